"""trt-generate from a picture, and again from what its result says; what is wrong is said in one line."""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.bundle.phases import Workload, run_phases
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime import Pipeline, Request
from sdxl_trt.runtime.cli.generate import main as trt_generate
from sdxl_trt.runtime.cli.repeat import repeated
from sdxl_trt.runtime.images.files import save_image
from sdxl_trt.runtime.images.inputs import read_input
from sdxl_trt.runtime.images.metadata import describe
from sdxl_trt.runtime.pipeline import pipeline
from sdxl_trt.runtime.pipeline.record import read_settings

pytestmark = pytest.mark.slow


@pytest.fixture
def photo(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A picture whose sides are no multiples, so that it shows how it came to its size."""
    Image.fromarray(rng.integers(0, 256, (45, 70, 3), np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture(scope="module")
def opened(pairs: Callable[[str], Any]) -> Iterator[Pipeline]:
    with pipeline.open_bundle(pairs("outline").bundle, residency="resident") as found:
        yield found


@pytest.fixture
def generate(opened: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., np.ndarray]:
    """Return a function that runs the command, on engines that stay loaded, and gives the pixels that it wrote."""

    def run(*arguments: str, out: str = "out.png") -> np.ndarray:
        monkeypatch.setattr(pipeline, "open_bundle", lambda *_, **__: nullcontext(opened))
        assert trt_generate([*arguments, "-o", str(tmp_path / out)]) == 0
        return np.asarray(Image.open(tmp_path / out))

    return run


@pytest.mark.parametrize(
    "more",
    [("--image",), ("--compat", "comfyui", "--image"), ("--width", "32", "--image"), ("--refine",)],
    ids=["scaled", "cut", "covered", "refined"],
)
def test_it_is_made_again_from_its_own_picture(
    generate: Any, photo: Path, tmp_path: Path, more: tuple[str, ...], capsys: Any
) -> None:
    *settings, option = more
    made = generate("a fox", "--steps", "4", "--seed", "3", "--strength", "0.5", *settings, option, str(photo))
    np.testing.assert_array_equal(generate("--from", str(tmp_path / "out.png"), out="again.png"), made)
    settings = read_settings(tmp_path / "out.png")
    assert (settings.image, settings.strength, settings.refine) == ("photo.png", 0.5, option == "--refine")
    assert str(tmp_path) not in json.dumps(Image.open(tmp_path / "out.png").text)
    assert repeated(["--from", str(tmp_path / "out.png"), "--strength", "1"]).strength == 1.0
    moved = photo.rename(tmp_path / "elsewhere.png")
    capsys.readouterr()
    assert trt_generate(["--from", str(tmp_path / "out.png")]) == 2
    error = capsys.readouterr().err
    assert f"was made from 'photo.png', which is not beside it as it was; give it with {option} FILE" in error
    np.testing.assert_array_equal(generate("--from", str(tmp_path / "out.png"), option, str(moved)), made)


def test_another_picture_of_that_name_is_not_taken_for_it(generate: Any, photo: Path, tmp_path: Path) -> None:
    generate("a fox", "--steps", "2", "--image", str(photo), "--strength", "0.5")
    Image.new("RGB", (70, 45)).save(photo)
    with pytest.raises(UsageError, match="not beside it as it was"):
        repeated(["--from", str(tmp_path / "out.png")])


def test_one_of_several_latents_is_not_guessed(opened: Pipeline, tmp_path: Path) -> None:
    latents = np.random.default_rng(0).standard_normal((2, 4, 32, 32)).astype(np.float32)
    np.save(tmp_path / "two.npy", latents)
    pictures = opened.generate(Request("a fox", steps=2, image=read_input(tmp_path / "two.npy"), strength=0.5,
                                       count=2, width=64, height=64, handoff=None))  # fmt: skip
    for index, picture in enumerate(pictures):
        save_image(picture.image, tmp_path / f"{index}.png", describe(picture.metadata))
        with pytest.raises(UsageError, match=r"from one of 2 latents in 'two\.npy', and does not say from which"):
            repeated(["--from", str(tmp_path / f"{index}.png")])


@pytest.mark.parametrize("name", ["../photo.png", "sub/photo.png", "", "/etc/passwd", "photo.png\0"])
def test_no_name_leads_out_of_the_folder(opened: Pipeline, photo: Path, tmp_path: Path, name: str) -> None:
    (picture,) = opened.generate(Request("a fox", steps=2, image=read_input(photo), strength=0.5, handoff=None))
    (tmp_path / "sub" / "sub").mkdir(parents=True)
    save_image(picture.image, tmp_path / "sub" / "out.png", describe(picture.metadata | {"image": name}))
    for place in (tmp_path, tmp_path / "sub" / "sub"):
        (place / "photo.png").write_bytes(photo.read_bytes())
    with pytest.raises(UsageError, match="give it with --image FILE"):
        repeated(["--from", str(tmp_path / "sub" / "out.png")])


def test_a_sweep_of_strengths_is_a_sheet(generate: Any, photo: Path, tmp_path: Path) -> None:
    generate("a fox", "--steps", "4", "--image", str(photo), "--sweep", "strength=0.25,1", "--no-refiner")
    changed = [np.abs(np.asarray(Image.open(tmp_path / f"out-{k}.png")).astype(int)) for k in (0, 1)]
    assert (changed[0] != changed[1]).any()


def test_latents_that_were_kept_are_refined(generate: Any, tmp_path: Path) -> None:
    kept = str(tmp_path / "kept.npz")
    generate("a fox", "--steps", "4", "--seed", "1", "--no-refiner", "--width", "32", "--height", "32",
             "--save-latents", kept)  # fmt: skip
    refined = generate("a fox", "--steps", "4", "--seed", "1", "--refine", kept, "--strength", "0.5")
    assert refined.shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a fox", "--strength", "0.5"], "give it with --image or --refine"),
        (["a fox", "--image", "missing.png"], "check the path"),
        (["a fox", "--image", "PHOTO", "--strength", "nan"], "choose above 0"),
        (["a fox", "--image", "PHOTO", "--strength", "0"], "choose above 0"),
        (["a fox", "--refine", "PHOTO", "--no-refiner"], "leave --no-refiner out"),
        (["a fox", "--refine", "PHOTO", "--handoff", "0.5"], "leave --handoff out"),
        (["--workflow", "w.json", "--image", "PHOTO"], "--workflow states --image itself"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    pairs: Any, photo: Path, arguments: list[str], words: str, capsys: Any
) -> None:
    given = [str(photo) if each == "PHOTO" else each for each in arguments]
    assert trt_generate([*given, "--engines", str(pairs("outline").bundle)]) == 2
    assert words in capsys.readouterr().err


def test_image_and_refine_are_one_or_the_other(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        trt_generate(["a fox", "--image", "a.png", "--refine", "b.png"])
    assert "argument --refine: not allowed with argument --image" in capsys.readouterr().err


def test_a_bundle_without_an_encoder_says_so(pairs: Any, photo: Path, monkeypatch: Any, capsys: Any) -> None:
    bundle, replace = read_bundle(pairs("outline").bundle), msgspec.structs.replace
    stage = replace(bundle.manifest.base, vae=replace(bundle.manifest.base.vae, encoder=None))
    manifest = replace(bundle.manifest, base=stage, refiner=None)
    monkeypatch.setattr(pipeline, "read_bundle", lambda _: replace(bundle, manifest=manifest))
    assert trt_generate(["a fox", "--image", str(photo), "--engines", str(pairs("outline").bundle)]) == 2
    assert "the bundle has no VAE encoder" in capsys.readouterr().err
    assert "picture" not in run_phases(manifest, "ort-cpu", Workload(from_image=True))


def test_the_plan_counts_the_encoder(pairs: Any, capsys: Any) -> None:
    plans = []
    for more in ([], ["--image", "any.png"]):
        assert trt_generate(["--plan", "--json", "--engines", str(pairs("outline").bundle), *more]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    names = [[phase["name"] for phase in plan["phases"]] for plan in plans]
    assert names[1] == ["picture", *names[0]]
    assert [phase["components"] for phase in plans[1]["phases"][:1]] == [["vae_encoder"]]
    assert "vae_encoder" in [need["component"] for need in plans[1]["needs"]]
