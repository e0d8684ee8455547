"""diffusers' scheduler classes: the equivalent sampler of each, and which of its settings that sampler follows.

Every setting of a class is followed, fixed (the sampler implements one value, any other causes a warning) or inert
(no value changes the result). A setting in none of the lists, from a later diffusers, causes a warning unless it has
the class's default. A class that is not listed is refused.
"""

__all__ = ["CLASSES", "FLOW", "SchedulerClass", "why_refused"]

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

FLOW = "use_flow_sigmas"
"""The setting that switches a class to flow matching's way of adding noise to latents."""

_TRAINING = frozenset(
    {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"}
)
_SPACED = _TRAINING | {"timestep_spacing", "steps_offset"}
_TRANSFORMED = _SPACED | {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"}
_EDM = frozenset({"sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho", "prediction_type"})

_OF_FLOW = dict.fromkeys(("flow_shift", "time_shift_type", "shift_terminal"), "read with use_flow_sigmas alone")
_OF_THRESHOLDING = dict.fromkeys(("dynamic_thresholding_ratio", "sample_max_value"), "read with thresholding alone")
_OF_CLIPPING = {"clip_sample_range": "read with clip_sample alone"}
_LEARNED = {"variance_type": (None,)}
_NO_THRESHOLDING: dict[str, tuple[Any, ...]] = {"thresholding": (False,)}
_NO_CLIPPING: dict[str, tuple[Any, ...]] = {"clip_sample": (False,)}


@dataclass(frozen=True)
class SchedulerClass:
    """How to replace a scheduler class of diffusers.

    `fixed` maps settings to the values with which `sampler` agrees, its own value first; other values of settings in
    `nearly` are followed approximately. `inert` maps settings to the reason why they have no effect. `instead` states
    what the class does if no sampler is equivalent; `forced` are settings for which the class has no field.
    """

    sampler: str
    followed: frozenset[str] = _TRANSFORMED
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    inert: Mapping[str, str] = field(default_factory=dict)
    nearly: frozenset[str] = frozenset()
    instead: str = ""
    forced: Mapping[str, Any] = field(default_factory=dict)

    def sampler_for(self, values: Mapping[str, Any]) -> str:
        """Return the sampler for these settings of the class: DPM-Solver's depends on `algorithm_type`."""
        stochastic = values.get("algorithm_type") == "sde-dpmsolver++"
        return "dpmpp_2m_sde" if self.sampler == "dpmpp_2m" and stochastic else self.sampler


_SOLVER_TYPES = ("midpoint", "logrho", "bh1", "bh2")  # DPM-Solver maps other classes' types to its own
_DPM = SchedulerClass(
    "dpmpp_2m",
    _TRANSFORMED | {"use_lu_lambdas", "rescale_betas_zero_snr"},
    {
        **_NO_THRESHOLDING, **_LEARNED, "solver_order": (2,), "solver_type": _SOLVER_TYPES,
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"), "final_sigmas_type": ("zero",),
        "lambda_min_clipped": (float("-inf"),), "use_dynamic_shifting": (False,), FLOW: (False,),
    },
    {
        **_OF_FLOW, **_OF_THRESHOLDING,
        "lower_order_final": "a step to sigma 0 is first order anyway, and the step before it second order",
        "euler_at_final": "a step to sigma 0 is first order anyway",
    },
)  # fmt: skip
_DDIM = SchedulerClass(
    "ddim",
    (_SPACED - {"timestep_spacing"}) | {"rescale_betas_zero_snr", "set_alpha_to_one"},
    # With other spacings diffusers' latents belong to a timestep next to the one that the model receives.
    {**_NO_THRESHOLDING, **_NO_CLIPPING, "timestep_spacing": ("leading",)},
    {**_OF_THRESHOLDING, **_OF_CLIPPING},
    frozenset({"timestep_spacing"}),
)
_LCM = SchedulerClass(
    "lcm",
    _TRAINING | {"rescale_betas_zero_snr", "original_inference_steps"},
    {**_NO_THRESHOLDING, **_NO_CLIPPING, "timestep_scaling": (10.0,)},
    {
        **_OF_THRESHOLDING, **_OF_CLIPPING,
        "timestep_spacing": "the timesteps are those of the distillation",
        "steps_offset": "the timesteps are those of the distillation",
        "set_alpha_to_one": "the class always ends at the estimate of the clean latents",
    },
)  # fmt: skip
_ANCESTRAL = SchedulerClass("euler_ancestral", _SPACED | {"rescale_betas_zero_snr"})
_KDPM2 = SchedulerClass("dpm_2")
_EDM_DPM = SchedulerClass(
    "dpmpp_2m",
    _EDM,
    {
        **_NO_THRESHOLDING, "solver_order": (2,), "solver_type": _SOLVER_TYPES, "final_sigmas_type": ("zero",),
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),
    },
    {**_OF_THRESHOLDING, **{name: _DPM.inert[name] for name in ("lower_order_final", "euler_at_final")},
     "num_train_timesteps": "the model receives the noise level"},
)  # fmt: skip
_DDPM = replace(
    _ANCESTRAL,
    followed=_ANCESTRAL.followed - {"timestep_spacing"},
    # With other spacings the initial noise has another scale, and timesteps are off as DDIM's.
    fixed={**_NO_THRESHOLDING, **_NO_CLIPPING, "variance_type": ("fixed_small",), "timestep_spacing": ("leading",)},
    inert={**_OF_THRESHOLDING, **_OF_CLIPPING},
    nearly=frozenset({"timestep_spacing"}),
)

CLASSES: dict[str, SchedulerClass] = {
    "EulerDiscreteScheduler": SchedulerClass(
        "euler",
        _TRANSFORMED | {"rescale_betas_zero_snr", "sigma_min", "sigma_max", "final_sigmas_type", "timestep_type"},
        {"interpolation_type": ("linear",)},
    ),
    "EulerAncestralDiscreteScheduler": _ANCESTRAL,
    "HeunDiscreteScheduler": SchedulerClass("heun", fixed=_NO_CLIPPING, inert=_OF_CLIPPING),
    "KDPM2DiscreteScheduler": _KDPM2,
    "KDPM2AncestralDiscreteScheduler": replace(_KDPM2, sampler="dpm_2_ancestral"),
    "LMSDiscreteScheduler": SchedulerClass("lms"),
    "DPMSolverMultistepScheduler": _DPM,
    "DPMSolverSDEScheduler": SchedulerClass("dpmpp_sde", fixed={"noise_sampler_seed": (None,)}),
    "UniPCMultistepScheduler": SchedulerClass(
        "uni_pc",
        _TRANSFORMED | {"rescale_betas_zero_snr", "sigma_min", "sigma_max"},
        {
            **_NO_THRESHOLDING, "solver_order": (2,), "solver_type": ("bh2", "midpoint", "heun", "logrho"),
            "predict_x0": (True,), "lower_order_final": (True,), "disable_corrector": ([],), "solver_p": (None,),
            "final_sigmas_type": ("zero",), "use_dynamic_shifting": (False,), FLOW: (False,),
        },
        {**_OF_FLOW, **_OF_THRESHOLDING},
    ),
    "DEISMultistepScheduler": SchedulerClass(
        "deis",
        _TRANSFORMED,
        {
            **_NO_THRESHOLDING, "solver_order": (2,), "solver_type": ("logrho", "midpoint", "heun", "bh1", "bh2"),
            "algorithm_type": ("deis", "dpmsolver", "dpmsolver++"), "lower_order_final": (True,),
            "use_dynamic_shifting": (False,), FLOW: (False,),
        },
        {**_OF_FLOW, **_OF_THRESHOLDING},
    ),
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "LCMScheduler": _LCM,
    "EDMEulerScheduler": SchedulerClass(
        "euler", _EDM | {"final_sigmas_type"}, inert={"num_train_timesteps": _EDM_DPM.inert["num_train_timesteps"]}
    ),
    "EDMDPMSolverMultistepScheduler": _EDM_DPM,
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "PNDMScheduler": SchedulerClass(
        "lms", _SPACED | {"set_alpha_to_one"}, {"skip_prk_steps": (True,)},
        instead="its steps are pseudo-numerical, up to fourth order",
    ),
    "TCDScheduler": replace(
        _LCM, sampler="ddim", inert={**_LCM.inert, "timestep_scaling": "the class has it but does not read it"},
        fixed={**_NO_THRESHOLDING, **_NO_CLIPPING}, instead="its steps go over the timesteps of a distillation",
        forced={"timestep_spacing": "trailing", "set_alpha_to_one": False},
    ),
    "DPMSolverSinglestepScheduler": SchedulerClass(
        "dpmpp_2m",
        _TRANSFORMED,
        _DPM.fixed,
        _DPM.inert,
        instead="its steps are those of the single-step solver, which discards every second step's estimate",
        forced={"timestep_spacing": "linspace"},
    ),
    "SASolverScheduler": SchedulerClass(
        "dpmpp_2m_sde",
        _TRANSFORMED,
        {**_NO_THRESHOLDING, FLOW: (False,)},
        {**_OF_FLOW, **_OF_THRESHOLDING},
        instead="its steps are those of the stochastic Adams solver",
    ),
}  # fmt: skip

_FLOW_MATCHING = "adds noise as flow matching does, and SDXL was not trained on that"
_INVERSE = "adds noise to a picture instead of removing it"
_REASONS = {
    "DDIMInverseScheduler": _INVERSE,
    "DPMSolverMultistepInverseScheduler": _INVERSE,
    "CosineDPMSolverMultistepScheduler": "is for audio models, and SDXL was not trained on their noise levels",
}


def why_refused(class_name: str) -> str:
    """Return why a scheduler class that is not listed is refused."""
    if "FlowMatch" in class_name:
        return _FLOW_MATCHING
    return _REASONS.get(class_name, "is unknown, or for another kind of model")
