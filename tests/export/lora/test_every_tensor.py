"""No tensor of a LoRA is ignored: files of every naming and kind, each tensor changed, renamed or dropped in turn."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sdxl_trt.engines.adapters.file import Lora, open_lora
from sdxl_trt.engines.adapters.names import COMPONENTS, LoraComponent
from sdxl_trt.engines.adapters.unet_names import unet_prefixes
from sdxl_trt.engines.errors import CorruptError, SdxlTrtError
from sdxl_trt.export.checkpoints.checkpoint import Checkpoint, open_file
from sdxl_trt.export.lora.fuse import check_fits, fuse_loras

CONFIG: dict[str, Any] = {
    "block_out_channels": [16, 32], "layers_per_block": 1, "transformer_layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
TO_K = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
TO_OUT = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONV, NORM = "down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.norm1"
FC1 = "text_model.encoder.layers.0.mlp.fc1"
Q_PROJ = "text_model.encoder.layers.0.self_attn.q_proj"
SHAPES: dict[LoraComponent, dict[str, tuple[int, ...]]] = {
    "unet": {TO_K: (12, 8), TO_OUT: (12, 12), CONV: (8, 6, 3, 3), NORM: (6,)},
    "text_encoder": {FC1: (12, 6), Q_PROJ: (6, 6)},
    "text_encoder_2": {FC1: (12, 6), "text_projection": (8, 6)},
}
TENSORS = {
    component: {f"{module}.{end}": shape if end == "weight" else shape[:1]
                for module, shape in modules.items() for end in ("weight", "bias")}
    for component, modules in SHAPES.items()
}  # fmt: skip
Place = tuple[LoraComponent, str]
Parts = dict[str, torch.Tensor]
File = dict[Place, Parts]
"""The content of a LoRA file independent of its key names: its parts by component and module."""

LDM = {module: ldm for ldm, module in unet_prefixes(CONFIG).items()}
UNDERSCORED = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
CLIP = {"text_encoder": "clip_l.", "text_encoder_2": "clip_g."}


def _ldm(module: str) -> str:
    return LDM.get(module, module)


STYLES: dict[str, Callable[[LoraComponent, str], str]] = {
    "kohya": lambda component, module: UNDERSCORED[component] + _ldm(module).replace(".", "_"),
    "kohya, diffusers' UNet": lambda component, module: UNDERSCORED[component] + module.replace(".", "_"),
    "SimpleTuner": lambda component, module: (
        "lycoris_" if component == "unet" else UNDERSCORED[component]
    ) + module.replace(".", "_"),
    "OneTrainer": lambda component, module: CLIP.get(component, "unet.") + _ldm(module),
    "OneTrainer's own": lambda component, module: UNDERSCORED[component].rstrip("_") + "." + module,
    "ComfyUI": lambda component, module: (
        f"text_encoders.{CLIP[component]}transformer.{module}" if component in CLIP
        else f"diffusion_model.{_ldm(module)}"
    ),
    "diffusers": lambda component, module: f"{component}.{module}",
    "peft in diffusers": lambda component, module: f"{component}.base_model.model.{module}",
}  # fmt: skip
ENDS = {
    "kohya": {"up": "lora_up.weight", "down": "lora_down.weight"},
    "peft": {"up": "lora_B.weight", "down": "lora_A.weight"},
    "peft in memory": {"up": "lora_B.default_0.weight", "down": "lora_A.default_0.weight",
                       "magnitude": "lora_magnitude_vector.default_0.weight"},
    "diffusers": {"up": "lora.up.weight", "down": "lora.down.weight"},
    "bare": {"up": "lora_B", "down": "lora_A"},
}  # fmt: skip


def _contents() -> dict[str, File]:
    """Return files of each kind; each file changes every module that its kind can."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weights = [(c, m, s) for c, modules in SHAPES.items() for m, s in modules.items() if m != NORM]

    def low_rank(shape: tuple[int, ...]) -> Parts:
        return {"up": random(shape[0], 2, *(1 for _ in shape[2:])), "down": random(2, *shape[1:])}

    lora = {(c, m): low_rank(s) | {"alpha": torch.tensor(3.0)} for c, m, s in weights}
    axes = itertools.cycle((0, 1))
    lycoris: File = {}
    for c, m, s in weights:
        norms = (s[0], 1) if next(axes) == 0 else (1, s[1])
        lycoris[c, m] = low_rank(s) | {"dora_scale": 1 + random(*norms, *(1 for _ in s[2:])).abs()}
    peft = {
        (c, m): low_rank(s) | {"magnitude": 1 + random(*((1, s[0], 1, 1) if len(s) == 4 else s[:1])).abs()}
        for c, m, s in weights
    }
    lokr: File = {}
    loha: File = {}
    for c, m, s in weights:
        lokr[c, m] = {"lokr_w1": random(2, 2), "lokr_w2": random(s[0] // 2, s[1] // 2, *s[2:]),
                      "alpha": torch.tensor(9.0)}  # fmt: skip
        columns = s[1] * s[2] * s[3] if len(s) == 4 else s[1]
        loha[c, m] = {
            name: random(*((s[0], 2) if name.endswith("a") else (2, columns)))
            for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        } | {"alpha": torch.tensor(1.0)}
    lokr["unet", TO_K] = {"lokr_w1": random(3, 2), "lokr_w2_a": random(4, 2), "lokr_w2_b": random(2, 4),
                          "alpha": torch.tensor(5.0)}  # fmt: skip
    everything = [(c, m, s) for c, modules in SHAPES.items() for m, s in modules.items()]
    full = {(c, m): {"diff": random(*s), "diff_b": random(s[0])} for c, m, s in everything}
    mixed = lora | {("unet", NORM): full["unet", NORM]}
    mixed["unet", CONV] = mixed["unet", CONV] | {"diff_b": random(8)}
    return {"LoRA": lora, "DoRA of LyCORIS": lycoris, "DoRA of peft": peft, "LoKr": lokr, "LoHa": loha,
            "differences": full, "LoRA and norms": mixed}  # fmt: skip


CONTENTS = _contents()


def _rendered(file: File, style: str, ends: str) -> dict[str, tuple[Place, str]]:
    """Return {key: its place and part} of a file in one naming."""
    names = ENDS[ends]
    return {
        f"{STYLES[style](*place)}.{names.get(part, 'lora_magnitude_vector' if part == 'magnitude' else part)}": (
            place, part,
        )
        for place, parts in file.items() for part in parts
    }  # fmt: skip


def _reference(file: File, plain: dict[Place, Parts]) -> dict[Place, Parts]:
    """Return weights and biases with a file fused at scale 1, by the formulas of LyCORIS, peft and ComfyUI, in fp64."""
    result: dict[Place, Parts] = {}
    for place, stored in plain.items():
        weight, bias = stored["weight"].double(), stored["bias"].double()
        parts = {name: tensor.double() for name, tensor in file.get(place, {}).items()}
        alpha = parts.get("alpha")
        rank, difference = 0, torch.zeros(())
        if "down" in parts:
            rank, difference = parts["down"].shape[0], parts["up"].flatten(1) @ parts["down"].flatten(1)
        elif "hada_w1_a" in parts:
            rank = parts["hada_w1_b"].shape[0]
            difference = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
        elif "lokr_w1" in parts:
            second = parts.get("lokr_w2")
            if second is None:
                rank, second = parts["lokr_w2_b"].shape[0], parts["lokr_w2_a"] @ parts["lokr_w2_b"]
            first = parts["lokr_w1"].reshape(*parts["lokr_w1"].shape, *(1 for _ in second.shape[2:]))
            difference = torch.kron(first, second)
        elif "diff" in parts:
            difference = parts["diff"]
        if alpha is not None and rank:
            difference = difference * alpha / rank
        weight = weight + difference.reshape(weight.shape if difference.dim() else ())
        norms = parts.get("dora_scale", parts.get("magnitude"))
        if norms is not None:
            axis = 0 if "magnitude" in parts or norms.shape[0] > 1 else 1
            others = [dim for dim in range(weight.dim()) if dim != axis]
            lengths = weight.square().sum(others, keepdim=True).sqrt()
            weight = weight * norms.reshape(lengths.shape) / lengths
        result[place] = {"weight": weight, "bias": bias + parts.get("diff_b", torch.zeros(()))}
    return result


@pytest.fixture(scope="module")
def plain(base: dict[LoraComponent, Checkpoint]) -> dict[Place, Parts]:
    return _by_place((c, name, t) for c in COMPONENTS for name, t in base[c].read(TENSORS[c]))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[LoraComponent, Checkpoint]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    for component, tensors in TENSORS.items():
        save_file({name: torch.randn(shape) for name, shape in tensors.items()}, folder / f"{component}.safetensors")
    return {component: open_file(folder / f"{component}.safetensors") for component in COMPONENTS}


def _by_place(tensors: Iterator[tuple[LoraComponent, str, torch.Tensor]]) -> dict[Place, Parts]:
    places: dict[Place, Parts] = {}
    for component, name, tensor in tensors:
        module, _, end = name.rpartition(".")
        places.setdefault((component, module), {})[end] = tensor
    return places


def _fused(base: dict[LoraComponent, Checkpoint], lora: Lora) -> dict[Place, Parts]:
    models: Any = {c: SimpleNamespace(state=TENSORS[c], config=CONFIG) for c in COMPONENTS}
    check_fits([lora], models)
    fused = {c: fuse_loras(base[c], c, [(lora, 1.0)], CONFIG) for c in COMPONENTS}
    return _by_place((c, name, t) for c in COMPONENTS for name, t in fused[c].read(TENSORS[c]))


def _agree(found: dict[Place, Parts], expected: dict[Place, Parts]) -> None:
    for place, parts in expected.items():
        for end, tensor in parts.items():
            torch.testing.assert_close(found[place][end].double(), tensor, rtol=1e-4, atol=1e-4, msg=f"{place} {end}")


def _write(path: Path, tensors: Parts) -> Lora:
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path)
    return open_lora(path)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("ends", ENDS)
