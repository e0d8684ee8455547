"""Step caching on diffusers' UNets: what enters the last up block is extrapolated in the steps that are not full."""

__all__ = ["extrapolate"]

from collections.abc import Callable
from typing import Any


def extrapolate(pipe: Any, *, every: int, first: int, calls: int = 1, reach: float = 1.0) -> Callable[[], None]:
    """Let the UNet of a pipeline of diffusers read extrapolated deep features in all but some steps.

    The UNet runs whole: `first` steps are as they are, then every `every`th one. In the others, what enters the last
    up block is replaced by the value at the call's sigma of the line through the values that it had at the two latest
    sigmas; of the way from the latest there only `reach` is taken, and with 0 it is the latest. `calls` is how often
    the scheduler has the UNet called in a step. The returned function ends it.
    """
    points: list[tuple[float, Any]] = []
    state = {"call": 0, "sigma": 0.0}

    def begin(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        timestep = float(named["timestep"] if "timestep" in named else given[1])
        scheduler = pipe.scheduler
        places = (scheduler.timesteps == timestep).nonzero()
        state["sigma"] = float(scheduler.sigmas[int(places[0])])

    def replace(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        step, sigma = state["call"] // calls, state["sigma"]
        state["call"] += 1
        if step < first or (step + 1 - first) % every == 0:
            if not reach or not points or points[-1][0] != sigma:
                points.append((sigma, named["hidden_states"].clone()))
            return given, named
        if not reach:
            return given, {**named, "hidden_states": points[-1][1]}
        (s0, h0), (s1, h1) = points[-2:]
        share = 1.0 + reach * (sigma - s1) / (s1 - s0)
        return given, {**named, "hidden_states": h0 * (1.0 - share) + h1 * share}

    hooks = [
        pipe.unet.register_forward_pre_hook(begin, with_kwargs=True),
        pipe.unet.up_blocks[-1].register_forward_pre_hook(replace, with_kwargs=True),
    ]
    return lambda: [hook.remove() for hook in hooks] and None
