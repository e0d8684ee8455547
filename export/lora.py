"""LoRA fused at export: base weights plus scale · alpha / rank · up @ down, one tensor at a time."""

__all__ = ["REFINER_NOTE", "check_fits", "fuse", "parse_lora_option"]

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sdxl_trt.engines.errors import CorruptError, SourceError, UsageError
from sdxl_trt.export.lora_file import Branch, Lora
from sdxl_trt.export.lora_names import Component, module_spellings
from sdxl_trt.export.models import MetaModel
from sdxl_trt.export.tensors import Checkpoint

REFINER_NOTE = (
    "the refiner was not trained with this LoRA and repaints the last steps as it knows them: it weakens or distorts"
    " the LoRA's style and subject; hand off later (--handoff 0.9 or more), or generate with --no-refiner"
)
_ENDING = ".safetensors"
_LARGEST = torch.finfo(torch.float32).max
_POINTS: tuple[tuple[int, ...], ...] = ((), (1, 1))


def parse_lora_option(text: str) -> tuple[Path, float]:
    """Return the file and the scale of ``FILE.safetensors[:SCALE]``; without a scale it is 1, and it may be negative.

    Only what follows the last colon is a scale, so a name may hold others. Raises UsageError.
    """
    if text.lower().endswith(_ENDING):
        return Path(text), 1.0
    head, _, tail = text.rpartition(":")
    if not head.lower().endswith(_ENDING):
        raise UsageError(
            f"--lora {text}: expected FILE.safetensors or FILE.safetensors:SCALE, such as a.safetensors:0.8"
        )
    try:
        scale = float(tail)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise UsageError(f"--lora {text}: {tail!r} is no scale; give a finite number after the colon, such as 0.8")
    return Path(head), scale


def check_fits(loras: Iterable[Lora], models: Mapping[str, MetaModel]) -> None:
    """Raise SourceError unless every module of every LoRA is one of the base's `models`, with fitting shapes."""
    for lora in loras:
        for component in lora.branches:
            if component not in models:
                raise SourceError(f"{lora.path}: LoRA for another model: it changes a {component}, which this base has"
                                  " not; use one that was trained on it")  # fmt: skip
            _targets(lora, component, models[component].state, models[component].config)


def fuse(
    checkpoint: Checkpoint,
    component: Component,
    loras: Sequence[tuple[Lora, float]],
    config: Mapping[str, Any],
) -> Checkpoint:
    """Return `checkpoint`, under published names, with (LoRA, scale) pairs added to the weights as they are read.

    A weight that a LoRA touches is summed and given in fp32, whatever the checkpoint's dtype, so that it is rounded
    once, when it is written; its TensorInfo says F32. All others are read as before. One tensor and its branches
    are in memory at a time. `config` is the component's. Raises SourceError for a LoRA that does not fit, and while
    reading CorruptError for one with NaN or infinite weights, or whose sum is beyond fp32.
    """
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    added = [
        _Addition(lora, scale, _targets(lora, component, shapes, config))
        for lora, scale in loras
        if component in lora.branches
    ]
    # A scale of 0 changes nothing, and the weight keeps its dtype.
    effective = [addition for addition in added if addition.scale != 0]
    return _FusedCheckpoint(checkpoint, effective) if effective else checkpoint


@dataclass(frozen=True)
class _Addition:
    """What one LoRA adds: its branches by the published name of the weight beside them."""

    lora: Lora
    scale: float
    branches: Mapping[str, Branch]

    def factors(self, names: Iterable[str]) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
        """Yield up (out, r), down (r, in · kernel) and their factor, for those of `names` that the LoRA touches."""
        branches = [self.branches[name] for name in names if name in self.branches]
        infos = [info for branch in branches for info in branch.infos]
        tensors = self._read(Checkpoint({info.key: info for info in infos}), [info.key for info in infos])
        for branch in branches:
            up = next(tensors).flatten(1)
            down = next(tensors)
            if branch.mid is not None:
                down = torch.einsum("ijkl,jr->irkl", next(tensors), down.flatten(1))
            yield up, down.flatten(1), self.scale * branch.scaling

    def _read(self, checkpoint: Checkpoint, keys: Iterable[str]) -> Iterator[torch.Tensor]:
        for key, tensor in checkpoint.read(keys):
            weight = tensor.to(torch.float32)
            if not _is_finite(weight):
                raise CorruptError(f"{self.lora.path}: {key!r} holds NaN or infinite weights; the LoRA is damaged")
            yield weight


