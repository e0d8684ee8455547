"""A1111's names of samplers and schedules, and what each of them is here."""

__all__ = ["DEFAULT_SAMPLER", "SAMPLERS", "SCHEDULERS", "Chosen", "SamplerKind", "SchedulerKind", "choose"]

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sdxl_trt.server.a1111.body.fields import invalid
from sdxl_trt.server.http import ApiError

DEFAULT_SAMPLER = "Euler"
"""A1111's own for requests that name none."""
Compat = Literal["diffusers", "comfyui"]
_SEED = "the noise that it adds in its steps is ComfyUI's for the seed, not A1111's"


@dataclass(frozen=True)
class SamplerKind:
    """A sampler: A1111's label, our name in ComfyUI's way, and the label of its usual schedule.

    `grid` is our schedule for samplers that take no other. `note` says where its pictures differ from A1111's, "" if
    they do not. `options` are what A1111's menu says of it.
    """

    label: str
    name: str
    aliases: tuple[str, ...]
    usual: str = "Automatic"
    grid: str = ""
    note: str = ""
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def told(self) -> dict[str, object]:
        """Return the options that A1111's menu has of it."""
        return {**({} if self.usual == "Automatic" else {"scheduler": self.usual.lower()}), **self.options}

    @property
    def two_calls(self) -> bool:
        """Return whether it asks the model twice in a step."""
        return bool(self.options.get("second_order"))

    @property
    def adds_noise(self) -> bool:
        """Return whether `eta` is a setting of it, whose usual value is 1."""
        return "uses_ensd" in self.options or "brownian_noise" in self.options


_TWICE, _ANCESTRAL, _BROWNIAN = {"second_order": True}, {"uses_ensd": True}, {"brownian_noise": True}
SAMPLERS = (
    SamplerKind("DPM++ 2M", "dpmpp_2m", ("k_dpmpp_2m",), "Karras"),
    SamplerKind("DPM++ SDE", "dpmpp_sde", ("k_dpmpp_sde",), "Karras", options=_TWICE | _BROWNIAN),
    SamplerKind("DPM++ 2M SDE", "dpmpp_2m_sde", ("k_dpmpp_2m_sde",), "Exponential", options=_BROWNIAN),
    SamplerKind("DPM++ 2S a", "dpmpp_2s_ancestral", ("k_dpmpp_2s_a",), "Karras", note=_SEED,
                options=_ANCESTRAL | _TWICE),
    SamplerKind("DPM++ 3M SDE", "dpmpp_3m_sde", ("k_dpmpp_3m_sde",), "Exponential",
                note="it takes every sigma of its schedule, where A1111 leaves out the last but one",
                options={"discard_next_to_last_sigma": True} | _BROWNIAN),
    SamplerKind("Euler a", "euler_ancestral", ("k_euler_a", "k_euler_ancestral"), note=_SEED, options=_ANCESTRAL),
    SamplerKind("Euler", "euler", ("k_euler",)),
    SamplerKind("LMS", "lms", ("k_lms",)),
    SamplerKind("Heun", "heun", ("k_heun",), options=_TWICE),
    SamplerKind("DPM2", "dpm_2", ("k_dpm_2",), "Karras", options={"discard_next_to_last_sigma": True} | _TWICE),
    SamplerKind("DPM2 a", "dpm_2_ancestral", ("k_dpm_2_a",), "Karras", note=_SEED,
                options={"discard_next_to_last_sigma": True} | _ANCESTRAL | _TWICE),
    SamplerKind("DDIM", "ddim", ("ddim",), grid="ddim_uniform",
                note="it takes one step more than A1111's, to no noise at all"),
    SamplerKind("UniPC", "uni_pc", ("unipc",), grid="normal", note="it is ComfyUI's uni_pc, on the schedule normal"),
    SamplerKind("LCM", "lcm", ("k_lcm",), note="it is ComfyUI's, on the schedule that is asked for"),
)  # fmt: skip


@dataclass(frozen=True)
class SchedulerKind:
    """A schedule: A1111's name and label, and ours in the way that has it."""

    name: str
    label: str
    schedule: str
    aliases: tuple[str, ...] = ()
    compat: Compat = "comfyui"
    default_rho: float = -1.0
    need_inner_model: bool = False


SCHEDULERS = (
    SchedulerKind("automatic", "Automatic", "normal"),
    SchedulerKind("uniform", "Uniform", "normal", need_inner_model=True),
    SchedulerKind("karras", "Karras", "karras", default_rho=7.0),
    SchedulerKind("exponential", "Exponential", "exponential"),
    # At its usual rho of 1 it is the exponential one.
    SchedulerKind("polyexponential", "Polyexponential", "exponential", default_rho=1.0),
    SchedulerKind("sgm_uniform", "SGM Uniform", "sgm_uniform", ("SGMUniform",), need_inner_model=True),
    SchedulerKind("simple", "Simple", "simple", need_inner_model=True),
    SchedulerKind("normal", "Normal", "normal", need_inner_model=True),
    SchedulerKind("ddim", "DDIM", "ddim_uniform", ("ddim_uniform",), need_inner_model=True),
    # A1111 and diffusers take quantiles of the sigmas, ComfyUI of the timesteps.
    SchedulerKind("beta", "Beta", "linspace+beta", compat="diffusers", need_inner_model=True),
)
_ELSEWHERE = ("kl optimal", "kl_optimal", "align your steps", "align_your_steps", "karras exponential",
              "karras_exponential", "turbo", "align your steps gits", "align_your_steps_gits")  # fmt: skip
"""Schedules of A1111 and its forks that are not here."""


@dataclass(frozen=True)
class Chosen:
    """A sampler and its schedule; `schedule` and `compat` are for a Request."""

    sampler: SamplerKind
    scheduler: SchedulerKind
    schedule: str
    compat: Compat


def _schedulers() -> dict[str, SchedulerKind]:
    return {known.lower(): kind for kind in SCHEDULERS for known in (kind.name, kind.label, *kind.aliases)}


def choose(sampler: str, scheduler: str) -> Chosen:
    """Return what two names of A1111 mean together, as its own code reads them; case does not matter.

    The sampler's name may end in a schedule's, which then wins over `scheduler`; without any, the sampler's usual one
    counts. Raises ApiError: 404 for an unknown name, 422 for a schedule that is not here.
    """
    known = _schedulers()
    asked, name = scheduler.strip().lower(), sampler.strip().lower()
    for each in sorted(known, key=len, reverse=True):
        if name.endswith(f" {each}"):
            asked, name = each, name.removesuffix(f" {each}")
            break
    kinds = {alias.lower(): kind for kind in SAMPLERS for alias in (kind.label, *kind.aliases)}
    if name not in kinds:
        raise ApiError(404, "Sampler not found", "not_found", param="sampler_name")
    kind = kinds[name]
    if asked in _ELSEWHERE:
        raise invalid("scheduler", f"is not here; choose one of: {', '.join(each.label for each in SCHEDULERS)}")
    if asked and asked not in known:
        raise ApiError(404, "Scheduler not found", "not_found", param="scheduler")
    found = known[asked or "automatic"]
    used = known[kind.usual.lower()] if found.name == "automatic" else found
    if kind.grid:
        return Chosen(kind, known["automatic"], kind.grid, "comfyui")
    return Chosen(kind, found, used.schedule, used.compat)
