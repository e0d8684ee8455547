"""Base and refiner in, bundle out: plan, convert what has changed, verify, and put the whole in place."""

__all__ = ["ExportPlan", "Job", "export_bundle", "export_optimum", "plan_export"]

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from sdxl_trt.engines.bundle import (
    FORMAT_NAME,
    FORMAT_VERSION,
    Bundle,
    Component,
    LoraRecord,
    Manifest,
    read_bundle,
    write_manifest,
)
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.export.budget import Needs, measure
from sdxl_trt.export.components import ComponentPlan, Options, StagePlan, plan_components
from sdxl_trt.export.conversion import RECORD_FILE, component_key, convert, finished
from sdxl_trt.export.lora import REFINER_NOTE
from sdxl_trt.export.lora_file import Lora, open_lora
from sdxl_trt.export.manifests import stage_record, write_tokenizers
from sdxl_trt.export.optimum_layout import write_optimum
from sdxl_trt.export.progress import Progress, Report
from sdxl_trt.export.sources import PipelineSource, Role, open_source, open_vae, with_vae
from sdxl_trt.export.staging import check_target, exclusive, partial_folder, publish, resumable
from sdxl_trt.export.unchanged import previous_bundle, take_over, unchanged_component
from sdxl_trt.export.verify import verify_bundle

log = logging.getLogger("sdxl_trt.export")
MINI = "mini"


@dataclass(frozen=True)
class Job:
    """One component: what is to be done ("export", "resume" or "keep") and, unless it is to be made, its record."""

    plan: ComponentPlan | None
    key: str
    action: str
    component: Component | None = None

    @property
    def bytes(self) -> int:
        """About how many bytes of weights have to be written."""
        return self.plan.bytes() if self.action == "export" and self.plan is not None else 0


@dataclass(frozen=True)
class ExportPlan:
    """Everything that an export will do, before it does anything."""

    base: PipelineSource
    refiner: PipelineSource | None
    stages: dict[str, StagePlan]
    jobs: dict[str, Job]
    loras: tuple[tuple[Lora, float], ...]
    previous: Bundle | None
    needs: Needs
    note: str = ""


def export_bundle(
    base: Path | str = MINI,
    refiner: Path | str | None = MINI,
    out: Path | str = "sdxl-bundle",
    options: Options | None = None,
    *,
    progress: Progress | None = None,
) -> Bundle:
    """Export a base and, unless None, a refiner to the bundle folder `out`, and return it opened.

    `base` and `refiner` are diffusers folders, hub ids, single-file checkpoints, or ``"mini"`` for the embedded pair.
    `out` appears, or is replaced, only when everything has been written; components that it already has, from the
    same tensors and options, are kept. A failure leaves it as it was; what was finished by then is kept beside it, for
    the next export to go on from. `progress` is told every Event. Raises SourceError, CorruptError, UsageError,
    ResourceError, and with `options.verify` VerificationError.
    """
    options, out = options or Options(), Path(out)
    check_target(out)
    with exclusive(out), planned(base, refiner, out, options) as plan:
        plan.needs.require(out)
        with resumable(out, RECORD_FILE) as folder:
            report = Report(progress, {name: job.bytes for name, job in plan.jobs.items() if job.action != "keep"})
            bundle = _make(plan, folder, options, report)
            if _is_same(plan, bundle) and not options.verify:
                shutil.rmtree(folder)  # what stands may hold more: plans, a report
            else:
                for record in folder.glob(f"*/{RECORD_FILE}"):
                    record.unlink()
                publish(folder, out)
    return read_bundle(out, partial=options.components is not None)


def export_optimum(
    base: Path | str = MINI,
    refiner: Path | str | None = MINI,
    out: Path | str = "sdxl-optimum",
    options: Options | None = None,
    *,
    progress: Progress | None = None,
) -> None:
    """Export as export_bundle does, and write the result to ``out/base`` and ``out/refiner`` in optimum-onnx's layout.

    Raises what export_bundle raises, and UsageError for a part of the components.
    """
    options, out = options or Options(), Path(out)
    if options.components is not None:
        raise UsageError("--layout optimum: takes all components; leave --components out")
    check_target(out)
    with exclusive(out), planned(base, refiner, out, options) as plan:
        plan.needs.require(out)
        with resumable(out, RECORD_FILE) as folder:
            report = Report(progress, {name: job.bytes for name, job in plan.jobs.items()})
            bundle = _make(plan, folder, options, report)
            write_optimum(bundle, plan.base, plan.refiner, out, consume=True, progress=report.stage)
            shutil.rmtree(folder)


