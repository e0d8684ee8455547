"""Change exported bundles together with their manifest; write pipelines as single-file checkpoints."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

State = dict[str, torch.Tensor]
Files = Callable[..., Path]
CLIP_G = {"base": "conditioner.embedders.1.model.", "refiner": "conditioner.embedders.0.model."}
Change = Callable[[NDArray[Any]], NDArray[Any]]


def _vouch(bundle: Path, component: str, part: str) -> None:
    """Update the manifest with the size and digest of a changed file."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_bytes())
    record = manifest["components"][component][part]
    content = (bundle / record["file"]).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    for each in manifest["components"].values():  # a UNet's shallow one has the same weights
        if part in each and each[part]["file"] == record["file"]:
            each[part] |= {"size": len(content), "sha256": digest}
    path.write_text(json.dumps(manifest))


@pytest.fixture
def edit_weight() -> Callable[[Path, str, str, Change], None]:
    """Return a function that changes one tensor of a component in ``weights.data``."""

    def edit(bundle: Path, component: str, name: str, change: Change) -> None:
        model = onnx.load(bundle / component / "model.onnx", load_external_data=False)
        stored = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        place = {entry.key: entry.value for entry in stored.external_data}
        dtype = onnx.helper.tensor_dtype_to_np_dtype(stored.data_type)
        array = np.memmap(bundle / component / place["location"], dtype, "r+", int(place["offset"]), tuple(stored.dims))
        changed = change(np.array(array))
        assert not np.array_equal(changed, array)
        array[:] = changed
        array.flush()
        del array
        _vouch(bundle, component, "weights")

    return edit


@pytest.fixture
def edit_graph() -> Callable[..., None]:
    """Return a function that edits the ``onnx.GraphProto`` of a component by a callback; `part` may be "cpu_graph"."""

    def edit(bundle: Path, component: str, change: Callable[[Any], None], part: str = "graph") -> None:
        path = bundle / component / {"graph": "model.onnx", "cpu_graph": "cpu.onnx"}[part]
        model = onnx.load(path, load_external_data=False)
        before = model.SerializeToString()
        change(model.graph)
        assert model.SerializeToString() != before
        path.write_bytes(model.SerializeToString())
        _vouch(bundle, component, part)

    return edit


