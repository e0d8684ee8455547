"""What export-engines tells of plans: the jobs of a dry run, a line while they are built, what came of it."""

__all__ = ["of_jobs", "of_plans", "progress_bar"]

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from sdxl_trt.engines.build.jobs import PlanJob
from sdxl_trt.engines.build.messages import BuildEvent
from sdxl_trt.engines.bundle.bundle import Bundle
from sdxl_trt.engines.bundle.plan_record import Flavour
from sdxl_trt.engines.host.console import CLEAR_LINE, Told
from sdxl_trt.engines.host.paths import shell_word

_INTERVAL, _WIDTH = 0.1, 20
_MIB = 2**20


def of_jobs(jobs: Sequence[PlanJob]) -> Told:
    """Return what building plans would do, and why."""
    parts = [
        {
            "component": job.component,
            "action": "build" if job.record is None else "keep",
            "reasons": list(job.reasons),
            "key": job.key.digest(),
        }
        for job in jobs
    ]
    lines = [f"  {part['component']:<24} {part['action']:<6} {'; '.join(part['reasons'])}".rstrip() for part in parts]
    return Told([*lines, "no plan was built"], {"dry_run": True, "plans": parts})


def of_plans(bundle: Bundle, flavour: Flavour, seconds: float) -> Told:
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
        }
        for record in records
    ]
    lines = [
        f"  {record.key.component:<24} {flavour:<12} {record.file.size / _MIB:9.1f} MiB, activations"
        f" {record.memory.activations / _MIB:8.1f} MiB, built in {record.seconds:.0f} s"
        for record in records
    ]
    total = sum(record.file.size for record in records) / _MIB
    lines.append(f"{bundle.root}: {len(records)} {flavour} plans, {total:.1f} MiB, in {seconds:.0f} s")
    lines.append(f'next: trt-generate "a prompt" --engines {shell_word(bundle.root)} --provider {flavour}')
    return Told(
        lines, {"bundle": str(bundle.root), "plans": parts, "plan_seconds": seconds, "onnx": bundle.manifest.onnx}
    )


@contextlib.contextmanager
def progress_bar(stream: TextIO) -> Iterator[Callable[[BuildEvent], None] | None]:
    """Yield what keeps one line on a terminal up to date while plans are built; None on anything else."""
    if not stream.isatty():
        yield None
        return
    shown = 0.0

    def show(event: BuildEvent) -> None:
        nonlocal shown
        if time.monotonic() - shown >= _INTERVAL:
            shown = time.monotonic()
            stream.write(CLEAR_LINE + _line(event))
            stream.flush()

    try:
        yield show
    finally:
        stream.write(CLEAR_LINE)
        stream.flush()


def _line(event: BuildEvent) -> str:
    full = int((event.share or 0.0) * _WIDTH)
    bar = "█" * full + "░" * (_WIDTH - full)
    memory = f", {event.resident / 1e9:.1f} GB" if event.resident else ""
    return f"{bar} {event.component}: {event.phase} ({event.seconds:.0f} s{memory})"
