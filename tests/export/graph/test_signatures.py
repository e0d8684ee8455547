"""Every kind of UNet, encoder and autoencoder that diffusers' configs allow, against PyTorch itself."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from sdxl_trt.engines.errors import SourceError
from sdxl_trt.export.checkpoints.checkpoint import Checkpoint, TensorInfo
from sdxl_trt.export.graph.models import build_model, published_name
from sdxl_trt.export.graph.passes import simplify
from sdxl_trt.export.graph.signatures import make_graph
from sdxl_trt.export.graph.trace import trace_graph
from sdxl_trt.export.graph.weights import write_weights

pytestmark = pytest.mark.usefixtures("translations_once")
POOLED, IDS = 24, 6
COMMON = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "norm_num_groups": 4, "cross_attention_dim": 20,
    "projection_class_embeddings_input_dim": POOLED + IDS * 8, "block_out_channels": (8, 16), "layers_per_block": 1,
    "attention_head_dim": 2, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "sample_size": 8,
}  # fmt: skip
UNETS: dict[str, dict[str, Any]] = {
    "reversed depths and scale shift": {
        "transformer_layers_per_block": ((1,), (2,)), "reverse_transformer_layers_per_block": ((1, 2), (1, 1)),
        "resnet_time_scale_shift": "scale_shift", "act_fn": "mish", "use_linear_projection": True,
    },
    "simple attention and resnet sampling": {
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "attention_head_dim": 4,
    },
    "self attention, one level, no middle": {
        "block_out_channels": (8,), "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",), "mid_block_type": None, "only_cross_attention": (True,),
    },
    "four levels, widths of context apart": {
        "block_out_channels": (8, 8, 12, 16), "attention_head_dim": (1, 2, 3, 4), "layers_per_block": (1, 2, 1, 1),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "flip_sin_to_cos": False, "freq_shift": 1, "time_embedding_act_fn": "silu", "dual_cross_attention": False,
    },
}  # fmt: skip


def _real_module(class_name: str, config: dict[str, Any]) -> torch.nn.Module:
    import diffusers

    torch.manual_seed(0)
    return getattr(diffusers, class_name).from_config(dict(config)).eval()


def _export(kind: str, class_name: str, config: dict[str, Any], module: Any, folder: Path, **signature: int) -> Path:
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


@pytest.mark.slow
@pytest.mark.parametrize("name", UNETS)
def test_unets_of_every_outline(name: str, tmp_path: Path) -> None:
    config = COMMON | UNETS[name]
    module = _real_module("UNet2DConditionModel", config)
    path = _export("unet", "UNet2DConditionModel", config, module, tmp_path, time_ids=IDS, pooled=POOLED)
    session = onnxruntime.InferenceSession(path)
    multiple = 2**module.num_upsamplers
    generator = torch.Generator().manual_seed(1)
    for rows, height, width, tokens in ((1, multiple, 3 * multiple, 77), (3, 4 * multiple, 2 * multiple, 154)):
        feed = {
            "sample": torch.randn(rows, 4, height, width, generator=generator),
            "timestep": torch.linspace(1.5, 999, rows),
            "encoder_hidden_states": torch.randn(rows, tokens, 20, generator=generator),
            "text_embeds": torch.randn(rows, POOLED, generator=generator),
            "time_ids": torch.rand(rows, IDS, generator=generator) * 1024,
        }
        with torch.no_grad():
            conditions = {key: feed[key] for key in ("text_embeds", "time_ids")}
            arguments = (feed["sample"], feed["timestep"], feed["encoder_hidden_states"])
            expected = module(*arguments, added_cond_kwargs=conditions).sample.numpy()
        (found,) = session.run(None, {key: value.numpy() for key, value in feed.items()})
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


@pytest.mark.slow
def test_autoencoders_without_the_usual_convolutions(tmp_path: Path) -> None:
    config = {
        "block_out_channels": (8, 16, 16), "down_block_types": ("DownEncoderBlock2D",) * 3, "norm_num_groups": 4,
        "up_block_types": ("UpDecoderBlock2D",) * 3, "layers_per_block": 2, "latent_channels": 4,
        "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False,
    }  # fmt: skip
    module = _real_module("AutoencoderKL", config)
    generator = torch.Generator().manual_seed(1)
    for kind, shape in (("vae_decoder", (1, 4, 5, 7)), ("vae_encoder", (3, 3, 20, 28))):
        folder = tmp_path / kind
        folder.mkdir()
        path = _export(kind, "AutoencoderKL", config, module, folder)
        value = torch.randn(shape, generator=generator)
        with torch.no_grad():
            decoded = kind == "vae_decoder"
            expected = module.decode(value).sample if decoded else module.encode(value).latent_dist.parameters
        session = onnxruntime.InferenceSession(path)
        (found,) = session.run(None, {session.get_inputs()[0].name: value.numpy()})
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=5e-5)


def _export_linear(folder: Path) -> Path:
    config = COMMON | {"use_linear_projection": True}
    module = _real_module("UNet2DConditionModel", config)
    return _export("unet", "UNet2DConditionModel", config, module, folder, time_ids=IDS, pooled=POOLED)


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the graph of a UNet with linear projections."""
    return _export_linear(tmp_path_factory.mktemp("linear"))


@pytest.mark.slow
def test_no_weight_is_transposed_at_run_time_and_no_metadata_remains(linear: Path) -> None:
    graph = ir.load(linear).graph
    weights = set(graph.initializers)
    assert [node.name for node in graph if node.op_type == "Transpose" and node.inputs[0].name in weights] == []
    assert {node.op_type for node in graph} & {"Identity", "SequenceAt", "SplitToSequence", "Constant"} == set()
    assert {"Attention", "GroupNormalization"} <= {node.op_type for node in graph}
    assert all(not node.metadata_props and not node.doc_string for node in graph)
    used = {value.name for node in graph for value in node.inputs if value is not None}
    assert weights <= used


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(linear: Path, tmp_path: Path) -> None:
    again = _export_linear(tmp_path)
    assert again.read_bytes() == linear.read_bytes()
    assert again.with_name("weights.data").read_bytes() == linear.with_name("weights.data").read_bytes()


def test_conditions_of_the_wrong_width_are_refused() -> None:
    model = build_model("UNet2DConditionModel", COMMON, "test")
    with pytest.raises(SourceError, match="requires_aesthetics_score"):
        make_graph("unet", model, time_ids=5, pooled=POOLED, where="test")
    plain = build_model("UNet2DConditionModel", COMMON | {"addition_embed_type": None}, "test")
    with pytest.raises(SourceError, match="text_time"):
        make_graph("unet", plain, time_ids=IDS, pooled=POOLED, where="test")
    with pytest.raises(SourceError, match="refuses this config"):
        build_model("UNet2DConditionModel", COMMON | {"block_out_channels": (8, 16, 32)}, "test")
    with pytest.raises(SourceError, match="not an SDXL component"):
        build_model("os.system", {}, "test")
