"""Pictures of the embedded pair: as through OpenAI's API, repeatable from their own texts, kept outside a mask."""

import base64
import io
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from starlette.testclient import TestClient

from sdxl_trt.runtime.images import SETTINGS, read_texts

SMALL = {"prompt": "a red star", "negative_prompt": "blur", "seed": 7, "steps": 3, "width": 64, "height": 64}
InfoOf = Callable[[Any], dict[str, Any]]


def _draw(client: TestClient, path: str = "txt2img", **fields: Any) -> Any:
    answer = client.post(f"/sdapi/v1/{path}", json={**SMALL, **fields})
    assert answer.status_code == 200, answer.text
    return answer


def _pixels(text: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def _as_base64(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_seed_gives_the_pixels_that_it_gives_through_openais_api(drawing: TestClient, info_of: InfoOf) -> None:
    """Three pictures of one request, each as it is alone: A1111's batch has a seed for each picture."""
    answer = _draw(drawing, batch_size=3, refiner_checkpoint="refiner", refiner_switch_at=0.7)
    assert info_of(answer)["all_seeds"] == [7, 8, 9]
    for seed, image in zip((7, 8, 9), answer.json()["images"], strict=True):
        body = {"prompt": "a red star", "negative_prompt": "blur", "seed": seed, "steps": 3, "size": "64x64",
                "compat": "comfyui", "sampler": "euler", "scheduler": "normal", "guidance_scale": 7.0,
                "handoff": 0.7}  # fmt: skip
        other = drawing.post("/v1/images/generations", json=body).json()
        assert np.array_equal(_pixels(image), _pixels(other["data"][0]["b64_json"]))


@pytest.mark.parametrize(
    "fields",
    [
        {"sampler_name": "DPM++ 2M", "refiner_checkpoint": "refiner", "refiner_switch_at": 0.5},
        {"negative_prompt": "", "scheduler": "Karras", "prompt": "a, b: (red:1.2) star\nof gold"},
        {"refiner_checkpoint": "refiner", "refiner_switch_at": 0.6, "steps": 5,
         "override_settings": {"refiner_switch_by_sample_steps": True}},
    ],
)  # fmt: skip
def test_a_picture_is_drawn_again_from_the_text_in_its_file(drawing: TestClient, fields: dict[str, Any]) -> None:
    first = _draw(drawing, **fields).json()["images"][0]
    told = drawing.post("/sdapi/v1/png-info", json={"image": f"data:image/png;base64,{first}"}).json()
    facts = told["parameters"]
    assert told["info"] == told["items"]["parameters"]
    body = {
        "prompt": facts["Prompt"], "negative_prompt": facts["Negative prompt"], "steps": facts["Steps"],
        "sampler_name": facts["Sampler"], "scheduler": facts["Schedule type"], "cfg_scale": facts["CFG scale"],
        "seed": facts["Seed"], "width": facts["Size-1"], "height": facts["Size-2"],
        "refiner_checkpoint": facts.get("Refiner"), "refiner_switch_at": facts.get("Refiner switch at"),
        "override_settings": {
            "sd_model_checkpoint": facts["Model hash"], "randn_source": facts["RNG"],
            "refiner_switch_by_sample_steps": facts.get("Refiner switch by sampling steps") == "True",
        },
    }  # fmt: skip
    again = drawing.post("/sdapi/v1/txt2img", json=body)
    assert again.status_code == 200, again.text
    assert again.json()["images"] == [first]


def test_the_record_in_a_file_says_where_the_refiner_came_in(drawing: TestClient, tmp_path: Any) -> None:
    steps = {}
    for at in (None, 0.3, 0.8, 1.0):
        image = _draw(drawing, steps=4, refiner_checkpoint="refiner", refiner_switch_at=at).json()["images"][0]
        record = json.loads(read_texts(base64.b64decode(image))[SETTINGS])
        steps[at] = record["handoff_step"]
    assert steps == {None: 0, 0.3: 1, 0.8: 3, 1.0: None}


@pytest.mark.parametrize(("kind", "named"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_pictures_are_files_of_the_format_that_is_asked_for(drawing: TestClient, kind: str, named: str) -> None:
    image = _draw(drawing, override_settings={"samples_format": kind}).json()["images"][0]
    assert Image.open(io.BytesIO(base64.b64decode(image))).format == named
    told = drawing.post("/sdapi/v1/png-info", json={"image": image}).json()
    assert told["info"].startswith("a red star\nNegative prompt: blur\nSteps: 3, Sampler: Euler, ")


def test_a_picture_is_changed_by_its_strength(drawing: TestClient, gradient: Image.Image) -> None:
    start, changes = _as_base64(gradient), []
    for strength in (0.0, 0.5, 1.0):
        answer = _draw(drawing, "img2img", steps=4, init_images=[start], denoising_strength=strength)
        made = _pixels(answer.json()["images"][0]).astype(int)
        changes.append(np.abs(made - np.asarray(gradient)).mean())
    assert changes == sorted(changes)
    assert answer.json()["parameters"]["init_images"] is None
    included = _draw(drawing, "img2img", init_images=[start], include_init_images=True)
    assert included.json()["parameters"]["init_images"] == [start]


@pytest.mark.parametrize("whole", [True, False])
def test_a_picture_is_kept_outside_a_mask(drawing: TestClient, gradient: Image.Image, *, whole: bool) -> None:
    wide = gradient.resize((96, 64))
    mask = Image.new("L", (96, 64))
    ImageDraw.Draw(mask).rectangle((0, 0, 31, 31), 255)
    fields = {"init_images": [_as_base64(wide)], "mask": _as_base64(mask), "mask_blur": 0,
              "inpaint_full_res": not whole, "width": 96 if whole else 64, "denoising_strength": 1.0}  # fmt: skip
    made = _pixels(_draw(drawing, "img2img", **fields).json()["images"][0])
    kept = np.ones((64, 96), np.bool_)
    kept[:32, :32] = False
    assert np.array_equal(made[kept], np.asarray(wide)[kept])
    assert not np.array_equal(made[~kept], np.asarray(wide)[~kept])


@pytest.mark.parametrize(
    ("fields", "status", "name"),
    [
        ({"init_images": []}, 404, "Init image"),
        ({"init_images": ["AAAA"]}, 400, "init_images"),
        ({"init_images": ["http://127.0.0.1/a.png"]}, 400, "init_images"),
        ({"init_images": ["", ""]}, 422, "init_images"),
        ({"resize_mode": 3}, 422, "resize_mode"),
        ({"mask": "AAAA"}, 400, "mask"),
        ({"mask": "AAAA", "inpainting_fill": 2}, 422, "inpainting_fill"),
        ({"mask": "AAAA", "latent_mask": "AAAA"}, 422, "latent_mask"),
        ({"initial_noise_multiplier": 1.5}, 422, "initial_noise_multiplier"),
        ({"denoising_strength": 1.5}, 422, "denoising_strength"),
    ],
)
def test_what_cannot_be_started_from_is_refused_by_name(
    drawing: TestClient, gradient: Image.Image, fields: dict[str, Any], status: int, name: str
) -> None:
    body = {**SMALL, "init_images": [_as_base64(gradient)], **fields}
    answer = drawing.post("/sdapi/v1/img2img", json=body)
    assert answer.status_code == status, answer.text
    assert name in answer.json()["detail"]


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"seed": 1, "seed": 2}', b'{"seed": NaN}', b"\xff", b'{"prompt":"\\ud800"}']
)
def test_a_damaged_body_is_refused(drawing: TestClient, body: bytes) -> None:
    for path in ("txt2img", "img2img", "options", "png-info"):
        answer = drawing.post(f"/sdapi/v1/{path}", content=body)
        assert answer.status_code == 400
        assert answer.json().keys() == {"error", "detail", "body", "errors"}


def test_an_interrupted_job_answers_with_what_is_estimated(drawing: TestClient, info_of: InfoOf) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(_draw, drawing, steps=500)
        while drawing.get("/sdapi/v1/progress?skip_current_image=1").json()["state"]["sampling_step"] < 2:
            pass
        shown = drawing.get("/sdapi/v1/progress").json()["current_image"]
        drawing.post("/sdapi/v1/interrupt")
        answer = running.result(60)
    assert _pixels(shown).shape == (64, 64, 3)
    assert len(answer.json()["images"]) == 1
    assert info_of(answer)["all_seeds"] == [7]
    assert "interrupted" in answer.headers["X-TRT-Warnings"]


OPENAI = {"negative_prompt": "blur", "seed": 7, "steps": 3, "size": "64x64", "compat": "comfyui", "sampler": "euler",
          "scheduler": "normal", "guidance_scale": 7.0, "handoff": None}  # fmt: skip


@pytest.fixture(scope="module")
def plain(drawing: TestClient) -> Any:
    return _pixels(_draw(drawing).json()["images"][0])


@pytest.mark.parametrize(
    ("prompt", "other"),
    [
        ("a Sketchy star", {"prompt": "a  embedding:sketchy  star"}),
        ("a (red [star]:1.2)", {"prompt": f"a (red :1.2)(star:{1.2 / 1.1})"}),
        ("a red star <lora:sticker:0.8>", {"prompt": "a red star ", "loras": [{"name": "sticker", "scale": 0.8}]}),
    ],
)
def test_what_a_prompt_names_is_what_openais_api_names(
    drawing: TestClient, plain: Any, info_of: InfoOf, prompt: str, other: dict[str, Any]
) -> None:
    answer = _draw(drawing, prompt=prompt)
    image = _pixels(answer.json()["images"][0])
    same = drawing.post("/v1/images/generations", json={**OPENAI, **other}).json()["data"][0]["b64_json"]
    assert np.array_equal(image, _pixels(same))
    assert not np.array_equal(image, plain)
    text = info_of(answer)["infotexts"][0]
    assert text.startswith(f"{prompt}\n")
    assert ('Lora hashes: "sticker' in text) == ("lora" in prompt)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "ink"])
def test_a_lora_is_found_in_the_servers_folder_alone(drawing: TestClient, name: str) -> None:
    answer = drawing.post("/sdapi/v1/txt2img", json={**SMALL, "prompt": f"a <lora:{name}:1>"})
    assert answer.status_code == 422
    assert name not in answer.text


def test_no_request_stays_in_memory_after_its_answer(
    drawing: TestClient, left_tickets: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdxl_trt.server.readers.once.MOST_FINISHED", 0)
    body = {"prompt": "a red star", "steps": 2, "size": "64x64"}
    for _number in range(3):
        _draw(drawing, steps=2)
        for more in ({}, {"stream": True, "partial_images": 1}):
            assert drawing.post("/v1/images/generations", json=body | more).status_code == 200
    # The worker may still look at the last one, and for a moment what sent an answer at another.
    end = time.monotonic() + 10
    while left_tickets() > 1 and time.monotonic() < end:
        pass
    assert left_tickets() <= 1
