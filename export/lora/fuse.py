"""Fuse LoRAs into the base's weights at export, one tensor at a time."""

__all__ = ["check_fits", "fuse_loras"]

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from sdxl_trt.engines import SourceError
from sdxl_trt.engines.adapters import COMPONENTS, Changes, Lora, LoraComponent, plan_changes, targets
from sdxl_trt.export.checkpoints import Checkpoint


class ShapedModel(Protocol):
    """What is asked of a model: its published tensors' shapes, and its config."""

    @property
    def state(self) -> Mapping[str, tuple[int, ...]]:
        """Return {published name: shape}."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Return the config."""


def check_fits(loras: Iterable[Lora], models: Mapping[str, ShapedModel]) -> None:
    """Raise SourceError unless every module of every LoRA is one of the base's `models`, with fitting shapes."""
    for lora in loras:
        # The UNet first: its shapes reveal best which model a LoRA was trained on.
        for component in sorted(lora.branches, key=COMPONENTS.index):
            if component not in models:
                raise SourceError(f"{lora.path}: changes a {component}, which this base lacks; use a LoRA that was"
                                  " trained on this base")  # fmt: skip
            targets(lora, component, models[component].state, models[component].config)


def fuse_loras(
    checkpoint: Checkpoint,
    component: LoraComponent,
    loras: Sequence[tuple[Lora, float]],
    config: Mapping[str, Any],
) -> Checkpoint:
    """Return `checkpoint`, under published names, whose read() fuses the (LoRA, scale) pairs in order.

    A tensor that a LoRA changes is computed and returned in fp32, whatever the checkpoint's dtype, so that it is
    rounded once, on writing; its TensorInfo says F32. All others are read as before. One tensor and its branches
    are in memory at a time. `config` is the component's. Raises SourceError for a LoRA that does not fit; reading
    raises CorruptError for a LoRA with NaN or infinite weights, and for sums beyond fp32.
    """
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    changes = plan_changes(loras, component, shapes, config)
    return _FusedCheckpoint(checkpoint, changes) if changes.names else checkpoint


class _FusedCheckpoint(Checkpoint):
    """A checkpoint whose read() fuses LoRAs."""

    def __init__(self, base: Checkpoint, changes: Changes) -> None:
        super().__init__(
            {name: replace(info, dtype="F32") if name in changes.names else info for name, info in base.tensors.items()}
        )
        self._base, self._changes = base, changes

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) in the given order, holding one tensor and its branches at a time."""
        for name, tensor in self._base.read(names):
            yield name, self._fused(name, tensor) if name in self._changes.names else tensor

    def _fused(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        # Copy even fp32: the tensor may be the file's mapped memory.
        fused = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        fused = fused.reshape(self.tensors[name].shape)
        self._changes.apply(name, fused.numpy())
        return fused
