"""Runs with ControlNets against diffusers' pipelines, on a random pair and random ControlNets, exported for this."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models.additions import save_controlnet

from sdxl_trt.engines.backends.ort.engine import OrtEngine
from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.export import Options, export_bundle
from sdxl_trt.runtime import Request, open_bundle
from sdxl_trt.runtime.controls.use import ControlUse
from sdxl_trt.runtime.images.inputs import as_input
from sdxl_trt.runtime.pipeline.pipeline import Pipeline

# diffusers and numpy 2 disagree on how a tensor becomes an array.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
HEIGHT, WIDTH, STEPS, SEED = 32, 48, 5, 7
TOLERANCE = 1e-3
PICTURES = [np.random.default_rng(seed).integers(0, 256, (40, 60, 3), np.uint8) for seed in (1, 2)]


@dataclass(frozen=True)
class Case:
    """One request, as both sides take it."""

    scale: float = 0.8
    start: float = 0.0
    end: float = 1.0
    guess: bool = False
    count: int = 1
    guidance: float = 5.0
    second: bool = False
    handoff: float | None = None
    steps: int = STEPS


CASES = {
    "a scale of 0.8": Case(),
    "guess mode": Case(guess=True),
    "guess mode without guidance": Case(guess=True, guidance=1.0),
    "from 0.3 to 0.7": Case(start=0.3, end=0.7, steps=10),
    "without guidance": Case(guidance=1.0),
    "two pictures of a batch": Case(count=2),
    "two ControlNets": Case(second=True, start=0.2),
    "a refiner after it": Case(handoff=0.6),
    "two ControlNets, a batch and a refiner": Case(second=True, count=2, handoff=0.6, end=0.5),
}


@dataclass(frozen=True)
class Pair:
    """The sources: the pair's folders, and those of the two ControlNets."""

    base: Path
    refiner: Path
    nets: tuple[Path, Path]


