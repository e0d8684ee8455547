"""Every pair of features, drawn through the command's own code, against the reference that the table names.

A pair's reference is found by the table's own words, so a new pair needs a check of that name here. Where both features
change the picture, the pair must also differ from each of them alone.
"""

import functools
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from independent.step_caching import extrapolate
from PIL import Image
from small_models import additions
from small_models.eight_bit import make_eight_bit
from small_models.log_lines import Lines

from sdxl_trt.engines.errors import IncompatibleError, SourceError, UsageError
from sdxl_trt.export import Options, export_bundle
from sdxl_trt.export.exporter import plan_export
from sdxl_trt.runtime import Shared, open_bundle, share_key
from sdxl_trt.runtime.cli import generate
from sdxl_trt.runtime.cli.options import make_parser
from sdxl_trt.runtime.pairs import PAIRS, SHARED
from sdxl_trt.runtime.pipeline.pipeline import Pipeline

# diffusers and numpy 2 disagree on how a tensor becomes an array.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
WIDTH, HEIGHT, STEPS, SEED = 48, 32, 4, 5
CACHED_STEPS = 10
"""Enough for steps that are not full, in base and refiner."""
PROMPT, WORDS = "a red fox in the snow", "a blue star in the snow"
NEAR, OURS, SEEN = 1e-3, 1e-4, 1e-2
"""Latents: how far from diffusers, how far from another way here, and the least that a feature changes."""
ROUNDED = 0.2
"""How far latents, up to 10 here, may be with a few layers in 8 bits from those in floats."""
SCALES = (0.7, 0.5)
IN_8_BITS = ", 8 bits"
VARIANTS = {"four": (), "four, fused": ("fused LoRA",), "nine": ("nine channels",)}
VARIANTS["nine, fused"] = (*VARIANTS["nine"], *VARIANTS["four, fused"])
VARIANTS |= {f"{name}{IN_8_BITS}": (*own, "8 bits") for name, own in VARIANTS.items()}
"""The bundles, and the features that each has; those with four channels have a ControlNet."""
PICTURED = {"mask", "nine channels", "refine"}
SEVERAL = {"batch", "sweep"}
CHANGING = {"fused LoRA", "LoRA", "mask", "nine channels", "ControlNet", "embedding", "refine", "step cache"}
OPTIONS: Mapping[str, list[str]] = {
    SHARED: [],
    "fused LoRA": [],
    "LoRA": ["--lora", "ink.safetensors:0.7:0.5"],
    "mask": ["--mask", "mask.png"],
    "nine channels": ["--mask", "mask.png"],
    "ControlNet": ["--control", "edges.png:0.8"],
    "embedding": ["--embedding-dir", "embeddings"],
    "tile": ["--tile"],
    "tiny decoder": ["--vae", "tiny"],
    "refine": [],
    "sweep": ["--sweep", "guidance=2,6"],
    "batch": ["-n", "2"],
    "workflow": ["--compat", "comfyui"],
    "8 bits": [],
    "step cache": ["--cache", "2", "--steps", str(CACHED_STEPS)],
}
"""What each feature adds to a command, beside what `command` arranges for pictures and prompts."""


@dataclass(frozen=True)
class Drawn:
    """The runs of a command, one after the other: latents (c, h, w) and pixels of every picture, and their graph."""

    latents: list[np.ndarray]
    pixels: list[np.ndarray]
    graph: Any

    def check(self, other: "Drawn", tolerance: float = OURS) -> None:
        assert len(self.latents) == len(other.latents)
        for mine, its in zip(self.latents, other.latents, strict=True):
            np.testing.assert_allclose(mine, its, rtol=0, atol=tolerance)