# A pipeline as one LDM checkpoint: the reverse conversion, with the module numbers of SDXL's authors. Written for the
# tests, independently of export/checkpoints/ldm.py.
def _unet_name(name: str, state: Mapping[str, Any], layers: int) -> str:
    def block(match: re.Match[str]) -> str:
        half, level, part, number = match[1], int(match[2]), match[3], int(match[4])
        first = (layers + 1) * level
        if half == "up":
            if part == "upsamplers":
                attends = any(key.startswith(f"up_blocks.{level}.attentions.") for key in state)
                return f"output_blocks.{first + layers}.{1 + attends}.conv."
            return f"output_blocks.{first + number}.{int(part == 'attentions')}."
        if part == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op."
        return f"input_blocks.{first + number + 1}.{int(part == 'attentions')}."

    name = re.sub(
        r"^(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(conv\.)?", block, name
    )
    name = re.sub(r"^mid_block\.resnets\.(\d)\.", lambda match: f"middle_block.{2 * int(match[1])}.", name)
    name = name.replace("mid_block.attentions.0.", "middle_block.1.")
    if re.match(r"(input_blocks|output_blocks)\.\d+\.0\.|middle_block\.[02]\.", name):
        for ours, theirs in (
            ("time_emb_proj.", "emb_layers.1."), ("conv_shortcut.", "skip_connection."), ("norm1.", "in_layers.0."),
            ("conv1.", "in_layers.2."), ("norm2.", "out_layers.0."), ("conv2.", "out_layers.3."),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
    for ours, theirs in (
        ("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"),
        ("conv_norm_out.", "out.0."), ("conv_out.", "out.2."),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return "input_blocks.0.0." + name.removeprefix("conv_in.") if name.startswith("conv_in.") else name


def _vae_name(name: str, levels: int) -> str:
    name = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2", name)
    name = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
    name = re.sub(r"decoder\.up_blocks\.(\d)", lambda match: f"decoder.up.{levels - 1 - int(match[1])}", name)
    name = re.sub(r"(up\.\d)\.resnets\.(\d)", r"\1.block.\2", name).replace("upsamplers.0", "upsample")
    name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    name = re.sub(r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1", name)
    name = name.replace("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out")
    name = name.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm")
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def _open_clip(state: State) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in state.items():
        if name == "text_projection.weight":
            yield "text_projection", tensor.T.contiguous()
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        else:
            fused = name.replace(".q_proj.weight", ".in_proj_weight").replace(".q_proj.bias", ".in_proj_bias")
            parts = [state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"] if fused != name else [tensor]
            for ours, theirs in (
                ("text_model.encoder.layers.", "transformer.resblocks."), (".self_attn.", ".attn."),
                (".layer_norm1.", ".ln_1."), (".layer_norm2.", ".ln_2."), (".fc1.", ".c_fc."), (".fc2.", ".c_proj."),
                ("text_model.final_layer_norm.", "ln_final."), ("text_model.embeddings.token_e", "token_e"),
                ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
            ):  # fmt: skip
                fused = fused.replace(ours, theirs)
            yield fused, torch.cat(parts)


def _states(root: Path) -> dict[str, State]:
    """Return a folder's tensors by component, under published names, as diffusers and transformers load them."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    states = {
        "unet": UNet2DConditionModel.from_pretrained(root / "unet").state_dict(),
        "vae": AutoencoderKL.from_pretrained(root / "vae").state_dict(),
        "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(root / "text_encoder_2").state_dict(),
    }
    if (root / "text_encoder").is_dir():
        bare = CLIPTextModel.from_pretrained(root / "text_encoder").state_dict()
        states["text_encoder"] = {f"text_model.{name.removeprefix('text_model.')}": bare[name] for name in bare}
    return states


def _to_ldm(states: dict[str, State], role: str, layers: int, levels: int) -> State:
    """Return a pipeline's states as one checkpoint with LDM names."""
    unet = {f"model.diffusion_model.{_unet_name(k, states['unet'], layers)}": v for k, v in states["unet"].items()}
    vae = {f"first_stage_model.{_vae_name(k, levels)}": v for k, v in states["vae"].items()}
    for name, tensor in vae.items():
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            vae[name] = tensor[:, :, None, None]
    clip = {f"conditioner.embedders.0.transformer.{k}": v for k, v in states.get("text_encoder", {}).items()}
    open_clip = {CLIP_G[role] + name: tensor for name, tensor in _open_clip(states["text_encoder_2"])}
    whole = unet | vae | clip | open_clip
    assert len(whole) == len(unet) + len(vae) + len(clip) + len(open_clip)
    return {name: tensor.contiguous() for name, tensor in whole.items()}


@pytest.fixture(scope="session")
def made(pairs: Callable[[str], Any]) -> Callable[[str, str], tuple[Path, dict[str, State], State]]:
    """Return a function that maps a pair's name and a role to its folder, its states and its LDM checkpoint."""
    known: dict[tuple[str, str], tuple[Path, dict[str, State], State]] = {}

    def get(name: str, role: str) -> tuple[Path, dict[str, State], State]:
        if (name, role) not in known:
            root: Path = getattr(pairs(name), role)
            states = _states(root)
            levels = len(json.loads((root / "vae" / "config.json").read_bytes())["block_out_channels"])
            known[name, role] = (root, states, _to_ldm(states, role, 1, levels))
        return known[name, role]

    return get


@pytest.fixture
def single(made: Any, tmp_path: Path) -> Files:
    """Return a function that writes the outline pair's `role` as a single file, with changes to its tensors."""

    def write(role: str = "base", without: str = "", **changes: torch.Tensor) -> Path:
        _, _, ldm = made("outline", role)
        kept = {name: tensor for name, tensor in ldm.items() if not without or not re.match(without, name)}
        _save_tensors(kept | changes, tmp_path / f"{role}.safetensors")
        return tmp_path / f"{role}.safetensors"

    return write


@pytest.fixture(scope="session")
def to_ldm() -> Callable[[dict[str, State], str, int, int], State]:
    """Return the function that makes an LDM checkpoint of a pipeline's states."""
    return _to_ldm


def _save_tensors(tensors: State, path: Path) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)


@pytest.fixture
def unet_inputs() -> Callable[[int], dict[str, NDArray[np.float32]]]:
    """Return a function from a seed to inputs of the base's UNet of the pair "outline"."""

    def draw(seed: int) -> dict[str, NDArray[np.float32]]:
        rng = np.random.default_rng(seed)
        shapes = {"sample": (2, 4, 16, 16), "encoder_hidden_states": (2, 77, 80), "text_embeds": (2, 48)}
        return {
            **{name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()},
            "timestep": np.full(2, rng.uniform(1, 999), np.float32),
            "time_ids": np.array([[128, 128, 0, 0, 128, 128]] * 2, np.float32),
        }

    return draw