@pytest.fixture(scope="module")
def sources(pairs: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    pair, root = pairs("outline"), tmp_path_factory.mktemp("nets")
    folders = (root / "edges", root / "poses")
    for seed, folder in enumerate(folders):
        save_controlnet(folder, pair.base / "unet", seed)
    return Pair(pair.base, pair.refiner, folders)


@pytest.fixture(scope="module")
def bundle(sources: Pair, convert_once: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("controlled") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdxl_trt.export.exporter.convert_component", convert_once)
        export_bundle(sources.base, sources.refiner, out, Options(precision="fp32", controlnets=sources.nets))
    return out


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Iterator[Pipeline]:
    with open_bundle(bundle, provider="ort-cpu", residency="resident") as opened:
        yield opened


@pytest.fixture(scope="module")
def theirs(sources: Pair) -> Callable[[Case], Any]:
    """Return a function from a case to the latents of diffusers' pipelines."""
    from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline, StableDiffusionXLImg2ImgPipeline
    from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

    nets = [ControlNetModel.from_pretrained(folder) for folder in sources.nets]
    base = StableDiffusionXLControlNetPipeline.from_pretrained(sources.base, controlnet=nets[0], add_watermarker=False)
    refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(sources.refiner, add_watermarker=False)
    for pipe in (base, refiner):
        pipe.set_progress_bar_config(disable=True)

    def draw(case: Case) -> Any:
        base.register_modules(controlnet=MultiControlNetModel(nets) if case.second else nets[0])
        pictures = [Image.fromarray(pixels) for pixels in PICTURES]

        def both(value: float, other: float) -> Any:
            return [value, other] if case.second else value

        common: dict[str, Any] = {
            "num_inference_steps": case.steps, "guidance_scale": case.guidance, "output_type": "latent",
            "generator": [torch.Generator().manual_seed(SEED + i) for i in range(case.count)],
        }  # fmt: skip
        prompts = ["a red fox"] * case.count
        drawn = base(
            prompts, image=pictures if case.second else pictures[0], width=WIDTH, height=HEIGHT,
            controlnet_conditioning_scale=both(case.scale, 0.5), control_guidance_start=both(case.start, 0.0),
            control_guidance_end=both(case.end, 1.0), guess_mode=case.guess, denoising_end=case.handoff, **common,
        ).images  # fmt: skip
        if case.handoff is not None:
            drawn = refiner(prompts, image=drawn, denoising_start=case.handoff, **common).images
        return drawn.numpy()

    return draw


def _ours(pipeline: Pipeline, case: Case, *, without: bool = False) -> Any:
    uses = [ControlUse(as_input(PICTURES[0]), case.scale, case.start, case.end)]
    uses += [ControlUse(as_input(PICTURES[1]), 0.5)] if case.second else []
    request = Request(
        "a red fox", seed=SEED, steps=case.steps, width=WIDTH, height=HEIGHT, count=case.count, handoff=case.handoff,
        guidance=case.guidance, controls=() if without else tuple(uses), control_guess=case.guess and not without,
    )  # fmt: skip
    assert len(list(pipeline.generate(request))) == case.count
    assert pipeline.run is not None
    return pipeline.run.final


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_latents_are_those_of_diffusers(pipeline: Pipeline, theirs: Callable[[Case], Any], case: Case) -> None:
    expected = theirs(case)
    np.testing.assert_allclose(_ours(pipeline, case), expected, atol=TOLERANCE, rtol=0)
    assert np.abs(expected - _ours(pipeline, case, without=True)).max() > 100 * TOLERANCE, (
        "the ControlNet has no effect"
    )


def test_a_scale_of_zero_gives_the_latents_without_a_controlnet(pipeline: Pipeline) -> None:
    assert np.array_equal(_ours(pipeline, Case(scale=0.0)), _ours(pipeline, Case(), without=True))


@pytest.mark.parametrize("standard", [True, False], ids=["model.onnx", "cpu.onnx"])
def test_the_residuals_are_those_of_diffusers(bundle: Path, sources: Pair, standard: bool) -> None:
    """Both graphs of a ControlNet, added to an earlier one's residuals."""
    from diffusers import ControlNetModel

    generator = torch.Generator().manual_seed(0)
    inputs = {
        "sample": torch.randn(2, 4, 8, 12, generator=generator), "timestep": torch.full((2,), 501.0),
        "encoder_hidden_states": torch.randn(2, 77, 80, generator=generator),
        "text_embeds": torch.randn(2, 48, generator=generator), "time_ids": torch.rand(2, 6, generator=generator) * 64,
        "controlnet_cond": torch.rand(2, 3, 16, 24, generator=generator),
    }  # fmt: skip
    net = ControlNetModel.from_pretrained(sources.nets[0])
    with torch.inference_mode():
        down, middle = net(
            inputs["sample"], 501.0, inputs["encoder_hidden_states"], inputs["controlnet_cond"],
            conditioning_scale=0.7, return_dict=False,
            added_cond_kwargs={"text_embeds": inputs["text_embeds"], "time_ids": inputs["time_ids"]},
        )  # fmt: skip
    engine = OrtEngine(read_bundle(bundle), "controlnet", standard=standard)
    engine.load()
    given = {name: value.numpy() for name, value in inputs.items()} | {"scales": np.full((2, 7), 0.7, np.float32)}
    once = engine.infer_on_device(given)
    twice = engine.infer(given | {f"earlier_{name}": value for name, value in once.items()})
    expected = [*down, middle]
    for value, name in zip(expected, [*(f"down_residual.{i}" for i in range(6)), "mid_residual"], strict=True):
        np.testing.assert_allclose(twice[name], 2 * value.numpy(), atol=1e-5)


def test_the_manifest_names_the_controlnets(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["controlnets"] == [
        {"component": "controlnet", "name": "edges"}, {"component": "controlnet_2", "name": "poses"},
    ]  # fmt: skip
