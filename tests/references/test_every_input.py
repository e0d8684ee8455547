"""Every input of every supported node, changed one at a time in whole runs: it changes the picture or the output."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_trt.runtime.cli.generate import main as trt_generate
from sdxl_trt.runtime.comfyui.node import Input
from sdxl_trt.runtime.comfyui.nodes import NODES

GRAPH = json.loads((Path(__file__).parents[1] / "comfyui" / "every_node.json").read_text())
OTHER_LINKS = {"MODEL": ["60", 0], "CLIP": ["60", 1], "VAE": ["61", 0], "CONDITIONING": ["62", 0],
               "LATENT": ["63", 0], "IMAGE": ["64", 0], "CONTROL_NET": ["65", 0], "MASK": ["140", 0]}  # fmt: skip
INPUTS = [(kind, each.name) for kind, node in NODES.items() for each in node.inputs]
LORAS = [{"name": "a", "sha256": "0" * 64, "scale": 0.5, "text_scale": 0.25},
         {"name": "b", "sha256": "0" * 64, "scale": 0.5, "text_scale": 0.0}]  # fmt: skip
Outcome = tuple[int, list[bytes], str]


@pytest.fixture(scope="module")
def run(
    pairs: Callable[[str], Any], add_controlnets: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Any, Any], Outcome]:
    """Return a function that draws a graph: the exit code, the pictures' pixels, the printed lines."""
    folder = tmp_path_factory.mktemp("inputs")
    add_controlnets(pairs("outline").bundle, folder / "bundle")
    manifest = json.loads((folder / "bundle" / "manifest.json").read_text())
    (folder / "bundle" / "manifest.json").write_text(json.dumps(manifest | {"loras": LORAS}))
    y, x = np.mgrid[:64, :64].astype(np.uint8)
    for name, pixels in (
        ("in", [x * 4, y * 4, x + y]),
        ("other", [y * 2, x, x * 3]),
        ("in.png too", [y, y, x]),
        ("mask", [x * 2 + y, y * 3, x]),  # red has corners, which grow in two ways
        ("mask.png too", [y, y, y]),
    ):
        Image.fromarray(np.stack(pixels, axis=-1)).save(folder / (name if "." in name else f"{name}.png"), "PNG")

    def draw(graph: Any, capsys: Any) -> Outcome:
        for old in folder.glob("made*.png"):
            old.unlink()
        (folder / "graph.json").write_text(json.dumps(graph))
        capsys.readouterr()
        code = trt_generate(["--workflow", str(folder / "graph.json"), "--engines", str(folder / "bundle"), "-o",
                             str(folder / "made.png")])  # fmt: skip
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" s")]
        made = sorted(folder.glob("made*.png"))
        return code, [np.asarray(Image.open(path)).tobytes() for path in made], "\n".join(lines)

    return draw


def _other(known: Input, value: Any) -> Any:
    if known.is_link:
        return OTHER_LINKS[known.type]
    if known.type == "CHOICE":
        return next(choice for choice in known.choices if choice != value)
    if known.type == "STRING":
        return f"{value} too"
    if known.type == "BOOLEAN":
        return not value
    number = value if isinstance(value, int | float) else 1
    # ComfyUI ignores changes of a size by less than one latent.
    sizes = ("width", "height", "right", "bottom")
    step = (64 if known.name in sizes else 1) if known.type == "INT" else 0.125
    return number + step if number + step <= known.high else number - step


BEFORE: dict[bool, Outcome] = {}


@pytest.mark.parametrize(("kind", "name"), INPUTS, ids=[f"{kind}.{name}" for kind, name in INPUTS])
def test_no_input_is_ignored_silently(run: Any, capsys: Any, kind: str, name: str) -> None:
    key = next(key for key, node in GRAPH.items() if node["class_type"] == kind)
    second = int(key) >= 50 or kind == "VAELoader"  # a preview, which is drawn only if nothing is saved
    graph = copy.deepcopy(GRAPH)
    if second:
        del graph["38"]
    if second not in BEFORE:
        BEFORE[second] = run(graph, capsys)
    assert BEFORE[second][0] == 0, BEFORE[second][2]
    inputs = graph[key]["inputs"]
    inputs[name] = _other(NODES[kind].input(name), inputs.get(name, NODES[kind].input(name).default))
    changed = run(graph, capsys)
    prefix = name == "filename_prefix"  # -o sets the name here
    assert changed[1:] != BEFORE[second][1:] or prefix, "the same picture, and no warning"
    assert changed[0] in (0, 2)
