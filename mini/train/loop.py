"""The training loop of all stages: AdamW, warm-up and cosine, averaged weights, resume."""

__all__ = ["Budget", "Loss", "Weights", "begin", "save_whole", "train"]

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

CHECKPOINT_SECONDS = 150.0
AVERAGE_DECAY = 0.999
WARM_UP = 200

Loss = Callable[[np.random.Generator], torch.Tensor]
"""One batch's loss. Its randomness comes from the generator, which depends only on seed and step."""

Weights = dict[str, torch.Tensor]
Deliver = Callable[[Weights], None]


def save_whole(content: object, path: Path) -> None:
    """`torch.save` to a sibling of `path`, then rename it, so that an interruption leaves the older file."""
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(path)


@dataclass(frozen=True)
class Budget:
    """When a stage ends: after `minutes` of training or `steps`, whichever comes first.

    Only a budget purely in steps is reproducible, since the learning rate follows the progress.
    """

    minutes: float = float("inf")
    steps: float = float("inf")

    def progress(self, step: int, seconds: float) -> float:
        """0 at the start, 1 when the stage is over."""
        return min(1.0, max(step / self.steps, seconds / 60 / self.minutes))


@dataclass
class State:
    """Everything needed to resume a stage, including the averaged weights, its result."""

    model: nn.Module
    average: Weights
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write the checkpoint."""
        content = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        save_whole(content, path)

    def restore(self, path: Path) -> None:
        """Continue where a saved checkpoint stopped."""
        saved = torch.load(path, map_location="cpu")
        self.model.load_state_dict(saved["model"])
        self.average = saved["average"]
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds = saved["step"], saved["seconds"]

    def update_average(self) -> None:
        """Move the averaged weights towards the trained ones; a growing decay forgets the initial weights."""
        keep = min(AVERAGE_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, 1 - keep)


def begin(model: nn.Module, path: Path) -> State:
    """A new state of a model's trainable parameters, or the one saved at `path`."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, foreach=True)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    state = State(model, average, optimizer)
    if path.exists():
        state.restore(path)
        print(f"resumed {path} at step {state.step}, {state.seconds / 60:.1f} minutes", flush=True)
    return state


def rate_at(peak: float, step: int, progress: float, warm_up: int = WARM_UP) -> float:
    """Linear warm-up over some steps, then a cosine down to 2 % of the peak."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * progress))
    return float(peak * min(1.0, (step + 1) / warm_up) * cosine)


def keep_nothing(weights: Weights) -> None:
    """Discard the weights: the stage writes its result itself."""


def train(
    state: State,
    loss: Loss,
    path: Path,
    budget: Budget,
    *,
    peak: float,
    seed: int,
    deliver: Deliver = keep_nothing,
    warm_up: int = WARM_UP,
) -> Weights:
    """Train until the budget is spent and return the averaged weights, by name.

    Every few minutes a checkpoint goes to `path` and the averaged weights to `deliver`.
    """
    saved_at = time.monotonic()
    recent: list[float] = []
    while (progress := budget.progress(state.step, state.seconds)) < 1:
        started = time.monotonic()
        for group in state.optimizer.param_groups:
            group["lr"] = rate_at(peak, state.step, progress, warm_up)
        recent.append(one_step(state, loss, seed))
        state.seconds += time.monotonic() - started
        if state.step % 50 == 0:
            print(_line(state, recent, progress), flush=True)
            recent.clear()
        if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
            state.save(path)
            deliver(state.average)
            saved_at = time.monotonic()
    state.save(path)
    deliver(state.average)
    return state.average


def one_step(state: State, loss: Loss, seed: int) -> float:
    """One optimizer step; its randomness depends only on seed and step, so a resumed run equals an unbroken one."""
    torch.manual_seed(seed * 1_000_003 + state.step)
    value = loss(np.random.default_rng((seed, state.step)))
    state.optimizer.zero_grad(set_to_none=True)
    value.backward()
    nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
    state.optimizer.step()
    state.step += 1
    state.update_average()
    return float(value.detach())


def _line(state: State, recent: list[float], progress: float) -> str:
    pace = state.seconds / state.step
    spent = f"{pace:.3f} s/step {state.seconds / 60:.1f} min {progress:.0%}"
    return f"step {state.step} loss {np.mean(recent):.4f} {spent}"
