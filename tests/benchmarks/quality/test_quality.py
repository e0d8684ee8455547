"""Correct engines pass against diffusers; faulty ones fail at the first stage that the fault affects."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from sdxl_trt.benchmarks.measure.subjects import Subject
from sdxl_trt.benchmarks.quality import quality
from sdxl_trt.benchmarks.quality.limits import STAGES
from sdxl_trt.benchmarks.quality.quality import GIVEN, measure_quality, verdict
from sdxl_trt.benchmarks.quality.rows import precisions_of
from sdxl_trt.benchmarks.quality.traces import Trace, TraceCase
from sdxl_trt.benchmarks.report.markdown import markdown_report
from sdxl_trt.benchmarks.report.records import BenchReport, BenchSettings, Quality
from sdxl_trt.engines.bundle.bundle import read_bundle, write_manifest
from sdxl_trt.engines.bundle.manifest import LoraRecord
from sdxl_trt.engines.errors import CorruptError, UsageError
from sdxl_trt.engines.host.files import sha256_file
from sdxl_trt.mini.scenes.scenes import EVALUATION_SEEDS, render, sample_scene, training_pairs
from sdxl_trt.runtime import open_bundle

SETTINGS = BenchSettings(
    bundle="", model="", width=32, height=32, batch=1, steps=4, handoff=0.5, guidance=5.0, seed=3, tokens=77, runs=1,
    warmups=0, threads=1, prompt="a red fox in the snow",
)  # fmt: skip
Tensors = dict[str, Any]


def _subject(pair: Any, bundle: Path, cache: Path, **changes: Any) -> Subject:
    named = {"base": str(pair.base), "refiner": str(pair.refiner), "name": "outline", "model": "outline"}
    return Subject(bundle=read_bundle(bundle), cache=cache, **(named | changes))


@pytest.fixture(scope="module")
def traced() -> Callable[..., list[Trace]]:
    """Return PyTorch's run, cached for all tests with the same arguments."""
    known: dict[tuple[Any, ...], list[Trace]] = {}
    run = quality.trace_diffusers

    def trace(base: str, refiner: str | None, cases: Sequence[TraceCase], settings: BenchSettings) -> list[Trace]:
        key = (base, refiner, settings, *(case.noise.tobytes() for case in cases))
        if key not in known:
            known[key] = run(base, refiner, cases, settings)
        return known[key]

    return trace


@pytest.fixture
def measure(
    pairs: Any, traced: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Quality, ...]]:
    """Return a function that measures the bundle, or a copy altered by `change`."""
    monkeypatch.setattr(quality, "trace_diffusers", traced)
    pair = pairs("outline")

    def run(change: Callable[[Path], None] | None = None, settings: BenchSettings = SETTINGS) -> tuple[Quality, ...]:
        bundle = pair.bundle
        if change is not None:
            monkeypatch.setattr(quality, "check_same_model", lambda _: None)  # takes seconds, and has its own tests
            bundle = Path(shutil.copytree(bundle, tmp_path / "wrong"))
            change(bundle)
        return measure_quality(_subject(pair, bundle, tmp_path / "cache"), settings, ())

    return run


def _tensors(bundle: Path, component: str) -> Tensors:
    """Return the weights of a component as writable views of its file."""
    found = {}
    for stored in onnx.load(bundle / component / "model.onnx", load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in stored.external_data}
        if "offset" in place:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(stored.data_type)
            where = bundle / component / place["location"]
            found[stored.name] = np.memmap(where, dtype, "r+", int(place["offset"]), tuple(stored.dims))
    return found


def _plant(component: str, change: Callable[[Tensors], None]) -> Callable[[Path], None]:
    """Return a fault: change weights in their file and update their digest in the manifest."""

    def plant(bundle: Path) -> None:
        tensors = _tensors(bundle, component)
        change(tensors)
        for array in tensors.values():
            array.flush()
        manifest = read_bundle(bundle).manifest
        part = manifest.components[component]
        weights = msgspec.structs.replace(part.weights, sha256=sha256_file(bundle / part.weights.file))
        assert weights != part.weights, "nothing was changed"
        sharing = {name: one for name, one in manifest.components.items() if one.weights == part.weights}
        parts = manifest.components | {
            name: msgspec.structs.replace(one, weights=weights) for name, one in sharing.items()
        }
        write_manifest(bundle, msgspec.structs.replace(manifest, components=parts))

    return plant


