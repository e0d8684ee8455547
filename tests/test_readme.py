"""The README's Python blocks run unchanged in an empty folder."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.mini.embedded import bundle_path

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, convert_once: Callable[..., Any]) -> Path:
    """Return the folder in which all blocks of the README have run, each with names of its own.

    The example that exports the embedded pair makes the same components: they are converted once for both.
    """
    place = tmp_path_factory.mktemp("readme")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("sdxl_trt.export.exporter.convert_component", convert_once)
        for block in blocks:
            exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    return place


@pytest.mark.slow
def test_the_readme_draws_a_picture(folder: Path) -> None:
    assert (folder / "circle.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_its_export_of_the_embedded_pair_is_the_embedded_bundle(folder: Path) -> None:
    """The package's bundle is byte for byte the export of the package's weights."""
    made, kept = read_bundle(folder / "my-bundle").manifest, read_bundle(bundle_path()).manifest
    assert set(made.components) == set(kept.components)
    for name, component in made.components.items():
        assert component.weights.sha256 == kept.components[name].weights.sha256, name
        assert component.graph.sha256 == kept.components[name].graph.sha256, name
    assert made.tokenizers == kept.tokenizers
    assert (made.base, made.refiner, made.note) == (kept.base, kept.refiner, kept.note)
