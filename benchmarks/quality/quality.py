"""Distance of the engines from PyTorch fp32 at the same noise, by stage and precision.

The reference is diffusers' own base and refiner on the checkpoint that the bundle was exported from. Other precisions
are exported from the same checkpoint for comparison; only the given bundle decides whether the quality check passes.
"""

__all__ = ["GIVEN", "VARIANTS", "measure_quality", "verdict"]

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from sdxl_trt.benchmarks.measure import Say, Subject
from sdxl_trt.benchmarks.model_card import evaluation_cases
from sdxl_trt.benchmarks.quality.limits import STAGES, culprit
from sdxl_trt.benchmarks.quality.rows import Scorer, compare, compare_tiled, precisions_of
from sdxl_trt.benchmarks.quality.traces import Pixels, Trace, TraceCase, make_cases, tiled_pixels, trace_engines
from sdxl_trt.benchmarks.quality.traces_torch import trace_diffusers
from sdxl_trt.benchmarks.report import BenchSettings, Quality
from sdxl_trt.engines import CorruptError, IncompatibleError, UsageError
from sdxl_trt.engines.bundle import Manifest
from sdxl_trt.export import Options, VaePrecision, export_bundle, plan_export
from sdxl_trt.mini.scenes import SIDE
from sdxl_trt.mini.score import score_picture
from sdxl_trt.runtime import Request, open_bundle
from sdxl_trt.runtime.request import resolve_request

GIVEN = "these engines"
"""Variant names of the given bundle's rows begin with this."""
REFERENCE = "PyTorch fp32"


@dataclass(frozen=True)
class Variant:
    """A bundle to export for comparison, by the overall precision and the autoencoder's, and what runs it."""

    precision: Literal["fp32", "fp16", "bf16", "int8", "fp8"]
    vae: VaePrecision
    provider: str = "ort-cpu"
    compute_precision: str = "auto"


VARIANTS: dict[str, Variant] = {
    "fp32": Variant("fp32", "fp32"),
    "fp32 on OpenVINO": Variant("fp32", "fp32", "openvino", "fp32"),
    "fp32 on OpenVINO, computed in bf16": Variant("fp32", "fp32", "openvino", "bf16"),
    "fp16, VAE fp32": Variant("fp16", "fp32"),
    "fp16, VAE mixed": Variant("fp16", "mixed"),
    "fp16, VAE fp16": Variant("fp16", "fp16"),
    "bf16": Variant("bf16", "bf16"),
    "int8, VAE int8": Variant("int8", "int8"),
    "fp8": Variant("fp8", "auto"),
}
SCORED = 4
_NO_BF16 = "ONNX Runtime's CPU provider has no bf16: bf16 graphs run in TensorRT plans, and on OpenVINO on some CPUs"


def measure_quality(
    subject: Subject,
    settings: BenchSettings,
    variants: Sequence[str] = tuple(VARIANTS),
    say: Say = lambda _: None,
) -> tuple[Quality, ...]:
    """Return the rows of the bundle of `subject`, then those of the `variants`, against PyTorch fp32.

    The embedded pair draws SCORED evaluation captions; any other model draws `settings.batch` pictures of the prompt.
    Size, steps, guidance and handoff come from `settings`. One model is in memory at a time. Variants are exported to
    `subject.cache` and reused by reruns. Raises UsageError if there is no checkpoint to compare with or the bundle was
    exported from another one, and whatever exporting and running the bundle raise.
    """
    check_same_model(subject)
    settings = _settled(subject, settings)
    cases, scorer = _cases(subject, settings)
    say("quality: PyTorch fp32")
    measured = _Measured(
        cases, settings, trace_diffusers(subject.base, subject.refiner or None, cases, settings), scorer
    )
    rows = measured.of_reference()
    say(f"quality: {GIVEN}")
    rows += measured.rows(subject.bundle.root, f"{GIVEN} ({_precision(subject.bundle.manifest)})", "auto", tiled=True)
    for name in variants:
        say(f"quality: {name}")
        rows += _variant(name, subject, measured)
    return tuple(rows)


def verdict(rows: Sequence[Quality]) -> str:
    """Return one line naming the given bundle's first stage below its limit and the component at fault, or ""."""
    given = [row for row in rows if row.variant.startswith(GIVEN)]
    failed = next((row for row in given if not row.passed), None)
    if failed is None:
        return ""
    refined = any(row.stage == "handoff latents" for row in given)
    plain = [row for row in given if row.variant == failed.variant]
    off = culprit(failed.stage, refined=refined) if len(plain) > 1 else "decoding in tiles"
    before = STAGES[: STAGES.index(failed.stage)]
    agree = [f"{row.stage} agree" for row in plain if row.stage in before]
    return (
        f"quality: {failed.stage} are {failed.psnr:.1f} dB from PyTorch fp32, {failed.limit:g} dB required: {off} does"
        f" not match the model{' (' + ', '.join(agree) + ')' if agree else ''}; export again"
    )


