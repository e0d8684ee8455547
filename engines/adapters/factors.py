"""LoRAs as the inputs of slots: the change of a weight as a product up · down, exactly, for every kind that is one.

A LoRA is such a product as it is stored, also a convolution's with a mid tensor. A LoHa is the elementwise product of
two of them, and a LoKr their Kronecker product: both are one product again, whose rank is the product of the two ranks.
DoRA rescales the weight itself, and full differences and biases have no factors: no slot takes them.
"""

__all__ = [
    "FUSE_OR_FP16",
    "WITHOUT_SLOTS",
    "Factors",
    "SlotFactors",
    "factors_of",
    "plan_factors",
    "rank_of",
]

import math
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.adapters.kinds import MAGNITUDES, Branch
from sdxl_trt.engines.adapters.names import LoraComponent
from sdxl_trt.engines.adapters.scaled import ScaledLora, targets
from sdxl_trt.engines.adapters.tensors import read_finite
from sdxl_trt.engines.errors import CorruptError, IncompatibleError

Weights = NDArray[np.float32]
Tensors = Mapping[str, Weights]
TensorShapes = Mapping[str, tuple[int, ...]]
WITHOUT_SLOTS = "fuse it with export-engines --lora, or run on ONNX Runtime: --provider ort-cuda"
"""What to do with a LoRA that TensorRT plans do not take."""
FUSE_OR_FP16 = "fuse it with export-engines --lora, or export the bundle with --fp16"
"""The same for 8-bit weights, which ONNX Runtime cannot change either."""


@dataclass(frozen=True)
class Factors:
    """A change of a weight (out, in, *kernel) as `up` (out, rank) times `down` (rank, in · kernel), in fp32."""

    down: Weights
    up: Weights

    @property
    def rank(self) -> int:
        """The number of columns of `up`."""
        return len(self.down)

    def balanced(self) -> "Factors":
        """Return the same product from factors with largest values that differ by a factor of 2 at most.

        A power of two moves from one factor to the other, which is exact. Trainers leave `up` much smaller than `down`:
        as fp16, its values would be subnormal.
        """
        largest = [float(np.abs(factor).max(initial=0.0)) for factor in (self.down, self.up)]
        if not all(map(math.isfinite, largest)) or 0.0 in largest:
            return self
        moved = round((math.log2(largest[0]) - math.log2(largest[1])) / 2)
        return Factors(np.ldexp(self.down, -moved), np.ldexp(self.up, moved))


class SlotFactors:
    """The LoRAs of one component as the inputs of its slots, in order; `rank` is that of all its slots.

    Nothing is read before `each`.
    """

    def __init__(self, additions: Sequence[tuple[ScaledLora, Mapping[str, Branch]]], shapes: TensorShapes) -> None:
        self._additions, self._shapes = tuple(additions), shapes
        self._names = tuple(dict.fromkeys(name for _, branches in additions for name in branches))
        self.modules = tuple(map(_module, self._names))
        """The modules whose slots the LoRAs change; the others take zeros."""
        ranks = (sum(rank_of(own[name]) for _, own in additions if name in own) for name in self._names)
        self.rank = max(ranks, default=0)
        """The largest sum of ranks in one slot, 0 without LoRAs."""

    @property
    def told(self) -> str:
        """The LoRAs with their own largest ranks, for a message."""
        return " and ".join(f"{lora.lora.name} (rank {max(map(rank_of, own.values()), default=0)})"
                            for lora, own in self._additions)  # fmt: skip

    def each(self) -> Iterator[tuple[str, Factors]]:
        """Yield each of `modules` with its factors, all LoRAs concatenated along the rank and filled up with zeros.

        One slot's tensors are in memory at a time. Raises CorruptError for a LoRA that is damaged, or infinite at its
        scale.
        """
        for module, name in zip(self.modules, self._names, strict=True):
            outputs, *columns = self._shapes[name]
            parts = [_read(lora, own[name], name) for lora, own in self._additions if name in own]
            down = np.zeros((self.rank, math.prod(columns)), np.float32)
            up = np.zeros((outputs, self.rank), np.float32)
            start = 0
            for part in parts:
                down[start : start + part.rank], up[:, start : start + part.rank] = part.down, part.up
                start += part.rank
            yield module, Factors(down, up)


def plan_factors(
    loras: Sequence[ScaledLora],
    component: LoraComponent,
    shapes: TensorShapes,
    config: Mapping[str, Any],
    slots: Collection[str],
    remedy: str = WITHOUT_SLOTS,
    unused: Container[str] = frozenset(),
) -> SlotFactors:
    """Return the LoRAs as inputs of `slots`, the modules that have one; `shapes` and `config` are as in `targets`.

    LoRAs with scale 0 on the component are left out, and changes of the tensors `unused` by its graph. Raises
    SourceError for a LoRA of another model, and IncompatibleError, with `remedy`, for a change that no slot takes:
    DoRA, a full difference, a bias, or that of a module without a slot.
    """
    additions = []
    for lora in loras:
        found = targets(lora.lora, component, shapes, config)
        branches = {name: branch for name, branch in found.items() if name not in unused}
        scaled = ScaledLora(lora.lora, lora.on(component))
        if not branches or scaled.scale == 0:
            continue
        for name, branch in branches.items():
            _require_slot(scaled, name, branch, slots, remedy)
        additions.append((scaled, branches))
    return SlotFactors(additions, shapes)


