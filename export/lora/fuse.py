"""Fuse LoRAs into the base's weights at export, one tensor at a time."""

__all__ = ["REFINER_NOTE", "ScaledLora", "check_fits", "fuse_loras"]

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sdxl_trt.engines import CorruptError, SourceError
from sdxl_trt.engines.bundle import LoraRecord
from sdxl_trt.export.checkpoints import Checkpoint
from sdxl_trt.export.graph import MetaModel
from sdxl_trt.export.lora.file import Lora, same_tensors
from sdxl_trt.export.lora.kinds import Branch
from sdxl_trt.export.lora.merge import merge
from sdxl_trt.export.lora.names import COMPONENTS, LoraComponent, module_spellings

REFINER_NOTE = (
    "the refiner was not trained with this LoRA, so its steps weaken or distort the LoRA's style and subject; hand off"
    " later (--handoff 0.9 or more), or generate with --no-refiner"
)
_LARGEST = torch.finfo(torch.float32).max
# The width of a UNet's cross-attention context identifies its family.
_CONTEXTS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL's base", 1280: "SDXL's refiner"}


@dataclass(frozen=True)
class ScaledLora:
    """An opened LoRA with its scale on the UNet, and on the text encoders; None there means the UNet's."""

    lora: Lora
    scale: float
    text_scale: float | None = None

    def on(self, component: LoraComponent) -> float:
        """Return the scale on a component."""
        return self.scale if component == "unet" or self.text_scale is None else self.text_scale

    def record(self) -> LoraRecord:
        """Return the manifest's record of it."""
        text_scale = None if self.text_scale == self.scale else self.text_scale
        return LoraRecord(name=self.lora.name, sha256=self.lora.sha256, scale=self.scale, text_scale=text_scale)

    def notes(self) -> Iterator[str]:
        """Yield sentences on tensors and scales without effect."""
        yield from self.lora.notes
        if self.text_scale is not None and self.text_scale != self.scale:
            if "unet" not in self.lora.branches:
                yield f"{self.lora.path}: has nothing for the UNet, so its scale {self.scale:g} has no effect"
            elif self.lora.branches.keys() == {"unet"}:
                yield (f"{self.lora.path}: has nothing for the text encoders, so their scale {self.text_scale:g} has"
                       " no effect")  # fmt: skip


def check_fits(loras: Iterable[Lora], models: Mapping[str, MetaModel]) -> None:
    """Raise SourceError unless every module of every LoRA is one of the base's `models`, with fitting shapes."""
    for lora in loras:
        # The UNet first: its shapes reveal best which model a LoRA was trained on.
        for component in sorted(lora.branches, key=COMPONENTS.index):
            if component not in models:
                raise SourceError(f"{lora.path}: changes a {component}, which this base lacks; use a LoRA that was"
                                  " trained on this base")  # fmt: skip
            _targets(lora, component, models[component].state, models[component].config)


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
    """One LoRA: its branches by the published name of the tensor that each changes."""

    lora: Lora
    scale: float
    branches: Mapping[str, Branch]

    def tensors(self, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
        """Yield {part: tensor in fp32} for those of `names` that the LoRA changes."""
        branches = [self.branches[name] for name in names if name in self.branches]
        infos = [info for branch in branches for info in branch.infos]
        read = self._read(Checkpoint({info.key: info for info in infos}), [info.key for info in infos])
        for branch in branches:
            yield {part: next(read) for part in branch.parts}

    def _read(self, checkpoint: Checkpoint, keys: Iterable[str]) -> Iterator[torch.Tensor]:
        for key, tensor in checkpoint.read(keys):
            weight = tensor.to(torch.float32)
            if not _is_finite(weight):
                raise CorruptError(f"{self.lora.path}: {key!r} holds NaN or infinite weights; the LoRA is damaged")
            yield weight


class _FusedCheckpoint(Checkpoint):
    """A checkpoint whose read() fuses LoRAs."""

    def __init__(self, base: Checkpoint, additions: Sequence[_Addition]) -> None:
        touched = {name for addition in additions for name in addition.branches}
        super().__init__(
            {name: replace(info, dtype="F32") if name in touched else info for name, info in base.tensors.items()}
        )
        self._base, self._additions = base, tuple(additions)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) in the given order, holding one tensor and its branches at a time."""
        wanted = list(names)
        # Each file is read once, in step with the base: reopening it for every weight would parse its header anew.
        streams = [(addition, addition.tensors(wanted)) for addition in self._additions]
        for name, tensor in self._base.read(wanted):
            touching = [(addition, stream) for addition, stream in streams if name in addition.branches]
            yield name, self._fused(name, tensor, touching) if touching else tensor

    def _fused(self, name: str, tensor: torch.Tensor, touching: Iterable[tuple[_Addition, Any]]) -> torch.Tensor:
        # Copy even fp32: the tensor may be the file's mapped memory.
        fused = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        fused = fused.reshape(self.tensors[name].shape)
        for addition, stream in touching:
            parts, branch = next(stream), addition.branches[name]
            finite = abs(addition.scale * branch.scaling) <= _LARGEST
            if finite:
                merge(fused, branch, parts, addition.scale)
                finite = _is_finite(fused) or not _is_finite(tensor)
            if not finite:
                raise CorruptError(f"{addition.lora.path}: makes {name} infinite at scale {addition.scale}; lower the"
                                   " scale, or download the LoRA again")  # fmt: skip
        return fused


def _is_finite(tensor: torch.Tensor) -> bool:
    # The sum needs no memory, and is finite for all intact weights.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _targets(
    lora: Lora, component: LoraComponent, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> dict[str, Branch]:
    """Return {published tensor name: the branch that changes it}."""
    spellings = module_spellings(component, shapes, config)
    targets: dict[str, Branch] = {}
    for branch in lora.branches[component]:
        name = f"{spellings.get(branch.place.module)}.{'bias' if branch.bias else 'weight'}"
        if name not in shapes or not branch.fits(shapes[name]):
            raise SourceError(f"{lora.path}: {_misfit(lora, branch, shapes, name)}")
        if name not in targets:
            targets[name] = branch
        elif not same_tensors(branch, targets[name]):
            raise SourceError(f"{lora.path}: {branch.infos[0].key!r} and {targets[name].infos[0].key!r} name the same"
                              " module but differ; remove one of them")  # fmt: skip
    return targets


def _misfit(lora: Lora, branch: Branch, shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    """Return why `branch` cannot change the tensor `name`, with the LoRA's model if the shapes reveal it."""
    component = branch.place.component
    contexts = {each.inputs: each for each in lora.branches.get("unet", ()) if _takes_context(each)}
    own = next((shape[1] for key, shape in shapes.items() if key.endswith(".attn2.to_k.weight")), None)
    for context, each in contexts.items():
        if context in _CONTEXTS and own is not None and context != own:
            return (f"LoRA for another model: {each.told()} takes a context of width {context}, like"
                    f" {_CONTEXTS[context]}, but this base's is {own}; use one that was trained on SDXL"
                    " base")  # fmt: skip
    if name in shapes:
        return (f"LoRA for another model: it has {branch.told()}, but {component} has {name} of shape"
                f" {list(shapes[name])}; use one that was trained on SDXL base")  # fmt: skip
    what = "such bias" if branch.bias else "such module"
    return (f"has {branch.told()}, but this base's {component} has no {what}; use a LoRA that was trained on SDXL"
            " base, or remove these keys")  # fmt: skip


def _takes_context(branch: Branch) -> bool:
    module = branch.place.module.replace("_", ".")
    return not branch.bias and "attn2" in module and module.endswith((".to.k", ".to.v"))