def plan_export(base: Path | str, refiner: Path | str | None, out: Path | str, options: Options) -> ExportPlan:
    """Return what an export with these arguments would do and need; nothing is written."""
    check_target(Path(out))
    with planned(base, refiner, Path(out), options) as plan:
        return plan


@contextlib.contextmanager
def planned(base: Path | str, refiner: Path | str | None, out: Path, options: Options) -> Iterator[ExportPlan]:
    """Yield the plan of an export; the sources stay open inside."""
    with contextlib.ExitStack() as stack:
        sources = _open_sources(base, refiner, options, stack)
        loras = tuple((open_lora(path), scale) for path, scale in options.loras)
        if loras and sources[1] is not None:
            log.warning("%s", REFINER_NOTE)
        components, stages = plan_components(*sources, options, log.warning, loras)
        previous = previous_bundle(out)
        jobs = _jobs(components, previous, out, options)
        yield ExportPlan(
            base=sources[0],
            refiner=sources[1],
            stages=stages,
            jobs=jobs,
            loras=loras,
            previous=previous,
            needs=measure([job.plan for job in jobs.values() if job.action == "export" and job.plan], out),
            note=_mini_note(base, refiner),
        )


def _jobs(components: dict[str, ComponentPlan], previous: Bundle | None, out: Path, options: Options) -> dict[str, Job]:
    jobs: dict[str, Job] = {}
    for name, plan in components.items():
        if options.components is not None and name not in options.components:
            kept = previous.manifest.components.get(name) if previous else None
            if kept is not None:
                jobs[name] = Job(plan, kept.key, "keep", kept)
            continue
        key = component_key(plan, options.opset)
        old = None if options.force else unchanged_component(previous, name, key)
        resumed = None if options.force or old else finished(partial_folder(out), name, key)
        action = "keep" if old else "resume" if resumed else "export"
        jobs[name] = Job(plan, key, action, old or resumed)
    return jobs


def _is_same(plan: ExportPlan, bundle: Bundle) -> bool:
    kept = all(job.action == "keep" for job in plan.jobs.values())
    return kept and plan.previous is not None and bundle.manifest == plan.previous.manifest


def _make(plan: ExportPlan, folder: Path, options: Options, report: Report) -> Bundle:
    """Fill `folder` with the whole bundle."""
    records: dict[str, Component] = {}
    for name, job in plan.jobs.items():
        if job.action == "keep" and job.component is not None and plan.previous is not None:
            take_over(plan.previous, job.component, folder)
            records[name] = job.component
        elif job.action == "resume" and job.component is not None:
            records[name] = job.component
        elif job.plan is not None:
            records[name] = convert(name, job.plan, job.key, folder, options.opset, report)
    tokenizers, tokenizer_of = write_tokenizers(plan.stages, folder)
    stages = {name: stage_record(stage, tokenizer_of[name]) for name, stage in plan.stages.items()}
    manifest = Manifest(
        format=FORMAT_NAME,
        format_version=FORMAT_VERSION,
        generator=f"sdxl-trt {version('sdxl-trt')}",
        precision=options.precision,
        components=records,
        tokenizers=tokenizers,
        base=stages["base"],
        refiner=stages.get("refiner"),
        loras=tuple(LoraRecord(name=lora.name, sha256=lora.sha256, scale=scale) for lora, scale in plan.loras),
        note=plan.note,
    )
    write_manifest(folder, manifest)
    bundle = read_bundle(folder, partial=options.components is not None)  # what cannot be opened replaces nothing
    if options.verify:
        plans = {name: job.plan for name, job in plan.jobs.items() if job.plan is not None}
        verify_bundle(bundle, plans, plan.stages, progress=report.stage).require()
    return bundle


def _open_sources(
    base: Path | str, refiner: Path | str | None, options: Options, stack: contextlib.ExitStack
) -> tuple[PipelineSource, PipelineSource | None]:
    mini: Path | None = None
    if MINI in (base, refiner):
        from sdxl_trt.mini.pair import materialize  # noqa: PLC0415 - only when the embedded pair is asked for

        mini = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sdxl-trt-mini-")))
        materialize(mini)
    vae = None if options.vae is None else open_vae(options.vae, precision=options.precision)

    def opened(spec: Path | str, role: Role) -> PipelineSource:
        place = mini / role if spec == MINI and mini is not None else spec
        source = open_source(place, role, precision=options.precision)
        return source if vae is None else with_vae(source, vae)

    return opened(base, "base"), None if refiner is None else opened(refiner, "refiner")


def _mini_note(base: Path | str, refiner: Path | str | None) -> str:
    if MINI not in (base, refiner):
        return ""
    from sdxl_trt.mini.embedded import NOTE  # noqa: PLC0415 - only when the embedded pair is asked for

    return NOTE
