"""Estimates are the longer of compute and memory, lie below all published times, and are labelled as estimates."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sdxl_trt.benchmarks.roofline.estimates import Work
from sdxl_trt.benchmarks.roofline.gpus import GPUS, find_gpu
from sdxl_trt.benchmarks.roofline.published import PUBLISHED
from sdxl_trt.benchmarks.roofline.roofline import estimate, run_estimate
from sdxl_trt.benchmarks.roofline.table import estimate_table
from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.errors import IncompatibleError, SizeError, SourceError, UsageError
from sdxl_trt.mini.embedded import bundle_path


def test_a_part_is_the_longer_of_compute_and_memory() -> None:
    found = run_estimate("h100")
    for part in found.parts:
        assert part.compute == part.counts.flops / getattr(found.gpu, part.rate)
        assert part.memory == part.counts.least_bytes / found.gpu.bandwidth
        assert part.floor == max(part.compute, part.memory)
    assert found.seconds == pytest.approx(sum(part.calls * part.floor for part in found.parts))
    by_name = {part.name: part for part in found.parts}
    # The UNet at a megapixel is compute-bound, the text encoder on two prompts memory-bound.
    assert by_name["base UNet step"].floor == by_name["base UNet step"].compute
    assert by_name["text encoder 2"].floor == by_name["text encoder 2"].memory
    assert by_name["VAE decoder"].rate == "fp32_sums"


def test_the_steps_are_split_as_the_pipeline_splits_them() -> None:
    # 30 steps with a handoff at 0.8 give the base 23, in diffusers and here.
    work = run_estimate("a100").work
    assert (work.base_steps, work.refiner_steps, work.rows) == (23, 7, 2)
    alone = run_estimate("a100", handoff=None)
    assert (alone.work.base_steps, alone.work.refiner_steps, alone.handoff) == (30, 0, None)
    assert "refiner UNet step" not in {part.name for part in alone.parts}


def test_more_work_takes_longer() -> None:
    usual = run_estimate("l40s")
    for more in ({"base_steps": 30}, {"height": 1152}, {"batch": 2}, {"tokens": 154}):
        assert estimate("l40s", msgspec.structs.replace(usual.work, **more)).seconds > usual.seconds
    assert estimate("l40s", msgspec.structs.replace(usual.work, rows=1)).seconds < 0.6 * usual.seconds
    assert run_estimate("l40s", batch=4).seconds < 4 * usual.seconds


def test_the_handoff_saves_what_its_steps_save_and_costs_its_weights() -> None:
    with_refiner, alone = run_estimate("4090"), run_estimate("4090", handoff=None)
    found = with_refiner.handoff
    assert found is not None
    assert found.saved == pytest.approx(alone.seconds - with_refiner.seconds)
    assert found.saved == pytest.approx(7 * (found.base_step - found.refiner_step))
    refiner = next(part for part in with_refiner.parts if part.name == "refiner UNet step")
    assert found.load == pytest.approx(refiner.counts.weight_bytes / 31.5e9)
    assert 4.4e9 < refiner.counts.weight_bytes < 4.7e9
    assert found.fits


@pytest.mark.parametrize("gpu", GPUS)
def test_no_published_time_is_below_its_floor(gpu: str) -> None:
    found = estimate(gpu, Work(base_steps=23, refiner_steps=7))
    for each in found.published:
        assert 0.0 < each.share < 1.0, each.published.what


def test_every_published_time_is_of_a_known_gpu() -> None:
    assert {each.gpu for each in PUBLISHED} <= set(GPUS)
    compared = [each for gpu in GPUS for each in estimate(gpu, Work(base_steps=1, refiner_steps=0)).published]
    assert [each.published for each in compared] == sorted(PUBLISHED, key=lambda p: list(GPUS).index(p.gpu))


def test_rates_are_dense_and_ordered_by_precision() -> None:
    for gpu in GPUS.values():
        assert gpu.tf32 < gpu.fp32_sums <= gpu.fp16 < gpu.eight_bit
        assert gpu.source.startswith("https://")
    # 132 SMs, 4 tensor cores of 512 multiply-adds per clock at 1.83 GHz; NVIDIA's table quotes twice that first.
    assert GPUS["h100"].fp16 == pytest.approx(2 * 132 * 4 * 512 * 1.83e9, rel=0.01)
    assert GPUS["a100"].fp16 == pytest.approx(2 * 108 * 4 * 256 * 1.41e9, rel=0.01)
    assert GPUS["4090"].fp16 == pytest.approx(2 * 128 * 4 * 128 * 2.52e9, rel=0.01)


def test_the_table_is_labelled_as_an_estimate() -> None:
    text = estimate_table(run_estimate("h100"))
    blocks = text.split("\n\n")
    assert blocks[0].startswith("**Estimate, not a measurement**")
    assert "Floor (estimate):" in text
    assert "Handoff (estimate):" in text
    assert "989 TFLOP/s" in text
    assert "1471 ms" in text
    for block in blocks:
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows}) <= 1
    bare = estimate_table(run_estimate("a10g", handoff=None))
    assert "Handoff" not in bare
    assert "published by others" not in bare


def test_a_bundle_is_counted_instead_of_sdxl() -> None:
    found = run_estimate("h100", engines=bundle_path(), height=128, width=128, batch=3)
    assert found.counts_from == str(bundle_path())
    assert not found.published
    assert found.seconds < 1e-3
    assert {part.rate for part in found.parts} == {"fp16"}


def test_8_bits_have_their_rate_and_attention_that_of_the_floats(partly_int8_bundle: Path, tmp_path: Path) -> None:
    sides = {"height": 128, "width": 128}
    found, plain = (run_estimate("4090", engines=each, **sides) for each in (partly_int8_bundle, bundle_path()))
    rates = {part.name: part.rate for part in found.parts}
    assert rates["base UNet step"] == rates["refiner UNet step"] == "eight_bit"
    assert rates["VAE decoder"] == "fp16"
    for part, other in zip(found.parts, plain.parts, strict=True):
        assert part.counts.by_operator == other.counts.by_operator, "Q/DQ nodes are no products"
        attention = part.counts.by_operator.get("Attention", 0)
        assert attention or "UNet" not in part.name
        expected = (part.counts.flops - attention) / getattr(found.gpu, part.rate) + attention / found.gpu.fp16
        assert part.compute == expected
        assert (part.compute < other.compute) == ("UNet" in part.name)
    bundle = read_bundle(partly_int8_bundle)
    parts = bundle.manifest.components
    fp8 = parts | {"unet": msgspec.structs.replace(parts["unet"], precision="fp8")}
    bundle = Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, components=fp8))
    work = msgspec.structs.replace(found.work, batch=1)
    assert estimate("l40s", work, bundle).parts
    with pytest.raises(IncompatibleError, match=r"a100: base UNet step in fp8 needs .* 8\.9, this GPU has 8\.0"):
        estimate("a100", work, bundle)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"gpu": "mi300"}, UsageError, "choose from h100"),
        ({"handoff": 1.5}, UsageError, "--handoff 1.5"),
        ({"steps": 0}, UsageError, "--steps 0"),
        ({"height": 1056}, SizeError, "multiples of 64"),
        ({"engines": bundle_path() / "none"}, SourceError, "none"),
    ],
)
def test_what_cannot_be_estimated_is_refused(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        run_estimate(**({"gpu": "h100"} | arguments))


def test_gpu_names_are_found_in_any_spelling() -> None:
    assert find_gpu("RTX 4090") is find_gpu("NVIDIA GeForce RTX-4090") is GPUS["4090"]
    assert find_gpu("H100") is GPUS["h100"]


def test_an_estimate_needs_neither_onnx_nor_torch() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['onnx', 'onnxruntime', 'torch', 'tensorrt', 'cuda']));"
        "from sdxl_trt.benchmarks.roofline.roofline import run_estimate;"
        "from sdxl_trt.benchmarks.roofline.table import estimate_table; print(estimate_table(run_estimate('h100')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Estimate, not a measurement" in done.stdout
