"""The programs that `full_size.export` measures, each run in its own process.

``python -m sdxl_trt.benchmarks.full_size.exporters WHAT …``: our exporter followed by a check of its graphs,
torch.onnx.export of a loaded model, optimum's exporter (in its own environment), and each exporter's imports alone.
"""

__all__ = ["main"]

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The modules that each exporter has loaded by its end, without those of a few kilobytes.
IMPORTS = {
    "ours": (
        "sdxl_trt.export.exporter", "diffusers.models.unets.unet_2d_condition",
        "diffusers.models.autoencoders.autoencoder_kl", "transformers.models.clip.modeling_clip", "onnx", "onnxscript",
    ),
    "torch": ("torch.onnx", "diffusers.models.unets.unet_2d_condition", "onnx", "onnxscript"),
    "optimum": (
        "optimum.exporters.onnx", "diffusers.models.unets.unet_2d_condition",
        "diffusers.pipelines.stable_diffusion_xl", "transformers.models.clip.modeling_clip", "onnx",
    ),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one exporter, or its imports, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sdxl_trt.benchmarks.full_size.exporters", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    imports = commands.add_parser("imports", help="only import an exporter's modules")
    imports.add_argument("exporter", choices=IMPORTS)
    commands.add_parser("ours", help="export-engines with the following arguments, then onnx.checker on every graph")
    torch = commands.add_parser("torch", help="torch.onnx.export(dynamo=True) of a loaded UNet")
    optimum = commands.add_parser("optimum", help="optimum's main_export of a pipeline folder")
    for peer in (torch, optimum):
        peer.add_argument("source", type=Path)
        peer.add_argument("out", type=Path)
    given = list(sys.argv[1:] if argv is None else argv)
    # Arguments after "ours" belong to export-engines: argparse would reject its options as unknown.
    own = 1 if given[:1] == ["ours"] else len(given)
    arguments = parser.parse_args(given[:own])
    if arguments.what == "imports":
        return _imports(arguments.exporter)
    if arguments.what == "ours":
        return _ours(given[own:])
    return (_torch if arguments.what == "torch" else _optimum)(arguments.source, arguments.out)


def _imports(exporter: str) -> int:
    for name in IMPORTS[exporter]:
        importlib.import_module(name)
    return 0


def _ours(arguments: list[str]) -> int:
    """Export and check in one process, so that its peak memory covers both."""
    from sdxl_trt.export.cli import main as export_engines  # noqa: PLC0415 - measured: no early imports

    code = export_engines(arguments)
    if code == 0:
        graphs = sorted(Path(arguments[arguments.index("--out") + 1]).glob("*/model.onnx"))
        for graph in graphs:
            _check(graph)
        sys.stdout.write(f"checked {len(graphs)} graphs\n")
    return code


def _check(graph: Path) -> None:
    """Check a graph in place, with type and shape inference of every node; its weight files must exist."""
    import onnx  # noqa: PLC0415 - measured: no early imports

    onnx.checker.check_model(str(graph), full_check=True)


def _torch(source: Path, out: Path) -> int:
    """Export as in torch's documentation: load the model, trace it with dynamic shapes, save."""
    import torch  # noqa: PLC0415 - measured: no early imports
    from diffusers import UNet2DConditionModel  # noqa: PLC0415

    model = UNet2DConditionModel.from_pretrained(source / "unet").eval()
    rows, tokens = torch.export.Dim("rows", max=63), torch.export.Dim("tokens")
    levels = 2 ** (len(model.config.block_out_channels) - 1)
    height, width = levels * torch.export.Dim("h"), levels * torch.export.Dim("w")
    inputs, shapes = _example(model.config), ({0: rows, 2: height, 3: width}, {0: rows}, {0: rows, 1: tokens})
    conditions = {"text_embeds": {0: rows}, "time_ids": {0: rows}}
    out.mkdir(parents=True)
    torch.onnx.export(
        model,
        inputs[:3],
        str(out / "model.onnx"),
        kwargs={"added_cond_kwargs": inputs[3], "return_dict": False},
        dynamic_shapes={
            **dict(zip(("sample", "timestep", "encoder_hidden_states"), shapes, strict=True)),
            "added_cond_kwargs": conditions,
            "return_dict": None,
        },
        dynamo=True,
        external_data=True,
        verbose=False,
    )
    return 0


def _example(config: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
    import torch  # noqa: PLC0415 - measured: no early imports

    size = 4 * 2 ** (len(config.block_out_channels) - 1)
    # The refiner has five time ids, the base six; the pooled width is what is left of the projection's input.
    index = json.loads((Path(config["_name_or_path"]).parent / "model_index.json").read_text(encoding="utf-8"))
    ids = 5 if index.get("requires_aesthetics_score") else 6
    pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
    sample = torch.zeros(2, config.in_channels, size, size + size // 2)
    states = torch.zeros(2, 154, config.cross_attention_dim)
    return sample, torch.zeros(2), states, {"text_embeds": torch.zeros(2, pooled), "time_ids": torch.zeros(2, ids)}


def _optimum(source: Path, out: Path) -> int:
    from optimum.exporters.onnx import main_export  # type: ignore[import-not-found,import-untyped,unused-ignore] # noqa: PLC0415 - its environment

    main_export(str(source), str(out), task="text-to-image", dtype="fp32", do_validation=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
