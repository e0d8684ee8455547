"""The webuiapi package, a client of AUTOMATIC1111's API."""

import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
import webuiapi
from PIL import Image, ImageDraw

SMALL: dict[str, Any] = {"prompt": "a red star", "negative_prompt": "blur", "seed": 7, "steps": 2, "width": 64,
                         "height": 64}  # fmt: skip


@pytest.fixture
def api(server: str, mounted: Callable[[str], None]) -> webuiapi.WebUIApi:
    mounted("/sdapi/v1/samplers")
    return webuiapi.WebUIApi(host="127.0.0.1", port=urlsplit(server).port)


def test_txt2img_draws_the_same_picture_for_a_seed(api: webuiapi.WebUIApi) -> None:
    first, again = (api.txt2img(**SMALL) for _ in range(2))
    assert first.image.size == (64, 64)
    assert first.image.tobytes() == again.image.tobytes()
    assert first.info["all_seeds"] == [7]
    assert "Seed: 7" in first.info["infotexts"][0]
    assert first.image.info["parameters"] == first.info["infotexts"][0]
    assert first.parameters["prompt"] == "a red star"


def test_pictures_of_a_batch_are_those_of_their_seeds(api: webuiapi.WebUIApi) -> None:
    batch = api.txt2img(**SMALL, batch_size=2, n_iter=2)
    assert batch.info["all_seeds"] == [7, 8, 9, 10]
    alone = api.txt2img(**{**SMALL, "seed": 9})
    assert batch.images[2].tobytes() == alone.image.tobytes()


def test_every_sampler_and_scheduler_of_the_menus_draws(api: webuiapi.WebUIApi) -> None:
    drawn = {name: api.txt2img(**SMALL, sampler_name=name).image.tobytes() for name in api.util_get_sampler_names()}
    drawn |= {name: api.txt2img(**SMALL, scheduler=name).image.tobytes() for name in api.util_get_scheduler_names()}
    assert drawn["Euler"] != drawn["Heun"]
    assert drawn["exponential"] == drawn["polyexponential"]


def test_img2img_starts_from_a_picture(api: webuiapi.WebUIApi) -> None:
    picture = Image.new("RGB", (64, 64), (200, 40, 40))
    result = api.img2img(images=[picture], **{**SMALL, "steps": 4}, denoising_strength=0.5)
    assert result.image.size == (64, 64)
    assert result.image.tobytes() != picture.tobytes()


@pytest.mark.parametrize("whole", [True, False])
def test_img2img_keeps_what_a_mask_does_not_show(api: webuiapi.WebUIApi, whole: bool) -> None:
    picture, mask = Image.new("RGB", (96, 64), (200, 40, 40)), Image.new("L", (96, 64))
    ImageDraw.Draw(mask).rectangle((0, 0, 31, 31), 255)
    made = api.img2img(images=[picture], mask_image=mask, mask_blur=0, inpaint_full_res=not whole,
                       **{**SMALL, "steps": 4, "width": 96 if whole else 64}).image  # fmt: skip
    assert made.size == (96, 64)
    assert made.crop((40, 0, 96, 64)).tobytes() == picture.crop((40, 0, 96, 64)).tobytes()
    assert made.crop((0, 0, 32, 32)).tobytes() != picture.crop((0, 0, 32, 32)).tobytes()


def test_the_refiner_takes_over_where_it_is_asked_to(api: webuiapi.WebUIApi) -> None:
    """The package has no argument for it: users send the field themselves."""
    refiner = api.get_sd_models()[1]["title"]
    alone = api.txt2img(**SMALL).image
    body = {**SMALL, "refiner_checkpoint": refiner, "refiner_switch_at": 0.5}
    refined = api.custom_post("txt2img", payload=body, baseurl=True)
    assert refined.image.tobytes() != alone.tobytes()
    assert "Refiner switch at: 0.5" in refined.info["infotexts"][0]


def test_a_picture_in_work_is_seen_and_interrupted(api: webuiapi.WebUIApi) -> None:
    done: list[Any] = []
    drawing = threading.Thread(target=lambda: done.append(api.txt2img(**{**SMALL, "steps": 1000})))
    drawing.start()
    while not (told := api.get_progress())["current_image"]:
        pass
    assert 0 < told["progress"] < 1
    assert told["state"]["sampling_steps"] == 1000
    api.interrupt()
    drawing.join(60)
    assert done[0].image.size == (64, 64)
    api.util_wait_for_ready()


def test_its_menus_and_its_options_can_be_read(api: webuiapi.WebUIApi) -> None:
    assert "Euler a" in api.util_get_sampler_names()
    assert "karras" in api.util_get_scheduler_names()
    assert api.util_get_current_model() in api.util_get_model_names()
    assert api.get_progress()["state"]["job_count"] == 0
    assert api.get_upscalers()[0]["name"] == "None"
    lists = (api.get_sd_vae, api.get_latent_upscale_modes, api.get_loras, api.get_hypernetworks, api.get_face_restorers,
             api.get_realesrgan_models, api.get_prompt_styles)  # fmt: skip
    assert [get() for get in lists] == [[]] * len(lists)
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert api.get_memory().keys() == {"ram", "cuda"}
    assert api.get_cmd_flags() == {}
    api.util_set_model(api.util_get_current_model())
    api.util_wait_for_ready()


def test_the_texts_of_a_picture_are_read(api: webuiapi.WebUIApi) -> None:
    drawn = api.txt2img(**SMALL)
    assert api.png_info(drawn.image).info == drawn.info["infotexts"][0]
    assert api.png_info(Image.new("RGB", (8, 8))).info == ""


@pytest.mark.parametrize(
    ("fields", "status", "named"),
    [
        ({"enable_hr": True}, 422, "enable_hr"),
        ({"sampler_name": "DPM adaptive"}, 404, "Sampler not found"),
        ({"width": 100}, 422, "width"),
        ({"script_name": "x/y/z plot"}, 422, "script_name"),
        ({"controlnet_units": [webuiapi.ControlNetUnit(image=Image.new("RGB", (64, 64)), model="canny")],
          "alwayson_scripts": {}}, 422, "alwayson_scripts.controlnet.model"),
        # The package adds scripts to the dictionary that it is given, which is its own default otherwise.
        ({"adetailer": [webuiapi.ADetailer(ad_model="face.pt")], "alwayson_scripts": {}}, 422, "alwayson_scripts"),
        ({"prompt": "a <lora:ink:1>"}, 422, "prompt"),
    ],
)  # fmt: skip
def test_what_is_not_here_is_an_error_that_names_it(
    api: webuiapi.WebUIApi, fields: dict[str, Any], status: int, named: str
) -> None:
    with pytest.raises(RuntimeError) as caught:
        api.txt2img(**{**SMALL, **fields})
    assert caught.value.args[0] == status
    assert named in caught.value.args[1]
