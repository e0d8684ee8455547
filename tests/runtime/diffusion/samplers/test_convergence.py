"""Samplers against exact solutions, and the order at which they converge to them.

For normally distributed data with deviation S, the best denoiser is x · S² / (S² + sigma²), and the probability
flow ODE has the solution x ∝ sqrt(S² + sigma²). The stochastic samplers must bring their latents' variance to
S² + sigma²: they are linear in the start and in the noises, so the variance is a sum of squares and nothing is drawn.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest

from sdxl_trt.runtime.diffusion.samplers.registry import COMFYUI, SAMPLERS, STOCHASTIC, drive
from sdxl_trt.runtime.diffusion.samplers.unipc import _uni_pc

DEVIATION, HIGHEST, LOWEST = 0.5, 10.0, 0.1
STEPS = (40, 80)
# The first step of a multistep sampler is of first order, which lowers the measured order of the higher ones.
ORDERS = {
    "euler": 1.0, "ddim": 1.0, "heun": 2.0, "dpm_2": 2.0, "dpmpp_2m": 2.0, "res_multistep": 2.0, "deis": 2.0,
    "uni_pc": 3.0, "lms": 3.4,
}  # fmt: skip
ERRORS = {
    "euler": 1.6e-2, "ddim": 1.6e-2, "heun": 5e-4, "dpm_2": 3e-4, "dpmpp_2m": 4e-4, "res_multistep": 6e-4,
    "deis": 4e-4, "uni_pc": 5e-5, "lms": 3e-5,
}  # fmt: skip
VARIANCE_ORDERS = {
    "euler_ancestral": 1.0, "dpm_2_ancestral": 2.0, "dpmpp_2s_ancestral": 2.0, "dpmpp_sde": 1.0, "dpmpp_2m_sde": 2.0,
    "dpmpp_3m_sde": 2.1,
}  # fmt: skip
COMFYUI_ORDERS = {"dpm_2": 2.0, "lms": 3.4, "deis": 2.8, "uni_pc": 1.9, "uni_pc_bh2": 1.9}
SLACK = 0.12


def _denoise(x: np.ndarray, sigma: float) -> np.ndarray:
    return x * (DEVIATION**2 / (DEVIATION**2 + sigma**2))


def _grid(steps: int) -> np.ndarray:
    """Return sigmas of the Karras schedule, in double precision."""
    return np.linspace(HIGHEST ** (1 / 7), LOWEST ** (1 / 7), steps + 1) ** 7


def _ode_error(sampler: Callable[..., object], steps: int) -> float:
    *_, last = drive(sampler(np.ones(1), _grid(steps)), _denoise)
    exact = math.sqrt((DEVIATION**2 + LOWEST**2) / (DEVIATION**2 + HIGHEST**2))
    return abs(float(last[0]) / exact - 1.0)


def _variance_error(name: str, steps: int) -> float:
    """Return the error of the variance; latents are the weights of the start and of every noise that was drawn."""
    units = iter(np.eye(2 * steps + 1))
    start = next(units) * math.sqrt(DEVIATION**2 + HIGHEST**2)
    *_, last = drive(STOCHASTIC[name](start, _grid(steps), noise=lambda sigma, after: next(units)), _denoise)
    return abs(float(last @ last) / (DEVIATION**2 + LOWEST**2) - 1.0)


def _check(name: str, errors: list[float], required: float) -> None:
    measured = math.log2(errors[0] / errors[1])
    assert measured >= required - SLACK, f"{name}: measured order {measured:.2f}, required {required}"


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_ode_is_solved_at_the_methods_order(name: str) -> None:
    errors = [_ode_error(SAMPLERS[name], steps) for steps in STEPS]
    _check(name, errors, ORDERS[name])
    assert errors[1] <= ERRORS[name], f"{name}: measured {errors[1]:.1e}, required {ERRORS[name]:.0e}"


@pytest.mark.parametrize("name", COMFYUI)
def test_comfyuis_variants_solve_the_ode_at_their_order(name: str) -> None:
    """The lower order of the last steps reduces the order of its UniPC."""
    _check(name, [_ode_error(COMFYUI[name], steps) for steps in STEPS], COMFYUI_ORDERS[name])


@pytest.mark.parametrize(("order", "required"), [(1, 1.9), (2, 2.9), (3, 3.3)])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_the_corrector_of_uni_pc_gains_an_order(variant: str, order: int, required: float) -> None:
    def solve(x: object, sigmas: object) -> object:
        return _uni_pc(x, sigmas, order=order, variant=variant, ends=False)

    _check(f"order {order}, {variant}", [_ode_error(solve, steps) for steps in STEPS], required)


@pytest.mark.parametrize("name", VARIANCE_ORDERS)
def test_latents_have_the_variance_of_the_grid(name: str) -> None:
    errors = [_variance_error(name, steps) for steps in STEPS]
    _check(name, errors, VARIANCE_ORDERS[name])
    assert errors[1] < 0.1


def test_lcm_adds_new_noise_to_the_models_estimate() -> None:
    """It is not a solver and has no order: after a step the variance is that of the estimate plus sigma²."""
    units = iter(np.eye(3))
    sigmas = np.array([10.0, 2.0, 0.5])
    asking = STOCHASTIC["lcm"](next(units) * 10.0, sigmas, noise=lambda sigma, after: next(units))
    first, second = drive(asking, _denoise)
    kept = [DEVIATION**2 / (DEVIATION**2 + sigma**2) for sigma in sigmas]
    np.testing.assert_allclose(first, [10.0 * kept[0], 2.0, 0.0])
    np.testing.assert_allclose(second, [10.0 * kept[0] * kept[1], 2.0 * kept[1], 0.5])


def test_every_stochastic_sampler_is_measured() -> None:
    assert {*VARIANCE_ORDERS, "lcm"} == set(STOCHASTIC)
    assert set(COMFYUI_ORDERS) == set(COMFYUI)
