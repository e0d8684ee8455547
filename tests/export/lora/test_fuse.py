"""LoRAs fused into weights, against the branches as torch modules beside the layers."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from sdxl_trt.engines.adapters.file import Lora, open_lora
from sdxl_trt.engines.adapters.names import COMPONENTS, LoraComponent
from sdxl_trt.engines.adapters.option import REFINER_NOTE
from sdxl_trt.engines.errors import CorruptError, SourceError
from sdxl_trt.export.checkpoints.checkpoint import Checkpoint, digest_tensors, open_file, resolve_names
from sdxl_trt.export.graph.models import MetaModel, build_model
from sdxl_trt.export.lora.fuse import check_fits, fuse_loras

UNET = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "attention_head_dim": 2, "in_channels": 4,
    "block_out_channels": [16, 32], "cross_attention_dim": 24, "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": 64, "transformer_layers_per_block": 1, "use_linear_projection": False,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 20,
    "eos_token_id": 2, "bos_token_id": 0, "projection_dim": 16,
}  # fmt: skip
CLASSES: dict[LoraComponent, tuple[str, dict[str, Any]]] = {
    "unet": ("UNet2DConditionModel", UNET),
    "text_encoder": ("CLIPTextModel", TEXT),
    "text_encoder_2": ("CLIPTextModelWithProjection", TEXT),
}
PREFIXES: dict[LoraComponent, str] = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
KINDS = [
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    "down_blocks.1.attentions.0.proj_in",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv",
]


ATTN2 = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"
FC1, Q_PROJ = "text_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.self_attn.q_proj"
TEXT_FC1 = "text_model_encoder_layers_{}_mlp_fc1"


@dataclass(frozen=True)
class Base:
    """A small base: models on the meta device, and their checkpoints."""

    models: dict[LoraComponent, MetaModel]
    checkpoints: dict[LoraComponent, Checkpoint]

    def shape(self, module: str) -> tuple[int, ...]:
        return self.models["unet"].state[f"{module}.weight"]

    def fused(self, loras: list[tuple[Lora, float]], component: LoraComponent = "unet") -> Checkpoint:
        return fuse_loras(self.checkpoints[component], component, loras, self.models[component].config)

    def weight(self, module: str, loras: list[tuple[Lora, float]]) -> torch.Tensor:
        [(_, tensor)] = self.fused(loras).read([f"{module}.weight"])
        return tensor


def _open_base(folder: Path, dtype: torch.dtype) -> Base:
    models: dict[LoraComponent, MetaModel] = {}
    checkpoints: dict[LoraComponent, Checkpoint] = {}
    for component, (class_name, config) in CLASSES.items():
        models[component] = build_model(class_name, config, component)
        generator = torch.Generator().manual_seed(len(component))
        tensors = {
            name: (torch.randn(shape, generator=generator) * 0.2).to(dtype)
            for name, shape in models[component].state.items()
        }
        file = folder / f"{component}.safetensors"
        save_file(tensors, file)
        checkpoints[component] = resolve_names(open_file(file), models[component].state, component, pytest.fail)
    return Base(models, checkpoints)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return _open_base(tmp_path_factory.mktemp("base"), torch.float32)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return _open_base(tmp_path_factory.mktemp("half"), torch.float16)


def _branch(shape: tuple[int, ...], rank: int, *, tucker: bool = False) -> nn.Sequential:
    """Return the branch as trainers build it beside a layer with a weight of `shape`."""
    out, inner, *kernel = shape
    if not kernel:
        return nn.Sequential(nn.Linear(inner, rank, bias=False), nn.Linear(rank, out, bias=False))
    padding = kernel[0] // 2
    if tucker:
        middle = nn.Conv2d(rank + 1, rank, tuple(kernel), padding=padding, bias=False)
        return nn.Sequential(nn.Conv2d(inner, rank + 1, 1, bias=False), middle, nn.Conv2d(rank, out, 1, bias=False))
    down = nn.Conv2d(inner, rank, tuple(kernel), padding=padding, bias=False)
    return nn.Sequential(down, nn.Conv2d(rank, out, 1, bias=False))


def _stored(prefix: str, branch: nn.Sequential, alpha: float | None) -> dict[str, torch.Tensor]:
    """Return kohya's tensors of a branch."""
    names = ["lora_down", "lora_mid", "lora_up"] if len(branch) == 3 else ["lora_down", "lora_up"]
    tensors = {f"{prefix}.{name}.weight": layer.weight.detach() for name, layer in zip(names, branch, strict=True)}
    return tensors if alpha is None else tensors | {f"{prefix}.alpha": torch.tensor(alpha)}


