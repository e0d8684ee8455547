"""What bodies ask for: every field used, refused by its name, or told to have no effect; and never an error of ours."""

import base64
import io
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from sdxl_trt.engines import SdxlTrtError
from sdxl_trt.engines.bundle import read_bundle
from sdxl_trt.mini import bundle_path
from sdxl_trt.runtime import Request
from sdxl_trt.runtime.request import resolve_request
from sdxl_trt.server import Options
from sdxl_trt.server.a1111.body import Models, Settings, read_asked
from sdxl_trt.server.a1111.faults import as_api_error
from sdxl_trt.server.a1111.translation import Translator
from sdxl_trt.server.http import ApiError

MANIFEST = read_bundle(bundle_path()).manifest
SMALL = {"prompt": "a red star", "negative_prompt": "blur", "seed": 7, "steps": 2, "width": 64, "height": 64}


@pytest.fixture
def ask(fake: Callable[..., Any]) -> Callable[..., Any]:
    """Send a body; return its answer and the Request that was drawn, None if there was none."""

    def send(path: str = "txt2img", options: Options | None = None, **fields: Any) -> tuple[Any, Request | None]:
        client, desk = fake(options)
        answer = client.post(f"/sdapi/v1/{path}", json={**SMALL, **fields})
        return answer, desk.orders[0].work if desk.orders else None

    return send


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"compat": "comfyui", "sampler": "euler", "schedule": "normal", "handoff": None, "guidance": 7.0,
              "negative": "blur", "base_sides": None, "count": 1, "width": 64, "seed": 7}),
        ({"cfg_scale": 4.5, "batch_size": 2, "n_iter": 3}, {"guidance": 4.5, "count": 6}),
        ({"seed": "12", "steps": "3", "cfg_scale": "2"}, {"seed": 12, "steps": 3, "guidance": 2.0}),
        ({"sampler_name": "DPM++ 2M", "sampler_index": "Euler"}, {"sampler": "dpmpp_2m", "schedule": "karras"}),
        ({"sampler_index": "Heun"}, {"sampler": "heun"}),
        ({"scheduler": "Beta"}, {"compat": "diffusers", "schedule": "linspace+beta", "negative": "blur"}),
        ({"scheduler": "Beta", "negative_prompt": ""}, {"negative": None}),
        ({"refiner_checkpoint": "refiner", "refiner_switch_at": 0.8, "steps": 30}, {"handoff_step": 24}),
        ({"refiner_checkpoint": "refiner", "refiner_switch_at": 0.8, "steps": 30, "scheduler": "karras"},
         {"handoff_step": 19}),
        ({"refiner_checkpoint": "refiner", "refiner_switch_at": 0.8, "steps": 30, "scheduler": "karras",
          "override_settings": {"refiner_switch_by_sample_steps": True}}, {"handoff_step": 24}),
        ({"refiner_checkpoint": "None", "refiner_switch_at": 0.8}, {"handoff": None, "handoff_step": None}),
        ({"refiner_checkpoint": "refiner"}, {"base_end_step": 0, "refiner_start_step": 0, "refiner_add_noise": True}),
        ({"refiner_checkpoint": "refiner", "refiner_switch_at": 1}, {"handoff": None, "handoff_step": None}),
        ({"override_settings": {"sdxl_refiner_high_aesthetic_score": 8, "sdxl_refiner_low_aesthetic_score": 1,
                                "sdxl_crop_top": 16, "sdxl_crop_left": 32}},
         {"aesthetic_score": 8.0, "negative_aesthetic_score": 1.0, "crop": (16, 32)}),
    ],
)  # fmt: skip
def test_fields_are_used(ask: Callable[..., Any], fields: dict[str, Any], expected: dict[str, Any]) -> None:
    answer, request = ask(**fields)
    assert answer.status_code == 200, answer.text
    assert {name: getattr(request, name) for name in expected} == expected


def test_an_empty_negative_prompt_is_zeros_for_both_experts(ask: Callable[..., Any]) -> None:
    _, request = ask(negative_prompt="")
    for sides in (request.base_sides, request.refiner_sides):
        assert (sides[0].text, sides[0].zeroed) == ("a red star", False)
        assert (sides[1].text, sides[1].zeroed) == ("", True)


