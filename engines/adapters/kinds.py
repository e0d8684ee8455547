"""The kinds of changes to one weight in LoRA files: the tensors of each kind, and which weights they fit."""

__all__ = ["MAGNITUDES", "Branch", "LoraKind", "magnitude_axis", "make_branches"]

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdxl_trt.engines.adapters.names import Place
from sdxl_trt.engines.adapters.tensors import StoredTensor
from sdxl_trt.engines.errors import CorruptError, SourceError

LoraKind = Literal["LoRA", "LoHa", "LoKr", "difference"]
Parts = Mapping[str, StoredTensor]

_KINDS: dict[LoraKind, frozenset[str]] = {
    "LoRA": frozenset({"down", "up", "mid"}),
    "LoHa": frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}),
    "LoKr": frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
    "difference": frozenset({"diff"}),
}
MAGNITUDES = ("dora_scale", "magnitude")
"""The parts that make a branch DoRA."""
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_CORES = ("mid", "hada_t1", "hada_t2", "lokr_t2")
_POINTS: tuple[tuple[int, ...], ...] = ((), (1, 1))


@dataclass(frozen=True)
class Branch:
    """A file's change to one tensor of the module at `place`: to the bias if `bias` is true, else to the weight.

    - ``LoRA``: up (out, r) @ down (r, in…); with a mid (r, r, kh, kw) between them in LoCon's convolutions
    - ``LoHa``: the elementwise product of two such: w1_a @ w1_b and w2_a @ w2_b
    - ``LoKr``: the Kronecker product of w1 and w2, each whole or as a @ b
    - ``difference``: a tensor of the weight's own shape

    `parts` are its tensors by the last word of their keys ("down", "lokr_w1_a", "diff"), `scaling` is alpha / r. With
    a ``dora_scale`` (LyCORIS, OneTrainer) or a ``magnitude`` (peft) among the parts it is DoRA: the changed weight is
    rescaled to the norms in that tensor.
    """

    place: Place
    kind: LoraKind
    parts: Parts
    scaling: float = 1.0
    bias: bool = False

    @property
    def infos(self) -> tuple[StoredTensor, ...]:
        """The branch's tensors, in the order of `parts`."""
        return tuple(self.parts.values())

    @property
    def rank(self) -> int | None:
        """The r by which alpha is divided; None if nothing is low-rank, so that alpha has no meaning."""
        if self.kind == "difference":
            return None
        factors = {"LoRA": ("down",), "LoHa": ("hada_w1_b",), "LoKr": ("lokr_w2_b", "lokr_w1_b")}[self.kind]
        return next((self.parts[part].shape[0] for part in factors if part in self.parts), None)

    @property
    def inputs(self) -> int:
        """The second axis of the weight, times its kernel if the parts do not separate them; 1 for vectors."""
        if self.kind == "LoKr":
            return _lokr_half(self.parts, "1")[1] * _lokr_half(self.parts, "2")[1]
        part = {"LoRA": "down", "LoHa": "hada_w1_b", "difference": "diff"}[self.kind]
        return (*self.parts[part].shape, 1)[1]

    def told(self) -> str:
        """Return the keys and shapes of the tensors, for a message."""
        return " and ".join(f"{info.key!r} {list(info.shape)}" for info in self.infos)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether this branch can change a weight of `shape` (out, in, *kernel)."""
        if self.kind == "difference":
            return _without_points(self.parts["diff"].shape) == _without_points(shape)
        if len(shape) not in {2, 4}:
            return False
        if any(part in self.parts for part in MAGNITUDES) and magnitude_axis(self, shape) is None:
            return False
        return {"LoRA": _lora_fits, "LoHa": _loha_fits, "LoKr": _lokr_fits}[self.kind](self.parts, shape)


def magnitude_axis(branch: Branch, shape: tuple[int, ...]) -> int | None:
    """Return the axis of a weight of `shape` along which DoRA's norms lie: 0, 1, or None if they fit neither.

    peft has one norm per output, as (out,) or (1, out, 1, 1); the others write (out, 1, …) or (1, in, …). If both
    fit, the norms are the outputs', as in ComfyUI.
    """
    if "magnitude" in branch.parts:
        return 0 if branch.parts["magnitude"].shape in {(shape[0],), (1, shape[0], 1, 1)} else None
    given = branch.parts["dora_scale"].shape
    if len(given) < 2 or any(length != 1 for length in given[2:]):
        return None
    return 0 if given[:2] == (shape[0], 1) else 1 if given[:2] == (1, shape[1]) else None


def make_branches(path: Path, place: Place, parts: Parts, alpha: float | None) -> Iterator[Branch]:
    """Yield the branches that the `parts` of one module make: of its weight, of its bias, or both.

    The scaling is alpha / r, or 1 without `alpha`. Raises CorruptError for missing parts and for shapes that do not
    belong together, SourceError for kinds that exclude each other.
    """
    where = f"{path}: {place.component} module {place.module!r}"
    for info in parts.values():
        if info.dtype not in _FLOATS or len(info.shape) not in {1, 2, 4} or 0 in info.shape:
            raise CorruptError(f"{path}: {info.key!r} is {info.dtype} {list(info.shape)}, expected the floats of a"
                               " LoRA's matrix or convolution; the LoRA is damaged")  # fmt: skip
    if "diff_b" in parts:
        yield Branch(place, "difference", {"diff": parts["diff_b"]}, bias=True)
    weight = {part: info for part, info in parts.items() if part != "diff_b"}
    if not weight and "diff_b" in parts:
        return
    kinds: list[LoraKind] = [kind for kind, own in _KINDS.items() if own & weight.keys()]
    decomposed = [part for part in MAGNITUDES if part in weight]
    if len(kinds) > 1 or len(decomposed) > 1 or (decomposed and kinds == ["difference"]):
        raise SourceError(f"{where} has {' and '.join(repr(info.key) for info in weight.values())}, which exclude"
                          " each other; remove what does not belong")  # fmt: skip
    missing = _missing(kinds[0] if kinds else "LoRA", weight)
    if missing:
        raise CorruptError(f"{where} lacks its {missing} weight; the LoRA is incomplete")
    branch = Branch(place, kinds[0], weight)
    _check_chain(path, branch, alpha)
    yield Branch(place, kinds[0], weight, 1.0 if alpha is None or branch.rank is None else alpha / branch.rank)


def _missing(kind: LoraKind, parts: Parts) -> str:
    """Return the name of a part that `kind` needs and the file lacks; "" if it is complete."""
    needed = {"LoRA": ["down", "up"], "LoHa": ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"], "LoKr": [],
              "difference": []}[kind]  # fmt: skip
    if kind == "LoHa" and not parts.keys().isdisjoint({"hada_t1", "hada_t2"}):
        needed += ["hada_t1", "hada_t2"]
    for whole in ("lokr_w1", "lokr_w2") if kind == "LoKr" else ():
        needed += [f"{whole}_a", f"{whole}_b"] if f"{whole}_a" in parts or f"{whole}_b" in parts else [whole]
    if "lokr_t2" in parts:
        needed += ["lokr_w2_a", "lokr_w2_b"]
    return next((part for part in needed if part not in parts), "")


def _check_chain(path: Path, branch: Branch, alpha: float | None) -> None:
    """Raise CorruptError unless the factors can be multiplied, SourceError if they are ambiguous."""
    parts = branch.parts
    chains = [("down", 0, "mid", 1), ("mid", 0, "up", 1)] if "mid" in parts else [("down", 0, "up", 1)]
    for whole, core in (("hada_w1", "hada_t1"), ("hada_w2", "hada_t2"), ("lokr_w1", ""), ("lokr_w2", "lokr_t2")):
        a, b = f"{whole}_a", f"{whole}_b"
        chains += [(a, 0, core, 0), (core, 1, b, 0)] if core in parts else [(a, 1, b, 0)]
        if whole in parts and a in parts:
            raise SourceError(f"{path}: has both {parts[whole].key!r} and {parts[a].key!r}; remove one of them")
    vectors = [info for part, info in parts.items() if len(info.shape) == 1 and part not in {*MAGNITUDES, "diff"}]
    if vectors:
        raise CorruptError(f"{path}: {vectors[0].key!r} is a vector, expected a LoRA's matrix or convolution")
    flat = [parts[core] for core in _CORES if core in parts and len(parts[core].shape) != 4]
    if flat:
        raise CorruptError(f"{path}: {flat[0].key!r} {list(flat[0].shape)} has no kernel, expected the four axes of a"
                           " convolution; the LoRA is damaged")  # fmt: skip
    for first, axis, second, other in chains:
        if first in parts and second in parts and parts[first].shape[axis] != parts[second].shape[other]:
            one, two = parts[first], parts[second]
            raise CorruptError(f"{path}: {one.key!r} {list(one.shape)} and {two.key!r} {list(two.shape)} do"
                               " not chain; the LoRA is damaged")  # fmt: skip
    ranks = {parts[part].shape[0] for part in ("lokr_w1_b", "lokr_w2_b") if part in parts}
    if alpha is not None and len(ranks) > 1:
        raise SourceError(f"{path}: {parts['lokr_w1_b'].key!r} and {parts['lokr_w2_b'].key!r} have ranks"
                          f" {min(ranks)} and {max(ranks)}, but one alpha for both; train it again")  # fmt: skip


def _lora_fits(parts: Parts, shape: tuple[int, ...]) -> bool:
    down, up, kernel = parts["down"].shape, parts["up"].shape, shape[2:]
    # A 1x1 convolution is a matrix; trainers store it as either.
    points = _POINTS if kernel in _POINTS else (kernel,)
    ends = (up[0], down[1]) == shape[:2] and up[2:] in _POINTS
    if "mid" not in parts:
        return ends and down[2:] in points
    return ends and down[2:] in _POINTS and parts["mid"].shape[2:] == kernel != ()


def _loha_fits(parts: Parts, shape: tuple[int, ...]) -> bool:
    for half in "12":
        a, b = parts[f"hada_w{half}_a"].shape, parts[f"hada_w{half}_b"].shape
        if len(a) != 2 or len(b) != 2:
            return False
        if f"hada_t{half}" in parts:
            if (a[1], b[1]) != shape[:2] or parts[f"hada_t{half}"].shape[2:] != shape[2:] or len(shape) != 4:
                return False
        elif (a[0], b[1]) != (shape[0], math.prod(shape[1:])):
            return False
    return True


def _lokr_half(parts: Parts, half: str) -> tuple[int, int, tuple[int, ...]]:
    """Return rows, columns and kernel of w1 or w2 after multiplying its factors."""
    if (whole := parts.get(f"lokr_w{half}")) is not None:
        return whole.shape[0], whole.shape[1], whole.shape[2:]
    a, b, core = parts[f"lokr_w{half}_a"], parts[f"lokr_w{half}_b"], parts.get(f"lokr_t{half}")
    return (a.shape[0], b.shape[1], ()) if core is None else (a.shape[1], b.shape[1], core.shape[2:])


def _lokr_fits(parts: Parts, shape: tuple[int, ...]) -> bool:
    first, second = _lokr_half(parts, "1"), _lokr_half(parts, "2")
    factors = [info.shape for part, info in parts.items() if part.startswith("lokr_w") and part[-1] in "ab"]
    size = (first[0] * second[0], first[1] * second[1])
    if any(len(factor) != 2 for factor in factors) or first[2] != ():
        return False
    if second[2] == () or second[2] == shape[2:]:
        # A w2 without kernel axes has the kernel in its columns.
        return size == (shape[0], math.prod(shape[1:]) if second[2] == () else shape[1])
    return second[2] == (1, 1) and size == shape


def _without_points(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return `shape` without the kernel of a 1x1 convolution."""
    return shape[:2] if shape[2:] == (1, 1) else shape