def _kohya(module: str, component: LoraComponent = "unet") -> str:
    return PREFIXES[component] + module.replace(".", "_")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Lora]:
    """Return a function that writes tensors as a LoRA file and opens it."""

    def write(tensors: dict[str, torch.Tensor], name: str = "style") -> Lora:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / f"{name}.safetensors")
        return open_lora(tmp_path / f"{name}.safetensors")

    return write


def _apply(shape: tuple[int, ...], weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    return inputs @ weight.T if len(shape) == 2 else nn.functional.conv2d(inputs, weight, padding=shape[2] // 2)


@pytest.mark.parametrize("alpha", [None, 1.0, 6.0])
@pytest.mark.parametrize(("module", "tucker"), [*((module, False) for module in KINDS), (KINDS[2], True)])
def test_a_fused_layer_equals_the_layer_plus_its_branch(
    module: str, tucker: bool, alpha: float | None, base: Base, write: Callable[..., Lora]
) -> None:
    torch.manual_seed(0)
    shape, rank, scale = base.shape(module), 4, -0.7
    branch = _branch(shape, rank, tucker=tucker)
    lora = write(_stored(_kohya(module), branch, alpha))
    inputs = torch.randn(3, shape[1], *([9, 9] if len(shape) == 4 else []))
    [(_, weight)] = base.checkpoints["unet"].read([f"{module}.weight"])
    # With a mid layer, alpha is divided by the rank of the down layer.
    divisor = rank + tucker
    expected = _apply(shape, weight, inputs) + branch(inputs) * scale * ((alpha or divisor) / divisor)
    actual = _apply(shape, base.weight(module, [(lora, scale)]), inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(actual, _apply(shape, weight, inputs), atol=1e-2)


def _hooked(module: nn.Module, branch: nn.Sequential, factor: float) -> None:
    if isinstance(module, nn.Conv2d):
        branch[0].stride, branch[0].padding = module.stride, module.padding
    module.register_forward_hook(lambda _, given, out: out + branch(given[0]) * factor)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_fused_model_equals_the_model_with_branches(
    component: LoraComponent, base: Base, write: Callable[..., Lora]
) -> None:
    torch.manual_seed(1)
    model = copy.deepcopy(base.models[component].module).to_empty(device="cpu")
    # Buffers that the model computes itself were not on the meta device when it was built.
    for name, value in base.models[component].buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, value)
    published = {n.removeprefix("text_model."): n for n in base.models[component].state}

    def fill(checkpoint: Checkpoint) -> None:
        state = {name: published[name.removeprefix("text_model.")] for name in model.state_dict()}
        read = dict(checkpoint.read(state.values()))
        model.load_state_dict({name: read[stored] for name, stored in state.items()})

    tensors: dict[str, torch.Tensor] = {}
    branches: dict[str, nn.Sequential] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            branches[name] = _branch(tuple(module.weight.shape), 2).requires_grad_(requires_grad=False)
            stored = published[f"{name}.weight".removeprefix("text_model.")].removesuffix(".weight")
            tensors |= _stored(_kohya(stored, component), branches[name], 3.0)
    lora = write(tensors)
    check_fits([lora], base.models)
    fill(base.fused([(lora, 0.25)], component))
    fused = _run(component, model)
    fill(base.checkpoints[component])
    plain = _run(component, model)
    for name, branch in branches.items():
        _hooked(model.get_submodule(name), branch, 0.25 * 3.0 / 2)
    torch.testing.assert_close(fused, _run(component, model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(fused, plain, atol=1e-2)


def _run(component: LoraComponent, model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        if component != "unet":
            return model(torch.tensor([[0, 5, 7, 19]])).last_hidden_state
        extra = {"text_embeds": torch.ones(1, 16), "time_ids": torch.full((1, 6), 4.0)}
        sample, context = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8), torch.linspace(-1, 1, 96).reshape(1, 4, 24)
        return model(sample, torch.tensor([300.0]), context, added_cond_kwargs=extra).sample


def _lora(base: Base, write: Callable[..., Lora], modules: Iterable[str], name: str = "style") -> Lora:
    torch.manual_seed(len(name))
    tensors: dict[str, torch.Tensor] = {}
    for module in modules:
        tensors |= _stored(_kohya(module), _branch(base.shape(module), 2), 1.0)
    return write(tensors, name)


def test_several_loras_add_up(base: Base, write: Callable[..., Lora]) -> None:
    one = _lora(base, write, KINDS, "one")
    other = _lora(base, write, KINDS[2:], "other")
    [(_, plain)] = base.checkpoints["unet"].read([f"{KINDS[2]}.weight"])
    first, second = (base.weight(KINDS[2], [(lora, 1.0)]) - plain for lora in (one, other))
    both = base.weight(KINDS[2], [(one, 2.0), (other, -0.5)])
    torch.testing.assert_close(both, plain + 2 * first - 0.5 * second, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(base.weight(KINDS[2], [(one, 1.0), (one, -1.0)]), plain, rtol=0, atol=1e-6)


def test_the_sum_is_fp32_for_any_checkpoint_dtype(half: Base, write: Callable[..., Lora]) -> None:
    lora = _lora(half, write, KINDS)
    checkpoint = half.fused([(lora, 0.1)])
    tensors = dict(checkpoint.read(checkpoint.tensors))
    plain = dict(half.checkpoints["unet"].read(checkpoint.tensors))
    touched = {f"{module}.weight" for module in KINDS}
    names = {torch.float16: "F16", torch.float32: "F32"}
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].dtype == names[tensor.dtype] == ("F32" if name in touched else "F16")
        assert checkpoint.tensors[name].shape == tensor.shape
        assert (name in touched) != torch.equal(tensor, plain[name])
    up, down = (f"{_kohya(KINDS[0])}.lora_{part}.weight" for part in ("up", "down"))
    factors = dict(open_file(lora.path).read([up, down]))
    exact = plain[f"{KINDS[0]}.weight"].double() + 0.05 * factors[up].double() @ factors[down].double()
    torch.testing.assert_close(tensors[f"{KINDS[0]}.weight"].double(), exact, rtol=3e-7, atol=3e-8)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_any_reading_order_gives_the_same_weights(data: st.DataObject, base: Base, write: Callable[..., Lora]) -> None:
    loras = [(_lora(base, write, KINDS, "one"), 1.0), (_lora(base, write, KINDS[1:3], "two"), 0.5)]
    checkpoint = base.fused(loras)
    # Also the same name twice: the base's file is mapped, and fusing must not change it.
    some = [f"{module}.weight" for module in KINDS] + ["conv_in.weight", "conv_in.bias"]
    names = data.draw(st.lists(st.sampled_from(some), max_size=8))
    expected = {name: tensor for name in set(names) for _, tensor in checkpoint.read([name])}
    read = list(checkpoint.read(names))
    assert [name for name, _ in read] == names
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read)


def test_a_checkpoint_without_a_lora_is_returned_itself(base: Base, write: Callable[..., Lora]) -> None:
    lora = _lora(base, write, KINDS)
    assert base.fused([]) is base.checkpoints["unet"]
    assert base.fused([(lora, 0.0)]) is base.checkpoints["unet"]
    assert base.fused([(lora, 1.0)], "text_encoder") is base.checkpoints["text_encoder"]


def test_a_lora_for_encoders_leaves_the_unet_unchanged(base: Base, write: Callable[..., Lora]) -> None:
    tensors = _pair(f"lora_te1_{TEXT_FC1.format(0)}", 32, 16) | _pair(f"clip_g.{Q_PROJ}", 16, 16)
    lora = write(tensors)
    check_fits([lora], base.models)
    assert base.fused([(lora, 1.0)]) is base.checkpoints["unet"]
    for component, name in (("text_encoder", FC1), ("text_encoder_2", Q_PROJ)):
        read = [dict(source.read([f"{name}.weight"]))[f"{name}.weight"]
                for source in (base.fused([(lora, 0.5)], component), base.checkpoints[component])]  # fmt: skip
        torch.testing.assert_close(read[0], read[1] + 1.0)  # 0.5 · ones of rank 2


@pytest.mark.parametrize("rank", [1, 7, 40])
@pytest.mark.parametrize("alpha", [0.0, -3.0, 1e-3, 1000.0])
def test_any_rank_and_alpha(rank: int, alpha: float, base: Base, write: Callable[..., Lora]) -> None:
    out, inner = base.shape(KINDS[0])
    up, down = torch.randn(out, rank), torch.randn(rank, inner)
    module = _kohya(KINDS[0])
    stored = {
        f"{module}.lora_up.weight": up,
        f"{module}.lora_down.weight": down,
        f"{module}.alpha": torch.tensor(alpha),
    }
    [(_, plain)] = base.checkpoints["unet"].read([f"{KINDS[0]}.weight"])
    expected = plain.double() + alpha / rank * (up.double() @ down.double())
    torch.testing.assert_close(
        base.weight(KINDS[0], [(write(stored), 1.0)]).double(), expected, rtol=1e-5, atol=1e-5 * max(1, abs(alpha))
    )


def test_the_digest_of_fused_weights_depends_on_loras_and_scales(base: Base, write: Callable[..., Lora]) -> None:
    one, other = _lora(base, write, KINDS, "one"), _lora(base, write, KINDS, "other")
    fusions = [[], [(one, 1.0)], [(one, 0.5)], [(other, 1.0)], [(one, 1.0), (other, 1.0)]]
    names = [f"{module}.weight" for module in KINDS]
    assert len({digest_tensors(base.fused(loras), names) for loras in fusions}) == len(fusions)


@pytest.mark.parametrize("scale", [-1e39, 3e38])
def test_the_error_for_a_sum_beyond_fp32_names_the_lora(scale: float, base: Base, write: Callable[..., Lora]) -> None:
    tensors = {key: 9 * tensor for key, tensor in _pair(_kohya(KINDS[0]), *base.shape(KINDS[0])).items()}
    with pytest.raises(
        CorruptError, match=r"style\.safetensors: makes .*to_k\.weight infinite at scale -?[13]e\+3[89]"
    ):
        base.weight(KINDS[0], [(write(tensors), scale)])


def test_nan_in_the_base_does_not_blame_the_lora(base: Base, write: Callable[..., Lora], tmp_path: Path) -> None:
    name = f"{KINDS[0]}.weight"
    save_file({name: torch.full(base.shape(KINDS[0]), math.nan)}, tmp_path / "nan.safetensors")
    fused = fuse_loras(open_file(tmp_path / "nan.safetensors"), "unet", [(_lora(base, write, KINDS[:1]), 1.0)], UNET)
    assert torch.isnan(dict(fused.read([name]))[name]).all()


def test_matrices_and_1x1_convolutions_are_interchangeable(base: Base, write: Callable[..., Lora]) -> None:
    linear, pointwise = KINDS[0], KINDS[1]
    for module, dims in ((linear, (1, 1)), (pointwise, ())):
        out, inner = base.shape(module)[:2]
        up, down = torch.randn(out, 2, *dims), torch.randn(2, inner, *dims)
        lora = write({f"{_kohya(module)}.lora_up.weight": up, f"{_kohya(module)}.lora_down.weight": down})
        [(_, plain)] = base.checkpoints["unet"].read([f"{module}.weight"])
        product = (up.flatten(1) @ down.flatten(1)).reshape(plain.shape)
        torch.testing.assert_close(base.weight(module, [(lora, 1.0)]), plain + product)


def _pair(module: str, out: int, inner: int, *kernel: int) -> dict[str, torch.Tensor]:
    return {
        f"{module}.lora_up.weight": torch.ones(out, 2, *(1 for _ in kernel)),
        f"{module}.lora_down.weight": torch.ones(2, inner, *kernel),
    }


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        # an unknown width, a wrong kernel, another encoder's width
        (_pair(_kohya(KINDS[0]), 320, 320), r"it has .*to_k\.lora_down.*\[2, 320\].*shape \[32, 24\]"),
        (_pair(_kohya(KINDS[2]), 16, 16, 1, 1), r"shape \[16, 16, 3, 3\]"),
        (_pair(f"lora_te2_{TEXT_FC1.format(0)}", 64, 16), r"text_encoder_2 has .*fc1.*\[32, 16\]"),
        # the context of the cross attention identifies the family, whichever tensor is checked first
        (_pair(_kohya(ATTN2), 320, 768), "takes a context of width 768, like Stable Diffusion 1, but this base's"),
        (
            _pair(_kohya(ATTN2), 320, 1024) | _pair(f"lora_te_{TEXT_FC1.format(22)}", 4096, 1024),
            "takes a context of width 1024, like Stable Diffusion 2, but this base's is 24",
        ),
        (
            _pair(_kohya("down_blocks.0.attentions.0.proj_in"), 8, 8) | _pair(f"unet.{ATTN2}", 384, 1280),
            "takes a context of width 1280, like SDXL's refiner, but this base's is 24",
        ),
        ({f"unet.{ATTN2}.diff": torch.ones(320, 2048)}, "takes a context of width 2048, like SDXL's base"),
    ],
)  # fmt: skip
def test_the_error_for_another_models_lora_names_its_shapes(
    tensors: dict[str, torch.Tensor], match: str, base: Base, write: Callable[..., Lora]
) -> None:
    lora = write(tensors)
    with pytest.raises(SourceError, match=rf"style\.safetensors: LoRA for another model: .*{match}") as error:
        check_fits([lora], base.models)
    assert "\n" not in str(error.value)
    with pytest.raises(SourceError, match="another model"):
        base.fused([(lora, 1.0)], "unet" if "unet" in lora.branches else "text_encoder_2")


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (_pair(_kohya("mid_block.attentions.0.transformer_blocks.9.attn1.to_q"), 32, 32), "blocks_9.* unet has no"),
        (_pair("lora_unet_double_blocks_0_img_attn_proj", 8, 8), "double_blocks_0.* unet has no such module"),
        (_pair(f"lora_te1_{TEXT_FC1.format(7)}", 32, 16), "layers_7.* text_encoder has no such module"),
        (_pair("lora_te2_transformer_resblocks_0_mlp_c_fc", 32, 16), "resblocks_0.* has no such module"),
        ({f"{_kohya(KINDS[0])}.diff_b": torch.ones(32)}, r"to_k\.diff_b.* unet has no such bias"),
    ],
)
def test_the_error_for_an_unknown_module_does_not_name_another_model(
    tensors: dict[str, torch.Tensor], match: str, base: Base, write: Callable[..., Lora]
) -> None:
    with pytest.raises(SourceError, match=rf"style\.safetensors: has .*{match}") as error:
        check_fits([write(tensors)], base.models)
    assert "another model" not in str(error.value)


