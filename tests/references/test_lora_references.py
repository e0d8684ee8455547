"""LoRAs in every naming scheme, fused into a small base, tensor by tensor against diffusers and peft."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from sdxl_trt.engines.adapters.names import COMPONENTS
from sdxl_trt.engines.adapters.unet_names import unet_prefixes
from sdxl_trt.export.components import Options
from sdxl_trt.export.exporter import plan_export
from sdxl_trt.export.graph.models import published_name

State = dict[str, torch.Tensor]
HEADER = "lora_adapter_metadata"
TOLERANCE = 1e-6  # for weights of about 1, in fp32: up @ down is summed in another order
TEXT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


@pytest.fixture(scope="module")
def base(pairs: Callable[[str], Any]) -> Path:
    return pairs("outline").base


@pytest.fixture(scope="module")
def plain(base: Path) -> dict[str, State]:
    return _state(_pipeline(base))


def _pipeline(base: Path) -> Any:
    pipeline = StableDiffusionXLPipeline.from_pretrained(base, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _state(pipeline: Any) -> dict[str, State]:
    """Return the weights by component, under published names."""
    states = {}
    for component in COMPONENTS:
        model = getattr(pipeline, component)
        states[component] = {
            published_name(name.replace(".base_layer.", "."), type(model).__name__): tensor.detach().clone()
            for name, tensor in model.state_dict().items()
            if ".lora_" not in name and ".lokr_" not in name
        }
    return states


def _ours(base: Path, tmp_path: Path, *loras: tuple[Any, ...]) -> dict[str, State]:
    """Return the weights that an export would write, read through its own plan."""
    plan = plan_export(base, None, tmp_path / "out", Options(precision="fp32", loras=loras))
    states = {}
    for component in COMPONENTS:
        part = plan.jobs[component].plan
        states[component] = dict(part.checkpoint.read(part.tensor_names()))
    return states


def _theirs(base: Path, *loras: tuple[Path, float, float]) -> dict[str, State]:
    """Return the weights after diffusers has loaded and fused each file with its two scales."""
    pipeline = _pipeline(base)
    for i, (path, scale, text_scale) in enumerate(loras):
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"a{i}")
        pipeline.fuse_lora(components=["unet"], lora_scale=scale, adapter_names=[f"a{i}"])
        pipeline.fuse_lora(
            components=["text_encoder", "text_encoder_2"], lora_scale=text_scale, adapter_names=[f"a{i}"]
        )
        pipeline.unload_lora_weights()
    return _state(pipeline)


def _compare(ours: dict[str, State], theirs: dict[str, State], plain: dict[str, State]) -> tuple[float, float, int]:
    """Assert that all weights agree; return the largest difference, the largest change, and the number changed."""
    worst, change, changed = 0.0, 0.0, 0
    for component, expected in theirs.items():
        assert ours[component].keys() == expected.keys() == plain[component].keys()
        for name, tensor in expected.items():
            found = ours[component][name].float()
            difference = float((found - tensor).abs().max())
            moved = float((tensor - plain[component][name]).abs().max())
            assert difference <= TOLERANCE * max(1.0, moved), f"{component} {name}: {difference:.2e}, moved {moved:.2e}"
            if moved == 0:
                assert torch.equal(found, plain[component][name]), name
            worst, change, changed = max(worst, difference), max(change, moved), changed + (moved > 0)
    print(f"largest difference {worst:.1e} where weights moved by up to {change:.2f}, {changed} tensors")
    return worst, change, changed


def _modules(plain: dict[str, State], component: str, ends: Iterable[str] = ()) -> dict[str, tuple[int, ...]]:
    """Return {module: weight shape} of linear layers and convolutions, with `ends` only of names that end so."""
    return {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in plain[component].items()
        if name.endswith(".weight") and tensor.dim() in {2, 4} and "embeddings" not in name
        and (not ends or name.removesuffix(".weight").endswith(tuple(ends)))
    }  # fmt: skip


def _factors(shape: tuple[int, ...], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a random down (r, in…) and up (out, r…), as trainers store them."""
    out, inner, *kernel = shape
    down = torch.randn(rank, inner, *kernel) / (inner * 2) ** 0.5
    return down, torch.randn(out, rank, *(1 for _ in kernel)) / rank**0.5


