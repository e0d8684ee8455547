"""What is asked becomes a Request of the runtime, against the embedded bundle's sizes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdxl_trt.engines import SdxlTrtError
from sdxl_trt.engines.bundle import Bundle, Range, read_bundle
from sdxl_trt.engines.plans import PlanLimits
from sdxl_trt.mini import bundle_path
from sdxl_trt.runtime import Request
from sdxl_trt.runtime.request import SAMPLERS, resolve_request
from sdxl_trt.server import Options
from sdxl_trt.server.http import ApiError
from sdxl_trt.server.openai.body.asked import Asked, NamedLora, read_asked
from sdxl_trt.server.openai.body.sizes import Sizes, told
from sdxl_trt.server.openai.body.translation import Start, translate
from sdxl_trt.server.openai.faults import as_api_error
from sdxl_trt.server.openai.pictures import start_from

BUNDLE: Bundle = read_bundle(bundle_path())
OPTIONS = Options()


def _translated(asked: Asked, start: Start | None = None, limits: PlanLimits | None = None) -> tuple[Request, Any]:
    done = translate(asked, OPTIONS, BUNDLE.manifest, limits, lambda lora: f"/loras/{lora.name}", start)
    return done.request, done.warnings


def test_a_refiner_without_a_shallow_unet_is_left_out_of_the_cache() -> None:
    bare = msgspec.structs.replace(BUNDLE.manifest.refiner, shallow=None)  # type: ignore[type-var]
    half = msgspec.structs.replace(BUNDLE.manifest, refiner=bare)

    def translated(asked: Asked) -> Request:
        return translate(asked, OPTIONS, half, None, lambda lora: lora.name).request

    with pytest.raises(ApiError, match=r"refiner was exported without a shallow UNet; give refiner_cache 1") as caught:
        translated(Asked("p", cache=2))
    assert caught.value.param == "cache"
    for asked in (Asked("p", cache=2, refiner_cache=1), Asked("p", cache=2, handoff=None)):
        assert translated(asked).cache == 2


def _refusal(asked: Asked, start: Start | None = None, limits: PlanLimits | None = None) -> ApiError:
    with pytest.raises(ApiError) as caught:
        _translated(asked, start, limits)
    return caught.value


def _start(width: int = 64, height: int = 64, mask: str | None = None) -> Start:
    grey = None if mask is None else np.full((height, width), 255, np.uint8)
    return Start(np.zeros((height, width, 3), np.uint8), grey)


def test_settings_reach_the_request() -> None:
    asked = read_asked({
        "prompt": "a red fox", "n": 3, "size": "128x64", "negative_prompt": "blur", "steps": 9, "cfg_scale": 6,
        "seed": 7, "sampler": "heun", "scheduler": "trailing", "handoff": 0.5, "refiner_guidance_scale": 4,
        "aesthetic_score": 7, "negative_aesthetic_score": 1.5, "loras": ["a"],
        "cache": 2, "refiner_cache": 3,
    })  # fmt: skip
    request, warnings = _translated(asked)
    assert request == Request(
        "a red fox", negative="blur", count=3, height=64, width=128, steps=9, guidance=6.0, seed=7, sampler="heun",
        schedule="trailing", handoff=0.5, refiner_guidance=4.0, aesthetic_score=7.0, negative_aesthetic_score=1.5,
        loras=request.loras, cache=2, refiner_cache=3,
    )  # fmt: skip
    assert request.loras[0].path == "/loras/a"
    assert warnings == ()


def test_what_is_not_said_is_the_runtimes_default() -> None:
    request, _ = _translated(Asked("p"))
    usual = BUNDLE.manifest.base.sample_size * BUNDLE.manifest.base.vae.factor
    assert request == Request("p", count=1, height=usual, width=usual)
    assert _translated(replace(Asked("p"), handoff=None))[0].handoff is None


@pytest.mark.parametrize(("quality", "steps"), [("low", 15), ("auto", 30), ("standard", 30), ("hd", 45), ("max", 45)])
def test_quality_is_a_factor_of_the_usual_steps(quality: str, steps: int) -> None:
    assert _translated(Asked("p", quality=quality))[0].steps == steps
    assert _translated(Asked("p", quality=quality, steps=4))[0].steps == 4


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ("100x64", "128x64"),
        ("8x8", "64x64"),
        ("0x64", "64x64"),
        ("64x200000", "64x16384"),
        ("16384x16384", "4096x4096"),
    ],
)
def test_a_size_that_cannot_be_drawn_is_refused_with_the_nearest(size: str, nearest: str) -> None:
    error = _refusal(read_asked({"prompt": "p", "size": size}))
    assert (error.status, error.param) == (400, "size")
    assert error.message.endswith(f"the nearest size is {nearest}")
    assert _translated(read_asked({"prompt": "p", "size": nearest}))[0].height


def test_plans_narrow_the_sizes() -> None:
    limits = PlanLimits(height=Range(min=64, opt=64, max=128), width=Range(min=64, opt=128, max=250), pictures=2,
                        tokens=Range(min=77, opt=77, max=77))  # fmt: skip
    assert _refusal(Asked("p", size=(512, 512)), limits=limits).message.endswith("the nearest size is 192x128")
    request, _ = _translated(Asked("p"), limits=limits)
    assert (request.width, request.height) == (128, 64)


@settings(max_examples=50)
@given(st.integers(0, 999_999), st.integers(0, 999_999), st.sampled_from([1 << 24, 1 << 16, 640 * 640]))
def test_the_nearest_size_can_always_be_drawn(height: int, width: int, pixels: int) -> None:
    sizes = Sizes.of(BUNDLE.manifest, None, pixels, refined=True)
    for size in (sizes.nearest((height, width)), sizes.for_picture((height, width))):
        assert sizes.takes(size), told(size)


def test_a_picture_is_changed_by_0_6_unless_a_mask_says_where() -> None:
    assert _translated(Asked("p"), _start())[0].strength == 0.6
    assert _translated(Asked("p", strength=0.2), _start())[0].strength == 0.2
    masked, _ = _translated(Asked("p"), _start(mask="all"))
    assert masked.strength is None
    assert masked.mask is not None


@pytest.mark.parametrize(
    ("picture", "size", "drawn", "warned"),
    [
        ((64, 128), None, (64, 128), False),
        ((64, 128), (64, 64), (64, 64), True),
        ((70, 120), None, (64, 128), True),
        ((2000, 1000), None, (192, 64), True),
        ((8, 8), None, (64, 64), True),
    ],
)
def test_a_picture_of_another_size_is_named(
    picture: tuple[int, int], size: tuple[int, int] | None, drawn: tuple[int, int], warned: bool
) -> None:
    request, warnings = _translated(Asked("p", size=size), _start(*picture))
    assert (request.width, request.height) == drawn
    assert bool(warnings) == warned
    assert all(text.startswith("image: ") for text in warnings)


def test_a_batch_of_one_seed_is_named() -> None:
    assert len(_translated(Asked("p", n=2, compat="comfyui"))[1]) == 1
    assert _translated(Asked("p", n=1, compat="comfyui"))[1] == ()


def _transparent(size: tuple[int, int], where: tuple[int, int, int, int] | None) -> Image.Image:
    mask = Image.new("RGBA", size, (10, 20, 30, 255))
    if where is not None:
        mask.paste((0, 0, 0, 0), where)
    return mask


def test_a_mask_is_transparent_where_the_picture_changes() -> None:
    start = start_from(Image.new("RGB", (64, 32)), _transparent((64, 32), (0, 0, 16, 32)))
    assert start.mask is not None
    assert start.mask[:, :16].min() == 255
    assert start.mask[:, 16:].max() == 0
    half = start_from(_transparent((64, 32), (0, 0, 1, 1)), None)
    assert half.warnings == ("image: its transparency is not used",)
    assert start_from(_transparent((64, 32), None), None).warnings == ()


@pytest.mark.parametrize(
    "mask", [Image.new("RGB", (64, 64)), _transparent((64, 64), None), _transparent((32, 64), (0, 0, 9, 9))]
)
def test_a_mask_that_changes_nothing_is_refused(mask: Image.Image) -> None:
    with pytest.raises(ApiError, match="mask: ") as caught:
        start_from(Image.new("RGB", (64, 64)), mask)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_image", "mask")


def test_an_error_of_the_runtime_speaks_of_fields(tmp_path: Path) -> None:
    request = replace(Request("p", strength=0.1, steps=2), image=np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(SdxlTrtError) as caught:
        resolve_request(request, BUNDLE.manifest)
    error = as_api_error(caught.value, OPTIONS)
    assert (error.status, error.param, error.message.split()[0]) == (400, "strength", "strength")
    with pytest.raises(SdxlTrtError) as caught:
        resolve_request(Request("a <lora:none:1> fox", lora_dir=tmp_path), BUNDLE.manifest, None, BUNDLE)
    assert str(tmp_path) not in as_api_error(caught.value, Options(lora_dir=tmp_path)).message
    assert as_api_error(OSError("/etc/x"), OPTIONS).status == 500
    assert "/etc" not in as_api_error(OSError("/etc/x"), OPTIONS).message


@settings(max_examples=50)
@given(
    st.builds(
        Asked,
        prompt=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
        n=st.integers(1, 10),
        size=st.none() | st.tuples(st.integers(0, 300), st.integers(0, 300)),
        steps=st.none() | st.integers(1, 1000),
        guidance=st.none() | st.floats(0, 100),
        seed=st.none() | st.integers(0, 2**64 - 1),
        sampler=st.none() | st.sampled_from(SAMPLERS),
        schedule=st.none() | st.sampled_from(["trailing", "leading+karras", "simple", "normal", "x", ""]),
        handoff=st.sampled_from(["auto", None]) | st.floats(0, 1, exclude_min=True, exclude_max=True),
        strength=st.none() | st.floats(0, 1, exclude_min=True),
        compat=st.sampled_from(["diffusers", "comfyui"]),
        loras=st.just(()) | st.just((NamedLora("none"),)),
    ),
    st.none() | st.builds(_start, st.integers(1, 99), st.integers(1, 99), st.sampled_from([None, "all"])),
)
def test_whatever_is_asked_is_resolved_or_refused(asked: Asked, start: Start | None) -> None:
    try:
        request, _ = _translated(asked if start else replace(asked, strength=None), start)
        resolved = resolve_request(request, BUNDLE.manifest, None, BUNDLE)
    except (ApiError, SdxlTrtError) as exc:
        error = as_api_error(exc, OPTIONS)
        assert error.status == 400, error.message
        assert "--" not in error.message, error.message
    else:
        assert len(resolved.seeds) == asked.n


def test_a_score_that_no_expert_reads_is_named() -> None:
    asked = Asked("a", handoff=None, aesthetic_score=7.0)
    assert _translated(asked)[1] == ("aesthetic_score: only the refiner reads it",)
    assert _translated(replace(asked, handoff="auto"))[1] == ()
