"""All checks, the most important first: time may run out."""

__all__ = ["Check", "all_checks"]

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sdxl_trt.benchmarks.gpu_check.checks import graphs, memory, pictures, plans, sizes, timing
from sdxl_trt.benchmarks.gpu_check.checks.findings import Finding
from sdxl_trt.benchmarks.gpu_check.checks.workplace import Workplace
from sdxl_trt.benchmarks.measure import FLAVOURS
from sdxl_trt.engines.backends.ort import ORT_PROVIDERS
from sdxl_trt.engines.bundle import Flavour

MINUTE = 60.0
_BUILD = 60 * MINUTE
"""A build may take what is left of the time."""
_REFERENCE = 15 * MINUTE
"""The most for a check that computes its reference on the CPU."""
_STAGES = ("base", "refiner")


@dataclass(frozen=True)
class Check:
    """A named check. `run` returns what it found, or raises Skipped, Failed, or any other error.

    `needs` is an estimate of its seconds at SDXL's size: it is not started with less time left. It is killed after
    `most` seconds. Without an `essential` check, no other of its provider can run.
    """

    name: str
    run: Callable[[Workplace], Finding]
    needs: float = 15.0
    most: float = 5 * MINUTE
    essential: bool = False

    @property
    def provider(self) -> str:
        """Return the provider that it checks: the beginning of its name."""
        return self.name.partition(":")[0]


def all_checks(*, compared: bool = False) -> list[Check]:
    """Return the checks in order; later ones use what earlier ones built.

    `compared`: an earlier run has built plans of the second export, so that comparing operator sets takes a minute.

    Each flavour of TensorRT has its own, then come ONNX Runtime's providers for GPUs, then what takes most time.
    """
    first = [check for flavour in FLAVOURS for check in _first(flavour)]
    rest = [check for flavour in FLAVOURS for check in _rest(flavour)]
    kernels = Check("tensorrt-rtx: compiled kernels are kept", pictures.kernel_cache)
    providers = [
        Check(
            f"{provider}: a whole picture matches ort-cpu", partial(pictures.onnxruntime, provider), MINUTE, _REFERENCE
        )
        for provider in ORT_PROVIDERS
        if provider != "ort-cpu"
    ]
    needs = MINUTE if compared else 8 * MINUTE
    eight_bits = [_check(flavour, "8 bits against fp16", timing.eight_bits, 8 * MINUTE, _BUILD) for flavour in FLAVOURS]
    last = [_check(flavour, "two operator sets", timing.operator_sets, needs, _BUILD) for flavour in FLAVOURS]
    return [*first, *providers, *rest, kernels, *eight_bits, *last]


Run = Callable[[Flavour, Workplace], Finding]


def _check(flavour: Flavour, name: str, run: Run, needs: float = 15.0, most: float = 5 * MINUTE) -> Check:
    return Check(f"{flavour}: {name}", partial(run, flavour), needs, most)


def _first(flavour: Flavour) -> list[Check]:
    """Return the checks without which no other means anything: libraries, plans, a whole picture."""
    builds = [
        _check(flavour, f"plans are built: {group}", partial(plans.build, group), MINUTE, _BUILD)
        for group in plans.GROUPS
    ]
    return [
        Check(f"{flavour}: the bindings import", partial(plans.bindings, flavour), needs=5, essential=True),
        _check(flavour, "the environment is known", plans.environment, 5),
        *builds,
        _check(flavour, "plans load and unload", plans.load, 30),
        _check(flavour, "a whole picture matches ort-cpu", pictures.picture, 90, _REFERENCE),
    ]


def _rest(flavour: Flavour) -> list[Check]:
    matches = [
        _check(
            flavour,
            f"every component matches ONNX Runtime: {group}",
            partial(plans.components, group),
            MINUTE,
            _REFERENCE,
        )
        for group in plans.GROUPS
    ]
    return [
        _check(flavour, "CUDA graphs are used", graphs.graphs_are_used),
        _check(flavour, "with and without CUDA graphs, the same latents", graphs.captured_against_uncaptured, 20),
        _check(flavour, "an engine loads while another captures", graphs.loading_during_captures, 20),
        _check(flavour, "residencies give the same picture", pictures.residencies, 30),
        _check(flavour, "one change of UNets", pictures.one_swap),
        _check(flavour, "memory is what was planned", memory.planned_memory),
        *_of_stages(flavour, "fused attention", plans.fused_attention, 5),
        _check(flavour, "plans over 2 GiB load", plans.large_plans, 20),
        _check(flavour, "time per step", timing.step_times, 20),
        _check(flavour, "the handoff", timing.handoff, 40),
        *_of_stages(flavour, "guidance on and off", sizes.guidance_changes, 20),
        *_of_stages(flavour, "profiles of one plan agree", sizes.static_against_range, 20),
        _check(flavour, "the same plan gives the same latents", pictures.determinism),
        *_of_stages(flavour, "half of the weights streamed", memory.streaming_half, 20),
        *matches,
        *_of_stages(flavour, "sizes off the optimum", sizes.sizes_off_the_optimum, 90, _REFERENCE),
        *_of_stages(flavour, "154 and 231 tokens", sizes.prompt_lengths, 45, _REFERENCE),
    ]


def _of_stages(
    flavour: Flavour,
    name: str,
    run: Callable[[str, Flavour, Workplace], Finding],
    needs: float,
    most: float = 5 * MINUTE,
) -> list[Check]:
    return [_check(flavour, f"{name}: {stage} UNet", partial(run, stage), needs, most) for stage in _STAGES]