def command(features: set[str], *further: str) -> list[str]:
    """Return the arguments that ask for `features`."""
    argv = [PROMPT.replace("red fox", "embedding:ink") if "embedding" in features else PROMPT]
    argv += ["--steps", str(STEPS), "--seed", str(SEED), "--provider", "ort-cpu"]
    argv += ["--refine" if "refine" in features else "--image", "photo.png"] if features & PICTURED else [
        "--width", str(WIDTH), "--height", str(HEIGHT)]  # fmt: skip
    argv += [] if "refine" in features or "--no-refiner" in further else ["--handoff", "0.5"]
    argv += ["--strength", "0.6"] if "refine" in features and "mask" not in features else []
    options = [OPTIONS[each] for each in sorted(features)]
    if {"mask", "nine channels"} <= features or {"nine channels", "refine"} <= features:
        options.remove(OPTIONS["mask"])  # the inpainting model's own mask, or the refiner, which needs none
    return [*argv, *(option for each in options for option in each), *further]


@dataclass(frozen=True)
class Laboratory:
    """The bundles, opened when they are needed, and a folder of files, which is the current one."""

    opened: Callable[[str], Pipeline]
    base: Path
    nine: Path
    refiner: Path
    net: Path

    def pipeline(self, features: set[str]) -> Pipeline:
        wanted = features & {"fused LoRA", "nine channels", "8 bits"}
        return self.opened(next(name for name, own in VARIANTS.items() if set(own) == wanted))

    def run(self, pipeline: Pipeline, argv: list[str]) -> Drawn:
        """Draw what a command asks for on a bundle that is open."""
        arguments = make_parser().parse_args(argv)
        asked = generate._request(arguments) if arguments.workflow is None else generate._workflow(arguments)
        batch, _ = generate._work(asked, arguments, pipeline)
        pictures: dict[tuple[int, int], Any] = {}
        for number, step in batch.steps():
            if step.picture is not None:
                pictures[number, step.pictures.start] = step.picture
        ordered = [pictures[place] for place in sorted(pictures)]
        pixels = [np.asarray(each.image).astype(int) for each in ordered]
        return Drawn([each for run in batch.runs for each in run.final], pixels, ordered[0].graph)

    def draw(self, features: set[str], *further: str) -> Drawn:
        return self.run(self.pipeline(features), command(features, *further))

    def read_back(self, features: set[str], graph: Any, *further: str) -> Drawn:
        """Draw a picture's graph again, with what is given beside a workflow."""
        Path("graph.json").write_text(json.dumps(graph))
        beside = ["--lora-dir", ".", "--embedding-dir", "embeddings", *further]
        return self.run(self.pipeline(features), ["--workflow", "graph.json", *beside])