def rank_of(branch: Branch) -> int:
    """Return the rank of the product that `factors_of` makes of `branch`."""
    if branch.kind == "LoRA":
        return branch.parts["up"].shape[1]
    prefix, core = _HALVES[branch.kind]
    return math.prod(_half_rank(branch, f"{prefix}{half}", f"{core}{half}") for half in "12")


def factors_of(branch: Branch, tensors: Tensors, factor: float) -> Factors:
    """Return the change that `branch` makes, times `factor`, which `up` contains; `tensors` are its parts in fp32."""
    if branch.kind == "LoRA":
        down = tensors["down"]
        if "mid" in tensors:
            down = np.einsum("ijkl,jr->irkl", tensors["mid"], _matrix(down), optimize=True)
        found = Factors(_matrix(down), _matrix(tensors["up"]))
    else:
        prefix, core = _HALVES[branch.kind]
        first, second = (_half(tensors, f"{prefix}{half}", f"{core}{half}") for half in "12")
        found = (_rows_product if branch.kind == "LoHa" else _kronecker)(first, second)
    with np.errstate(over="ignore"):
        return Factors(found.down, found.up * np.float32(factor))


_HALVES = {"LoHa": ("hada_w", "hada_t"), "LoKr": ("lokr_w", "lokr_t")}
_Half = tuple[Weights, Weights]
"""up (rows, rank) and down (rank, columns, *kernel)"""


def _rows_product(first: _Half, second: _Half) -> Factors:
    """Return the elementwise product of two products: every column of one `up` with every column of the other."""
    (up, down), (other_up, other_down) = first, second
    ups = up[:, :, None] * other_up[:, None, :]
    downs = _matrix(down)[:, None, :] * _matrix(other_down)[None, :, :]
    return Factors(downs.reshape(-1, downs.shape[-1]), ups.reshape(len(ups), -1))


def _kronecker(first: _Half, second: _Half) -> Factors:
    """Return the Kronecker product of two products: kron(a · b, c · d) = kron(a, c) · kron(b, d)."""
    (up, down), (other_up, other_down) = first, second
    widened = down.reshape(*down.shape, *(1 for _ in other_down.shape[2:]))
    return Factors(_matrix(np.kron(widened, other_down)), np.kron(up, other_up))


def _half(tensors: Tensors, name: str, core: str) -> _Half:
    """Return a tensor stored whole, as a · b, or as a and b with a core between them, as a product."""
    if name in tensors:
        whole = tensors[name]
        if len(whole) <= math.prod(whole.shape[1:]):
            return np.eye(len(whole), dtype=np.float32), whole
        matrix = _matrix(whole)
        return matrix, np.eye(matrix.shape[1], dtype=np.float32).reshape(-1, *whole.shape[1:])
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    if core not in tensors:
        return a, b
    return a.T, np.einsum("ijkl,jr->irkl", tensors[core], b, optimize=True)


def _half_rank(branch: Branch, name: str, core: str) -> int:
    if name in branch.parts:
        rows, *columns = branch.parts[name].shape
        return min(rows, math.prod(columns))
    return branch.parts[core].shape[0] if core in branch.parts else branch.parts[f"{name}_a"].shape[1]


def _read(lora: ScaledLora, branch: Branch, name: str) -> Factors:
    """Return the factors of a branch of a LoRA whose scale is the component's."""
    tensors = {part: read_finite(info) for part, info in branch.parts.items()}
    found = factors_of(branch, tensors, lora.scale * branch.scaling)
    if not (np.isfinite(found.up).all() and np.isfinite(found.down).all()):
        raise CorruptError(f"{lora.lora.path}: makes {name} infinite at scale {lora.scale}; lower the scale, or"
                           " download the LoRA again")  # fmt: skip
    return found


def _require_slot(lora: ScaledLora, name: str, branch: Branch, slots: Collection[str], remedy: str) -> None:
    if branch.bias:
        what = f"the bias {name}"
    elif branch.kind == "difference":
        what = f"{name} by a full difference"
    elif not branch.parts.keys().isdisjoint(MAGNITUDES):
        what = f"{name} by DoRA"
    elif _module(name) not in slots:
        what = f"{name}, which has no input for LoRAs"
    else:
        return
    raise IncompatibleError(f"{lora.lora.path}: changes {what}, and TensorRT plans take only low-rank changes as"
                            f" inputs; {remedy}")  # fmt: skip


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _matrix(tensor: Weights) -> Weights:
    """Return a tensor with all axes after the first in one."""
    return tensor.reshape(len(tensor), -1)
