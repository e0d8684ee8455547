"""The table of estimated and built activations, and when the comparison fails."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sdxl_trt.benchmarks.full_size import activations
from sdxl_trt.benchmarks.full_size.activations import Row, main, table
from sdxl_trt.engines.bundle.manifest import Component
from sdxl_trt.mini.embedded import bundle_path

ROWS = [
    Row("unet 320-640-1280 fp16", "1024², 1 picture", 265_000_000, 258_700_000, 0.1),
    Row("unet 64-128-256 fp16", "1024², 1 picture", 82_000_000, 100_000_000, 0.2),
]


def test_the_table_names_how_many_are_near_and_the_worst() -> None:
    text = table(ROWS, "COMMAND")
    assert "(`COMMAND`)" in text
    assert "Of 2 plans 1 are within 5 %, 1 within 10 %" in text
    assert "off by -18%" in text
    assert "| unet 320-640-1280 fp16 | 1024², 1 picture | 265.0 MB | 258.7 MB | +2.4% |" in text


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that installs a builder whose plans take `factor` times the estimate."""

    def install(factor: float) -> None:
        def compare(name: str, component: Component, graph: Path, sizes: str) -> Row:
            assert graph.name == "model.onnx"
            return Row(name, sizes, 100, int(100 * factor), 0.1)

        monkeypatch.setattr(activations, "compare", compare)
        monkeypatch.setattr(activations, "assemble", Path)
        monkeypatch.setattr(activations, "child_environment", lambda _: {})

    return install


@pytest.mark.parametrize(("factor", "code"), [(1.05, 0), (1.5, 1), (0.5, 1)])
def test_an_estimate_beyond_its_allowed_error_fails(
    builder: Callable[[float], None], tmp_path: Path, factor: float, code: int
) -> None:
    builder(factor)
    assert main([str(bundle_path()), "--results", str(tmp_path / "table.md")]) == code
    lines = (tmp_path / "table.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith(("| unet ", "| refiner_unet ", "| vae_decoder "))]
    assert len(rows) == 2 * 4 + 3, "a decoder takes one picture at a time, whatever the batch"
    assert f"`{activations.COMMAND} bundle`" in lines[0]
