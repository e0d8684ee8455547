"""The report of a verification: ``verify.json`` beside the manifest, and a few lines for a terminal."""

__all__ = ["VERIFY_FILE", "Comparison", "ComponentReport", "VerifyCase", "VerifyReport", "read_report", "write_report"]

from collections.abc import Iterator
from pathlib import Path

import msgspec

from sdxl_trt.engines import VerificationError
from sdxl_trt.engines.host import atomic_write
from sdxl_trt.export.verify.metrics import Figures
from sdxl_trt.export.verify.overflow import Peak

VERIFY_FILE = "verify.json"


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """Frozen and keyword-only; every field is written, so that readers need no defaults."""


class Comparison(_Record, frozen=True, kw_only=True):
    """The worst output of `found` against `reference`, each "PyTorch fp32", "ONNX Runtime" and so on."""

    found: str
    reference: str
    figures: Figures


class VerifyCase(_Record, frozen=True, kw_only=True):
    """One call of a component with recorded inputs. `excess` is ONNX Runtime's distance from fp32 over PyTorch's."""

    title: str
    shapes: dict[str, tuple[int, ...]]
    comparisons: tuple[Comparison, ...]
    excess: float | None = None


class ComponentReport(_Record, frozen=True, kw_only=True):
    """A component's cases, its largest activations in fp32, its warnings and failures."""

    kind: str
    precision: str
    not_run: str
    """Why ONNX Runtime did not run it, or ""."""
    cases: tuple[VerifyCase, ...]
    peaks: tuple[Peak, ...]
    warnings: tuple[str, ...]
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Return whether nothing failed."""
        return not self.failures

    def worst(self) -> Iterator[Comparison]:
        """Yield the worst case's comparison for every compared pair."""
        pairs: dict[tuple[str, str], list[Comparison]] = {}
        for comparison in (each for case in self.cases for each in case.comparisons):
            pairs.setdefault((comparison.found, comparison.reference), []).append(comparison)
        for comparisons in pairs.values():
            yield min(comparisons, key=lambda each: each.figures.rank)


class VerifyReport(_Record, frozen=True, kw_only=True):
    """The whole of ``verify.json``."""

    generator: str
    versions: dict[str, str]
    seed: int
    passed: bool
    components: dict[str, ComponentReport]

    def lines(self) -> list[str]:
        """Return the report for a terminal: one line per comparison, then every warning and failure."""
        lines = []
        for name, part in self.components.items():
            for comparison in part.worst():
                pair = f"{comparison.found} - {comparison.reference}"
                lines.append(f"{name:<24} {pair:<28} {_line(comparison.figures)}")
            lines += [f"{name:<24} {part.not_run}"] if part.not_run else []
        for name, part in self.components.items():
            lines += [f"warning: {name}: {text}" for text in part.warnings]
            lines += [f"failed: {name}: {text}" for text in part.failures]
        return lines

    def require(self) -> None:
        """Raise VerificationError, naming the first component that failed and how many more did."""
        failed = [(name, part) for name, part in self.components.items() if not part.passed]
        if failed:
            name, part = failed[0]
            more = f" (and {len(failed) - 1} more components)" if len(failed) > 1 else ""
            raise VerificationError(f"{name}: {part.failures[0]}{more}")


def write_report(root: Path, report: VerifyReport) -> None:
    """Write ``verify.json`` into the bundle folder `root`, atomically and in a fixed order."""
    encoded = msgspec.json.format(msgspec.json.encode(report, order="deterministic"), indent=1)
    with atomic_write(root / VERIFY_FILE) as file:
        file.write(encoded + b"\n")


def read_report(root: Path) -> VerifyReport:
    """Read ``verify.json`` from the bundle folder `root`."""
    return msgspec.json.decode((root / VERIFY_FILE).read_bytes(), type=VerifyReport)


def _line(figures: Figures) -> str:
    if not figures.finite:
        return f"NaN or infinity in {figures.output}"
    psnr = "identical" if figures.psnr is None else f"PSNR {figures.psnr:5.1f} dB"
    return f"max abs {figures.max_abs:.2e} of {figures.peak:<8.3g} cosine {figures.cosine:.8f}  {psnr}"
