"""What trt-bench measures: a bundle and its checkpoints, exported first if there is no bundle."""

__all__ = ["Subject", "bench_cache", "find_subject"]

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sdxl_trt.benchmarks.measure.processes import measure
from sdxl_trt.engines import CorruptError, IncompatibleError, ResourceError, SdxlTrtError, UsageError
from sdxl_trt.engines.bundle import Bundle, read_bundle
from sdxl_trt.engines.host import cache_folder
from sdxl_trt.mini import bundle_path

EMBEDDED = "mini"
_DIGITS = 16
_ERRORS: dict[int, type[SdxlTrtError]] = {
    error.exit_code: error for error in (UsageError, IncompatibleError, CorruptError, ResourceError)
}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """A bundle, the checkpoints that PyTorch loads ("" if unknown), and a cache folder for files derived from them.

    `name` and `model` are for the report and contain no local paths.
    """

    bundle: Bundle
    base: str
    refiner: str
    cache: Path
    name: str
    model: str

    @property
    def embedded(self) -> bool:
        """Whether this is the embedded pair, whose pictures can be scored."""
        return self.model == EMBEDDED


def bench_cache() -> Path:
    """Return trt-bench's folder in the user's cache."""
    return cache_folder() / "bench"


def find_subject(engines: Path | None, model: str | None, refiner: str | None, work: Path, say: Say) -> Subject:
    """Return the subject that ``--engines``, ``--model`` and ``--refiner`` name, by default the embedded pair.

    A model without a bundle is exported in fp32 by export-engines, as a separate process, into `work`, and kept. A
    bundle alone has no checkpoint to compare with. Raises UsageError, and whatever reading and exporting raise.
    """
    if refiner is not None and model is None:
        raise UsageError("--refiner needs --model; give both")
    if engines is None and model is None:
        model, engines = EMBEDDED, bundle_path()
    if model is None:
        bundle = read_bundle(engines or bundle_path())
        return _subject(bundle, "", "", work, "")
    base, refiner_source = _sources(model, refiner, work)
    if engines is None:
        engines = _exported(model, refiner, work, say)
    return _subject(read_bundle(engines), base, refiner_source, work, model)


def _subject(bundle: Bundle, base: str, refiner: str, work: Path, model: str) -> Subject:
    # Keyed by the digests of the checkpoint's tensors: a cache folder is never shared by two models.
    parts = bundle.manifest.components
    key = _digest(sorted(f"{name} {parts[name].source.sha256}" for name in parts))
    name = "the embedded pair's" if bundle.root == bundle_path() else bundle.root.name
    shown = Path(model).name if "/" in model and Path(model).exists() else model
    return Subject(bundle, base, refiner if bundle.manifest.refiner else "", work / key, name, shown)


def _sources(model: str, refiner: str | None, work: Path) -> tuple[str, str]:
    """Return the sources for PyTorch; the embedded pair is first written as two folders."""
    if model != EMBEDDED:
        return model, refiner or ""
    try:
        from sdxl_trt.mini import materialize  # noqa: PLC0415 - needs safetensors, which the runtime does not
    except ImportError:
        return "", ""
    base, refined = materialize(work / EMBEDDED)
    return str(base), str(refined) if refiner in (None, EMBEDDED) else str(refiner)


def _exported(model: str, refiner: str | None, work: Path, say: Say) -> Path:
    """Return the bundle of a model in `work`; export-engines does not rewrite an unchanged one."""
    target = work / "bundles" / _digest([model, refiner or ""])
    target.parent.mkdir(parents=True, exist_ok=True)
    with_refiner = ["--refiner", refiner] if refiner else [] if model == EMBEDDED else ["--no-refiner"]
    command = [sys.executable, "-m", "sdxl_trt.export.cli", "--base", model, *with_refiner, "--fp32"]
    say(f"exporting {model}")
    done = measure([*command, "--engine", "none", "--out", str(target)])
    if not done.ok:
        last = done.output.rpartition("\n")[2].removeprefix("error: ")
        raise _ERRORS.get(done.exit_code, SdxlTrtError)(last or f"{model}: the export ended with {done.exit_code}")
    return target


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:_DIGITS]
