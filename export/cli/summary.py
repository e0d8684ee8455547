"""What export-engines tells: progress, the plan of a dry run, and what was written."""

__all__ = ["export_progress", "of_export", "of_jobs", "of_plan", "of_plans"]

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdxl_trt.engines.build import PlanJob
from sdxl_trt.engines.bundle import Bundle, Flavour, LoraRecord, Scheduler
from sdxl_trt.engines.host import Output, ProgressLine, one_line, shell_word
from sdxl_trt.export.components import ExportEvent, ExportProgress, Needs
from sdxl_trt.export.exporter import ExportPlan
from sdxl_trt.export.verify import VERIFY_FILE, read_report


def of_plan(plan: ExportPlan) -> Output:
    """Return what an export would do and need."""
    parts: dict[str, dict[str, Any]] = {
        name: {
            "action": job.action,
            "kind": job.plan.kind,
            "precision": job.plan.precision,
            "bytes": job.plan.bytes(),
            "source": job.plan.source.name,
        }
        for name, job in plan.jobs.items()
    }
    lines = [
        f"  {name:<24} {part['action']:<7} {part['precision']:<6} {part['bytes'] / 2**20:9.1f} MiB"
        f"  {one_line(part['source'])}"
        for name, part in parts.items()
    ]
    loras = plan.lora_records
    lines += [f"  LoRA {one_line(lora.name)} at {lora.told}, in the base" for lora in loras]
    lines += _controlnet_lines(plan.stages["base"].controlnets)
    lines += _told_sampler(plan.base.scheduler)
    lines.append(_told_needs(plan.needs))
    needs = {"disk": plan.needs.disk, "disk_free": plan.needs.disk_free, "memory": plan.needs.memory,
             "memory_free": plan.needs.memory_free}  # fmt: skip
    told = {"dry_run": True, "components": parts, "loras": [_lora_json(lora) for lora in loras], "needs": needs,
            "controlnets": plan.stages["base"].controlnets, "note": plan.note,
            "sampler": plan.base.scheduler.sampler}  # fmt: skip
    return Output(lines, told)


def _lora_json(lora: LoraRecord) -> dict[str, Any]:
    return {"name": lora.name, "sha256": lora.sha256, "scale": lora.scale, "text_scale": lora.encoder_scale}


def _controlnet_lines(controlnets: Mapping[str, str]) -> list[str]:
    return [f"  {component} is --control {shell_word(name + '=FILE')}" for component, name in controlnets.items()]


def _told_sampler(scheduler: Scheduler) -> list[str]:
    """Return a line on the sampler that the scheduler class of a source means, where it is not the usual one."""
    if scheduler.sampler == Scheduler().sampler:
        return []
    return [f"  {one_line(scheduler.class_name)} is --sampler {scheduler.sampler}: runs without that option use it"]


def _told_needs(needs: Needs) -> str:
    def free(count: int | None) -> str:
        return "unknown" if count is None else f"{count / 1e9:.1f} GB"

    return (f"nothing written; needs {needs.disk / 1e9:.2f} GB of disk (free: {free(needs.disk_free)}) and"
            f" {needs.memory / 1e9:.1f} GB of memory (free: {free(needs.memory_free)})")  # fmt: skip


def of_export(bundle: Bundle | None, out: Path, seconds: float) -> Output:
    """Return what was exported to `out` in `seconds`; `bundle` is None for another layout."""
    if bundle is None:
        return Output([f"{out}: written in {seconds:.0f} s"], {"folder": str(out), "seconds": seconds})
    manifest = bundle.manifest
    parts = {
        name: {
            "kind": component.kind,
            "precision": component.precision,
            "parameters": component.parameters,
            "bytes": sum(file.size for file in manifest.own_files(name)),
            "sha256": component.weights.sha256,
        }
        for name, component in manifest.components.items()
    }
    loras = [_lora_json(lora) for lora in manifest.loras]
    told = {"bundle": str(bundle.root), "seconds": seconds, "components": parts, "loras": loras,
            "controlnets": {each.component: each.name for each in manifest.controlnets},
            "refiner": manifest.refiner is not None, "note": manifest.note,
            "sampler": manifest.base.scheduler.sampler}  # fmt: skip
    return Output(_lines(bundle, told), told)