@pytest.mark.parametrize(
    ("fields", "status", "name"),
    [
        ({"enable_hr": True}, 422, "enable_hr"),
        ({"restore_faces": True}, 422, "restore_faces"),
        ({"tiling": True}, 422, "tiling"),
        ({"subseed_strength": 0.5}, 422, "subseed_strength"),
        ({"seed_resize_from_w": 512}, 422, "seed_resize_from_w"),
        ({"s_churn": 1}, 422, "s_churn"),
        ({"s_noise": 0.5}, 422, "s_noise"),
        ({"s_min_uncond": 2}, 422, "s_min_uncond"),
        ({"eta": 0.5, "sampler_name": "Euler a"}, 422, "eta"),
        ({"script_name": "x/y/z plot"}, 422, "script_name"),
        ({"alwayson_scripts": {"ADetailer": {"args": [True]}}}, 422, "alwayson_scripts"),
        ({"alwayson_scripts": {"controlnet": {"args": [{"image": "AAAA", "module": "canny"}]}}}, 422, "module"),
        ({"alwayson_scripts": {"controlnet": {"args": [{"image": "AAAA", "control_mode": 1}]}}}, 422, "control_mode"),
        ({"alwayson_scripts": {"controlnet": {"args": [{"image": "AAAA", "model": "canny"}]}}}, 422, "model"),
        ({"alwayson_scripts": {"controlnet": {"args": [{}]}}}, 422, "image"),
        ({"refiner_checkpoint": "sd_xl_refiner_1.0"}, 404, "refiner_checkpoint"),
        ({"override_settings": {"sd_model_checkpoint": "v1-5"}}, 404, "override_settings.sd_model_checkpoint"),
        ({"override_settings": {"sd_vae": "other.vae"}}, 422, "override_settings.sd_vae"),
        ({"override_settings": {"samples_format": "gif"}}, 422, "override_settings.samples_format"),
        ({"override_settings": []}, 422, "override_settings"),
        ({"sampler_name": "DPM adaptive"}, 404, "Sampler not found"),
        ({"steps": 0}, 422, "steps"),
        ({"steps": 2.5}, 422, "steps"),
        ({"steps": True}, 422, "steps"),
        ({"width": 100}, 422, "width 100: the UNets in use take multiples of 32; try 96 or 128"),
        ({"width": 64, "height": 96, "refiner_checkpoint": "refiner", "refiner_switch_at": 0.5}, 422, "height"),
        ({"width": 8192, "height": 8192}, 422, "width"),
        ({"seed": -7}, 422, "seed"),
        ({"seed": "a fox"}, 422, "seed"),
        ({"seed": 2**64 - 1, "n_iter": 2}, 422, "seed"),
        ({"cfg_scale": 1e9}, 422, "cfg_scale"),
        ({"prompt": ["a"]}, 422, "prompt"),
        ({"prompt": "a [b:c:0.5]"}, 422, "prompt"),
        ({"prompt": "<lora:ink:1>"}, 422, "prompt"),
        ({"n_iter": 1000, "batch_size": 1000}, 422, "1000000 pictures"),
    ],
)
def test_what_would_change_a_picture_is_refused_by_name(
    drawing: TestClient, fields: dict[str, Any], status: int, name: str
) -> None:
    answer = drawing.post("/sdapi/v1/txt2img", json={**SMALL, **fields})
    assert answer.status_code == status, answer.text
    assert name in answer.json()["detail"]
    assert answer.json().keys() == {"error", "detail", "body", "errors"}


