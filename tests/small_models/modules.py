"""Modules of diffusers' classes with any config, exported by themselves as the exporter does."""

__all__ = ["COMMON", "IDS", "POOLED", "export_module", "real_module"]

from pathlib import Path
from typing import Any

import onnx_ir as ir

from sdxl_trt.export.checkpoints.checkpoint import Checkpoint, TensorInfo
from sdxl_trt.export.graph.models import build_model, published_name
from sdxl_trt.export.graph.passes import simplify
from sdxl_trt.export.graph.signatures import make_graph
from sdxl_trt.export.graph.trace import trace_graph
from sdxl_trt.export.graph.weights import write_weights

POOLED, IDS = 24, 6
COMMON = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "norm_num_groups": 4, "cross_attention_dim": 20,
    "projection_class_embeddings_input_dim": POOLED + IDS * 8, "block_out_channels": (8, 16), "layers_per_block": 1,
    "attention_head_dim": 2, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "sample_size": 8,
}  # fmt: skip


def real_module(class_name: str, config: dict[str, Any]) -> Any:
    import diffusers
    import torch

    torch.manual_seed(0)
    return getattr(diffusers, class_name).from_config(dict(config)).eval()


def export_module(
    kind: str, class_name: str, config: dict[str, Any], module: Any, folder: Path, **signature: int
) -> Path:
    """Export `module` as the exporter does, with its own state dict as the checkpoint."""
    from safetensors.torch import save_file

    file = folder / "weights.safetensors"
    state = {published_name(name, class_name): value.contiguous() for name, value in module.state_dict().items()}
    save_file(state, file)
    meta = build_model(class_name, config, "test")
    checkpoint = Checkpoint({n: TensorInfo(file, n, tuple(t.shape), "F32") for n, t in state.items()})
    graph = make_graph(kind, meta, where="test", **signature)
    model = trace_graph(graph, "fp32", 23)
    names = {}
    for value in list(model.graph.initializers.values()):
        inner = value.name.removeprefix(graph.prefix)
        if inner in meta.buffers:
            value.const_value = ir.tensor(meta.buffers[inner].numpy(), name=value.name)
        elif published_name(inner, class_name) in meta.state:
            value.name = names[inner] = published_name(inner, class_name)
    permutations = simplify(model)
    names = {name: name for name in names.values() if name in model.graph.initializers}
    write_weights(model, checkpoint, names, permutations, folder)
    ir.save(model, folder / "model.onnx")
    return folder / "model.onnx"
