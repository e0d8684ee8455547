"""The programs that `full_size.export` and `full_size.build` run, each in its own process.

``python -m sdxl_trt.benchmarks.full_size.exporters WHAT …``: our exporter followed by a check of its graphs,
torch.onnx.export of a loaded model, optimum's exporter (in its own environment), and each exporter's imports alone;
and the UNets of a bundle in 8 bits, of ranges that nobody measured: for what does not depend on them, such as builds.
"""

__all__ = ["main", "quantize_unets"]

import argparse
import hashlib
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from sdxl_trt.engines.bundle import MANIFEST, Bundle, Component, read_bundle, write_manifest

if TYPE_CHECKING:
    from sdxl_trt.export.eight_bit import Scheme

_ASSUMED = (-8.0, 8.0)
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
    eight_bit = commands.add_parser("eight-bit", help="a bundle's UNets in 8 bits, their ranges assumed")
    eight_bit.add_argument("scheme", choices=("int8", "fp8"))
    eight_bit.add_argument("source", type=Path, help="a bundle in fp16")
    eight_bit.add_argument("out", type=Path)
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
    if arguments.what == "eight-bit":
        quantize_unets(arguments.source, arguments.scheme, arguments.out)
        return 0
    return (_torch if arguments.what == "torch" else _optimum)(arguments.source, arguments.out)


def quantize_unets(source: Path, scheme: "Scheme", out: Path) -> Bundle:
    """Write the UNets of the bundle at `source` in 8 bits as the partial bundle `out`, unless it is there.

    Every range is assumed to be (-8, 8), so the pictures are worth nothing.
    """
    import onnx_ir as ir  # noqa: PLC0415 - measured: no early imports

    from sdxl_trt.export.eight_bit import Ranges, add_range_outputs  # noqa: PLC0415
    from sdxl_trt.export.quantize import EightBitJob, quantize_component  # noqa: PLC0415

    floats = read_bundle(source, partial=True)
    found: dict[str, Component] = {}
    for name, component in floats.manifest.components.items():
        if component.kind != "unet":
            continue
        key = hashlib.sha256(f"{component.key} {scheme} {_ASSUMED}".encode()).hexdigest()
        kept = _kept(out)
        if name in kept and kept[name].key == key:
            found |= {part: each for part, each in kept.items() if each.key == key}
            continue
        graph = ir.load(floats.path(component.graph))
        ranges = Ranges(name, dict.fromkeys(add_range_outputs(graph).outputs, _ASSUMED))
        job = EightBitJob(name=name, precision=scheme, key=key, source=component, folder=floats.root / name,
                          ranges=ranges, calibration="assumed")  # fmt: skip
        found |= quantize_component(job, out, {}).records(name)
    write_manifest(
        out, msgspec.structs.replace(floats.manifest, precision=scheme, components=found, tokenizers={}, plans=())
    )
    return read_bundle(out, partial=True)


def _kept(out: Path) -> dict[str, Component]:
    """Return the records of the components of the bundle at `out`; none if there is no bundle."""
    return read_bundle(out, partial=True).manifest.components if (out / MANIFEST).exists() else {}


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
