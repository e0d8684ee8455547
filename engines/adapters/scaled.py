"""LoRAs with their scales: which tensors of a component they change, and the changed values."""

__all__ = [
    "Adapted",
    "Changes",
    "ScaledLora",
    "Use",
    "adapted",
    "loras_of",
    "name_of",
    "narrowed",
    "plan_changes",
    "targets",
]

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.adapters.file import Lora, same_tensors
from sdxl_trt.engines.adapters.kinds import Branch
from sdxl_trt.engines.adapters.merge import merge
from sdxl_trt.engines.adapters.names import LoraComponent, component_role, module_spellings
from sdxl_trt.engines.adapters.tensors import is_finite, read_finite
from sdxl_trt.engines.errors import CorruptError, SourceError

Weights = NDArray[np.float32]
Shapes = Mapping[str, tuple[int, ...]]
_LARGEST = float(np.finfo(np.float32).max)
# The width of a UNet's cross-attention context identifies its family.
_CONTEXTS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL's base", 1280: "SDXL's refiner"}


@dataclass(frozen=True)
class ScaledLora:
    """An opened LoRA with its scale on the UNet, and on the text encoders; None there means the UNet's.

    Two are equal if the digests of their files and their scales are.
    """

    lora: Lora
    scale: float
    text_scale: float | None = None

    def on(self, component: LoraComponent) -> float:
        """Return the scale on a component."""
        return self.scale if component == "unet" or self.text_scale is None else self.text_scale

    def notes(self) -> Iterator[str]:
        """Yield sentences on tensors and scales without effect."""
        yield from self.lora.notes
        if self.text_scale is not None and self.text_scale != self.scale:
            if "unet" not in self.lora.branches and self.scale:
                yield f"{self.lora.path}: has nothing for the UNet, so its scale {self.scale:g} has no effect"
            elif self.lora.branches.keys() == {"unet"} and self.text_scale:
                yield (f"{self.lora.path}: has nothing for the text encoders, so their scale {self.text_scale:g} has"
                       " no effect")  # fmt: skip


def narrowed(loras: Sequence[ScaledLora], component: LoraComponent) -> tuple[ScaledLora, ...]:
    """Return what changes `component`, in order: LoRAs with branches for it, with their scale on it as the only one.

    LoRAs with a scale of 0 on it are left out, so two sets with the same effect on `component` are equal.
    """
    return tuple(
        ScaledLora(each.lora, each.on(component))
        for each in loras
        if component in each.lora.branches and each.on(component) != 0
    )


@dataclass(frozen=True)
class Adapted:
    """A component of a bundle with LoRAs, at least one, each with an effect on it: make it with `adapted`."""

    component: str
    loras: tuple[ScaledLora, ...]


Use = str | Adapted
"""What a run uses: a component as it was exported, by its name, or one with LoRAs."""


def adapted(component: str, loras: Sequence[ScaledLora]) -> Use:
    """Return component `component` of a bundle with those of `loras` that change it; its name alone if none does."""
    role = component_role(component)
    own = () if role is None else narrowed(loras, role)
    return Adapted(component, own) if own else component


def name_of(use: Use) -> str:
    """Return the component's name."""
    return use if isinstance(use, str) else use.component


def loras_of(use: Use) -> tuple[ScaledLora, ...]:
    """Return the LoRAs of a component, () if it has none."""
    return () if isinstance(use, str) else use.loras


@dataclass(frozen=True)
class _Addition:
    """One LoRA at a scale: its branches by the published name of the tensor that each changes."""

    lora: Lora
    scale: float
    branches: Mapping[str, Branch]

    def add(self, name: str, weight: Weights) -> None:
        """Merge the branch of `name` into `weight`, in place."""
        branch = self.branches[name]
        infinite = abs(self.scale * branch.scaling) > _LARGEST
        if not infinite:
            sound = is_finite(weight)  # else the weight itself is damaged, which is not this LoRA's fault
            merge(weight, branch, {part: read_finite(info) for part, info in branch.parts.items()}, self.scale)
            infinite = sound and not is_finite(weight)
        if infinite:
            raise self.explain(name, "infinite")

    def explain(self, name: str, what: str) -> CorruptError:
        """Return the error for a sum that is `what`, "infinite" or "beyond fp16's range"."""
        return CorruptError(f"{self.lora.path}: makes {name} {what} at scale {self.scale}; lower the scale, or download"
                            " the LoRA again")  # fmt: skip