def test_a_mid_layer_must_fit_the_kernel(base: Base, write: Callable[..., Lora]) -> None:
    tensors = _stored(_kohya(KINDS[2]), _branch((16, 16, 5, 5), 2, tucker=True), None)
    with pytest.raises(SourceError, match=r"lora_mid.*\[2, 3, 5, 5\].*shape \[16, 16, 3, 3\]"):
        check_fits([write(tensors)], base.models)


def test_a_base_without_the_encoder_refuses_its_lora(base: Base, write: Callable[..., Lora]) -> None:
    lora = write(_pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 32, 16))
    check_fits([lora], base.models)
    with pytest.raises(SourceError, match="changes a text_encoder, which this base lacks"):
        check_fits([lora], {"unet": base.models["unet"]})


TWO_NAMES = [
    ("lora_unet_conv_in", "lora_unet_input_blocks_0_0"),
    ("lora_unet_conv_in", "unet.conv_in"),
    ("conv_in", "base_model.model.conv_in"),
]


@pytest.mark.parametrize("names", TWO_NAMES)
def test_two_names_of_one_module_count_once_if_they_agree(
    names: tuple[str, str], base: Base, write: Callable[..., Lora]
) -> None:
    one, other = (_pair(name, 16, 4, 3, 3) for name in names)
    both = base.weight("conv_in", [(write(one | other, "both"), 1.0)])
    assert torch.equal(both, base.weight("conv_in", [(write(one, "one"), 1.0)]))
    different = {key: tensor * 1.5 for key, tensor in other.items()}
    for i, tensors in enumerate((one | different, one | other | {f"{names[0]}.alpha": torch.tensor(1.0)})):
        with pytest.raises(SourceError, match=r"name the same module but differ") as error:
            check_fits([write(tensors, f"other-{i}")], base.models)
        assert all(f"'{name}.lora" in str(error.value) for name in names)


def test_tensor_infos_keep_their_location(half: Base, write: Callable[..., Lora]) -> None:
    lora = _lora(half, write, KINDS)
    before, after = half.checkpoints["unet"], half.fused([(lora, 1.0)])
    assert {name: replace(info, dtype="F16") for name, info in after.tensors.items()} == before.tensors
    assert after.in_file_order(after.tensors) == before.in_file_order(before.tensors)


def test_the_note_about_the_refiner_is_one_line_with_a_remedy() -> None:
    assert "\n" not in REFINER_NOTE
    assert "--no-refiner" in REFINER_NOTE
