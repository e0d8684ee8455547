"""The sections of trt-bench's report in order: bars, timings, preparation, cold start, quality, failures, setup."""

__all__ = ["bars_words", "machine_words", "sections", "settings_words"]

import math
import shlex
from collections.abc import Iterator

from sdxl_trt.benchmarks.measure import NOT_MEASURED, VERDICTS
from sdxl_trt.benchmarks.report.document import Section, Table, without_empty
from sdxl_trt.benchmarks.report.gpu import gpu_section
from sdxl_trt.benchmarks.report.quantities import memory, significant, time_unit, times
from sdxl_trt.benchmarks.report.records import BenchReport, BenchSettings, Contestant, Quality
from sdxl_trt.benchmarks.report.timed import PICTURE, labels, our_names, spread_words, stage_table, task_tables, tasks


def sections(report: BenchReport) -> list[Section]:
    """Return the non-empty sections of `report`, in reading order."""
    found = [
        _bars(report), _pictures(report), _parts(report), gpu_section(report), _ready(report), _cold(report),
        _quality(report), _missing(report), _notes(report), _how(report),
    ]  # fmt: skip
    return [section for section in found if not section.empty]


def _bars(report: BenchReport) -> Section:
    rows = tuple((bar.what, bar.bar, bar.value, VERDICTS[bar.met]) for bar in report.bars)
    table = Table(("", "bar", "measured", "met"), rows, words=4, verdict=True)
    return Section("bars", "Bars", (f"{bars_words(report)}.",), (table,) if rows else ())


def bars_words(report: BenchReport) -> str:
    """Return a phrase with the numbers of bars met, missed and not measured."""
    verdicts = [bar.met for bar in report.bars]
    others = [("missed", verdicts.count(False)), (NOT_MEASURED, verdicts.count(None))]
    met = f"{verdicts.count(True)} of {len(verdicts)} bars met"
    return ", ".join([met, *(f"{count} {word}" for word, count in others if count)])


def _pictures(report: BenchReport) -> Section:
    about = (
        f"{settings_words(report.settings)}. Prompt to pixels, after {_count(report.settings.warmups, 'warm-up')}; "
        "importing, loading and compiling are not included: see “Before the first run”."
    )
    tables = [*task_tables(report, PICTURE), stage_table(report)]
    return Section("pictures", "End to end", (about, _reading(report)), tuple(table for table in tables if table))


def _reading(report: BenchReport) -> str:
    """Return an explanation of the columns that `report` has."""
    words = ["The spread is half the interquartile range."]
    if report.ratios:
        words.append(
            "Contestants took turns in every round: a ratio is the median over the rounds' ratios, with the span of "
            "the middle eight of ten in parentheses; below 1, the contestant named in the column is faster than the "
            "row's."
        )
    if any(one.difference is not None for one in report.measurements):
        words.append(
            "The largest difference is that of the output from PyTorch's (if it did not run: from ours), as a fraction "
            "of its largest value."
        )
    return " ".join(words)


def _parts(report: BenchReport) -> Section:
    tables = [table for what in tasks(report) if what != PICTURE for table in task_tables(report, what)]
    reading = _reading(report)
    floors = (
        "A floor is the time of the task's multiply-adds at the peak GEMM rate measured in the same run: "
        "a step that does nothing else and reaches that rate is at 1×."
    )
    return Section("parts", "Part by part", (reading, floors) if report.floors else (reading,), tuple(tables))


def _ready(report: BenchReport) -> Section:
    named, ours = labels(report), our_names(report)
    there = [one for one in report.contestants if not one.missing]
    rows = [
        [
            named[one.name],
            *("" if taken is None else time_unit([taken]).show(taken) for taken in _getting_ready(one)),
            *("" if size is None else memory(size) for size in (one.peak_rss, one.peak_gpu)),
        ]
        for one in there
    ]
    head, filled = without_empty(["", "importing", "loading", "compiling", "peak RSS", "peak GPU"], rows)
    table = Table(head, filled, ours=frozenset(number for number, one in enumerate(there) if one.name in ours))
    says = "One-time cost of each contestant, in its own process. The peaks are over the whole life of that process."
    return Section("ready", "Before the first run", (says,), (table,) if len(head) > 1 else ())


def _getting_ready(one: Contestant) -> tuple[float | None, float | None, float | None]:
    return one.import_seconds, one.load_seconds, one.compile_seconds


def _cold(report: BenchReport) -> Section:
    there = [one for one in report.cold_starts if one.seconds and not one.missing]
    if not there:
        return Section("cold", "Cold start")
    first = there[0]
    unit = time_unit(one.median for one in there)
    rows = tuple(
        (
            one.name, unit.show(one.median), spread_words(one) or "–", str(len(one.seconds)),
            times(first.median / one.median) if one.median else "–", memory(one.peak_rss),
            times(first.peak_rss / one.peak_rss) if one.peak_rss else "–",
        )
        for one in there
    )  # fmt: skip
    head = ("", "median", "spread", "runs", f"{first.name} / this", "peak RSS", f"memory, {first.name} / this")
    says = "From command to first picture: starting, importing, loading, compiling if needed, and drawing."
    commands = tuple((one.name, shlex.join(one.command)) for one in there if one.command)
    return Section("cold", "Cold start", (says,), (Table(head, rows, ours=frozenset({0})),), commands=commands)