class Changes:
    """The changes of LoRAs to the tensors of one component, in the LoRAs' order."""

    def __init__(self, additions: Sequence[_Addition]) -> None:
        self._additions = tuple(additions)
        self.names = frozenset(name for addition in additions for name in addition.branches)
        """The published names of the tensors that change."""

    def apply(self, name: str, weight: Weights) -> None:
        """Change the tensor `name` in place: `weight` is contiguous fp32, in the published shape.

        One branch is in memory at a time. Raises CorruptError for a LoRA with NaN or infinite weights, and for sums
        beyond fp32; `weight` is then undefined.
        """
        for addition in self._additions:
            if name in addition.branches:
                addition.add(name, weight)

    def explain(self, name: str, what: str) -> CorruptError:
        """Return the error for a changed tensor `name` that is `what`: it blames the last LoRA that changes it."""
        return next(each for each in reversed(self._additions) if name in each.branches).explain(name, what)


def plan_changes(
    loras: Sequence[tuple[Lora, float]], component: LoraComponent, shapes: Shapes, config: Mapping[str, Any]
) -> Changes:
    """Return the changes of the (LoRA, scale) pairs, in order, to a component; arguments as for `targets`.

    A scale of 0 changes nothing, but the LoRA must still fit. Raises SourceError for a LoRA that does not.
    """
    additions = [
        _Addition(lora, scale, targets(lora, component, shapes, config))
        for lora, scale in loras
        if component in lora.branches
    ]
    return Changes([addition for addition in additions if addition.scale != 0])


def targets(
    lora: Lora, component: LoraComponent, shapes: Shapes, config: Mapping[str, Any], model: str = "base"
) -> dict[str, Branch]:
    """Return {published tensor name: the branch that changes it}; empty if the LoRA has nothing for `component`.

    `shapes` maps all published tensor names of the component to their shapes, `config` is its model's. `model`
    is "base" or "refiner", for messages. Raises
    SourceError for a LoRA of another model; reads tensors only where two branches name the same module.
    """
    if component not in lora.branches:
        return {}
    spellings = module_spellings(component, shapes, config)
    found: dict[str, Branch] = {}
    for branch in lora.branches[component]:
        name = f"{spellings.get(branch.place.module)}.{'bias' if branch.bias else 'weight'}"
        if name not in shapes or not branch.fits(shapes[name]):
            raise SourceError(f"{lora.path}: {_misfit(lora, branch, shapes, name, model)}")
        if name not in found:
            found[name] = branch
        elif not same_tensors(branch, found[name]):
            raise SourceError(f"{lora.path}: {branch.infos[0].key!r} and {found[name].infos[0].key!r} name the same"
                              " module but differ; remove one of them")  # fmt: skip
    return found


def _misfit(lora: Lora, branch: Branch, shapes: Shapes, name: str, model: str) -> str:
    """Return why `branch` cannot change the tensor `name`, with the LoRA's model if the shapes reveal it."""
    component, trained = branch.place.component, "SDXL base" if model == "base" else "SDXL's refiner"
    contexts = {each.inputs: each for each in lora.branches.get("unet", ()) if _takes_context(each)}
    own = next((shape[1] for key, shape in shapes.items() if key.endswith(".attn2.to_k.weight")), None)
    for context, each in contexts.items():
        if context in _CONTEXTS and own is not None and context != own:
            return (f"LoRA for another model: {each.told()} takes a context of width {context}, like"
                    f" {_CONTEXTS[context]}, but this {model}'s is {own}; use one that was trained on"
                    f" {trained}")  # fmt: skip
    if name in shapes:
        return (f"LoRA for another model: it has {branch.told()}, but {component} has {name} of shape"
                f" {list(shapes[name])}; use one that was trained on {trained}")  # fmt: skip
    what = "such bias" if branch.bias else "such module"
    return (f"has {branch.told()}, but this {model}'s {component} has no {what}; use a LoRA that was trained on"
            f" {trained}, or remove these keys")  # fmt: skip


def _takes_context(branch: Branch) -> bool:
    module = branch.place.module.replace("_", ".")
    return not branch.bias and "attn2" in module and module.endswith((".to.k", ".to.v"))
