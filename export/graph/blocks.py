"""Trace repeated blocks once: SDXL's 70 transformer blocks are two graphs, instantiated with different weights.

While a module is traced, each of its repeated blocks (the table `BLOCKS`) is hollow: its forward emits one node and
records its arguments. Each distinct block is then traced alone, with its own repeated blocks hollow, and its graph
replaces the nodes. The result equals the graph of a trace of the whole module, in a fraction of the time.
"""

__all__ = ["DOMAIN", "Blocks", "Call", "Template", "expand", "hollowed", "translations"]

import contextlib
import functools
import itertools
import types
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import onnx
import onnx_ir as ir
import torch
from onnxscript import values
from torch import Tensor, nn

DOMAIN, BLOCK = "sdxl_trt", "Block"

# Classes that repeat, with the attribute path of the output channels (None: as the first input) and whether forward
# returns a tuple.
BLOCKS: dict[str, tuple[str | None, bool]] = {
    "diffusers.models.transformers.transformer_2d.Transformer2DModel": (None, True),
    "diffusers.models.attention.BasicTransformerBlock": (None, False),
    "diffusers.models.resnet.ResnetBlock2D": ("conv2.out_channels", False),
    "transformers.models.clip.modeling_clip.CLIPEncoderLayer": (None, False),
}
_PLAIN = (int, float, str, bool, type(None), torch.dtype)

_library = torch.library.Library(DOMAIN, "DEF")
_library.define("block(Tensor[] inputs, str path, int channels) -> Tensor")


@torch.library.register_fake(f"{DOMAIN}::block", lib=_library)
def _block_shape(inputs: list[Tensor], path: str, channels: int) -> Tensor:  # noqa: ARG001 - the operator's signature
    shape = list(inputs[0].shape)
    if channels:
        shape[1] = channels
    return inputs[0].new_empty(shape)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the translation table with which `torch.onnx.export` writes the node of a hollow block."""
    schema = onnx.defs.OpSchema
    parameter = functools.partial(schema.FormalParameter, type_str="T")
    operator = values.Op(
        values.Opset(DOMAIN, 1),
        BLOCK,
        schema(
            BLOCK,
            DOMAIN,
            1,
            inputs=[parameter("inputs", param_option=schema.FormalParameterOption.Variadic, is_homogeneous=False)],
            outputs=[parameter("output")],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(bool)"], "")],
            attributes=[schema.Attribute("path", schema.AttrType.STRING)],
        ),
    )

    def translate(inputs: list[Any], path: str, channels: int) -> Any:  # noqa: ARG001 - the operator's signature
        return operator(*inputs, path=path)

    return {torch.ops.sdxl_trt.block.default: translate}


@dataclass(frozen=True)
class Argument:
    """A tensor argument of a hollow block: its dtype, its sizes (a symbol if dynamic), example sizes."""

    dtype: torch.dtype
    sizes: tuple[int | str, ...]
    example: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Argument":
        """Describe a tensor of a running trace."""
        # The same rows have different symbols in different inputs, so they get one name.
        names = ("rows", *map(str, tensor.shape[1:]))
        sizes = tuple(size if isinstance(size, int) else name for size, name in zip(tensor.shape, names, strict=True))
        example = tuple(size if isinstance(size, int) else int(size.node.hint) for size in tensor.shape)
        return cls(tensor.dtype, sizes, example)


@dataclass(frozen=True)
class Call:
    """A call of a block: its tensors by position or keyword, and all other arguments unchanged."""

    block: nn.Module
    tensors: Mapping[int | str, Argument]
    others: Mapping[int | str, Any]

    def key(self) -> Hashable:
        """Return a key that two calls share exactly if one graph serves both."""
        symbols: dict[str, int] = {}
        shapes = tuple(
            (name, argument.dtype, *(s if isinstance(s, int) else f"s{symbols.setdefault(s, len(symbols))}"
                                     for s in argument.sizes))
            for name, argument in self.tensors.items()
        )  # fmt: skip
        return fingerprint(self.block), shapes, repr(sorted(self.others.items(), key=lambda item: str(item[0])))

    def run(self, tensors: Iterable[Tensor]) -> Tensor:
        """Call the block again with `tensors` in place of its own."""
        given = {**self.others, **dict(zip(self.tensors, tensors, strict=True))}
        positional = [given[name] for name in sorted(name for name in given if isinstance(name, int))]
        result = self.block(*positional, **{name: value for name, value in given.items() if isinstance(name, str)})
        return result[0] if isinstance(result, tuple) else result


class Blocks(nn.Module):
    """Several blocks as one module, for a single trace: takes the tensors of all calls, returns one output per call."""

    def __init__(self, calls: Sequence[Call]) -> None:
        super().__init__()
        self.calls = tuple(calls)
        self.blocks = nn.ModuleList(call.block for call in calls)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run each block on its own tensors."""
        rest = iter(tensors)
        return tuple(call.run(itertools.islice(rest, len(call.tensors))) for call in self.calls)

    def arguments(self) -> tuple[Tensor, ...]:
        """Return example tensors on the meta device."""
        every = (argument for call in self.calls for argument in call.tensors.values())
        return tuple(torch.empty(argument.example, dtype=argument.dtype, device="meta") for argument in every)

    def dynamic_shapes(self) -> tuple[tuple[dict[int, Any], ...]]:
        """Return the dynamic dimensions of the tensors; equal symbols within a call give one dimension."""
        dims: dict[tuple[int, str], Any] = {}
        shapes: list[dict[int, Any]] = []
        for index, call in enumerate(self.calls):
            for argument in call.tensors.values():
                varying = {axis: (index, size) for axis, size in enumerate(argument.sizes) if isinstance(size, str)}
                shapes.append({axis: dims.setdefault(symbol, torch.export.Dim(f"d{len(dims)}"))
                               for axis, symbol in varying.items()})  # fmt: skip
        return (tuple(shapes),)

    def templates(self, model: ir.Model) -> list["Template"]:
        """Split the traced graph into one template per call."""
        rest = iter(model.graph.inputs)
        return [
            Template.of(model.graph, tuple(itertools.islice(rest, len(call.tensors))), output, f"blocks.{index}.")
            for index, (call, output) in enumerate(zip(self.calls, model.graph.outputs, strict=True))
        ]


