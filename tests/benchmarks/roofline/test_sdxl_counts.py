"""The checked-in costs of SDXL are exact polynomials, and equal torch's own counts at full size."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sdxl_trt.benchmarks.roofline.count_sdxl import GRAPHS, fit_graph, published_graphs, solve, write_graph
from sdxl_trt.benchmarks.roofline.flops import Counts, component_shapes, count_component, count_graph
from sdxl_trt.benchmarks.roofline.sdxl_counts import FACTOR, TERMS, read_counts, term_values
from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.errors import CorruptError, SizeError

# Parameters of the published checkpoints, as their safetensors files list them.
PARAMETERS = {
    "unet": 2_567_463_684,
    "text_encoder": 123_060_480,
    "text_encoder_2": 694_659_840,
    "vae_decoder_fp16": 49_490_199,
}


def test_every_published_graph_has_counts() -> None:
    assert set(read_counts().graphs) == {each.name for each in GRAPHS}


@pytest.mark.parametrize("name", PARAMETERS)
def test_weights_are_the_published_parameters(name: str) -> None:
    """Two bytes each at fp16, plus constants, without a norm that no output needs."""
    assert read_counts().graphs[name].weight_bytes == pytest.approx(2 * PARAMETERS[name], rel=1e-3)


def test_the_count_matches_a_published_one() -> None:
    """diffusers' published benchmark of the UNet: 5,979,098.32 MFLOP per row, by a tool that skips attention."""
    counts = read_counts().graphs["unet"].at(rows=1, height=1024, width=1024)
    assert counts.flops - counts.by_operator["Attention"] == pytest.approx(5_979_098.32e6, rel=5e-4)


def torch_flops(graph: Any, rows: int, height: int, width: int, tokens: int) -> int:
    """Return FlopCounterMode's count of a graph's module on the meta device; sides are in pixels."""
    sizes = {"rows": rows, "prompts": rows, "vectors": 1, "pictures": rows, "tokens": tokens}
    sizes |= {"height": height // FACTOR, "width": width // FACTOR}
    shapes = [[axis if isinstance(axis, int) else sizes[axis.name] for axis in value.shape] for value in graph.inputs]
    with FlopCounterMode(display=False) as counter:
        graph.module(*[torch.empty(shape, dtype=value.dtype, device="meta")
                       for shape, value in zip(shapes, graph.inputs, strict=True)])  # fmt: skip
    return int(counter.get_total_flops())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "refiner_unet", "vae_decoder"])
def test_torch_counts_the_same_at_full_size(name: str) -> None:
    """On the published modules, at a size that was not used to solve for the coefficients."""
    _, _, graph = next(published_graphs(names=[name]))
    counted = read_counts().graphs[name].at(rows=2, height=832, width=1216, tokens=154)
    assert counted.flops == torch_flops(graph, 2, 832, 1216, 154)


def test_a_graph_is_counted_without_weights(tmp_path: Path) -> None:
    """As the command does it: traced, simplified, and written with only the weights' names and shapes."""
    each, model, graph = next(published_graphs("tiny", ["text_encoder"]))
    flops = torch_flops(graph, 5, 64, 64, 77)
    write_graph(model, graph, each.precision, tmp_path / "model.onnx")
    shapes = {"input_ids": (5, 77), "embedding_index": (5, 77), "embeddings": (1, model.config["hidden_size"])}
    counts = count_graph(tmp_path / "model.onnx", shapes)
    assert counts.flops == flops
    parameters = sum(math.prod(shape) for shape in model.state.values())
    assert counts.weight_bytes == pytest.approx(2 * parameters, rel=0.01)


@pytest.mark.parametrize("name", ["unet", "vae_decoder", "text_encoder"])
def test_polynomials_hold_at_every_size(pairs: Any, name: str) -> None:
    bundle = read_bundle(pairs("outline").bundle)
    component, factor = bundle.manifest.components[name], bundle.manifest.base.vae.factor

    def count(rows: int, height: int, width: int, tokens: int) -> Counts:
        # The polynomials are in SDXL's latent pixels, 8 pixels each.
        size = {"height": height // FACTOR * factor, "width": width // FACTOR * factor}
        shapes = component_shapes(component, factor, rows=rows, tokens=tokens, **size)
        return count_graph(bundle.path(component.graph), shapes)

    fitted = fit_graph("fp32", 8, count)
    for rows, height, width, tokens in ((1, 640, 192, 77), (7, 128, 448, 308)):
        found = fitted.at(rows=rows, height=height, width=width, tokens=tokens)
        assert found == count(rows, height, width, tokens)
    with pytest.raises(SizeError, match="multiples of 64"):
        fitted.at(rows=1, height=96, width=64)
    wider = count_component(bundle, name, rows=2, height=64, width=64)
    assert wider == fitted.at(rows=2, height=64 // factor * FACTOR, width=64 // factor * FACTOR)


def test_counts_that_are_not_polynomial_are_refused() -> None:
    def count(rows: int, height: int, width: int, tokens: int) -> Counts:
        flops = rows * height * width * max(height, width)
        return Counts(flops=flops, by_operator={"Conv": flops}, weight_bytes=1, least_bytes=1, activation_bytes=1)

    with pytest.raises(ValueError, match=r"polynomial|coefficients"):
        fit_graph("fp32", 1, count)


def test_equations_are_solved_exactly() -> None:
    matrix = [
        list(term_values(pixels, tokens).values()) for pixels, tokens in ((4, 7), (8, 7), (16, 7), (4, 9), (8, 9))
    ]
    wanted = [3, 10**15 + 1, 7, 0, 2]
    values = [sum(a * b for a, b in zip(row, wanted, strict=True)) for row in matrix]
    assert solve(matrix, values) == wanted
    assert len(TERMS) == len(wanted)
    with pytest.raises(ValueError, match="integer"):
        solve([[2, 0], [0, 1]], [1, 1])


def test_missing_counts_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match=r"roofline\.count_sdxl"):
        read_counts(tmp_path / "none.json")
