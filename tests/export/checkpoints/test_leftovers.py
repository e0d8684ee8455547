"""No tensor of a checkpoint is ignored in silence: whatever is added, renamed or removed is seen, told or refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdxl_trt.engines.errors import SdxlTrtError, SourceError
from sdxl_trt.export.checkpoints.checkpoint import Checkpoint, TensorInfo, resolve_names
from sdxl_trt.export.checkpoints.leftovers import known_extra, left_out
from sdxl_trt.export.graph.models import build_model
from sdxl_trt.export.sources.single_file import SingleFile

COMPONENTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
              "text_encoder_2": "CLIPTextModelWithProjection"}  # fmt: skip
ENDINGS = ("weight_scale", "weight_scale_inv", "scale_weight", "scale", "input_scale", "lora_A.weight", "diff", "bias",
           "zero_point", "alpha", "weight.absmax", "qweight", "hada_w1_a", "processor.to_q_lora.up.weight", "new",
           "weight", "0.weight", "running_mean")  # fmt: skip
Tensors = dict[str, TensorInfo]


@pytest.fixture(scope="module")
def whole(made: Callable[..., Any]) -> tuple[Tensors, dict[str, dict[str, Any]], dict[str, Any]]:
    """Return the tensors of a base's single file without their numbers, its configs, and what its models hold."""
    root, _, ldm = made("outline", "base")
    infos = {name: TensorInfo(Path("x"), name, tuple(tensor.shape), "F32") for name, tensor in ldm.items()}
    configs = {name: json.loads((root / name / "config.json").read_bytes()) for name in COMPONENTS}
    states = {name: build_model(COMPONENTS[name], config, name).state for name, config in configs.items()}
    return infos, configs, states


def _outcome(tensors: Tensors, configs: dict[str, Any], states: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return where every tensor of every model is read from, and what was told; raise what is raised."""
    told: list[str] = []
    file = SingleFile(Path("x"), "base", tensors)
    told += file.unused()
    found = {
        component: resolve_names(file.checkpoint(component, configs[component]), state, component, told.append).tensors
        for component, state in states.items()
    }
    return found, told


def test_the_whole_file_is_read_without_a_word(whole: Any) -> None:
    _, told = _outcome(*whole)
    assert told == []


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_nothing_is_ignored_in_silence(whole: Any, data: st.DataObject) -> None:
    tensors, configs, states = whole
    name = data.draw(st.sampled_from(sorted(tensors)))
    change = data.draw(st.sampled_from(["add", "add beside", "remove", "rename", "dtype"]))
    changed = dict(tensors)
    module = name.rpartition(".")[0]
    if change == "remove":
        del changed[name]
    elif change == "dtype":
        changed[name] = replace(changed[name], dtype="I8")
    else:
        new = {"add": f"{name}.", "add beside": f"{module}.", "rename": f"{module}."}[change]
        new += data.draw(st.sampled_from(ENDINGS))
        changed[new] = replace(changed.pop(name) if change == "rename" else changed[name], key=new)
        if new in tensors or known_extra(new):
            return
    try:
        found, told = _outcome(changed, configs, states)
    except SdxlTrtError:
        return
    assert told or found != _outcome(*whole)[0], f"{change} {name} was not noticed"


@pytest.mark.parametrize("role", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_folder_is_as_strict(whole: Any, role: str) -> None:
    _, _, states = whole
    state = states[role]
    plain = {name: TensorInfo(Path("x"), name, tuple(shape), "F32") for name, shape in state.items()}
    for name in list(state)[::43]:
        for ending in ENDINGS:
            added = f"{name.rpartition('.')[0]}.{ending}"
            if added in plain or known_extra(added):
                continue
            told: list[str] = []
            try:
                resolve_names(Checkpoint(plain | {added: replace(plain[name], key=added)}), state, role, told.append)
            except SdxlTrtError:
                continue
            assert told, added


@pytest.mark.parametrize(
    "name",
    ["down.attn.to_q.weight_scale", "down.attn.to_q.bias", "down.attn.to_q.weight.diff", "down.attn.to_q.lora_A.weight",
     "down.attn.processor.to_k_ip.lora.up.weight", "lora.up", "other.scale", "x.cond_proj.weight", "a.to_q.smooth"],
)  # fmt: skip
def test_what_changes_a_weight_is_refused(name: str) -> None:
    with pytest.raises(SourceError, match=rf"unet: the tensor {name} would change the model's weights"):
        left_out([name], ["down.attn.to_q.weight"], "unet")


@pytest.mark.parametrize("name", ["ema", "down.other.weight", "surprise.weight", "visual.proj", "upscaler"])
def test_what_does_not_is_told(name: str) -> None:
    assert left_out([name, "logit_scale"], ["down.attn.to_q.weight"], "unet") == [name]
