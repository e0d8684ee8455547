"""Masks through the pipeline and the command: options, errors, records, graphs, the paste."""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from sdxl_trt.engines.bundle import Manifest
from sdxl_trt.engines.errors import SizeError, UsageError
from sdxl_trt.runtime import Pipeline, Request, open_bundle
from sdxl_trt.runtime.cli.generate import main as trt_generate
from sdxl_trt.runtime.pipeline import pipeline as pipeline_module
from sdxl_trt.runtime.pipeline.record import read_settings
from sdxl_trt.runtime.pipeline.run import start_job
from sdxl_trt.runtime.request.resolve import resolve_request
from sdxl_trt.runtime.vae import Moments

pytestmark = pytest.mark.slow
SIDE = 32
"""The pair's UNets take multiples of 16."""


@pytest.fixture(scope="module")
def opened(pairs: Callable[[str], Any]) -> Iterator[Pipeline]:
    with open_bundle(pairs("outline").bundle, residency="resident") as found:
        yield found


@pytest.fixture
def pixels(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)


@pytest.fixture
def mask() -> np.ndarray:
    found = np.zeros((SIDE, SIDE), np.uint8)
    found[12:20, 6:18] = 255
    return found


@pytest.fixture
def files(tmp_path: Path, pixels: np.ndarray, mask: np.ndarray) -> Path:
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def _request(start: Any, where: Any, **changes: Any) -> Request:
    return Request("a red fox", **{"image": start, "mask": where, "steps": 4, "seed": 1, "handoff": 0.5} | changes)


def _drawn(opened: Pipeline, request: Request) -> list[np.ndarray]:
    return [np.asarray(picture.image) for picture in opened.generate(request)]


def test_pixels_outside_the_blurred_mask_are_the_originals(
    opened: Pipeline, pixels: np.ndarray, mask: np.ndarray
) -> None:
    far = np.ones((SIDE, SIDE), bool)
    far[2:30, :28] = False
    for count, changes in (
        (2, {"mask_blur": 2, "tile": True}),
        (1, {"compat": "comfyui", "mask_blur": 2, "handoff": None}),
    ):
        for made in _drawn(opened, _request(pixels, mask, count=count, **changes)):
            np.testing.assert_array_equal(made[far], pixels[far])
            assert (made[mask > 0] != pixels[mask > 0]).mean() > 0.5
    for changes in ({"paste": False}, {"compat": "comfyui", "handoff": None}):
        (made,) = _drawn(opened, _request(pixels, mask, **changes))
        assert (made[far] != pixels[far]).any(), "nothing is pasted"
    (white,) = _drawn(opened, _request(pixels, np.ones_like(mask) * 255))
    assert (white != pixels).mean() > 0.9, "a white mask leaves nothing of the picture"


def test_an_outpainting_has_the_canvas_as_its_size(opened: Pipeline, pixels: np.ndarray) -> None:
    (made,) = _drawn(opened, _request(pixels, None, outpaint=(SIDE, 0, 0, SIDE), mask_blur=0))
    assert made.shape == (2 * SIDE, 2 * SIDE, 3)
    np.testing.assert_array_equal(made[:SIDE, SIDE:], pixels)
    (smaller,) = _drawn(opened, _request(pixels, None, outpaint=(10, 0, 0, 0), width=SIDE, height=SIDE))
    assert smaller.shape == pixels.shape, "a stated size scales the canvas"


