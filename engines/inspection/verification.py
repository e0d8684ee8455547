"""Compare the plans of a bundle with ONNX Runtime on the graphs that they were built from."""

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
    """How far every output is from the reference's; `skipped` maps components without a reference to the reason."""

    left: str = ""
    right: str = REFERENCE
    agreements: list[Agreement] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def worst(self) -> list[tuple[Agreement, int]]:
        """Return, for every component, the output with the largest error, and the number of its outputs."""
        parts: dict[str, list[Agreement]] = {}
        for each in self.agreements:
            parts.setdefault(each.component, []).append(each)
        return [(max(outputs, key=_badness), len(outputs)) for outputs in parts.values()]

    def require(self) -> None:
        """Raise VerificationError if any output differs; the message names every one."""
        wrong = [each for each in self.agreements if not each.passed]
        if wrong:
            differences = "; ".join(
                f"{each.component} {each.output}: largest error {each.max_abs:.2g} ({each.allowed:.2g} allowed), cosine"
                f" {each.cosine:.6f} ({each.required:.6f} required)"
                for each in wrong
            )
            raise VerificationError(f"{self.left} differs from {self.right}: {differences}; build the plans again, and"
                                    " report it if it persists")  # fmt: skip

    def json(self) -> dict[str, Any]:
        """Return the record as JSON data."""
        return {"left": self.left, "right": self.right, "agreements": self.agreements, "skipped": self.skipped}


def _badness(each: Agreement) -> tuple[bool, float]:
    share = each.max_abs / each.allowed if each.allowed else each.max_abs
    return not each.passed, math.inf if math.isnan(share) else share


def verify_plans(bundle: Bundle, progress: Callable[[str], None] | None = None) -> Verification:
    """Compare every plan of the flavour that runs here with ONNX Runtime's CPU provider.

    `progress` is called with each component before it runs. Raises UsageError for a bundle without plans,
    IncompatibleError if plans cannot run here or the bundle has no graphs, and what engines raise.
    """
    manifest = bundle.manifest
    if not manifest.plans:
        raise UsageError(f"{bundle.root}: has no plans to verify; build them with: export-engines --engine tensorrt"
                         f" --out {shell_word(bundle.root)}")  # fmt: skip
    if not manifest.onnx:
        raise IncompatibleError(f"{bundle.root}: contains only plans, and no graph to compare them with; verify the"
                                " bundle that they were built from")  # fmt: skip
    flavour = _flavour(bundle)
    here = [record for record in manifest.plans
            if record.key.component in manifest.components and record.key.environment.flavour == flavour]  # fmt: skip
    planned = dict.fromkeys(record.key.component for record in here if not record.for_loras)
    skipped = {
        name: f"it is bf16, which {REFERENCE} cannot run, and has no fp32 twin"
        for name in planned
        if reference_of(manifest, name, REFERENCE) is None
    }
    names = [name for name in planned if name not in skipped]
    skipped |= {f"{record.key.component} for LoRAs": "its inputs are LoRAs, and there is none to compare it with"
                for record in here if record.for_loras}  # fmt: skip
    return Verification(
        flavour, REFERENCE, compare_engines(bundle, names, flavour, REFERENCE, progress=progress), skipped
    )


def _flavour(bundle: Bundle) -> Flavour:
    """Return the first flavour of the bundle's plans that this machine can run; raise IncompatibleError if none."""
    from sdxl_trt.engines.backends.trt import current_environment  # noqa: PLC0415 - imports CUDA

    problems = []
    for flavour in dict.fromkeys(record.key.environment.flavour for record in bundle.manifest.plans):
        try:
            current_environment(flavour)
        except IncompatibleError as exc:
            problems.append(str(exc))
        else:
            return flavour
    raise IncompatibleError("; ".join(problems))
