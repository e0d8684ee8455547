"""ControlNets, steps and LoRAs in a bundle, translated without drawing."""

import base64
import io
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from sdxl_trt.engines.bundle import ControlNet, LoraRecord, read_bundle
from sdxl_trt.mini import bundle_path
from sdxl_trt.runtime.diffusion import comfyui_span
from sdxl_trt.runtime.diffusion.schedules import make_comfyui_schedule
from sdxl_trt.server import Options
from sdxl_trt.server.a1111.body import Models, Settings, read_asked
from sdxl_trt.server.a1111.translation import Translated, Translator
from sdxl_trt.server.http import ApiError

MANIFEST = read_bundle(bundle_path()).manifest
FUSED = LoraRecord(name="ink.safetensors", sha256="0" * 64, scale=0.8)
BUNDLE = msgspec.structs.replace(
    MANIFEST, controlnets=(ControlNet(component="controlnet", name="edges"),), loras=(FUSED,)
)
SMALL = {"prompt": "a red star", "negative_prompt": "blur", "seed": 7, "steps": 10, "width": 64, "height": 64}


def _picture() -> str:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((80, 64)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _translated(img2img: bool = False, **fields: Any) -> Translated:
    asked = read_asked({**SMALL, **fields}, Models.of(BUNDLE), Settings(), img2img=img2img)
    return Translator(BUNDLE, None, Options()).translate(asked)


def _unit(**fields: Any) -> dict[str, Any]:
    return {
        "alwayson_scripts": {"ControlNet": {"args": [{"image": _picture(), "model": "edges [0123abcd]", **fields}]}}
    }


def test_a_unit_of_controlnet_is_used() -> None:
    (use,) = _translated(
        **_unit(weight=0.7, module="none", pixel_perfect=True, resize_mode="Just Resize")
    ).request.controls
    assert (use.net, use.scale, use.start, use.end, use.side) == ("edges", 0.7, 0.0, 1.0, "both")
    pixels = use.picture.pixels  # type: ignore[union-attr]
    expected = Image.linear_gradient("L").resize((80, 64)).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(pixels, np.asarray(expected))


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.0, 0.5), (0.25, 0.75), (0.3, 0.3), (0.5, 1.0), (0.95, 0.9)])
def test_a_controlnet_works_in_the_steps_that_a1111_counts(start: float, end: float) -> None:
    """Step i of n if start <= i / n <= end; ComfyUI, whose way is followed, counts training timesteps."""
    controls = _translated(**_unit(guidance_start=start, guidance_end=end), scheduler="Karras").request.controls
    grid = make_comfyui_schedule(BUNDLE.base.scheduler, 10, "euler", "karras")
    expected = [i for i in range(10) if start <= i / 10 <= end]
    found = []
    for use in controls:
        above, up_to = comfyui_span(grid, use.start, use.end)
        found = [i for i, sigma in enumerate(grid.sigmas[:-1]) if above < sigma <= up_to]
    assert found == expected


def test_a_controlnet_without_a_step_is_left_out_with_a_warning() -> None:
    made = _translated(**_unit(guidance_start=0.95, guidance_end=0.9))
    assert made.request.controls == ()
    assert any("no step" in each for each in made.warnings)


@pytest.mark.parametrize(
    "fields",
    [
        {**_unit(), "scheduler": "beta"},
        {**_unit(), "refiner_checkpoint": "refiner"},
        _unit(model="poses"),
        _unit(control_mode="My prompt is more important"),
        _unit(image={"image": _picture(), "mask": _picture()}),
    ],
)
def test_what_controlnet_cannot_do_here_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        _translated(**fields)
    assert caught.value.status == 422


def test_a_lora_that_is_fused_at_the_weight_is_taken_out_of_the_prompt() -> None:
    made = _translated(prompt="a star<lora:ink:0.8>")
    assert (made.request.prompt, made.request.loras) == ("a star", ())
    assert any("fused" in each for each in made.warnings)
    with pytest.raises(ApiError):
        _translated(prompt="a star<lora:ink:0.7>")


@pytest.mark.parametrize(
    ("steps", "strength", "begin"),
    [(20, 0.75, 4), (20, 0.5, 9), (20, 1.0, 0), (20, 0.0, 19), (30, 0.33, 20), (1, 0.5, 0)],
)
def test_a_picture_takes_the_steps_that_a1111_gives_it(steps: int, strength: float, begin: int) -> None:
    """setup_img2img_steps: int(min(strength, 0.999) * steps) + 1 of them."""
    made = _translated(img2img=True, init_images=[_picture()], steps=steps, denoising_strength=strength)
    assert (made.request.base_start_step, made.steps) == (begin, steps - begin)
    assert made.request.strength == (None if begin else 1.0)


def test_a_mask_goes_with_the_base_alone() -> None:
    white = Image.new("L", (80, 64), 255)
    buffer = io.BytesIO()
    white.save(buffer, "PNG")
    fields = {"img2img": True, "init_images": [_picture()], "mask": base64.b64encode(buffer.getvalue()).decode()}
    made = _translated(**fields)
    assert (made.request.paste, made.request.mask is not None) == (False, True)
    for more in ({"refiner_checkpoint": "refiner", "refiner_switch_at": 0.5}, {"scheduler": "Beta"}):
        with pytest.raises(ApiError):
            _translated(**fields, **more)


def test_the_number_of_pictures_is_limited() -> None:
    asked = read_asked({**SMALL, "n_iter": 3}, Models.of(BUNDLE), Settings())
    options = replace(Options(), queue_pictures=2)
    with pytest.raises(ApiError, match="3 pictures"):
        Translator(BUNDLE, None, options).translate(asked)
