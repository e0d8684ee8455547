"""A1111's names of samplers and schedules."""

import pytest

from sdxl_trt.runtime.diffusion.samplers import TWO_CALLS, sampler_names
from sdxl_trt.runtime.diffusion.schedules import COMFYUI_SCHEDULES
from sdxl_trt.server.a1111.body import SAMPLERS, SCHEDULERS, choose
from sdxl_trt.server.http import ApiError


@pytest.mark.parametrize(
    ("sampler", "scheduler", "expected"),
    [
        ("Euler", "", ("euler", "normal")),
        ("euler A", "Automatic", ("euler_ancestral", "normal")),
        ("k_euler_a", "", ("euler_ancestral", "normal")),
        ("DPM++ 2M", "", ("dpmpp_2m", "karras")),
        ("DPM++ 2M", "automatic", ("dpmpp_2m", "karras")),
        ("DPM++ 2M", "uniform", ("dpmpp_2m", "normal")),
        ("DPM++ 2M Karras", "Exponential", ("dpmpp_2m", "karras")),
        ("DPM++ 2M SDE Exponential", "", ("dpmpp_2m_sde", "exponential")),
        ("DPM++ 2M SDE SGMUniform", "", ("dpmpp_2m_sde", "sgm_uniform")),
        ("DPM++ 3M SDE", "", ("dpmpp_3m_sde", "exponential")),
        ("DPM2 a karras", "", ("dpm_2_ancestral", "karras")),
        ("DPM2", "Polyexponential", ("dpm_2", "exponential")),
        ("Heun", "SGM Uniform", ("heun", "sgm_uniform")),
        ("LMS", "sgm_uniform", ("lms", "sgm_uniform")),
        ("Euler", "beta", ("euler", "linspace+beta")),
        ("DDIM", "normal", ("ddim", "ddim_uniform")),
        ("DDIM Karras", "", ("ddim", "ddim_uniform")),
        ("UniPC", "karras", ("uni_pc", "normal")),
    ],
)
def test_names_mean_what_they_mean_in_a1111(sampler: str, scheduler: str, expected: tuple[str, str]) -> None:
    chosen = choose(sampler, scheduler)
    assert (chosen.sampler.name, chosen.schedule) == expected


@pytest.mark.parametrize(
    ("sampler", "scheduler", "status"),
    [
        ("DPM adaptive", "", 404), ("DPM fast", "", 404), ("Restart", "", 404), ("PLMS", "", 404),
        ("DPM++ 2M SDE Heun", "", 404), ("Karras", "", 404), ("", "", 404), ("Euler", "fast", 404),
        ("Euler", "KL Optimal", 422), ("Euler", "align_your_steps", 422),
    ],
)  # fmt: skip
def test_a_name_that_is_not_here_is_refused(sampler: str, scheduler: str, status: int) -> None:
    with pytest.raises(ApiError) as caught:
        choose(sampler, scheduler)
    assert caught.value.status == status


def test_the_tables_name_what_the_runtime_has() -> None:
    assert {each.name for each in SAMPLERS} <= set(sampler_names(comfyui=True))
    assert {each.name for each in SAMPLERS if each.two_calls} == TWO_CALLS
    assert {each.schedule for each in SCHEDULERS if each.compat == "comfyui"} <= set(COMFYUI_SCHEDULES)
    assert all(choose(each.usual and each.label, each.usual) for each in SAMPLERS)