def _scaled(component: str, name: str) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        tensors[name][...] *= tensors[name].dtype.type(1.05)

    return _plant(component, change)


def _swapped_blocks(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("mid_block.resnets.0.")]:
        other = tensors[name.replace("resnets.0", "resnets.1")]
        kept = np.array(tensors[name])
        tensors[name][...], other[...] = np.array(other), kept


def _shifted_bias(tensors: Tensors) -> None:
    tensors["decoder.conv_out.bias"][...] += 0.05


def _of_the_base(bundle: Path) -> None:
    """Overwrite the refiner's weights with the base's, if name and shape are the same."""

    def change(tensors: Tensors) -> None:
        for name, array in _tensors(bundle, "unet").items():
            if name in tensors and tensors[name].shape == array.shape:
                tensors[name][...] = array

    _plant("refiner_unet", change)(bundle)


@pytest.mark.slow
def test_correct_engines_pass_at_every_stage(measure: Any) -> None:
    rows = measure()
    assert [row.stage for row in rows] == [*STAGES, "pixels"]
    assert {row.variant for row in rows[:4]} == {f"{GIVEN} (fp32)"}
    assert rows[4].variant == f"{GIVEN} (fp32), tiles of 16x16"
    assert all(row.passed and row.pictures == 1 for row in rows)
    assert [row.ssim is not None for row in rows] == [False, False, False, True, True]
    assert rows[3].ssim > 0.9999
    assert verdict(rows) == ""
    assert json.loads(msgspec.json.encode(rows))[0]["psnr"] > 120


