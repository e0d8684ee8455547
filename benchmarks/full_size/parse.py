"""Parse every graph of a bundle with the real TensorRT parser and print the results.

``python -m sdxl_trt.benchmarks.full_size.parse BUNDLE…`` also takes bare ``.onnx`` files. It exits with 1 unless all
graphs are accepted completely: strongly typed, external weights read, every operator supported.
"""

__all__ = ["Parsed", "main"]

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from sdxl_trt.benchmarks.full_size.tensorrt_on_cpu import assemble, child_environment, load
from sdxl_trt.engines.backends.trt import make_logger
from sdxl_trt.engines.build import BuildJob, BuildLog, BuiltPlan, build_plan, parse_graph
from sdxl_trt.engines.bundle import Profile, Shape, read_bundle

# (min, opt, max) by axis: sizes that every tiny UNet takes, rows with and without guidance, one or two prompt chunks.
AXES = {"rows": (1, 2, 4), "pictures": (1, 1, 2), "prompts": (1, 2, 2), "vectors": (1, 1, 4), "tokens": (77, 77, 154)}
LATENTS, PIXELS = (16, 16, 32), (64, 64, 128)


class Parsed(msgspec.Struct, frozen=True):
    """The parser's result for one graph."""

    graph: str
    accepted: bool
    layers: int
    seconds: float
    inputs: dict[str, tuple[str, tuple[int, ...]]]
    operators: dict[str, int]
    unknown: tuple[str, ...]
    errors: tuple[str, ...]


def main(argv: list[str] | None = None) -> int:
    """Parse, and with ``--build`` build, the graphs named on the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sdxl_trt.benchmarks.full_size.parse", description=__doc__)
    parser.add_argument("sources", nargs="+", type=Path, metavar="BUNDLE", help="bundle folders or .onnx files")
    parser.add_argument("--build", action="store_true", help="also build a plan with a dynamic profile")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args(argv)
    tensorrt = TensorRT()
    graphs = [graph for source in arguments.sources for graph in _graphs(source)]
    parsed = [tensorrt.parse(name, path) for name, path in graphs]
    os.environ.update(child_environment(assemble()))
    built = [build(name, path) for name, path in graphs] if arguments.build else []
    report = {"tensorrt": tensorrt.version, "parsed": parsed, "built": built}
    text = msgspec.json.encode(report, enc_hook=str).decode() if arguments.json else table(parsed)
    sys.stdout.write(text + "\n")
    return 0 if all(graph.accepted for graph in parsed) else 1


def table(parsed: list[Parsed]) -> str:
    """Return the figures as a Markdown table."""
    lines = ["| graph | accepted | layers | seconds | operators | not known |", "|---|---|---|---|---|---|"]
    for one in parsed:
        accepted = "yes" if one.accepted else "no: " + "; ".join(one.errors)
        unknown = ", ".join(one.unknown) or "none"
        operators = f"{len(one.operators)} kinds, {sum(one.operators.values())} nodes"
        lines.append(f"| {one.graph} | {accepted} | {one.layers} | {one.seconds:.2f} | {operators} | {unknown} |")
    return "\n".join(lines)


def build(name: str, path: Path) -> BuiltPlan:
    """Build a plan of the graph at `path` with one dynamic profile, and delete it. Raises as `build_plan`.

    Child processes must find TensorRT for RTX: see `tensorrt_on_cpu.child_environment`.
    """
    profile = axes_profile(_named_inputs(path))
    with tempfile.TemporaryDirectory() as folder:
        plan, log = Path(folder) / "plan", Path(folder) / "log"
        return build_plan(
            BuildJob(component=name, graph=path, profiles=(profile,), flavour="tensorrt-rtx", plan=plan, log=log)
        )


def axes_profile(inputs: Mapping[str, tuple[int | str, ...]]) -> Profile:
    """Return a dynamic profile for inputs whose dynamic axes are strings, as in a manifest."""
    return Profile(shapes={name: _range(name, shape) for name, shape in inputs.items()})


def _range(name: str, shape: tuple[int | str, ...]) -> tuple[Shape, Shape, Shape]:
    low, usual, high = (tuple(_size(axis, name, i, shape) for axis in shape) for i in range(3))
    return low, usual, high


def _size(axis: int | str, name: str, i: int, shape: tuple[int | str, ...]) -> int:
    if isinstance(axis, int):
        return axis
    if axis in AXES:
        return AXES[axis][i]
    # A VAE encoder takes pixels, with three channels; latents have four.
    return (PIXELS if name == "sample" and shape[1] == 3 else LATENTS)[i]


def _graphs(source: Path) -> list[tuple[str, Path]]:
    """Return (name, path) of the graphs of a bundle, or of a bare file."""
    if source.is_file():
        return [(str(source), source)]
    bundle = read_bundle(source)
    components = bundle.manifest.components
    return [(f"{source}/{name}", bundle.path(component.graph)) for name, component in components.items()]


class TensorRT:
    """The assembled TensorRT, with one builder and a network per graph."""

    def __init__(self) -> None:
        self._trt = load(assemble())
        self._logger = make_logger(self._trt, BuildLog().note)
        self._builder = self._trt.Builder(self._logger)
        self.version = str(self._trt.__version__)

    def parse(self, name: str, path: Path) -> Parsed:
        """Parse the graph at `path` and its external weights into a strongly typed network."""
        accepted, network, parser, seconds = parse_graph(self._trt, self._builder, self._logger, path)
        operators = _operators(path)
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        return Parsed(
            graph=name,
            accepted=accepted,
            layers=network.num_layers,
            seconds=seconds,
            inputs={tensor.name: (tensor.dtype.name, tuple(tensor.shape)) for tensor in inputs},
            operators=operators,
            unknown=tuple(operator for operator in operators if not parser.supports_operator(operator)),
            errors=tuple(_describe(parser.get_error(i)) for i in range(parser.num_errors)),
        )


def _describe(error: Any) -> str:
    return f"{error.node_operator()} {error.node_name()}: {error.desc()}".strip()


def _operators(path: Path) -> dict[str, int]:
    from sdxl_trt.benchmarks.full_size.node_counts import count_operators  # noqa: PLC0415 - onnx takes a while to import

    return count_operators(path)


def _named_inputs(path: Path) -> dict[str, tuple[int | str, ...]]:
    import onnx  # noqa: PLC0415 - takes a while to import

    model = onnx.load(path, load_external_data=False)
    return {
        value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in model.graph.input
    }


if __name__ == "__main__":
    sys.exit(main())
