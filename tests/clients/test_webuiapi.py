"""The webuiapi package, a client of AUTOMATIC1111's API."""

from collections.abc import Callable
from urllib.parse import urlsplit

import pytest
import webuiapi
from PIL import Image


@pytest.fixture
def api(server: str, mounted: Callable[[str], None]) -> webuiapi.WebUIApi:
    mounted("/sdapi/v1/samplers")
    return webuiapi.WebUIApi(host="127.0.0.1", port=urlsplit(server).port)


def test_txt2img_draws_the_same_picture_for_a_seed(api: webuiapi.WebUIApi) -> None:
    body = {"prompt": "a red star", "negative_prompt": "blur", "seed": 7, "steps": 2, "width": 64, "height": 64}
    first, again = (api.txt2img(**body) for _ in range(2))
    assert first.image.size == (64, 64)
    assert first.image.tobytes() == again.image.tobytes()
    assert first.info["all_seeds"] == [7]
    assert "Seed: 7" in first.info["infotexts"][0]


def test_img2img_starts_from_a_picture(api: webuiapi.WebUIApi) -> None:
    picture = Image.new("RGB", (64, 64), (200, 40, 40))
    result = api.img2img(images=[picture], prompt="a blue star", seed=7, steps=4, width=64, height=64,
                         denoising_strength=0.5)  # fmt: skip
    assert result.image.size == (64, 64)
    assert result.image.tobytes() != picture.tobytes()


def test_its_menus_and_its_progress_can_be_read(api: webuiapi.WebUIApi) -> None:
    assert "Euler a" in api.util_get_sampler_names()
    assert "karras" in [name.lower() for name in api.util_get_scheduler_names()]
    assert api.util_get_current_model() in {model["title"] for model in api.get_sd_models()}
    assert api.get_progress()["state"]["job_count"] == 0
    api.interrupt()