def _kohya(plain: dict[str, State], config: Mapping[str, Any], *, ldm: bool) -> State:
    """Return a LoRA in kohya's format for every module that diffusers can read in these names."""
    torch.manual_seed(ldm)
    inverse = {module: name for name, module in unet_prefixes(config).items()}
    names: dict[str, tuple[int, ...]] = {}
    for module, shape in _modules(plain, "unet").items():
        # diffusers drops these when they have diffusers names.
        if ldm or not module.startswith("add_embedding."):
            names[f"lora_unet_{(inverse[module] if ldm else module).replace('.', '_')}"] = shape
    for i, component in enumerate(("text_encoder", "text_encoder_2")):
        for module, shape in _modules(plain, component, (*TEXT, "text_projection")).items():
            names[f"lora_te{i + 1}_{module.replace('.', '_')}"] = shape
    tensors: State = {}
    for i, (name, shape) in enumerate(names.items()):
        down, up = _factors(shape, 2 + i % 3)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        # diffusers takes one alpha per component; if they differ, it warns and drops those of the UNet's attention.
        tensors[f"{name}.alpha"] = torch.tensor(1.5 if name.startswith("lora_unet_") else 2.0)
    return tensors


def _written(path: Path, tensors: State, header: Mapping[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, dict(header or {}))
    return path


@pytest.mark.parametrize(("ldm", "scales"), [(True, (1.0, 1.0)), (False, (-0.6, 0.3))])
def test_kohya(ldm: bool, scales: tuple[float, float], base: Path, plain: dict[str, State], tmp_path: Path) -> None:
    config = json.loads((base / "unet" / "config.json").read_text())
    path = _written(tmp_path / "a.safetensors", _kohya(plain, config, ldm=ldm))
    _, _, changed = _compare(_ours(base, tmp_path, (path, *scales)), _theirs(base, (path, *scales)), plain)
    assert changed == sum(key.endswith(".lora_up.weight") for key in _kohya(plain, config, ldm=ldm))


def _old_diffusers(plain: dict[str, State]) -> State:
    """Return a LoRA in diffusers' names before peft: attention processors, and layers with LoRA submodules."""
    torch.manual_seed(3)
    names: dict[str, tuple[int, ...]] = {}
    for module, shape in _modules(plain, "unet").items():
        parent, _, leaf = module.removesuffix(".0").rpartition(".")
        attention = leaf in {"to_q", "to_k", "to_v", "to_out"}
        names[f"unet.{parent}.processor.{leaf}_lora" if attention else f"unet.{module}.lora"] = shape
    for component in ("text_encoder", "text_encoder_2"):
        for module, shape in _modules(plain, component, TEXT).items():
            names[f"{component}.{module}.lora_linear_layer"] = shape
    factors = {name: _factors(shape, 3) for name, shape in names.items()}
    return {f"{name}.{part}.weight": pair[part == "up"] for name, pair in factors.items() for part in ("down", "up")}


def test_diffusers_names_before_peft(base: Path, plain: dict[str, State], tmp_path: Path) -> None:
    path = _written(tmp_path / "a.safetensors", _old_diffusers(plain))
    _, _, changed = _compare(_ours(base, tmp_path, (path, 0.7)), _theirs(base, (path, 0.7, 0.7)), plain)
    assert changed == len(_old_diffusers(plain)) // 2


def test_several_files_are_fused_in_order(base: Path, plain: dict[str, State], tmp_path: Path) -> None:
    config = json.loads((base / "unet" / "config.json").read_text())
    torch.manual_seed(4)
    dora: State = {}
    for module, shape in _modules(plain, "unet", ["to_k", "conv1", "proj_out"]).items():
        down, up = _factors(shape, 2)
        norms = (1.1 * plain["unet"][f"{module}.weight"].flatten(1).norm(dim=1)).reshape(1, -1, *shape[2:2], 1, 1)
        dora |= {f"unet.{module}.lora_A.weight": down, f"unet.{module}.lora_B.weight": up}
        dora[f"unet.{module}.lora_magnitude_vector"] = norms if len(shape) == 4 else norms.flatten()
    first = (_written(tmp_path / "a.safetensors", _kohya(plain, config, ldm=True)), 0.7, 0.5)
    second = (_written(tmp_path / "b.safetensors", dora), 0.8, 0.8)
    for order in ((first, second), (second, first)):
        _compare(_ours(base, tmp_path, *order), _theirs(base, *order), plain)


def _randomize(model: torch.nn.Module) -> None:
    """Give the adapters of a peft model random weights; DoRA's magnitudes stay near their values."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if not any(mark in name for mark in ("lora_", "lokr_", "hada_")):
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            parameter.copy_(parameter * (1 + 0.2 * noise) if "magnitude" in name else 0.3 * noise)


UNET_TARGETS = ["to_q", "to_v", "to_out.0", "ff.net.2", "proj_in", "conv1", "conv_in", "downsamplers.0.conv",
                "time_emb_proj", "linear_1"]  # fmt: skip
TEXT_TARGETS = ["q_proj", "out_proj", "fc1"]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rank-stabilized": {"r": 4, "lora_alpha": 2, "use_rslora": True},
    "patterns": {
        "r": 2, "lora_alpha": 3, "alpha_pattern": {"conv_in": 1, "mid_block.attentions.0.proj_in": 7},
        "rank_pattern": {"conv_in": 3, "up_blocks.0.attentions.0.proj_in": 4},
    },
    "DoRA": {"r": 3, "lora_alpha": 4, "use_dora": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "scale"), [("plain", 0.4), ("rank-stabilized", 1.0), ("patterns", -0.5), ("DoRA", 1.0), ("DoRA", 0.4)]
)
def test_files_that_diffusers_writes(
    name: str, scale: float, base: Path, plain: dict[str, State], tmp_path: Path
) -> None:
    pipeline = _pipeline(base)
    layers: dict[str, Any] = {}
    for component in COMPONENTS:
        settings = SETTINGS[name] | ({"alpha_pattern": {}, "rank_pattern": {}} if component != "unet" else {})
        config = LoraConfig(target_modules=UNET_TARGETS if component == "unet" else TEXT_TARGETS, **settings)
        model = getattr(pipeline, component)
        model.add_adapter(config)
        _randomize(model)
        layers[f"{component}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="default")
        layers[f"{component}_lora_adapter_metadata"] = config.to_dict()
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, weight_name="a.safetensors", **layers)
    pipeline.fuse_lora(components=list(COMPONENTS), lora_scale=scale)
    theirs = _state(pipeline)
    _, _, changed = _compare(_ours(base, tmp_path, (tmp_path / "a.safetensors", scale)), theirs, plain)
    assert changed > 60
    again = _theirs(base, (tmp_path / "a.safetensors", scale, scale))  # also the way diffusers reads its own file
    if name == "DoRA":  # diffusers drops the encoders' magnitudes, with a warning
        again, theirs, plain = ({"unet": states["unet"]} for states in (again, theirs, plain))
    _compare(again, theirs, plain)


ADAPTERS = {
    "LoRA": LoraConfig(r=3, lora_alpha=5, target_modules=UNET_TARGETS),
    "DoRA": LoraConfig(r=2, lora_alpha=5, target_modules=UNET_TARGETS, use_dora=True),
    "LoHa": LoHaConfig(r=3, alpha=2, target_modules=UNET_TARGETS, init_weights=False),
    "LoHa, Tucker": LoHaConfig(r=3, alpha=2, target_modules=UNET_TARGETS, use_effective_conv2d=True),
    "LoKr": LoKrConfig(r=2, alpha=3, target_modules=UNET_TARGETS, rank_pattern={"conv_in": 1}),
    "LoKr, Tucker": LoKrConfig(r=2, alpha=3, target_modules=UNET_TARGETS, use_effective_conv2d=True),
    "LoKr, both": LoKrConfig(r=1, alpha=3, target_modules=UNET_TARGETS, decompose_both=True, decompose_factor=4),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_folders_that_peft_writes(kind: str, base: Path, plain: dict[str, State], tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    model = get_peft_model(unet, ADAPTERS[kind])
    _randomize(model)
    model.save_pretrained(tmp_path)
    merged = {name: tensor.detach() for name, tensor in model.merge_and_unload().state_dict().items()}
    ours = _ours(base, tmp_path, (tmp_path / "adapter_model.safetensors", 1.0))
    _, _, changed = _compare(ours, plain | {"unet": merged}, plain)
    assert changed > 60