@dataclass(frozen=True)
class Template:
    """The part of a graph that makes one output; it is copied to every place of its block."""

    inputs: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]
    initializers: Mapping[str, ir.Value]
    output: ir.Value

    @classmethod
    def of(cls, graph: ir.Graph, inputs: tuple[ir.Value, ...], output: ir.Value, prefix: str) -> "Template":
        """Collect the nodes and weights that `output` depends on; `prefix` is stripped from the weights' names."""
        needed: set[ir.Value] = {output}
        nodes: list[ir.Node] = []
        for node in reversed(graph):
            if needed.intersection(node.outputs):
                nodes.append(node)
                needed.update(value for value in node.inputs if value is not None)
        weights = {name.removeprefix(prefix): value for name, value in graph.initializers.items() if value in needed}
        return cls(inputs, tuple(reversed(nodes)), weights, output)


@contextlib.contextmanager
def hollowed(module: nn.Module) -> Iterator[dict[str, Call]]:
    """Hollow the repeated blocks of `module`; yield {path: call}, which fills during a trace."""
    calls: dict[str, Call] = {}
    restored: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for path, block in _repeated(module):
            restored.append((block, dict(block.__dict__)))
            _hollow(block, path, calls)
        yield calls
    finally:
        for block, state in restored:
            block.__dict__.clear()
            block.__dict__.update(state)