FAULTS = {
    "an encoder's tensor": (
        _scaled("text_encoder_2", "text_model.encoder.layers.1.mlp.fc2.weight"), "embeddings", "the text encoders",
    ),
    "the base's tensor": (
        _scaled("unet", "mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"), "handoff latents",
        "the base's UNet",
    ),
    "the base's blocks": (_plant("unet", _swapped_blocks), "handoff latents", "the base's UNet"),
    "the base for the refiner": (_of_the_base, "final latents", "the refiner's UNet"),
    "a bias of the VAE": (_plant("vae_decoder", _shifted_bias), "pixels", "the VAE's decoder"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_engine_fails_at_the_stage_it_affects(fault: str, measure: Any) -> None:
    plant, stage, culprit = FAULTS[fault]
    rows = measure(plant)
    assert next(row.stage for row in rows if not row.passed) == stage
    assert [row.passed for row in rows[: STAGES.index(stage)]] == [True] * STAGES.index(stage)
    said = verdict(rows)
    assert said.startswith(f"quality: {stage} are ")
    assert f": {culprit} does not match the model" in said
    assert said.count(" agree") == STAGES.index(stage)


@pytest.mark.slow
def test_a_base_alone_without_guidance_has_no_handoff(measure: Any) -> None:
    settings = msgspec.structs.replace(SETTINGS, handoff=None, guidance=1.0, batch=2, steps=2)
    rows = measure(settings=settings)
    assert [row.stage for row in rows[:3]] == ["embeddings", "final latents", "pixels"]
    assert {row.pictures for row in rows} == {2}
    assert verdict(rows) == ""
    low = msgspec.structs.replace(rows[1], psnr=20.0, passed=False)
    assert "the base's UNet does not match the model (embeddings agree)" in verdict((rows[0], low, rows[2]))


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(pairs: Any, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    pair = pairs("outline")
    base = Path(shutil.copytree(pair.base, tmp_path / "base"))
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_out.bias"] = tensors["conv_out.bias"] + 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UsageError, match=r"not exported from outline \(its unet was made from other tensors\)"):
        measure_quality(_subject(pair, pair.bundle, tmp_path, base=str(base)), SETTINGS, ())


def test_without_a_checkpoint_or_with_a_lora_there_is_nothing_to_compare_with(pairs: Any, tmp_path: Path) -> None:
    pair = pairs("outline")
    subject = _subject(pair, pair.bundle, tmp_path, base="")
    with pytest.raises(UsageError, match="give it with --model"):
        measure_quality(subject, SETTINGS, ())
    lora = LoraRecord(name="style.safetensors", sha256="0" * 64, scale=1.0)
    manifest = msgspec.structs.replace(subject.bundle.manifest, loras=(lora,))
    with_lora = msgspec.structs.replace(subject.bundle, manifest=manifest)
    subject = Subject(with_lora, str(pair.base), "", tmp_path, "outline", "outline")
    with pytest.raises(UsageError, match=r"LoRA style.safetensors"):
        measure_quality(subject, SETTINGS, ())


@pytest.mark.slow
def test_variants_are_reported_but_do_not_affect_the_verdict(
    pairs: Any, traced: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, exported = pairs("outline"), []

    def export(base: str, refiner: str, target: Path, options: Any) -> None:
        exported.append((target.name, options.precision, options.vae_precision))
        if options.vae_precision == "fp16":
            raise CorruptError("black")
        shutil.copytree(pair.bundle, target, dirs_exist_ok=True)
        if options.precision == "fp16":
            _scaled("unet", "conv_out.weight")(target)

    monkeypatch.setattr(quality, "trace_diffusers", traced)
    monkeypatch.setattr(quality, "check_same_model", lambda _: None)
    monkeypatch.setattr(quality, "export_bundle", export)
    chosen = ("bf16", "fp16, VAE fp32", "fp16, VAE fp16", "fp32", "fp32 on OpenVINO")
    rows = measure_quality(_subject(pair, pair.bundle, tmp_path), SETTINGS, chosen)
    of = {name: [row for row in rows if row.variant == name] for name in chosen}
    assert exported == [("fp16", "fp16", "fp32"), ("fp16", "fp16", "fp16"), *[("fp32", "fp32", "fp32")] * 2]
    assert [(row.stage, row.passed) for row in of["bf16"]] == [("", True)]
    assert "no bf16" in of["bf16"][0].missing
    assert [(row.missing, row.passed) for row in of["fp16, VAE fp16"]] == [("black", False)]
    assert [row.passed for row in of["fp16, VAE fp32"]] == [True, False, False, False]
    assert [row.passed for row in of["fp32"]] == [row.passed for row in of["fp32 on OpenVINO"]] == [True] * 4
    assert [row.limit for row in of["fp32 on OpenVINO"]] == [110.0, 100.0, 100.0, 60.0]
    assert [row.psnr for row in of["fp32 on OpenVINO"]] != [row.psnr for row in of["fp32"]]
    assert verdict(rows) == ""


@pytest.mark.parametrize(("computes", "added"), [(None, set()), ("fp32", set()), ("bf16", {"bf16"})])
def test_what_openvino_computes_in_counts_at_every_stage(pairs: Any, computes: str | None, added: set[str]) -> None:
    with open_bundle(pairs("outline").bundle) as pipeline:
        pipeline.pool.computes = computes
        found = precisions_of(pipeline, refined=True)
    assert found == dict.fromkeys(STAGES, {"fp32"} | added)


def test_the_cases_depend_on_the_model(pairs: Any, tmp_path: Path) -> None:
    pair = pairs("outline")
    subject = _subject(pair, pair.bundle, tmp_path, model="mini")
    settings = msgspec.structs.replace(SETTINGS, width=128, height=128)
    cases, scorer = quality._cases(subject, settings)
    right = [render(sample_scene(np.random.default_rng(seed), training_pairs())) for seed in EVALUATION_SEEDS[:4]]
    assert len({case.noise.tobytes() for case in cases}) == len(cases) == 4
    assert scorer(right) == 1.0
    assert scorer([*right[:3], np.zeros_like(right[3])]) == 0.75
    assert quality._settled(subject, settings).handoff == 0.5
    without = _subject(pair, pair.bundle, tmp_path, refiner="")
    assert quality._settled(without, SETTINGS).handoff is None
    _, unscored = quality._cases(subject, SETTINGS)
    assert unscored(right) is None


def test_the_report_says_why_a_variant_was_not_measured(report: BenchReport) -> None:
    missing = Quality(variant="bf16", stage="", psnr=None, missing="no kernels")
    text = markdown_report(msgspec.structs.replace(report, quality=(*report.quality, missing)))
    assert "bf16 | quality | no kernels" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| bf16 | ") and "no kernels" not in line)
    assert not {"equal", "yes", "no"} & {cell.strip() for cell in row.split("|")}