def _quality(report: BenchReport) -> Section:
    rows = [
        [
            one.variant,
            one.stage,
            _psnr(one),
            "" if one.ssim is None else f"{one.ssim:.4f}",
            "" if one.score is None else significant(one.score),
            "" if one.limit is None else f">= {one.limit:.1f} dB",
            "" if one.missing and one.passed else "yes" if one.passed else "no",
        ]
        for one in report.quality
    ]
    head, filled = without_empty(["variant", "stage", "PSNR", "SSIM", "prompt score", "limit", "passed"], rows)
    says = "Against PyTorch fp32 at the same noise, by stage; “equal” means bit for bit. Prompt score: see mini/score/."
    return Section("quality", "Quality", (says,), (Table(head, filled, words=2, verdict=True),) if rows else ())


def _psnr(one: Quality) -> str:
    """Return a PSNR as text. JSON has no infinity: None means equal if the row passed, else not finite."""
    if one.missing:
        return ""
    if one.psnr is None:
        return "equal" if one.passed else "not finite"
    return f"{one.psnr:.1f} dB" if math.isfinite(one.psnr) else "not finite"


def _missing(report: BenchReport) -> Section:
    named = labels(report)
    rows = [(named[one.name], "everything", one.missing) for one in report.contestants if one.missing]
    rows += [(named[one.name], what, why) for one in report.contestants for what, why in one.not_run.items()]
    rows += [(one.name, "cold start", one.missing) for one in report.cold_starts if one.missing]
    rows += [(one.variant, "quality", one.missing) for one in report.quality if one.missing]
    table = Table(("", "task", "reason"), tuple(rows), words=3)
    return Section("missing", "What could not run", tables=(table,) if rows else ())


def _notes(report: BenchReport) -> Section:
    named = labels(report)
    own = [f"{named[one.name]}: {one.note}" for one in report.contestants if one.note]
    return Section("notes", "Notes", points=(*report.notes, *own))


def _how(report: BenchReport) -> Section:
    settings = report.settings
    asked = (
        f"{settings_words(settings)}, seed {settings.seed}, prompts of {settings.tokens} tokens, "
        f"{_count(settings.runs, 'run')} after {_count(settings.warmups, 'warm-up')}, "
        f"{_count(settings.threads, 'thread')}"
    )
    points = [
        f"Machine: {', '.join(_facts(report.machine))}.",
        f"Versions: {', '.join(f'{name} {version}' for name, version in report.versions.items())}.",
        f"Settings of every contestant: {asked}.",
        f"Prompt: {settings.prompt}",
    ]
    points += [f"{labels(report)[name]}: {words}." for name, words in _own_versions(report)]
    commands = [("This report", shlex.join(report.command))] if report.command else []
    commands += [(labels(report)[one.name], shlex.join(one.command)) for one in report.contestants if one.command]
    return Section("how", "How it was measured", points=tuple(points), commands=tuple(commands))


def _own_versions(report: BenchReport) -> Iterator[tuple[str, str]]:
    """Yield each contestant's versions that differ from the report's, by its name."""
    for one in report.contestants:
        own = {name: version for name, version in one.versions.items() if report.versions.get(name) != version}
        if own:
            yield one.name, ", ".join(f"{name} {version}" for name, version in own.items())


def _facts(machine: dict[str, str | int]) -> Iterator[str]:
    for name, value in machine.items():
        if name.endswith("_bytes") and isinstance(value, int):
            yield f"{name.removesuffix('_bytes')} {memory(value)}"
        else:
            yield f"{name.replace('_', ' ')} {value}"


def machine_words(machine: dict[str, str | int]) -> str:
    """Return a machine in a phrase: processor, cores, and the rates of matrix products if they were measured."""
    rates = [f"{name.replace('_', ' ')} {value}" for name, value in machine.items() if name.endswith("_GEMM")]
    words = [str(machine.get("processor", "an unknown processor")), f"{machine.get('cores', '?')} cores"]
    return ", ".join([*words, *rates])


def settings_words(settings: BenchSettings) -> str:
    """Return the settings as text: model, size, batch, steps, handoff and guidance."""
    handoff = "the base alone" if settings.handoff is None else f"handoff at {settings.handoff:g}"
    size = f"{settings.width}×{settings.height}"
    return (
        f"{settings.model}, {size}, {_count(settings.batch, 'picture')} at once, {_count(settings.steps, 'step')}, "
        f"{handoff}, guidance {settings.guidance:g}"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