def test_every_naming_of_a_lora_means_the_same(
    style: str, ends: str, base: dict[LoraComponent, Checkpoint], plain: dict[Place, Parts], tmp_path: Path
) -> None:
    file = CONTENTS["LoRA"]
    keys = _rendered(file, style, ends)
    lora = _write(tmp_path / "a.safetensors", {key: file[place][part] for key, (place, part) in keys.items()})
    assert lora.notes == ()
    _agree(_fused(base, lora), _reference(file, plain))


KEPT = {"alpha", "dora_scale", "magnitude", "diff", "diff_b"}
"""Parts that a file can lack: a difference may be of the weight alone, or of the bias alone."""
CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "grown": lambda tensor: tensor * 1.5, "zero": torch.zeros_like, "one value": lambda tensor: _with_one(tensor, 2.0),
}  # fmt: skip


def _with_one(tensor: torch.Tensor, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[tensor.numel() // 2] = value
    return changed


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_every_tensor_has_an_effect(
    data: st.DataObject, base: dict[LoraComponent, Checkpoint], plain: dict[Place, Parts], tmp_path: Path
) -> None:
    kind, style = data.draw(st.sampled_from(list(CONTENTS))), data.draw(st.sampled_from(list(STYLES)))
    file = CONTENTS[kind]
    keys = _rendered(file, style, data.draw(st.sampled_from(list(ENDS))))
    key = data.draw(st.sampled_from(list(keys)))
    place, part = keys[key]
    stored = {name: file[where][what] for name, (where, what) in keys.items()}
    how = data.draw(st.sampled_from([*CHANGES, "dropped", "NaN", "renamed", "of another module", "longer", "beside"]))
    path = tmp_path / "a.safetensors"

    def changed(parts: Parts) -> File:
        return file | {place: parts}

    if how in CHANGES:
        stored[key] = CHANGES[how](stored[key])
        expected = _reference(changed(file[place] | {part: stored[key]}), plain)
    elif how == "dropped" and part in KEPT:
        del stored[key]
        expected = _reference(changed({name: t for name, t in file[place].items() if name != part}), plain)
    else:
        tensor = stored.pop(key)
        names = {"renamed": f"{key}x", "of another module": key.replace("0", "7", 1) if "0" in key else f"x{key}"}
        if how != "dropped":
            bad = {"NaN": _with_one(tensor, float("nan")), "longer": torch.cat([tensor.reshape(-1)] * 2)}
            stored[names.get(how, key)] = bad.get(how, tensor)
        if how == "beside":
            stored["unet.conv_in.weight"] = torch.ones(1)
        with pytest.raises(SdxlTrtError) as error:
            _fused(base, _write(path, stored))
        assert "\n" not in str(error.value)
        assert how != "NaN" or isinstance(error.value, CorruptError)
        return
    _agree(_fused(base, _write(path, stored)), expected)
