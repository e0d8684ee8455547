"""Base and refiner to a bundle: plan the export, convert what has changed, verify it, and publish the folder."""

__all__ = ["ExportPlan", "check_optimum", "export_bundle", "export_optimum", "plan_export"]

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from sdxl_trt.engines import CorruptError, IncompatibleError, SdxlTrtError, UsageError
from sdxl_trt.engines.adapters import REFINER_NOTE, LoraOption, ScaledLora, open_lora
from sdxl_trt.engines.bundle import (
    FORMAT_NAME,
    FORMAT_VERSION,
    Bundle,
    Component,
    LoraRecord,
    Manifest,
    read_bundle,
    verify_file,
    write_manifest,
)
from sdxl_trt.engines.plans import PLANS
from sdxl_trt.export.components import (
    RECORD_FILE,
    TINY,
    CalibrationOptions,
    Exported,
    ExportJob,
    ExportProgress,
    Needs,
    Options,
    ProgressTracker,
    StagePlan,
    add_controlnets,
    component_key,
    controlnet_records,
    convert_component,
    finished,
    measure,
    plan_components,
    plan_jobs,
    stage_record,
    with_recipes,
    write_tokenizers,
)
from sdxl_trt.export.optimum import write_optimum
from sdxl_trt.export.output import (
    check_target,
    exclusive,
    previous_bundle,
    publish,
    resumable,
    take_over,
    take_over_plans,
)
from sdxl_trt.export.quantize import check_calibration, quantize_components
from sdxl_trt.export.sources import (
    ControlNetSource,
    PipelineSource,
    Role,
    open_controlnet,
    open_source,
    open_tiny_vae,
    open_unet,
    open_vae,
    with_tiny_vae,
    with_unet,
    with_vae,
)
from sdxl_trt.export.verify import VERIFY_FILE, verify_bundle

log = logging.getLogger("sdxl_trt.export")
MINI = "mini"
_FLOATS = ".floats"
"""What follows the names of components in an unfinished bundle that are measured before they are quantized."""


@dataclass(frozen=True)
class ExportPlan:
    """Everything that an export will do."""

    base: PipelineSource
    refiner: PipelineSource | None
    stages: dict[str, StagePlan]
    jobs: dict[str, ExportJob]
    loras: tuple[ScaledLora, ...]
    previous: Bundle | None
    needs: Needs
    note: str = ""
    mini: bool = False
    """Whether the base is the embedded pair's, which draws what it was trained on."""

    @property
    def lora_records(self) -> tuple[LoraRecord, ...]:
        """Return the manifest's records of the LoRAs."""
        return tuple(
            LoraRecord.of(each.lora.name, each.lora.sha256, each.scale, each.text_scale, each.lora.tensors_sha256)
            for each in self.loras
        )


def export_bundle(
    base: Path | str = MINI,
    refiner: Path | str | None = MINI,
    out: Path | str = "sdxl-bundle",
    options: Options | None = None,
    *,
    progress: ExportProgress | None = None,
) -> Bundle:
    """Export a base and, unless None, a refiner to the bundle folder `out`; return the bundle, opened.

    `base` and `refiner` are diffusers folders, hub ids, single-file checkpoints, or ``"mini"`` for the embedded pair.
    `out` is created or replaced only after everything has been written; components that it already holds for the same
    tensors and options are kept. A failure leaves `out` as it was; after an interruption the finished components stay
    beside it, and the next export resumes from them. `progress` receives every ExportEvent. Raises SourceError,
    CorruptError, UsageError, ResourceError, and with `options.verify` VerificationError.
    """
    options, out = options or Options(), Path(out)
    check_target(out)
    with exclusive(out, lock=options.lock), planned(base, refiner, out, options) as plan:
        plan.needs.require(out)
        with resumable(out, RECORD_FILE) as folder:
            report = ProgressTracker(
                progress, {name: job.bytes for name, job in plan.jobs.items() if job.action != "keep"}
            )
            bundle = _make(plan, folder, options, report)
            if _is_same(plan, bundle):  # `out` may hold more than was made, such as plans
                if options.verify:
                    (folder / VERIFY_FILE).replace(out / VERIFY_FILE)
                shutil.rmtree(folder)
            else:
                publish(folder, out)
                for record in out.glob(f"*/{RECORD_FILE}"):
                    record.unlink()
    return read_bundle(out, partial=options.components is not None)