LATENTS = np.zeros((1, 4, SIDE // 2, SIDE // 2), np.float32)
SPARSE = (np.mgrid[:SIDE, :SIDE] % 2 == 1).all(axis=0)
"""White only where diffusers takes no pixel for the latents."""
WRONG: list[tuple[dict[str, Any], type[UsageError], str]] = [
    ({"mask": np.zeros((SIDE, SIDE), bool)}, UsageError, "--mask: is black everywhere, so nothing would change; paint"),
    ({"mask": np.ones((SIDE, 16), bool)}, UsageError, "--mask: 16x32 pixels given, but the picture has 32x32; make"),
    (
        {"mask": SPARSE},
        UsageError,
        "has no white that is left at the latents' size, every 2 pixels, so nothing would change",
    ),
    ({"image": None}, UsageError, "--mask is about a picture; give that with --image or --refine"),
    ({"image": None, "mask": None, "outpaint": (1, 0, 0, 0)}, UsageError, "--outpaint is about a picture"),
    ({"mask": None, "mask_blur": 3}, UsageError, "--mask-blur is about a mask; give one with --mask"),
    ({"mask": None, "paste": False}, UsageError, "--no-paste is about a mask"),
    ({"paste": False, "mask_blur": 3}, UsageError, "--mask-blur softens the edge of the paste"),
    ({"mask_blur": -1}, UsageError, "--mask-blur -1: choose 0 to 1024"),
    ({"outpaint": (0, -8, 0, 0)}, UsageError, "--outpaint -8: choose 0 to 16384"),
    ({"outpaint": (0, 5, 17, 0)}, SizeError, "a picture of 49x37, but .* multiples of 16; try --outpaint 0,16,32,0"),
    ({"outpaint": (3, 0, 3, 3)}, SizeError, "try --outpaint 3,0,13,16$"),
    ({"image": LATENTS}, UsageError, "have no pixels to paste back; give --no-paste"),
    ({"image": LATENTS, "compat": "comfyui", "mask_blur": 1}, UsageError, "give --no-paste, or a picture with --image"),
    ({"image": LATENTS, "outpaint": (8, 0, 0, 0)}, UsageError, "latents have none"),
    ({"image": LATENTS[:, :, :8]}, UsageError, "32x32 pixels given, but the latents are those of 32x16"),
]


@pytest.mark.parametrize(("changes", "kind", "words"), WRONG, ids=[words for *_, words in WRONG])
def test_what_is_wrong_is_refused_before_anything_is_loaded(
    changes: dict[str, Any], kind: type[UsageError], words: str, opened: Pipeline, pixels: np.ndarray, mask: np.ndarray
) -> None:
    with pytest.raises(kind, match=words) as caught:
        opened.start(_request(pixels, mask, **changes))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


@pytest.fixture
def nine(opened: Pipeline) -> Manifest:
    """The manifest of a bundle whose base receives the mask."""
    unet = opened.manifest.components["unet"]
    wider = tuple(
        msgspec.structs.replace(spec, shape=(spec.shape[0], 9, *spec.shape[2:])) if spec.name == "sample" else spec
        for spec in unet.inputs
    )
    components = opened.manifest.components | {"unet": msgspec.structs.replace(unet, inputs=wider)}
    return msgspec.structs.replace(opened.manifest, components=components)


def test_a_model_of_nine_channels_needs_a_mask(nine: Manifest, pixels: np.ndarray, mask: np.ndarray) -> None:
    for request in (Request("a star"), _request(pixels, None)):
        with pytest.raises(UsageError, match=r"is an inpainting model, .*; give --image FILE --mask FILE"):
            resolve_request(request, nine)
    with pytest.raises(
        UsageError, match=r"--image: latents given, .* an inpainting model, .*; give the picture itself"
    ):
        resolve_request(_request(LATENTS, mask, paste=False), nine)
    assert resolve_request(_request(LATENTS, mask, paste=False, compat="comfyui", graph="{}"), nine).takes_mask
    assert resolve_request(_request(pixels, mask), nine).takes_mask
    assert resolve_request(_request(pixels, None, refine=True, handoff="auto", steps=5), nine).refiner_only


def test_the_noise_of_nine_channels_does_not_depend_on_what_follows(
    nine: Manifest, pixels: np.ndarray, mask: np.ndarray
) -> None:
    """Requests that share a base run continue its noise; what a refiner keeps is drawn after it."""
    requests = [_request(pixels, mask, strength=1.0, handoff=handoff, count=2) for handoff in (0.5, None)]
    refined, alone = (start_job(resolve_request(each, nine), each, nine) for each in requests)
    shape, latent = refined.latents.shape[1:], np.ones((1, *refined.latents.shape[1:]), np.float32)
    refined.begin_from(Moments(latent, 2 * latent), nine.base.vae)
    np.testing.assert_array_equal(refined.latents, alone.latents)
    np.testing.assert_array_equal(refined.noises["base"].draw(shape), alone.noises["base"].draw(shape))
    refined.keep_picture()
    drawn = 1 + 2 * alone.noises["base"].draw(shape)
    np.testing.assert_allclose(refined.clean, drawn * nine.base.vae.scaling_factor, rtol=1e-6)


def test_the_usual_strength_is_diffusers_for_masks(opened: Pipeline, pixels: np.ndarray, mask: np.ndarray) -> None:
    for changes, strength in (({}, 0.9999), ({"compat": "comfyui"}, 1.0), ({"mask": None}, 0.3)):
        assert opened.start(_request(pixels, mask, **{"steps": 5} | changes)).run.request.strength == strength


def test_comfyuis_masked_handoff_is_warned_of(
    opened: Pipeline, pixels: np.ndarray, mask: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    opened.start(_request(pixels, mask, compat="comfyui", handoff=None))
    assert not caplog.records
    opened.start(_request(pixels, mask, compat="comfyui"))
    assert "the refiner keeps what the base hands over outside the mask, with its noise" in caplog.text


@pytest.fixture
def generate(opened: Pipeline, files: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., np.ndarray]:
    """Return a function that runs the command, on engines that stay loaded, and gives the pixels that it wrote."""

    def run(*arguments: str, out: str = "out.png") -> np.ndarray:
        monkeypatch.setattr(pipeline_module, "open_bundle", lambda *_, **__: nullcontext(opened))
        assert trt_generate([*arguments, "-o", str(files / out)]) == 0
        return np.asarray(Image.open(files / out))

    return run


MASKED = ("a fox", "--steps", "4", "--seed", "3", "--handoff", "0.5")


def test_it_is_made_again_with_the_mask_that_its_picture_names(generate: Any, files: Path, fails: Any) -> None:
    paths = ("--image", str(files / "photo.png"), "--mask", str(files / "mask.png"))
    made = generate(*MASKED, *paths, "--mask-blur", "2", "--outpaint", "0,32,0,0")
    settings = read_settings(files / "out.png")
    assert (settings.mask, settings.mask_blur, settings.outpaint, settings.paste) == (
        "mask.png",
        2,
        (0, 32, 0, 0),
        None,
    )
    assert str(files) not in json.dumps(Image.open(files / "out.png").text)
    np.testing.assert_array_equal(generate("--from", str(files / "out.png"), out="again.png"), made)
    moved = (files / "mask.png").rename(files / "moved.png")
    line = fails(trt_generate, ["--from", str(files / "out.png")], 2)
    assert "was made with the mask 'mask.png', which is not beside it as it was; give it with --mask FILE" in line
    Image.new("L", (SIDE, SIDE), 255).save(files / "mask.png")
    assert "'mask.png', which is not beside it as it was" in fails(trt_generate, ["--from", str(files / "out.png")], 2)
    again = generate("--from", str(files / "out.png"), "--mask", str(moved), out="again.png")
    np.testing.assert_array_equal(again, made)


def test_a_graph_with_a_mask_draws_the_same_picture(generate: Any, files: Path) -> None:
    paths = ("--image", str(files / "photo.png"), "--mask", str(files / "mask.png"))
    made = generate(*MASKED[:-2], "--no-refiner", "--compat", "comfyui", *paths, "--strength", "0.7")
    graph = json.loads(Image.open(files / "out.png").text["prompt"])
    kinds = [node["class_type"] for node in graph.values()]
    assert kinds.count("SetLatentNoiseMask") == kinds.count("LoadImageMask") == 1
    np.testing.assert_array_equal(generate("--workflow", str(files / "out.png"), out="graph.png"), made)
    for more in (("--mask-blur", "3"), ("--outpaint", "32,0,0,0")):
        generate(*MASKED[:-2], "--no-refiner", "--compat", "comfyui", *paths, *more, out="none.png")
        assert "prompt" not in Image.open(files / "none.png").text, "no node expresses it"
    Image.fromarray(np.full((SIDE, SIDE, 3), (0, 255, 0), np.uint8)).save(files / "mask.png")
    generate(*MASKED[:-2], "--no-refiner", "--compat", "comfyui", *paths, out="none.png")
    assert "prompt" not in Image.open(files / "none.png").text, "no channel of a coloured mask is its luminance"


def test_a_sweep_with_a_mask(generate: Any, files: Path) -> None:
    paths = ("--image", str(files / "photo.png"), "--mask", str(files / "mask.png"))
    assert generate(*MASKED[:-2], *paths, "--sweep", "handoff=0.5,none", out="sheet.png").size
    assert read_settings(files / "sheet.png").mask == "mask.png"