@pytest.fixture(scope="module")
def laboratory(
    pairs: Callable[[str], Any], convert_once: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Laboratory]:
    pair, root = pairs("outline"), tmp_path_factory.mktemp("pairs")
    files = root / "files"
    (files / "embeddings").mkdir(parents=True)
    additions.save_pictures(files, WIDTH, HEIGHT)
    additions.save_embedding(files / "embeddings" / "ink.safetensors", pair.base)
    net = additions.save_controlnet(root / "edges", pair.base / "unet")
    additions.save_tiny_vae(root / "tiny", pair.base / "vae")
    nine = additions.save_nine_channels(pair.base, root / "nine channels")
    opened: dict[str, Pipeline] = {}

    @functools.cache
    def bundle(name: str) -> Path:
        """Export a variant; the LoRA is made for the tables of the plain one."""
        if name.endswith(IN_8_BITS):
            make_eight_bit(bundle(name.removesuffix(IN_8_BITS)), root / name)
            return root / name
        options = {
            "controlnets": () if name.startswith("nine") else (net,),
            "loras": ((files / "ink.safetensors", *SCALES),) if "fused" in name else (),
        }
        folder = nine if name.startswith("nine") else pair.base
        export_bundle(folder, pair.refiner, root / name, Options(precision="fp32", tiny_vae=root / "tiny", **options))
        if name == "four":
            for number, lora in enumerate(("ink", "pen")):
                additions.save_lora(files / f"{lora}.safetensors", root / name, number)
            additions.save_lora(files / "fine.safetensors", root / name, 2, refiner=True)
        return root / name

    def get(name: str) -> Pipeline:
        if name not in opened:
            bundle("four")
            opened[name] = open_bundle(bundle(name), provider="ort-cpu", residency="resident")
        return opened[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdxl_trt.export.exporter.convert_component", convert_once)
        # The pictures of these tests are smaller than the usual tile.
        patch.setattr("sdxl_trt.runtime.vae.tile_sizes.TILE", 16)
        patch.chdir(files)
        yield Laboratory(get, pair.base, nine, pair.refiner, net)
    for pipeline in opened.values():
        pipeline.pool.close()


def _as_lora(lab: Laboratory, pair: set[str]) -> None:
    """Either LoRA is the other: the bundle's, and the request's."""
    rest = pair - {"fused LoRA", "LoRA"}
    lab.draw(rest | {"LoRA"}).check(lab.draw(rest | {"fused LoRA"}))


def _both_loras(lab: Laboratory, _: set[str]) -> None:
    fused = lab.draw({"fused LoRA"}, "--lora", "pen.safetensors:-0.4")
    fused.check(lab.draw({"LoRA"}, "--lora", "pen.safetensors:-0.4"))
    assert _apart(fused, lab.draw({"fused LoRA"})) > SEEN
    with pytest.raises(UsageError, match=r"fused into this bundle at 0\.7.* already; leave it out"):
        lab.draw({"fused LoRA", "LoRA"})


def _lora_of_a_refiner(lab: Laboratory, pair: set[str]) -> None:
    said = Lines()
    logging.getLogger("sdxl_trt.runtime").addHandler(said)
    lab.draw(pair).check(lab.draw({"refine"}), 0.0)
    logging.getLogger("sdxl_trt.runtime").removeHandler(said)
    assert "the base does not run, so its LoRAs have no effect" in said.text
    own = lab.draw({"refine"}, "--refiner-lora", "fine.safetensors:0.7")
    expected = _diffusers(lab, {"refine"}, refiner_lora=True)
    np.testing.assert_allclose(own.latents[0], expected, rtol=0, atol=NEAR)
    assert _apart(own, lab.draw({"refine"})) > SEEN


def _as_floats(lab: Laboratory, pair: set[str]) -> None:
    drawn, floats = lab.draw(pair), lab.draw(pair - {"8 bits"})
    drawn.check(floats, ROUNDED)
    assert _apart(drawn, floats) > OURS, "nothing was rounded"


def _same_refiner(lab: Laboratory, pair: set[str]) -> None:
    lab.draw(pair).check(lab.draw(pair - {"fused LoRA", "nine channels"}), 0.0)


def _as_words(lab: Laboratory, pair: set[str]) -> None:
    """In ComfyUI's way, which pools at the end token: the vectors of words are the words."""
    words = [WORDS, *command(pair - {"embedding"}, "--compat", "comfyui")[1:]]
    lab.draw(pair, "--compat", "comfyui").check(lab.run(lab.pipeline(pair), words))


def _as_whole(lab: Laboratory, pair: set[str]) -> None:
    rest = pair - {"tile"}
    if rest == {"workflow"}:
        graph = lab.draw(rest).graph
        tiled, whole = lab.read_back(set(), graph, "--tile"), lab.read_back(set(), graph)
    else:
        tiled, whole = lab.draw(pair), lab.draw(rest)
    # A picture to start from is encoded in tiles too.
    tiled.check(whole, 1.0 if rest & PICTURED else 0.0)
    (mine,), (its,) = tiled.pixels, whole.pixels
    assert 0 < np.abs(mine - its).mean() < 30


def _as_full(lab: Laboratory, pair: set[str]) -> None:
    """The latents are the same, those of a picture to start from too: only decoding is another."""
    rest = pair - {"tiny decoder", "tile"}
    tiny, full = lab.draw(pair), lab.draw(rest)
    tiny.check(full, 0.0)
    (mine,), (its,) = tiny.pixels, full.pixels
    assert np.abs(mine - its).mean() > 1
    if "tile" in pair:
        (untiled,) = lab.draw(pair - {"tile"}).pixels
        assert 0 < np.abs(mine - untiled).mean() < 30


def _as_cells(lab: Laboratory, pair: set[str]) -> None:
    rest, cells = pair - {"sweep"}, []
    if rest == {"workflow"}:
        graph = lab.draw(rest).graph
        sheet = lab.read_back(set(), graph, *OPTIONS["sweep"])
        (base,) = (node["inputs"] for node in graph.values() if node["inputs"].get("add_noise") == "enable")
        for value in (2.0, 6.0):  # a workflow's refiner has a scale of its own
            base["cfg"] = value
            cells += lab.read_back(set(), graph).latents
    else:
        sheet = lab.draw(pair)
        for value in ("2", "6"):
            cells += lab.draw(rest, "--guidance", value).latents
    sheet.check(Drawn(cells, [], None))
    assert np.abs(cells[0] - cells[1]).max() > SEEN


def _as_single(lab: Laboratory, pair: set[str]) -> None:
    both, single = lab.draw(pair), []
    for number in range(2):
        single += lab.draw(pair - {"batch"}, "--seed", str(SEED + number)).latents
    both.check(Drawn(single, [], None))
    assert np.abs(single[0] - single[1]).max() > SEEN


def _as_graph(lab: Laboratory, pair: set[str]) -> None:
    alone = ["--no-refiner"] if "mask" in pair else []  # its graph warns of the handoff
    drawn = lab.draw(pair, *alone)
    assert drawn.graph is not None
    again = lab.read_back(pair & {"fused LoRA", "8 bits"}, drawn.graph)
    again.check(drawn)
    for mine, its in zip(again.pixels, drawn.pixels, strict=True):
        assert np.abs(mine - its).max() <= 1


def _as_comfyui(lab: Laboratory, pair: set[str]) -> None:
    """An inpainting model's own nodes, or a cache, for which no graph is written."""
    if "step cache" in pair:
        drawn = lab.draw(pair)
        assert drawn.graph is None
        graph = lab.draw({"workflow"}, "--steps", str(CACHED_STEPS)).graph
        lab.read_back(set(), graph, "--cache", "2").check(drawn)
        return
    drawn = lab.draw(pair, "--no-refiner")
    assert drawn.graph is None
    graph = lab.draw({"workflow"}, "--no-refiner").graph
    (sampler,) = (node["inputs"] for node in graph.values() if node["class_type"] == "KSamplerAdvanced")
    (vae,) = (node["inputs"]["vae"] for node in graph.values() if node["class_type"] == "VAEDecode")
    sides = {name: sampler[name] for name in ("positive", "negative")}
    graph |= {
        "photo": {"class_type": "LoadImage", "inputs": {"image": "photo.png"}},
        "mask": {"class_type": "LoadImageMask", "inputs": {"image": "mask.png", "channel": "red"}},
        "shown": {"class_type": "InpaintModelConditioning",
                  "inputs": {**sides, "vae": vae, "pixels": ["photo", 0], "mask": ["mask", 0], "noise_mask": True}},
    }  # fmt: skip
    sampler |= {"positive": ["shown", 0], "negative": ["shown", 1], "latent_image": ["shown", 2]}
    lab.read_back(pair, graph).check(drawn)


def _as_each_alone(lab: Laboratory, pair: set[str]) -> None:
    """Two jobs with the feature, one of them with another seed, scale and prompt, take their steps together."""
    rest = pair - {SHARED}
    pipeline, alone = lab.pipeline(rest), ["--no-refiner"] if "mask" in rest else []
    both = [command(rest, *alone), [WORDS, *command(rest, *alone, "--seed", "9", "--guidance", "3")[1:]]]
    both = both[:1] * 2 if rest == {"embedding"} else both
    jobs, expected = [], []
    for argv in both:
        expected += lab.run(pipeline, argv).latents
        arguments = make_parser().parse_args(argv)
        jobs += generate._work(generate._request(arguments), arguments, pipeline)[0]._jobs
    list(pipeline.pictures(jobs))
    list(pipeline.encode(jobs))
    for stage in ("base", "refiner"):
        keys = [share_key(job.run.request, stage) for job in jobs]
        together = [jobs] if len({*keys}) == 1 and keys[0] is not None else [[job] for job in jobs]
        assert (len(together) > 1) == ("step cache" in rest or ("ControlNet" in rest and stage == "base"))
        for each in together:
            shared = Shared(pipeline, stage, each)
            list(shared.steps())
            assert not shared.failed
    Drawn([latents for job in jobs for latents in job.final()], [], None).check(Drawn(expected, [], None))


def _diffusers(lab: Laboratory, features: set[str], *, refiner_lora: bool = False) -> np.ndarray:
    """Return the latents of diffusers' pipelines with `features`, on the same weights and files."""
    import diffusers
    import torch
    from safetensors.torch import load_file

    refine, masked = "refine" in features, bool(features & {"mask", "nine channels"})
    kind = {(False, False): "", (True, False): "Img2Img", (True, True): "Inpaint", (False, True): "Inpaint"}
    name = f"StableDiffusionXL{'ControlNet' * ('ControlNet' in features)}{kind[refine, masked]}Pipeline"
    folder = lab.refiner if refine else lab.nine if "nine channels" in features else lab.base
    extra: dict[str, Any] = {"requires_aesthetics_score": refine} if masked and "ControlNet" not in features else {}
    call: dict[str, Any] = {"image": Image.open("photo.png").convert("RGB")}
    call |= {"mask_image": Image.open("mask.png"), "strength": 0.9999} if masked else {"strength": 0.6}
    if "ControlNet" in features:
        extra["controlnet"] = diffusers.ControlNetModel.from_pretrained(lab.net)
        edges = Image.open("edges.png").convert("RGB")
        # From text, `image` is what the ControlNet follows.
        call = call | {"control_image": edges} if masked else {"image": edges}
        call["controlnet_conditioning_scale"] = 0.8
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = getattr(diffusers, name).from_pretrained(folder, torch_dtype=torch.float32, **extra)
        pipe.set_progress_bar_config(disable=True)
        if "step cache" in features:
            extrapolate(pipe, every=2, first=2 if refine else 4)
        if refiner_lora or "LoRA" in features:
            unet, text = (0.7, 0.7) if refiner_lora else SCALES
            file = "fine.safetensors" if refiner_lora else "ink.safetensors"
            pipe.load_lora_weights(".", weight_name=file, adapter_name="one")
            weights = {"unet": unet} | ({} if refiner_lora else {"text_encoder": text, "text_encoder_2": text})
            pipe.set_adapters(["one"], adapter_weights=[weights])
        if "embedding" in features:
            tensors = load_file("embeddings/ink.safetensors")
            for key, part in (("clip_l", ""), ("clip_g", "_2")):
                encoder, tokenizer = getattr(pipe, f"text_encoder{part}"), getattr(pipe, f"tokenizer{part}")
                pipe.load_textual_inversion(tensors[key], token="embedding:ink", text_encoder=encoder,
                                            tokenizer=tokenizer)  # fmt: skip
        generator = [torch.Generator().manual_seed(SEED)]
        steps = CACHED_STEPS if "step cache" in features else STEPS
        latents = pipe(command(features)[0], num_inference_steps=steps, guidance_scale=5.0, generator=generator,
                       height=HEIGHT, width=WIDTH, output_type="latent", **call).images  # fmt: skip
    return np.asarray(latents[0])


def _as_diffusers(lab: Laboratory, pair: set[str]) -> None:
    further = [] if "refine" in pair else ["--no-refiner"]
    drawn = lab.draw(pair, *further)
    near = OURS if "step cache" in pair else NEAR  # a cache changes little in small random UNets
    np.testing.assert_allclose(drawn.latents[0], _diffusers(lab, pair), rtol=0, atol=near)


CHECKS: Mapping[str, Callable[[Laboratory, set[str]], None]] = {
    **{outcome.equal_to: _as_each_alone for pair, outcome in PAIRS.items() if SHARED in pair},
    "the LoRA given with the request": _as_lora,
    "a bundle with the LoRA fused": _as_lora,
    "both LoRAs given with the request": _both_loras,
    "the refiner of a bundle without the LoRA": _same_refiner,
    "the refiner of a bundle with four channels": _same_refiner,
    "the run without the LoRA, with a warning": _lora_of_a_refiner,
    "the words whose vectors the embedding holds": _as_words,
    "the run without tiles, before decoding": _as_whole,
    "the run with the full decoder, before decoding": _as_full,
    "the run with the full decoder and without tiles, before decoding": _as_full,
    "the run in floats, but for the rounding to 8 bits": _as_floats,
    "the run in floats with the LoRA fused, but for the rounding to 8 bits": _as_floats,
    "each cell alone": _as_cells,
    "each picture alone": _as_single,
    "the request whose picture carries the graph": _as_graph,
    "the request with --compat comfyui": _as_comfyui,
    "diffusers' StableDiffusionXLInpaintPipeline": _as_diffusers,
    "diffusers' StableDiffusionXLInpaintPipeline of the refiner": _as_diffusers,
    "diffusers' StableDiffusionXLControlNetInpaintPipeline": _as_diffusers,
    "diffusers' pipeline, the deep features of its UNet extrapolated in some steps": _as_diffusers,
}


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_a_pair_is_its_reference_or_refused(pair: tuple[str, str], laboratory: Laboratory) -> None:
    both, outcome = set(pair), PAIRS[pair]
    if outcome.refused:
        with pytest.raises((UsageError, SourceError, IncompatibleError)) as raised:
            _refused(laboratory, both)
        assert outcome.refused in str(raised.value)
        return
    CHECKS[outcome.equal_to](laboratory, both)
    if both <= CHANGING | {"8 bits"} and "refine" not in both and both != {"fused LoRA", "LoRA"}:
        drawn, steps = laboratory.draw(both), ["--steps", str(CACHED_STEPS)] if "step cache" in both else []
        # An inpainting model cannot do without its mask.
        for feature in both - ({"nine channels", "mask", "8 bits"} if "nine channels" in both else {"8 bits"}):
            least = OURS if feature == "step cache" else SEEN
            assert _apart(drawn, laboratory.draw(both - {feature}, *steps)) > least, f"{feature}: no effect"


def test_a_mask_a_controlnet_an_embedding_and_a_lora_at_once_are_diffusers_run(laboratory: Laboratory) -> None:
    four = {"mask", "ControlNet", "embedding", "LoRA"}
    drawn, expected = laboratory.draw(four, "--no-refiner"), _diffusers(laboratory, four)
    np.testing.assert_allclose(drawn.latents[0], expected, rtol=0, atol=NEAR)
    for feature in four:
        assert _apart(drawn, laboratory.draw(four - {feature}, "--no-refiner")) > SEEN, f"{feature}: no effect"


def _refused(lab: Laboratory, pair: set[str]) -> None:
    if pair == {"nine channels", "ControlNet"}:
        plan_export(lab.nine, None, Path("never"), Options(precision="fp32", controlnets=(lab.net,)))
    if pair == {"ControlNet", "8 bits"}:
        quantized: dict[str, Any] = {"precision": "int8", "controlnets": (lab.net,)}
        plan_export(lab.base, None, Path("never"), Options(**quantized))
    lab.draw(pair)


def _apart(one: Drawn, other: Drawn) -> float:
    return max(float(np.abs(mine - its).max()) for mine, its in zip(one.latents, other.latents, strict=True))
