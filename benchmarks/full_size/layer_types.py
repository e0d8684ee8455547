"""Which layers of a plan compute in 8 bits, counted in the builder's log (`BuildJob.list_layers`).

TensorRT lists the kernels that a plan consists of, with the types of what they read. A kernel may do the work of
several layers of the graph: queries, keys and values are one product. Products with LoRAs are not counted, nor are
convolutions whose weight a LoRA changes.
"""

__all__ = ["Count", "LayerTypes", "count_layer_types"]

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

Kind = Literal["linears", "convolutions", "attentions"]
EIGHT_BIT = ("Int8", "FP8")
_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\],"
    r" Outputs: \[(?P<outputs>.*?)\], TacticName: .*?Metadata: (?P<origin>.*)"
)
_TENSOR = re.compile(r"Dimensions: \[(?P<dimensions>[^\]]*)\].*?Datatype: (?P<type>\w+)")
# The names that TensorRT gives to its fused kernels, such as __myl_FcAddMul, tell what they begin with.
_FUSED_PRODUCT, _FUSED_CONVOLUTION = re.compile(r"__myl_\w*?Fc"), re.compile(r"__myl_\w*?Corr")
_FUSED_ATTENTION = "_gemm_mha"
_ADAPTER = "/lora/"


class Count(msgspec.Struct, frozen=True):
    """How many kernels of one kind a plan has, how many of them compute in 8 bits, and those kernels' share.

    The share is that of the operations, of attentions that of their number.
    """

    all: int = 0
    eight_bit: int = 0
    share: float = 0.0


class LayerTypes(msgspec.Struct, frozen=True):
    """The kernels of a plan. An attention is one fused kernel, or two products of activations."""

    linears: Count
    convolutions: Count
    attentions: Count
    fused_attentions: int


class _Tensor(NamedTuple):
    dimensions: tuple[int, ...]
    type: str


class _Kernel(NamedTuple):
    kind: Kind
    eight_bit: bool
    operations: int
    """Multiplications and additions; 1 for an attention."""


def count_layer_types(log: Path) -> LayerTypes:
    """Return what the log of a build with `list_layers` says. Raises ValueError for a log without a list of layers."""
    kernels: list[_Kernel] = []
    products: list[_Kernel] = []
    listed = False
    with log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            found = _LAYER.search(line)
            listed = listed or found is not None
            kernel = None if found is None else _kernel(found)
            if found is not None and kernel is not None:
                fused = kernel.kind != "attentions" or found["name"].startswith(_FUSED_ATTENTION)
                (kernels if fused else products).append(kernel)
    if not listed:
        raise ValueError(f"{log.name}: has no list of layers with their types")
    fused = sum(kernel.kind == "attentions" for kernel in kernels)
    # Scores and their sum over the values: an attention that is not fused is in 8 bits if both products are.
    pairs = [products[place : place + 2] for place in range(0, len(products), 2)]
    both = [_Kernel("attentions", all(product.eight_bit for product in pair), 1) for pair in pairs]
    return LayerTypes(
        _count(kernels, "linears"), _count(kernels, "convolutions"), _count([*kernels, *both], "attentions"), fused
    )


def _kernel(found: "re.Match[str]") -> _Kernel | None:
    """Return what the kernel of a log line computes, None if it has no products."""
    name, kind = found["name"], found["type"]
    inputs, constants = _tensors(found["inputs"]), _tensors(found["constants"])
    if name.startswith(_FUSED_ATTENTION):
        return _Kernel("attentions", all(tensor.type in EIGHT_BIT for tensor in inputs), 1)
    convolution = kind == "correlation" or (kind == "runtime_fusion" and _FUSED_CONVOLUTION.match(name))
    product = kind == "gemm" or (kind == "runtime_fusion" and _FUSED_PRODUCT.match(name))
    if not (convolution or product) or not inputs:
        return None
    weight = max(constants, key=lambda tensor: math.prod(tensor.dimensions), default=_Tensor((), ""))
    if sum(size > 1 for size in weight.dimensions) < 2:
        # Without a weight, whose bias and scales are vectors: a product of activations, or with a LoRA.
        if convolution or _ADAPTER in found["origin"]:
            return None
        return _Kernel("attentions", all(each.type in EIGHT_BIT for each in inputs[:2]), 1)
    source = inputs[0]
    eight_bit = weight.type in EIGHT_BIT and source.type in EIGHT_BIT
    sizes = _tensors(found["outputs"])[0].dimensions if convolution else source.dimensions
    if min(sizes) < 0:
        raise ValueError(f"{name}: computes on {list(sizes)}, but only plans for one size can be counted")
    places = math.prod(sizes) // sizes[1 if convolution else -1]
    return _Kernel("convolutions" if convolution else "linears", eight_bit, 2 * places * math.prod(weight.dimensions))


def _tensors(text: str) -> list[_Tensor]:
    """Return the tensors of a list in the log; the rank of LoRAs, and sizes that vary, are -1."""
    return [
        _Tensor(tuple(int(size) for size in match["dimensions"].split(",") if size), match["type"])
        for match in _TENSOR.finditer(text)
    ]


def _count(kernels: Iterable[_Kernel], kind: Kind) -> Count:
    chosen = [kernel for kernel in kernels if kernel.kind == kind]
    narrow = [kernel for kernel in chosen if kernel.eight_bit]
    whole = sum(kernel.operations for kernel in chosen)
    share = sum(kernel.operations for kernel in narrow) / whole if whole else 0.0
    return Count(len(chosen), len(narrow), round(share, 4))