@pytest.mark.parametrize(
    ("fields", "warned"),
    [
        ({"seed": -1}, ""),
        ({}, "randn_source CPU"),
        ({"sampler_name": "Euler a"}, "sampler_name: Euler a"),
        ({"sampler_name": "DDIM", "eta": 1.0}, "eta: has no effect"),
        ({"styles": ["photo"]}, "styles"),
        ({"infotext": "Steps: 2"}, "infotext"),
        ({"prompt": "a (fox:1.3)"}, "prompt: weights count as in ComfyUI"),
        ({"prompt": "a (fox:1.3)", "scheduler": "beta"}, "prompt: with the scheduler Beta weights"),
        ({"refiner_switch_at": 0.8}, "refiner_switch_at: has no effect"),
        ({"refiner_checkpoint": "refiner"}, "refiner_switch_at: without it"),
        ({"refiner_checkpoint": "refiner", "refiner_switch_at": 1}, "none of the steps"),
        ({"refiner_checkpoint": "refiner", "refiner_switch_at": 0.5, "sampler_name": "Heun"}, "asks twice"),
        ({"refiner_checkpoint": "refiner", "refiner_switch_at": 0.5, "sampler_name": "LMS"}, "starts anew"),
        ({"override_settings": {"randn_source": "NV"}}, "randn_source has no effect"),
        ({"override_settings": {"eta_noise_seed_delta": 31337}}, "eta_noise_seed_delta"),
        ({"override_settings": {"some_extension": 1}}, "1 options"),
        ({"fancy": 1}, "1 fields"),
    ],
)
def test_what_has_another_effect_than_in_a1111_is_warned_of(
    ask: Callable[..., Any], fields: dict[str, Any], warned: str
) -> None:
    answer, _ = ask(**fields)
    assert answer.status_code == 200, answer.text
    assert warned in answer.headers.get("X-TRT-Warnings", "")
    assert warned or "X-TRT-Warnings" not in answer.headers


def test_what_changes_nothing_is_taken_in_silence(ask: Callable[..., Any]) -> None:
    """The constants that webuiapi and SillyTavern always send."""
    fields = {"subseed": -1, "subseed_strength": 0.0, "seed_resize_from_w": 0, "eta": 1.0, "s_churn": 0, "s_tmax": 0,
              "s_noise": 1, "enable_hr": False, "hr_upscaler": "Latent", "styles": [], "script_name": None,
              "restore_faces": False, "override_settings": {"CLIP_stop_at_last_layers": 2, "sd_vae": "Automatic"},
              "url": "http://user:secret@host", "auth": "user:secret", "save_images": True, "seed": -1,
              "alwayson_scripts": {"controlnet": {"args": [{"enabled": False}, False]}}}  # fmt: skip
    answer, _ = ask(**fields)
    assert answer.status_code == 200, answer.text
    assert "X-TRT-Warnings" not in answer.headers
    assert "secret" not in answer.text


def test_sizes_are_rounded_down_if_the_server_is_told_to(ask: Callable[..., Any]) -> None:
    answer, request = ask(options=Options(round_sizes=True), width=100, height=127)
    assert (request.width, request.height) == (96, 96)
    assert "96x96" in answer.headers["X-TRT-Warnings"]


def test_without_a_seed_one_is_drawn(ask: Callable[..., Any], info_of: Callable[[Any], dict[str, Any]]) -> None:
    seeds = set()
    for seed in (-1, None, "", "-1"):
        answer, request = ask(seed=seed)
        assert info_of(answer)["seed"] == request.seed < 4294967294
        seeds.add(request.seed)
    assert len(seeds) == 4


def _picture() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


FIELDS = [*SMALL, "sampler_name", "scheduler", "refiner_checkpoint", "refiner_switch_at", "override_settings", "eta",
          "alwayson_scripts", "batch_size", "n_iter", "cfg_scale", "init_images", "mask", "resize_mode", "mask_blur",
          "denoising_strength", "inpainting_fill", "send_images", "force_task_id", "styles", "enable_hr", "s_churn",
          "inpaint_full_res", "inpaint_full_res_padding", "script_name", "seed_resize_from_w"]  # fmt: skip
KNOWN = ["Euler a", "DPM++ 2M Karras", "DDIM", "karras", "Beta", "refiner", "None", "controlnet", "args", "image",
         "(a:1.2) [b] \\(", "[a:b:0.5]", "<lora:x:1>", "data:image/png;base64,AAAA", _picture(), "\ud800"]  # fmt: skip
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.sampled_from([2**63, 2**64, 1e308, 0.5, 0.999])
    | st.text(max_size=8)
)
VALUES = st.recursive(
    PLAIN | st.sampled_from(KNOWN),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*FIELDS, *KNOWN, "sd_vae"]) | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), VALUES, max_size=8), st.booleans())
def test_any_body_is_read_or_refused(body: dict[str, Any], img2img: bool) -> None:

    options = Options(max_pixels=1 << 14)
    try:
        asked = read_asked({**SMALL, **body}, Models.of(MANIFEST), Settings(), img2img=img2img)
        resolve_request(Translator(MANIFEST, None, options).translate(asked).request, MANIFEST)
    except (ApiError, SdxlTrtError) as exc:
        status = as_api_error(exc, options).status
    else:
        status = 200
    assert status < 500
