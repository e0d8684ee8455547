"""Small workflows shaped like public ones, with ComfyUI's results: tests/comfyui/README.md."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_trt.runtime.cli.generate import main as trt_generate

GRAPHS = Path(__file__).parents[1] / "comfyui" / "graphs"
Json = Any
Run = Callable[..., tuple[int, Any, str]]


def _graph(name: str) -> Json:
    return json.loads((GRAPHS / f"{name}.json").read_text())


@pytest.fixture
def run(tmp_path: Path, capsys: Any) -> Run:
    """Return a function that draws a graph, given by name or content: exit code, pixels, and stderr."""
    y, x = np.mgrid[:128, :128].astype(np.uint8)
    Image.fromarray(np.stack([x, y, x ^ y], axis=-1)).save(tmp_path / "in.png")

    def draw(graph: str | Json, *arguments: str) -> tuple[int, Any, str]:
        (tmp_path / "graph.json").write_text(json.dumps(_graph(graph) if isinstance(graph, str) else graph))
        made = tmp_path / "made.png"
        made.unlink(missing_ok=True)
        capsys.readouterr()
        code = trt_generate(["--workflow", str(tmp_path / "graph.json"), "-o", str(made), *arguments])
        return code, np.asarray(Image.open(made)) if made.exists() else None, capsys.readouterr().err

    return draw


def _changed(name: str, node: str, **inputs: Any) -> Json:
    graph = _graph(name)
    graph[node]["inputs"] |= inputs
    return graph


SAME: dict[str, tuple[str, Callable[[], Json]]] = {
    "clip-set-last-layer-minus-2": ("clip-set-last-layer-minus-2", lambda: _changed("plain", "3", steps=6)),
    "deadbranch": ("deadbranch", lambda: _graph("plain")),
    "primint": ("primint", lambda: _graph("plain")),
    "primstr": ("primstr", lambda: _changed("plain", "6", text="a red star")),
    "strnum": ("strnum", lambda: _graph("plain")),
    "wrapped": ("wrapped", lambda: _graph("plain")),
    "bypassed": ("bypassed-two-outputs", lambda: _graph("bypassed-two-outputs-wired")),
    "subgraph": ("subgraph", lambda: _graph("bypassed-two-outputs-wired")),
    # The text that is left: ComfyUI keeps the comma after an embedding that it does not find.
    "embedding": ("embedding", lambda: _changed("plain", "6", text="a red star, ,")),
}


@pytest.mark.parametrize("name", SAME)
def test_two_equivalent_graphs_give_the_same_picture(run: Run, name: str) -> None:
    graph, other = SAME[name]
    code, pixels, said = run(graph)
    assert code == 0, said
    np.testing.assert_array_equal(pixels, run(other())[1])
    if name == "embedding":
        assert "EasyNegative" in said
    if name == "deadbranch":
        assert "node 41 (PreviewImage)" in said


def test_the_graph_sets_the_last_layer(run: Run, tmp_path: Path) -> None:
    plain = run(_changed("plain", "3", steps=6))[1]
    found = {layer: run(f"clip-set-last-layer-minus-{layer}") for layer in (1, 3)}
    assert all(code == 0 and not np.array_equal(pixels, plain) for code, pixels, _ in found.values())
    assert not np.array_equal(found[1][1], found[3][1])
    for layer, skip in ((1, -1), (3, 1)):
        options = ["--compat", "comfyui", "--negative", "blurry", "--seed", "11", "--steps", "6", "--guidance", "8",
                   "--no-refiner", "--width", "128", "--height", "128", "--clip-skip", str(skip)]  # fmt: skip
        out = tmp_path / "options.png"
        assert trt_generate(["a large red star on a blue background", *options, "-o", str(out)]) == 0
        np.testing.assert_array_equal(np.asarray(Image.open(out)), found[layer][1])
    code, _, said = run("clip-set-last-layer-minus-12")
    assert (code, "stops at layer -12" in said) == (2, True)


@pytest.mark.parametrize(("name", "node"), [("dualclip", "DualCLIPLoader"), ("noclip", "node 6 (CLIPTextEncode)"),
                                            ("styler", "error: --workflow")])  # fmt: skip
def test_what_comfyui_reads_differently_is_refused_by_node(run: Run, name: str, node: str) -> None:
    code, pixels, said = run(name)
    assert (code, pixels) == (2, None)
    assert node in said
    if name == "styler":
        assert said.index("node 20 (SDXLPromptStyler)") < said.index("node 6 (CLIPTextEncode)")


def test_a_single_sampler_on_the_refiners_checkpoint_is_the_refiner(run: Run) -> None:
    code, pixels, said = run("one-sampler-on-the-refiner")
    assert code == 0, said
    assert "refiner alone" in said
    graph = _graph("one-sampler-on-the-refiner")
    for node, score in (("6", 6.0), ("7", 2.5)):
        graph[node]["class_type"] = "CLIPTextEncodeSDXLRefiner"
        graph[node]["inputs"] |= {"ascore": score, "width": 128, "height": 128}
    np.testing.assert_array_equal(pixels, run(graph)[1])


def _export(pairs: Any, folder: Path, *scales: float) -> Path:
    import torch
    from safetensors.torch import save_file

    from sdxl_trt.export import Options, export_bundle

    pair, seed = pairs("outline"), torch.Generator().manual_seed(1)
    down = torch.randn((4, 32), generator=seed)
    lora = {}
    for name in ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te1_text_model_encoder_layers_1_mlp_fc1"):
        lora |= {
            f"{name}.lora_down.weight": down.clone(),
            f"{name}.lora_up.weight": torch.randn((64, 4), generator=seed),
        }
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    lora |= {f"{name}.lora_down.weight": down.clone(), f"{name}.lora_up.weight": torch.randn((32, 4), generator=seed)}
    save_file(lora, folder / "style.safetensors")
    options = Options(precision="fp32", loras=((folder / "style.safetensors", *scales),))
    export_bundle(pair.base, pair.refiner, folder / "bundle", options)
    return folder / "bundle"


@pytest.mark.usefixtures("converted_once")
def test_loras_must_match_the_bundle_in_both_strengths(pairs: Any, run: Run, tmp_path: Path) -> None:
    for name in ("both", "unet"):
        (tmp_path / name).mkdir()
    both = str(_export(pairs, tmp_path / "both", 0.8))
    unet = str(_export(pairs, tmp_path / "unet", 0.8, 0.0))
    code, same, said = run("lora-same", "--engines", both)
    assert code == 0, said
    clip0, alone = (run(name, "--engines", unet) for name in ("lora-clip0", "lora-modelonly"))
    assert (clip0[0], alone[0]) == (0, 0), clip0[2] + alone[2]
    np.testing.assert_array_equal(clip0[1], alone[1])
    assert not np.array_equal(clip0[1], same)
    assert not np.array_equal(same, run("plain", "--engines", str(pairs("outline").bundle))[1])
    for name, bundle in (("lora-same", unet), ("lora-clip0", both), ("lora-modelonly", both)):
        code, _, said = run(name, "--engines", bundle)
        assert (code, "LoRA style.safetensors at strength 0.8" in said) == (2, True)
