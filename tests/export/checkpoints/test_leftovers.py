"""No tensor of a checkpoint is ignored silently: each has an effect, a warning or an error."""

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
    """Return the tensors of a base's single file without values, its configs, and the tensor names of its models."""
    root, _, ldm = made("outline", "base")
    infos = {name: TensorInfo(Path("x"), name, tuple(tensor.shape), "F32") for name, tensor in ldm.items()}
    configs = {name: json.loads((root / name / "config.json").read_bytes()) for name in COMPONENTS}
    states = {name: build_model(COMPONENTS[name], config, name).state for name, config in configs.items()}
    return infos, configs, states


def _outcome(tensors: Tensors, configs: dict[str, Any], states: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return the source of every tensor of every model, and the warnings; errors propagate."""
    lines: list[str] = []
    file = SingleFile(Path("x"), "base", tensors)
    lines += file.unused()
    found = {
        component: resolve_names(file.checkpoint(component, configs[component]), state, component, lines.append).tensors
        for component, state in states.items()
    }
    return found, lines


def test_an_unchanged_file_causes_no_warning(whole: Any) -> None:
    _, lines = _outcome(*whole)
    assert lines == []


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_no_tensor_is_ignored_silently(whole: Any, data: st.DataObject) -> None:
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
        found, lines = _outcome(changed, configs, states)
    except SdxlTrtError:
        return
    assert lines or found != _outcome(*whole)[0], f"{change} {name} was not noticed"


@pytest.mark.parametrize("role", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_folder_is_checked_as_strictly(whole: Any, role: str) -> None:
    _, _, states = whole
    state = states[role]
    plain = {name: TensorInfo(Path("x"), name, tuple(shape), "F32") for name, shape in state.items()}
    for name in list(state)[::43]:
        for ending in ENDINGS:
            added = f"{name.rpartition('.')[0]}.{ending}"
            if added in plain or known_extra(added):
                continue
            lines: list[str] = []
            try:
                resolve_names(Checkpoint(plain | {added: replace(plain[name], key=added)}), state, role, lines.append)
            except SdxlTrtError:
                continue
            assert lines, added


@pytest.mark.parametrize(
    "name",
    ["down.attn.to_q.weight_scale", "down.attn.to_q.bias", "down.attn.to_q.weight.diff", "down.attn.to_q.lora_A.weight",
     "down.attn.processor.to_k_ip.lora.up.weight", "lora.up", "other.scale", "x.cond_proj.weight", "a.to_q.smooth"],
)  # fmt: skip
def test_extras_that_would_change_a_weight_are_refused(name: str) -> None:
    with pytest.raises(SourceError, match=rf"unet: the tensor {name} would change the model's weights"):
        left_out([name], ["down.attn.to_q.weight"], "unet")


@pytest.mark.parametrize("name", ["ema", "down.other.weight", "surprise.weight", "visual.proj", "upscaler"])
def test_other_extras_are_returned_for_a_warning(name: str) -> None:
    assert left_out([name, "logit_scale"], ["down.attn.to_q.weight"], "unet") == [name]