class _FusedCheckpoint(Checkpoint):
    """A checkpoint whose read() adds the LoRAs' products to the weights that they touch."""

    def __init__(self, base: Checkpoint, additions: Sequence[_Addition]) -> None:
        touched = {name for addition in additions for name in addition.branches}
        super().__init__(
            {name: replace(info, dtype="F32") if name in touched else info for name, info in base.tensors.items()}
        )
        self._base, self._additions = base, tuple(additions)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) in the given order, holding one tensor and its branches at a time."""
        wanted = list(names)
        # Each file is read once, in step with the base: opening it anew for every weight would cost its header.
        streams = [(addition, addition.factors(wanted)) for addition in self._additions]
        for name, tensor in self._base.read(wanted):
            touching = [(addition, stream) for addition, stream in streams if name in addition.branches]
            yield name, self._sum(name, tensor, touching) if touching else tensor

    def _sum(self, name: str, tensor: torch.Tensor, touching: Iterable[tuple[_Addition, Any]]) -> torch.Tensor:
        # A copy even of fp32: the tensor may be the file's own mapped memory.
        fused = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        rows = fused.view(tensor.shape[0], -1)
        for addition, stream in touching:
            up, down, factor = next(stream)
            finite = abs(factor) <= _LARGEST
            if finite:
                rows.addmm_(up, down, alpha=factor)
                finite = _is_finite(rows) or not _is_finite(tensor)
            if not finite:
                raise CorruptError(f"{addition.lora.path}: makes {name} infinite at scale {addition.scale}; lower the"
                                   " scale, or get a sound copy of the LoRA")  # fmt: skip
        return fused.reshape(self.tensors[name].shape)


def _is_finite(tensor: torch.Tensor) -> bool:
    # A sum needs no memory, and is finite for all sound weights.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _targets(
    lora: Lora, component: Component, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> dict[str, Branch]:
    """Return the branches by the published name of the weight that each is added to."""
    spellings = module_spellings(component, shapes, config)
    targets: dict[str, Branch] = {}
    for module, branch in lora.branches[component].items():
        name = spellings.get(module)
        given = " and ".join(f"{info.key!r} {list(info.shape)}" for info in branch.infos)
        if name is None:
            raise SourceError(f"{lora.path}: LoRA for another model: it has {given}, and this base's {component} has no"
                              " such module; use one that was trained on SDXL base")  # fmt: skip
        if not _fits(branch, shapes[name]):
            raise SourceError(f"{lora.path}: LoRA for another model: it has {given}, but {component} has {name} of"
                              f" shape {list(shapes[name])}; use one that was trained on SDXL base")  # fmt: skip
        if name in targets:
            raise SourceError(f"{lora.path}: {branch.down.key!r} and {targets[name].down.key!r} are two names of one"
                              " module; remove one of them")  # fmt: skip
        targets[name] = branch
    return targets


def _fits(branch: Branch, shape: tuple[int, ...]) -> bool:
    """Return whether up @ down, or up @ mid @ down, has the weight's shape (out, in, *kernel)."""
    kernel = shape[2:]
    # A 1x1 convolution is a matrix, and trainers store it as either.
    points = _POINTS if kernel in _POINTS else (kernel,)
    ends = branch.up.shape[0] == shape[0] and branch.down.shape[1] == shape[1] and branch.up.shape[2:] in _POINTS
    if branch.mid is None:
        return ends and branch.down.shape[2:] in points
    return ends and branch.down.shape[2:] in _POINTS and branch.mid.shape[2:] == kernel != ()