def _repeated(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (path, block) of the outermost blocks that occur at least twice in `module`."""
    candidates = {path: block for path, block in module.named_modules() if path and _name(block) in BLOCKS}
    alike = Counter(fingerprint(block) for block in candidates.values())
    chosen: list[tuple[str, nn.Module]] = []
    outermost = set(module.blocks) if isinstance(module, Blocks) else set()
    for path, block in candidates.items():
        inside = any(path.startswith(f"{outer}.") for outer, _ in chosen)
        if not inside and block not in outermost and alike[fingerprint(block)] > 1:
            chosen.append((path, block))
    return chosen


def _hollow(block: nn.Module, path: str, calls: dict[str, Call]) -> None:
    channels_at, as_tuple = BLOCKS[_name(block)]
    channels = 0 if channels_at is None else int(functools.reduce(getattr, channels_at.split("."), block))
    whole = object.__new__(type(block))
    whole.__dict__.update(block.__dict__)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given: dict[int | str, Any] = dict(enumerate(args))
        given.update(kwargs.items())
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in given.items() if name not in tensors}
        calls[path] = Call(whole, {name: Argument.of(tensor) for name, tensor in tensors.items()}, others)
        output = torch.ops.sdxl_trt.block(list(tensors.values()), path, channels)
        return (output,) if as_tuple else output

    block.__dict__.update(_modules={}, _parameters={}, forward=forward)


def expand(model: ir.Model, templates: Mapping[str, Template]) -> None:
    """Replace each block's node by a copy of its template; `templates` are by path."""
    constants: dict[ir.Value, ir.Value] = {}
    for node in [node for node in model.graph if node.domain == DOMAIN]:
        path = node.attributes["path"].as_string()
        _instantiate(model.graph, node, templates[path], path, constants)
    model.opset_imports.pop(DOMAIN, None)


def _instantiate(
    graph: ir.Graph, node: ir.Node, template: Template, path: str, constants: dict[ir.Value, ir.Value]
) -> None:
    twins: dict[ir.Value | None, ir.Value | None] = {None: None}
    twins.update(zip(template.inputs, node.inputs, strict=True))
    for name, initializer in template.initializers.items():
        twins[initializer] = constants.get(initializer) or _initializer(graph, initializer, f"{path}.{name}")
        if initializer.const_value is not None:  # a folded constant, the same in every copy
            constants[initializer] = cast("ir.Value", twins[initializer])
    symbols = _symbols(template.inputs, node.inputs)
    for original in template.nodes:
        outputs = [_twin(value, path, symbols) for value in original.outputs]
        twins.update(zip(original.outputs, outputs, strict=True))
        inputs = [twins[value] for value in original.inputs]
        attributes = list(original.attributes.values())
        copy = ir.Node(original.domain, original.op_type, inputs, attributes, outputs=outputs,
                       version=original.version, name=f"{path}/{original.name}")  # fmt: skip
        graph.insert_before(node, copy)
    result = twins[template.output]
    if result is None:
        raise RuntimeError(f"{path}: the block's graph has no output")
    ir.convenience.replace_all_uses_with(node.outputs[0], result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _initializer(graph: ir.Graph, like: ir.Value, name: str) -> ir.Value:
    value = ir.Value(name=name, shape=like.shape, type=like.type, const_value=like.const_value)
    graph.initializers.add(value)
    return value


def _symbols(inner: Iterable[ir.Value], outer: Iterable[ir.Value | None]) -> dict[str, str]:
    """Return {symbolic size in the template: its name in the copy}."""
    found: dict[str, str] = {}
    for value, given in zip(inner, outer, strict=True):
        if value.shape is None or given is None or given.shape is None:
            continue
        for one, other in zip(value.shape, given.shape, strict=True):
            if isinstance(one, ir.SymbolicDim) and isinstance(other, ir.SymbolicDim) and one.value and other.value:
                found[one.value] = other.value
    return found


def _twin(value: ir.Value, path: str, symbols: Mapping[str, str]) -> ir.Value:
    """Return a value like `value` under a new name; sizes without a name in `symbols` become unknown."""
    shape = None
    if value.shape is not None:
        shape = ir.Shape([dim if isinstance(dim, int) else symbols.get(str(dim.value)) for dim in value.shape])
    return ir.Value(name=f"{path}/{value.name}", type=value.type, shape=shape)


def fingerprint(module: nn.Module) -> Hashable:
    """Return what determines a module's graph: classes, settings, shapes. An unknown setting makes it unique."""
    return tuple((path, _settings(part)) for path, part in module.named_modules())


def _settings(part: nn.Module) -> Hashable:
    hooked = part._forward_hooks or part._forward_pre_hooks  # noqa: SLF001 - torch has no public way to ask
    public = {name: _setting(value) for name, value in vars(part).items() if not name.startswith("_")}
    tensors = (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
    shapes = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors)
    return _name(part), id(part) if hooked else None, tuple(sorted(public.items())), shapes


def _setting(value: object) -> str:
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({', '.join(_setting(item) for item in value)})"
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "__dict__") and not vars(value):  # stateless: attention processors
        return f"{type(value).__module__}.{type(value).__qualname__}()"
    return f"object {id(value)}"


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