def export_optimum(
    base: Path | str = MINI,
    refiner: Path | str | None = MINI,
    out: Path | str = "sdxl-optimum",
    options: Options | None = None,
    *,
    progress: ExportProgress | None = None,
) -> None:
    """Export as export_bundle does, and write the result to ``out/base`` and ``out/refiner`` in optimum-onnx's layout.

    Raises what export_bundle raises, and UsageError if `options.components` is set.
    """
    options, out = options or Options(), Path(out)
    if options.components is not None:
        raise UsageError("--layout optimum: needs all components; remove --components")
    if options.controlnets or options.tiny_vae is not None:
        given = "ControlNets; remove --controlnet" if options.controlnets else "a tiny decoder; remove --tiny-vae"
        raise UsageError(f"--layout optimum: has no place for {given}")
    check_target(out)
    with exclusive(out, lock=options.lock), planned(base, refiner, out, options, own_tiny=False) as plan:
        check_optimum(plan)
        plan.needs.require(out)
        with resumable(out, RECORD_FILE) as folder:
            report = ProgressTracker(progress, {name: job.bytes for name, job in plan.jobs.items()})
            bundle = _make(plan, folder, options, report)
            for record in folder.glob(f"*/{RECORD_FILE}"):
                record.unlink()  # write_optimum moves the weights away: nobody can resume from this folder
            write_optimum(bundle, plan.base, plan.refiner, out, consume=True, progress=report.stage)
            shutil.rmtree(folder)


def check_optimum(plan: ExportPlan) -> None:
    """Raise IncompatibleError if optimum-onnx could not load what `plan` makes."""
    narrow = [name for name, job in plan.jobs.items() if job.plan.precision == "bf16"]
    if narrow:
        raise IncompatibleError(f"--layout optimum: {narrow[0]} would be bf16, which ONNX Runtime cannot be fed from"
                                " numpy; export with --fp16")  # fmt: skip
    eight_bit = [name for name, job in plan.jobs.items() if job.plan.eight_bit]
    if eight_bit:
        raise IncompatibleError(f"--layout optimum: {eight_bit[0]} would be {plan.jobs[eight_bit[0]].plan.precision},"
                                " which has one graph for a CPU and another for GPUs, and optimum-onnx loads one;"
                                " export with --fp16")  # fmt: skip


def plan_export(
    base: Path | str, refiner: Path | str | None, out: Path | str, options: Options, *, own_tiny: bool = True
) -> ExportPlan:
    """Return what an export with these arguments would do and need, without writing anything.

    `own_tiny` false: without the embedded pair's tiny decoder, as in optimum-onnx's layout, which has no place for it.
    """
    check_target(Path(out))
    with planned(base, refiner, Path(out), options, own_tiny=own_tiny) as plan:
        return plan


@contextlib.contextmanager
def planned(
    base: Path | str, refiner: Path | str | None, out: Path, options: Options, *, own_tiny: bool = True
) -> Iterator[ExportPlan]:
    """Yield the plan of an export; its sources stay open until the context ends."""
    with contextlib.ExitStack() as stack:
        sources = _open_sources(base, refiner, options, stack, own_tiny=own_tiny)
        loras = tuple(_open_lora(LoraOption(*lora)) for lora in options.loras)
        if loras and sources[1] is not None:
            log.warning("%s", REFINER_NOTE)
        previous = previous_bundle(out)
        if previous is not None and previous.manifest.base.vae.decoder_bf16 is not None:
            options = replace(options, twins=True)  # keep the bf16 twins: the bundle may have plans of them
        components, stages = plan_components(*sources, options, log.warning, loras)
        add_controlnets(components, stages["base"], _open_controlnets(sources[0], options), log.warning)
        calibration = options.calibration or CalibrationOptions()
        components = with_recipes(components, calibration)
        jobs = plan_jobs(components, previous, out, options)
        check_calibration(calibration, components, jobs, out)
        yield ExportPlan(
            base=sources[0],
            refiner=sources[1],
            stages=stages,
            jobs=jobs,
            loras=loras,
            previous=previous,
            needs=measure(
                [job.plan for job in jobs.values() if job.action == "export"],
                out,
                [job.plan for job in jobs.values()] if options.verify else (),
            ),
            note=_mini_note(base, refiner),
            mini=base == MINI or (options.eight_bit and _is_embedded(components["unet"].digest)),
        )


def _is_same(plan: ExportPlan, bundle: Bundle) -> bool:
    """Return whether `bundle` equals the bundle it would replace, file by file."""
    if plan.previous is None or bundle.manifest != plan.previous.manifest:
        return False
    if any(job.action != "keep" for job in plan.jobs.values()):
        return False
    try:
        for tokenizer in bundle.manifest.tokenizers.values():
            verify_file(plan.previous.path(tokenizer.file), tokenizer.file)
    except SdxlTrtError:
        return False
    return True