def _lines(bundle: Bundle, told: dict[str, Any]) -> list[str]:
    lines = [
        f"  {name:<24} {part['precision']:<6} {part['parameters'] / 1e6:9.2f} M  {part['bytes'] / 2**20:9.1f} MiB"
        for name, part in told["components"].items()
    ]
    lines += [f"  LoRA {one_line(lora.name)} at {lora.told}, in the base" for lora in bundle.manifest.loras]
    lines += _controlnet_lines({each.component: each.name for each in bundle.manifest.controlnets})
    lines += _told_sampler(bundle.manifest.base.scheduler)
    total = sum(file.size for file in bundle.manifest.files) / 2**20
    lines.append(f"{bundle.root}: {total:.1f} MiB in {told['seconds']:.0f} s")
    if told["note"]:
        lines.append(f"note: {one_line(told['note'])}")
    lines += read_report(bundle.root).lines() if (bundle.root / VERIFY_FILE).is_file() else []
    if bundle.manifest.base.unet in bundle.manifest.components:
        lines.append(f'next: trt-generate "a prompt" --engines {shell_word(bundle.root)}')
    return lines


def export_progress(line: ProgressLine) -> ExportProgress:
    """Return a function that shows an export on `line`: bytes of weights, over all components."""

    def show(event: ExportEvent) -> None:
        text = f"[{event.index}/{event.count}] {event.component}: {event.stage}"
        line.draw("export", text, event.written, event.total, unit="B")

    return show


_MIB = 2**20


def _for_loras(lora_rank: int) -> str:
    """Return the words that tell a plan for LoRAs from the other plan of its component; "" for that one."""
    return f"; for LoRAs of rank up to {lora_rank}" if lora_rank else ""


def of_jobs(jobs: Sequence[PlanJob]) -> Output:
    """Return what building plans would do, and why."""
    parts = [
        {
            "component": job.component,
            "action": "build" if job.record is None else "keep",
            "reasons": list(job.reasons),
            "key": job.key.digest(),
            "lora_rank": job.key.lora_rank,
        }
        for job in jobs
    ]
    lines = [
        f"  {job.component:<24} {'build' if job.record is None else 'keep':<6} {'; '.join(job.reasons)}".rstrip()
        + _for_loras(job.key.lora_rank)
        for job in jobs
    ]
    return Output([*lines, "no plan was built"], {"dry_run": True, "plans": parts})


def of_plans(bundle: Bundle, flavour: Flavour, seconds: float) -> Output:
    """Return which plans of `flavour` the bundle has, built or kept in `seconds`."""
    records = [record for record in bundle.manifest.plans if record.key.environment.flavour == flavour]
    parts = [
        {
            "component": record.key.component,
            "flavour": flavour,
            "bytes": record.file.size,
            "activations": record.memory.activations,
            "seconds": record.seconds,
            "key": record.key.digest(),
            "gpu": record.key.environment.gpu,
            "lora_rank": record.key.lora_rank,
        }
        for record in records
    ]
    lines = [
        f"  {record.key.component:<24} {flavour:<12} {record.file.size / _MIB:9.1f} MiB, activations"
        f" {record.memory.activations / _MIB:8.1f} MiB, built in {record.seconds:.0f} s"
        f"{_for_loras(record.key.lora_rank)}"
        for record in records
    ]
    total = sum(record.file.size for record in records) / _MIB
    lines.append(f"{bundle.root}: {len(records)} {flavour} plans, {total:.1f} MiB, in {seconds:.0f} s")
    lines.append(f'next: trt-generate "a prompt" --engines {shell_word(bundle.root)} --provider {flavour}')
    return Output(
        lines, {"bundle": str(bundle.root), "plans": parts, "plan_seconds": seconds, "onnx": bundle.manifest.onnx}
    )
