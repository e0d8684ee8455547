"""Write comfyui.json: what ComfyUI's schedules and those of its samplers that differ give, computed another way.

ComfyUI is not installed for tests; this is its arithmetic (0.3.64, by reading) in torch and scipy: schedules in
torch's float32, sampler steps as integrals that scipy evaluates. Run it in the peers' environment:
.venv-peers/bin/python tests/runtime/golden/make_comfyui.py
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy import integrate, stats

STEPS = [2, 3, 10, 25, 30, 50]
DISCARDING = ("dpm_2", "uni_pc")
START = [[9.0, -14.0, 2.5], [-0.5, 21.0, 6.0]]
GRID = [14.6, 9.0, 5.5, 3.2, 1.7, 0.8, 0.3, 0.0]
LEFT = [14.6, 9.0, 5.5, 3.2, 1.7]


def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
    """Return the estimate that the test's model makes too."""
    return np.tanh(x / (1 + sigma**2)) + 0.1 * np.sin(x)


# Schedules


def table(zero_snr: bool) -> torch.Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    alpha_bar = (1 - betas).log().cumsum(0).exp()
    if zero_snr:
        signal = alpha_bar.sqrt()
        share = (signal - signal[-1]) / (signal[0] - signal[-1])
        alpha_bar = (share * signal[0]).square()
        alpha_bar[-1] = 4.8973451890853435e-08
    return (1 / alpha_bar - 1).sqrt()


def at(times: torch.Tensor, sigmas: torch.Tensor) -> list[float]:
    logs = sigmas.log().float()
    below = times.floor().long()
    above = times.ceil().long()
    part = times.frac()
    return ((1 - part) * logs[below] + part * logs[above]).exp().tolist()


