"""Count SDXL's graphs and write the polynomials: ``python -m sdxl_trt.benchmarks.roofline.count_sdxl``, two minutes.

The graphs are those that export-engines makes from the published configs, without the VAE encoder; they are traced on
torch's meta device and written without weights. Each is counted at enough sizes to solve for its coefficients, and at
two more sizes as a check.
"""

__all__ = ["fit_graph", "main", "published_graphs", "write_graph"]

import argparse
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from sdxl_trt.benchmarks.full_size import architecture
from sdxl_trt.benchmarks.roofline.flops import Counts, count_graph
from sdxl_trt.benchmarks.roofline.sdxl_counts import FACTOR, PATH, TERMS, GraphCounts, SdxlCounts, term_values
from sdxl_trt.engines import SdxlTrtError
from sdxl_trt.engines.host import atomic_write

COMMAND = "python -m sdxl_trt.benchmarks.roofline.count_sdxl"
OPSET = 23
# (height, width, tokens), sides in units of the graph's multiple: five to solve for the terms, then two to check.
_SAMPLES = ((1, 1, 77), (2, 1, 77), (2, 2, 77), (1, 1, 154), (2, 1, 154), (3, 5, 231), (16, 12, 77))
_LIBRARIES = ("torch", "diffusers", "transformers", "onnxscript", "onnx-ir", "onnx")


class Published(NamedTuple):
    """One of SDXL's graphs: its component's name, and the arguments of `export.graph.make_graph`."""

    name: str
    role: Any
    model: str
    kind: str
    precision: str


GRAPHS = (
    Published("text_encoder", "base", "text_encoder", "text_encoder", "fp16"),
    Published("text_encoder_2", "base", "text_encoder_2", "text_encoder", "fp16"),
    Published("unet", "base", "unet", "unet", "fp16"),
    Published("refiner_unet", "refiner", "unet", "unet", "fp16"),
    Published("vae_decoder", "base", "vae", "vae_decoder", "fp32"),
    Published("vae_decoder_bf16", "base", "vae", "vae_decoder", "bf16"),
    Published("vae_decoder_fp16", "base", "vae", "vae_decoder", "fp16"),
)


def published_graphs(size: str = "sdxl", names: Collection[str] = ()) -> Iterator[tuple[Published, Any, Any]]:
    """Yield the GRAPHS in `names`, or all, each with its model on the meta device and its traceable module.

    `size` is one of `architectures.SIZES`. Needs the exporter's libraries.
    """
    from sdxl_trt.export.graph import build_model, make_graph  # noqa: PLC0415

    for each in (graph for graph in GRAPHS if not names or graph.name in names):
        configs = architecture(size, each.role)
        model = build_model(configs.class_name(each.model), configs.models[each.model], each.name)
        time_ids = 5 if each.role == "refiner" else 6
        pooled = configs.models["text_encoder_2"]["projection_dim"]
        yield each, model, make_graph(each.kind, model, time_ids=time_ids, pooled=pooled, where=each.name)


def write_graph(model: Any, graph: Any, precision: str, path: Path) -> None:
    """Trace a `graph` of `published_graphs`, simplify it as an export does, and write it to `path` without weights."""
    import onnx_ir as ir  # noqa: PLC0415 - an exporter library

    from sdxl_trt.export.graph import simplify, trace_graph  # noqa: PLC0415

    traced = trace_graph(graph, precision, OPSET)
    for name, value in traced.graph.initializers.items():
        buffer = model.buffers.get(name.removeprefix(graph.prefix))
        if buffer is not None:
            value.const_value = ir.tensor(buffer.numpy(), name=name)
    simplify(traced)
    for name, value in traced.graph.initializers.items():
        # Counting needs only the names, types and shapes of the weights.
        if value.const_value is None and value.dtype is not None and value.shape is not None:
            value.const_value = ir.ExternalTensor("absent", 0, 0, value.dtype, shape=value.shape, name=name)
    ir.save(traced, path)


