"""Count the nodes of a bundle's graphs by operator: ``python -m sdxl_trt.benchmarks.full_size.node_counts BUNDLE``."""

__all__ = ["count_operators", "main", "table"]

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdxl_trt.engines import SdxlTrtError
from sdxl_trt.engines.bundle import read_bundle


def count_operators(path: Path) -> dict[str, int]:
    """Return how often each operator occurs in the ONNX file at `path` and its subgraphs, most frequent first.

    Operators outside ONNX's own domain are prefixed with their domain. The weights are not read.
    """
    import onnx  # noqa: PLC0415 - takes a while to import

    model = onnx.load(path, load_external_data=False)
    counts = Counter(_name(node) for node in _nodes(model.graph))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def table(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Return {graph: {operator: count}} as a Markdown table: a row per operator, a column per graph, totals last."""
    total: Counter[str] = Counter()
    for graph in counts.values():
        total.update(graph)
    rows = [["operator", *counts], ["---", *["---:"] * len(counts)]]
    for operator, _ in sorted(total.items(), key=lambda item: (-item[1], item[0])):
        rows.append([operator, *(str(graph.get(operator, "")) for graph in counts.values())])
    rows.append(["**all nodes**", *(str(sum(graph.values())) for graph in counts.values())])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Print the table of the bundle named on the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sdxl_trt.benchmarks.full_size.node_counts", description=__doc__)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a bundle folder")
    arguments = parser.parse_args(argv)
    try:
        bundle = read_bundle(arguments.bundle)
    except SdxlTrtError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return exc.exit_code
    components = bundle.manifest.components
    counts = {name: count_operators(bundle.path(component.graph)) for name, component in components.items()}
    sys.stdout.write(table(counts) + "\n")
    return 0


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else [*attribute.graphs]:
                yield from _nodes(inner)


def _name(node: Any) -> str:
    return str(node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}")


if __name__ == "__main__":
    sys.exit(main())