def check_same_model(subject: Subject) -> None:
    """Raise UsageError unless the bundle was exported from the tensors of the checkpoint, component by component."""
    if not subject.base:
        raise UsageError("--quality compares with PyTorch, which needs the checkpoint: give it with --model"
                         " (and --refiner)")  # fmt: skip
    manifest = subject.bundle.manifest
    if manifest.loras:
        raise UsageError(f"--quality: {subject.bundle.root} has the LoRA {manifest.loras[0].name} fused in, but"
                         " --model does not; export the bundle without it")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_export(subject.base, subject.refiner or None, Path(folder) / "none", Options(precision="fp32"))
    for name, job in plan.jobs.items():
        found = manifest.components.get(name)
        if found is None or found.source.sha256 != job.plan.digest:
            problem = f"has no {name}" if found is None else f"its {name} was made from other tensors"
            raise UsageError(f"--quality: {subject.bundle.root} was not exported from {subject.model or '--model'}"
                             f" ({problem}); give the checkpoints it was exported from")  # fmt: skip


@dataclass(frozen=True)
class _Measured:
    """The cases and PyTorch's traces of them."""

    cases: Sequence[TraceCase]
    settings: BenchSettings
    reference: Sequence[Trace]
    score: Scorer

    def of_reference(self) -> list[Quality]:
        """Return the row of PyTorch's own pictures, or no row if they cannot be scored."""
        right = self.score([trace.pixels for trace in self.reference])
        if right is None:
            return []
        row = Quality(variant=REFERENCE, stage="pixels", psnr=None, ssim=1.0, score=right, pictures=len(self.cases))
        return [row]

    def rows(
        self, bundle: Path, variant: str, provider: str, compute_precision: str = "auto", *, tiled: bool = False
    ) -> Iterator[Quality]:
        """Yield the rows of the bundle at `bundle`; with `tiled` also the row of its pictures decoded in tiles."""
        with open_bundle(bundle, provider=provider, compute_precision=compute_precision) as pipeline:
            traces = trace_engines(pipeline, self.cases, self.settings)
            precisions = precisions_of(pipeline, refined=self.settings.handoff is not None)
            yield from compare(variant, traces, self.reference, precisions, self.score)
            parts = tiled_pixels(pipeline, traces) if tiled else None
        if parts is not None:
            (height, width), pictures = parts
            name = f"{variant}, tiles of {width}x{height}"
            yield compare_tiled(name, pictures, self.reference, precisions, self.score)


def _variant(name: str, subject: Subject, measured: _Measured) -> list[Quality]:
    """Export a variant and return its rows, or one row with the reason why it cannot be measured."""
    chosen = VARIANTS[name]
    if chosen.precision == "bf16":
        return [Quality(variant=name, stage="", psnr=None, missing=_NO_BF16)]
    # Variants that differ only in the autoencoder share a folder, so nothing else is exported again.
    target = subject.cache / "quality" / chosen.precision
    target.parent.mkdir(parents=True, exist_ok=True)
    options = Options(precision=chosen.precision, vae_precision=chosen.vae)
    try:
        export_bundle(subject.base, subject.refiner or None, target, options)
        return list(measured.rows(target, name, chosen.provider, chosen.compute_precision))
    except (CorruptError, IncompatibleError) as exc:  # for example an autoencoder that overflows fp16
        return [Quality(variant=name, stage="", psnr=None, passed=False, missing=str(exc))]


def _settled(subject: Subject, settings: BenchSettings) -> BenchSettings:
    """Return the settings, with handoff None if the refiner is not used."""
    request = Request(settings.prompt, steps=settings.steps, handoff=settings.handoff, seed=settings.seed,
                      width=settings.width, height=settings.height)  # fmt: skip
    refined = bool(subject.refiner) and resolve_request(request, subject.bundle.manifest).uses_refiner
    return settings if refined else msgspec.structs.replace(settings, handoff=None)


def _cases(subject: Subject, settings: BenchSettings) -> tuple[list[TraceCase], Scorer]:
    """Return the cases to draw, and the scorer of whether a picture matches its prompt."""
    vae = subject.bundle.manifest.base.vae
    if not subject.embedded or (settings.width, settings.height) != (SIDE, SIDE):
        seeds = [settings.seed + i for i in range(settings.batch)]
        return make_cases([settings.prompt] * settings.batch, seeds, settings, vae), lambda _: None
    asked = evaluation_cases(SCORED)
    captions = [case.caption for case in asked]

    def share(pictures: Sequence[Pixels]) -> float:
        right = [score_picture(picture, caption).right for picture, caption in zip(pictures, captions, strict=True)]
        return sum(right) / len(right)

    return make_cases(captions, [case.seed for case in asked], settings, vae), share


def _precision(manifest: Manifest) -> str:
    vae = manifest.components[manifest.base.vae.decoder].precision
    return manifest.precision if vae == manifest.precision else f"{manifest.precision}, VAE {vae}"