def fit_graph(precision: str, multiple: int, count: Callable[[int, int, int, int], Counts]) -> GraphCounts:
    """Return the polynomials of a graph from `count(rows, height, width, tokens)`, sides in pixels.

    Raises ValueError if the counts are not polynomials in the TERMS with integer coefficients.
    """
    sizes = [(multiple * FACTOR * high, multiple * FACTOR * wide, tokens) for high, wide, tokens in _SAMPLES]
    one = [count(1, *size) for size in sizes[: len(TERMS)]]
    matrix = [list(term_values(h * w // FACTOR**2, tokens).values()) for h, w, tokens in sizes[: len(TERMS)]]

    def solved(values: Sequence[int]) -> dict[str, int]:
        return {term: value for term, value in zip(TERMS, solve(matrix, values), strict=True) if value}

    first, fixed = one[0], 2 * one[0].least_bytes - count(2, *sizes[0]).least_bytes
    graph = GraphCounts(
        precision=precision,
        multiple=multiple,
        flops={name: solved([each.by_operator[name] for each in one]) for name in first.by_operator},
        weight_bytes=first.weight_bytes,
        fixed_bytes=fixed,
        row_bytes=solved([each.least_bytes - fixed for each in one]),
        activation_bytes=solved([each.activation_bytes for each in one]),
    )
    for rows, (height, width, tokens) in ((3, sizes[-2]), (2, sizes[-1])):
        counted = count(rows, height, width, tokens)
        if graph.at(rows=rows, height=height, width=width, tokens=tokens) != counted:
            raise ValueError(f"the polynomial does not match the counts at {rows} rows of {width}x{height}: {counted}")
    return graph


def solve(matrix: Sequence[Sequence[int]], values: Sequence[int]) -> list[int]:
    """Return the integers x with `matrix` · x = `values`, by elimination in fractions. Raises ValueError if none."""
    size = len(values)
    rows = [[Fraction(entry) for entry in (*row, value)] for row, value in zip(matrix, values, strict=True)]
    for i in range(size):
        pivot = next(k for k in range(i, size) if rows[k][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [entry / rows[i][i] for entry in rows[i]]
        for k in range(size):
            if k != i:
                rows[k] = [entry - rows[k][i] * known for entry, known in zip(rows[k], rows[i], strict=True)]
    found = [row[-1] for row in rows]
    if any(value.denominator != 1 for value in found):
        raise ValueError(f"not integer coefficients: {found}")
    return [int(value) for value in found]


def main(argv: Sequence[str] | None = None) -> int:
    """Count every graph and write the file; return the exit code."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--out", type=Path, default=PATH, help="the JSON file to write")
    arguments = parser.parse_args(argv)
    graphs = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for each, model, graph in published_graphs():
                path = Path(folder) / f"{each.name}.onnx"
                write_graph(model, graph, each.precision, path)
                graphs[each.name] = _fit(each, graph, path)
                sys.stderr.write(f"{each.name}\n")
    except SdxlTrtError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return exc.exit_code
    counts = SdxlCounts(command=COMMAND, versions={name: version(name) for name in _LIBRARIES}, graphs=graphs)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(arguments.out) as file:
        file.write(msgspec.json.format(msgspec.json.encode(counts), indent=1) + b"\n")
    return 0


def _fit(each: Published, graph: Any, path: Path) -> GraphCounts:
    multiple = max((axis.multiple for axis in _axes(graph) if axis.name == "height"), default=1)

    def count(rows: int, height: int, width: int, tokens: int) -> Counts:
        sizes = {"rows": rows, "prompts": rows, "vectors": 1, "pictures": rows, "tokens": tokens}
        sizes |= {"height": height // FACTOR, "width": width // FACTOR}
        shapes = {
            value.name: tuple(axis if isinstance(axis, int) else sizes[axis.name] for axis in value.shape)
            for value in graph.inputs
        }
        return count_graph(path, shapes)

    return fit_graph(each.precision, multiple, count)


def _axes(graph: Any) -> Iterator[Any]:
    return (axis for value in graph.inputs for axis in value.shape if not isinstance(axis, int))


if __name__ == "__main__":
    sys.exit(main())