def schedule(name: str, steps: int, double: torch.Tensor) -> list[float]:
    sigmas = double.float()
    high, low, last = sigmas[-1].item(), sigmas[0].item(), len(sigmas) - 1
    if name == "simple":
        found = [sigmas[last - math.floor(i * 1000 / steps)].item() for i in range(steps)]
    elif name == "sgm_uniform":
        found = at(torch.linspace(last, 0, steps + 1)[:steps], double)
    elif name == "normal":
        found = at(torch.linspace(last, 0, steps), double)
    elif name == "karras":
        found = torch.lerp(torch.tensor(high ** (1 / 7)), torch.tensor(low ** (1 / 7)), torch.linspace(0, 1, steps))
        found = found.pow(7).tolist()
    elif name == "exponential":
        found = torch.logspace(math.log10(high), math.log10(low), steps, dtype=torch.float64).tolist()
    elif name == "ddim_uniform":
        found = [sigmas[i].item() for i in range(1, 1000, 1000 // steps)][::-1]
    elif name == "beta":
        times = [round(stats.beta(0.6, 0.6).ppf(1 - i / steps) * last) for i in range(steps)]
        found = [sigmas[t].item() for i, t in enumerate(times) if i == 0 or t != times[i - 1]]
    elif name == "linear_quadratic":
        found = linear_quadratic(steps, high)
    elif name == "kl_optimal":
        share = torch.arange(steps, dtype=torch.float64) / (steps - 1)
        found = torch.tan(share * math.atan(low) + (1 - share) * math.atan(high)).tolist()
    return [*found, 0.0]


def linear_quadratic(steps: int, high: float) -> list[float]:
    """A line to 0.025 at half of the steps, then the parabola that goes on from it, with its slope, to 1."""
    knee, noise = steps // 2, 0.025
    conditions = np.array([[knee**2, knee, 1], [2 * knee, 1, 0], [steps**2, steps, 1]], dtype=float)
    parabola = np.linalg.solve(conditions, [noise, noise / knee, 1])
    removed = [i * noise / knee if i < knee else np.polyval(parabola, i) for i in range(steps)]
    return [float((1 - gone) * high) for gone in removed]


def timesteps(sigmas: list[float], double: torch.Tensor) -> list[int]:
    distance = torch.tensor(sigmas[:-1]).log()[:, None] - double.log().float()
    return distance.abs().argmin(1).tolist()


# Samplers


def lagrange(nodes: list[float], which: int, time: float) -> float:
    return math.prod((time - other) / (nodes[which] - other) for i, other in enumerate(nodes) if i != which)


def adams(sigmas: list[float], order: int, clock: Callable[[float], float]) -> list[np.ndarray]:
    """Integrate over sigma the polynomial, in the clock's time, through the last slopes; end with an Euler step."""
    x, slopes, trail = np.array(START), [], []
    for i in range(len(sigmas) - 1):
        slopes.insert(0, (x - denoise(x, sigmas[i])) / sigmas[i])
        used = min(i + 1, order) if sigmas[i + 1] else 1
        nodes = [clock(sigmas[i - j]) for j in range(used)]
        for j in range(used):
            weight, _ = integrate.quad(
                lambda sigma, nodes=nodes, j=j: lagrange(nodes, j, clock(sigma)), sigmas[i], sigmas[i + 1], epsabs=1e-12
            )
            x = x + weight * slopes[j]
        trail.append(x)
    return trail


def vp_time(sigma: float) -> float:
    """Return t of sigma² + 1 = exp(beta_d t² / 2 + beta_min t), which is 0.002 at t = 0.001 and 80 at t = 1."""
    ends = np.array([[0.5 * 0.001**2, 0.001], [0.5, 1.0]])
    beta_d, beta_min = np.linalg.solve(ends, np.log1p([0.002**2, 80.0**2]))
    return float(np.roots([0.5 * beta_d, beta_min, -math.log1p(sigma**2)]).max())


def res_multistep(sigmas: list[float]) -> list[np.ndarray]:
    """Integrate the line through the last two estimates against the exponential of the step."""
    x, before, trail = np.array(START), None, []
    for i in range(len(sigmas) - 1):
        now = denoise(x, sigmas[i])
        if i == 0 or sigmas[i + 1] == 0:
            x = now + sigmas[i + 1] / sigmas[i] * (x - now)
        else:
            ahead, behind = math.log(sigmas[i] / sigmas[i + 1]), math.log(sigmas[i - 1] / sigmas[i])
            flat, _ = integrate.quad(lambda s, h=ahead: math.exp(s - h), 0, ahead)
            rising, _ = integrate.quad(lambda s, h=ahead: s * math.exp(s - h), 0, ahead)
            x = math.exp(-ahead) * x + flat * now + rising * (now - before) / behind
        before = now
        trail.append(x)
    return trail


def uni_pc(sigmas: list[float], variant: str) -> list[np.ndarray]:
    """Predict and correct; the weights satisfy the order conditions, whose right sides are integrals."""
    sigmas = [sigma or 0.001 for sigma in sigmas]
    steps = len(sigmas) - 1
    order = min(3, steps - 1)
    x, known, trail = np.array(START), [(math.log(sigmas[0]), denoise(np.array(START), sigmas[0]))], []
    for i in range(steps):
        used = min(i + 1, order, steps - i)
        predicted = uni_step(x, known[:used], sigmas[i + 1], variant, None)
        trail.append(predicted)
        if i + 1 < steps:
            estimate = denoise(predicted, sigmas[i + 1])
            x = uni_step(x, known[:used], sigmas[i + 1], variant, estimate)
            known.insert(0, (math.log(sigmas[i + 1]), estimate))
    return trail


def uni_step(
    x: np.ndarray, known: list[tuple[float, np.ndarray]], after: float, variant: str, reached: np.ndarray | None
) -> np.ndarray:
    (log, estimate), *older = known
    step = math.log(after) - log
    nodes = [((other - log) / step, value) for other, value in older]
    nodes += [(1.0, reached)] if reached is not None else []
    scale = step if variant == "bh1" else math.expm1(step)
    x = math.exp(step) * x + (1 - math.exp(step)) * estimate
    conditions = [[place**power for place, _ in nodes] for power in range(len(nodes))]
    sides = [
        step / scale * integrate.quad(lambda s, n=n: math.exp((1 - s) * step) * s**n, 0, 1)[0]
        for n in range(1, len(nodes) + 1)
    ]
    weights = [0.5] if len(nodes) == 1 else np.linalg.solve(conditions, sides) if nodes else []
    for weight, (place, value) in zip(weights, nodes, strict=True):
        x = x - scale * weight * (value - estimate) / place
    return x


SCHEDULES = ["simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal", "linear_quadratic",
             "kl_optimal"]  # fmt: skip
SAMPLERS: dict[str, Callable[[list[float]], list[np.ndarray]]] = {
    "lms": lambda sigmas: adams(sigmas, 4, float),
    "deis": lambda sigmas: adams(sigmas, 3, vp_time),
    "res_multistep": res_multistep,
    "uni_pc": lambda sigmas: uni_pc(sigmas, "bh1"),
    "uni_pc_bh2": lambda sigmas: uni_pc(sigmas, "bh2"),
}


def main() -> None:
    grids = []
    for zero_snr in (False, True):
        double = table(zero_snr)
        for name in SCHEDULES:
            for steps in STEPS:
                sigmas = schedule(name, steps, double)
                grids.append({
                    "schedule": name, "steps": steps, "zero_snr": zero_snr,
                    "sigmas": [float(f"{sigma:.8g}") for sigma in sigmas], "timesteps": timesteps(sigmas, double),
                })  # fmt: skip
    trails = [
        {"sampler": name, "sigmas": grid, "trail": np.round(sampler(grid), 9).tolist()}
        for name, sampler in SAMPLERS.items()
        for grid in (GRID, LEFT)
    ]
    golden = {"start": START, "grids": grids, "trails": trails}
    Path(__file__).with_name("comfyui.json").write_text(json.dumps(golden) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
