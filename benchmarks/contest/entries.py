"""Convert a contest's results to the records of a report."""

__all__ = ["contestant", "measurement"]

from sdxl_trt.benchmarks.contest.inputs import unet_rows
from sdxl_trt.benchmarks.contest.turns import Entrant, Turns
from sdxl_trt.benchmarks.contestants import Ask, Ran, Spec
from sdxl_trt.benchmarks.report import Contestant, Measurement

PICTURE = "picture"


def contestant(entrant: Entrant, device: str) -> Contestant:
    """Return the record of a contestant, also for one that could not run."""
    ready, memory = entrant.ready, entrant.memory
    return Contestant(
        name=entrant.name,
        title=entrant.entry.title,
        precision=ready.precision if ready else "",
        device=device,
        missing=entrant.missing,
        versions=ready.versions if ready else {},
        command=entrant.command,
        import_seconds=ready.import_seconds if ready else None,
        load_seconds=ready.load_seconds if ready else None,
        compile_seconds=ready.compile_seconds if ready else None,
        peak_rss=memory.peak_rss if memory else None,
        peak_gpu=entrant.gpu_peak if memory is None or memory.peak_gpu is None else memory.peak_gpu,
        not_run=entrant.not_run,
        note=ready.note if ready else "",
    )


def measurement(
    entrant: Entrant, task: str, turns: Turns, spec: Spec, *, reference: str = "", ask: Ask | None = None,
    sweep: str = "",
) -> Measurement:  # fmt: skip
    """Return the record of one contestant's turns; `ask` holds the settings that a `sweep` replaced in the spec."""
    answers = turns.answers[entrant.name]
    asked = ask or Ask(do="run", task=task)
    batch = asked.batch or spec.batch
    pictures, single = task == PICTURE, task == "VAE decode"
    handoff = spec.handoff if asked.handoff == "spec" else None if asked.handoff == "none" else asked.handoff
    return Measurement(
        contestant=entrant.name,
        what=task,
        width=asked.width or spec.width,
        height=asked.height or spec.height,
        batch=1 if single else batch,
        seconds=tuple(one.seconds for one in answers),
        rows=unet_rows(batch, spec.guidance) if task.endswith("UNet step") else None,
        pictures=batch if pictures else None,
        joules=turns.joules.get(entrant.name),
        stages=_middle(answers).stages,
        handoff=handoff if pictures else None,
        sweep=sweep,
        difference=turns.difference(entrant.name, reference),
    )


def _middle(answers: list[Ran]) -> Ran:
    """Return the run of median length; of two middle runs the shorter."""
    return sorted(answers, key=lambda one: one.seconds)[(len(answers) - 1) // 2]
