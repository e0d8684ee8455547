"""The plans of a bundle held against ONNX Runtime on the graphs that they were built from."""

__all__ = ["Verification", "verify_plans"]

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sdxl_trt.engines.bundle import Bundle, Flavour
from sdxl_trt.engines.errors import IncompatibleError, UsageError, VerificationError
from sdxl_trt.engines.host import shell_word
from sdxl_trt.engines.inspection.compare import Agreement, compare_engines, reference_of

REFERENCE = "ort-cpu"


@dataclass(frozen=True)
class Verification:
    """How far every output is from the reference's; `skipped` names the components that have none, and why."""

    left: str = ""
    right: str = REFERENCE
    agreements: list[Agreement] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def worst(self) -> list[tuple[Agreement, int]]:
        """Return, for every component, the output that is farthest off, and how many outputs it has."""
        parts: dict[str, list[Agreement]] = {}
        for each in self.agreements:
            parts.setdefault(each.component, []).append(each)
        return [(max(outputs, key=_badness), len(outputs)) for outputs in parts.values()]

    def require(self) -> None:
        """Raise VerificationError that names every output that differs."""
        wrong = [each for each in self.agreements if not each.passed]
        if wrong:
            told = "; ".join(
                f"{each.component} {each.output}: largest error {each.max_abs:.2g} ({each.allowed:.2g} allowed), cosine"
                f" {each.cosine:.6f} ({each.required:.6f} required)"
                for each in wrong
            )
            raise VerificationError(f"{self.left} differs from {self.right}: {told}; build the plans again, and report"
                                    " it if it stays")  # fmt: skip

    def json(self) -> dict[str, Any]:
        """Return all of it for programs."""
        return {"left": self.left, "right": self.right, "agreements": self.agreements, "skipped": self.skipped}


def _badness(each: Agreement) -> tuple[bool, float]:
    share = each.max_abs / each.allowed if each.allowed else each.max_abs
    return not each.passed, math.inf if math.isnan(share) else share


def verify_plans(bundle: Bundle, progress: Callable[[str], None] | None = None) -> Verification:
    """Compare every plan of the flavour that runs here with ONNX Runtime's CPU provider.

    `progress` is told each component before it is run. Raises UsageError for a bundle without plans,
    IncompatibleError where plans cannot run here or graphs are not in the bundle, and what engines raise.
    """
    manifest = bundle.manifest
    if not manifest.plans:
        raise UsageError(f"{bundle.root}: has no plans to verify; build them with: export-engines --engine tensorrt"
                         f" --out {shell_word(bundle.root)}")  # fmt: skip
    if not manifest.onnx:
        raise IncompatibleError(f"{bundle.root}: holds plans alone, and there is no graph to compare them with; verify"
                                " the bundle that they were built from")  # fmt: skip
    flavour = _flavour(bundle)
    keys = [record.key for record in manifest.plans if record.key.component in manifest.components]
    planned = dict.fromkeys(key.component for key in keys if key.environment.flavour == flavour)
    skipped = {
        name: f"it is bf16, which {REFERENCE} cannot run, and has no fp32 twin"
        for name in planned
        if reference_of(manifest, name, REFERENCE) is None
    }
    names = [name for name in planned if name not in skipped]
    return Verification(
        flavour, REFERENCE, compare_engines(bundle, names, flavour, REFERENCE, progress=progress), skipped
    )


def _flavour(bundle: Bundle) -> Flavour:
    """Return the flavour of the bundle's plans that this machine has a library for, or raise why there is none."""
    from sdxl_trt.engines.backends.trt import current_environment  # noqa: PLC0415 - reaches for CUDA

    problems = []
    for flavour in dict.fromkeys(record.key.environment.flavour for record in bundle.manifest.plans):
        try:
            current_environment(flavour)
        except IncompatibleError as exc:
            problems.append(str(exc))
        else:
            return flavour
    raise IncompatibleError("; ".join(problems))