def _make(plan: ExportPlan, folder: Path, options: Options, report: ProgressTracker) -> Bundle:
    """Write the whole bundle to `folder` and return it, opened."""
    made, floats = dict[str, Exported](), dict[str, Component]()
    for name, job in plan.jobs.items():
        if job.action == "keep" and job.found is not None and plan.previous is not None:
            take_over(plan.previous, job.found.files, folder)
            made[name] = job.found
        elif job.action == "resume" and job.found is not None:
            made[name] = job.found
        elif job.plan.eight_bit:
            floats[name] = _make_floats(name, job, folder, options, report)
        else:
            made[name] = convert_component(name, job.plan, job.key, folder, options.opset, report)
    if floats:
        calibration = options.calibration or CalibrationOptions()
        others = {name: each.component for name, each in made.items()}
        made |= quantize_components(plan.jobs, plan.stages, floats, others, folder, calibration, report,
                                    mini=plan.mini)  # fmt: skip
    records = {part: record for name in plan.jobs for part, record in made[name].records(name).items()}
    tokenizers, tokenizer_of = write_tokenizers(plan.stages, folder)
    stages = {name: stage_record(stage, tokenizer_of[name], records) for name, stage in plan.stages.items()}
    manifest = Manifest(
        format=FORMAT_NAME,
        format_version=FORMAT_VERSION,
        generator=f"sdxl-trt {version('sdxl-trt')}",
        precision=records["unet"].precision if "unet" in records else options.precision,
        components=records,
        tokenizers=tokenizers,
        base=stages["base"],
        refiner=stages.get("refiner"),
        loras=plan.lora_records,
        controlnets=controlnet_records(plan.stages["base"]),
        plans=take_over_plans(plan.previous, records, folder) if plan.previous else (),
        note=plan.note,
    )
    _drop_strays(folder, {*records, *tokenizers, PLANS})
    write_manifest(folder, manifest)
    bundle = read_bundle(folder, partial=options.components is not None)  # raises before anything is replaced
    if options.verify:
        plans = {name: job.plan for name, job in plan.jobs.items()}
        verified = verify_bundle(bundle, plans, plan.stages, progress=report.stage)
        for name, part in verified.components.items():
            for text in part.warnings:
                log.warning("%s: %s", name, text)
        verified.require()
    return bundle


def _make_floats(name: str, job: ExportJob, root: Path, options: Options, report: ProgressTracker) -> Component:
    """Return the component that an 8-bit one is made of, in floating point: written, or found finished."""
    plan = job.plan.in_floats()
    key = component_key(plan, options.opset)
    found = finished(root, name + _FLOATS, key)
    if found is not None:
        report.written(plan.bytes())
        return found.component
    return convert_component(name, plan, key, root, options.opset, report, into=name + _FLOATS).component


def _open_lora(option: LoraOption) -> ScaledLora:
    """Return the LoRA of an option; warn of its tensors that have no effect."""
    lora = ScaledLora(open_lora(option.file), option.scale, option.text_scale)
    for note in lora.notes():
        log.warning("%s", note)
    return lora


def _open_controlnets(base: PipelineSource, options: Options) -> tuple[ControlNetSource, ...]:
    """Return the ControlNets of an export; a single file's config follows the base's UNet."""
    configs = Path(base.models["unet"].where)
    own = configs if (configs / "config.json").is_file() else None
    return tuple(open_controlnet(spec, precision=options.floats, configs=own) for spec in options.controlnets)


def _drop_strays(folder: Path, wanted: set[str]) -> None:
    """Remove the components that an interrupted export of other models finished."""
    for part in folder.iterdir():
        if part.is_dir() and part.name not in wanted:
            shutil.rmtree(part)


def _open_sources(
    base: Path | str,
    refiner: Path | str | None,
    options: Options,
    stack: contextlib.ExitStack,
    *,
    own_tiny: bool,
) -> tuple[PipelineSource, PipelineSource | None]:
    mini: Path | None = None
    if MINI in (base, refiner):
        from sdxl_trt.mini import materialize  # noqa: PLC0415 - only when the embedded pair is asked for

        mini = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sdxl-trt-mini-")))
        try:
            materialize(mini)
        except (FileNotFoundError, ValueError) as exc:
            raise CorruptError(str(exc)) from exc
    vae = None if options.vae is None else open_vae(options.vae, precision=options.floats)
    tiny_spec = options.tiny_vae
    if tiny_spec is None and base == MINI and mini is not None and own_tiny and vae is None:
        # It imitates the pair's own decoder.
        tiny_spec = mini / TINY if (mini / TINY).is_dir() else None
    tiny = None if tiny_spec is None else open_tiny_vae(tiny_spec, precision=options.floats)

    def opened(spec: Path | str, role: Role) -> PipelineSource:
        place = mini / role if spec == MINI and mini is not None else spec
        source = open_source(place, role, precision=options.floats, vae=vae is None)
        source = source if vae is None else with_vae(source, vae)
        return source if tiny is None else with_tiny_vae(source, tiny)

    first = opened(base, "base")
    if options.unet is not None:
        first = with_unet(first, open_unet(options.unet, precision=options.floats))
    return first, None if refiner is None else opened(refiner, "refiner")


def _is_embedded(digest: str) -> bool:
    """Return whether a base's UNet with this digest is the embedded pair's, which its folders do not tell."""
    from sdxl_trt.mini import bundle_path  # noqa: PLC0415 - only for 8 bits

    try:
        embedded = read_bundle(bundle_path(), files=False).manifest
    except SdxlTrtError:  # an installation without the pair
        return False
    return embedded.components[embedded.base.unet].source.sha256 == digest


def _mini_note(base: Path | str, refiner: Path | str | None) -> str:
    if MINI not in (base, refiner):
        return ""
    from sdxl_trt.mini import NOTE  # noqa: PLC0415 - only when the embedded pair is asked for

    return NOTE
