"""Untrusted LoRA files: other formats, incomplete and damaged files, peft settings."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sdxl_trt.engines.adapters.file import Lora, open_lora
from sdxl_trt.engines.adapters.kinds import Branch
from sdxl_trt.engines.adapters.names import Place, place_module, split_key
from sdxl_trt.engines.adapters.settings import AdapterSettings
from sdxl_trt.engines.adapters.tensors import StoredTensor
from sdxl_trt.engines.errors import CorruptError, SdxlTrtError, SourceError, UsageError

MODULE = "mid_block.attentions.0.proj_in"
KOHYA = "lora_unet_mid_block_attentions_0_proj_in"
ENCODER = "text_model.encoder.layers.0.mlp.fc1"
HEADER = "lora_adapter_metadata"


def _pair(module: str, down: str = "lora_down.weight", up: str = "lora_up.weight") -> dict[str, torch.Tensor]:
    return {f"{module}.{down}": torch.ones(4, 8), f"{module}.{up}": torch.ones(8, 4)}


def _peft(module: str = f"unet.{MODULE}") -> dict[str, torch.Tensor]:
    return _pair(module, "lora_A.weight", "lora_B.weight")


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(tensors: dict[str, torch.Tensor], **header: Any) -> Path:
        path = tmp_path / "style.safetensors"
        save_file(tensors, path, {key: json.dumps(value) for key, value in header.items()})
        return path

    return write


def _only(lora: Lora) -> Branch:
    [[branch]] = lora.branches.values()
    return branch


def test_a_file_is_opened_without_keeping_its_weights(write: Write) -> None:
    path = write(_pair(KOHYA) | {f"{KOHYA}.alpha": torch.tensor(2.0, dtype=torch.bfloat16)})
    lora = open_lora(path)
    branch = _only(lora)
    assert {part: info.shape for part, info in branch.parts.items()} == {"down": (4, 8), "up": (8, 4)}
    assert (branch.kind, branch.scaling) == ("LoRA", 0.5)
    assert lora.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert lora.name == "style.safetensors"


def test_all_three_components_are_distinguished(write: Write) -> None:
    keys = [KOHYA, f"text_encoder.{ENCODER}", "lora_te2_" + ENCODER.replace(".", "_")]
    tensors = {name: tensor for key in keys for name, tensor in _pair(key).items()}
    lora = open_lora(write(tensors))
    assert {name: [branch.place.module for branch in branches] for name, branches in lora.branches.items()} == {
        "unet": [KOHYA.removeprefix("lora_unet_")],
        "text_encoder": [ENCODER],
        "text_encoder_2": [ENCODER.replace(".", "_")],
    }


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (f"{KOHYA}.set_weight", "set weights"),
        (f"{KOHYA}.reshape_weight", "set weights"),
        (f"{KOHYA}.oft_blocks", "OFT"),
        (f"{KOHYA}.oft_R.weight", "OFT"),
        (f"{KOHYA}.boft_blocks", "BOFT"),
        (f"{KOHYA}.on_input", "IA3"),
        (f"{KOHYA}.a1.weight", "GLoRA"),
        (f"{KOHYA}.b2.weight", "GLoRA"),
        (f"unet.{MODULE}.lora_E", "AdaLoRA"),
        (f"{KOHYA}.wd_for_diff", "DoRA of the difference"),
        ("lora_controlnet", "Control LoRA"),
        (f"unet.{MODULE}.lora_B.bias", "LoRA with biases"),
        ("text_encoder.text_model.embeddings.token_embedding.lora_embedding_A", "LoRA of token embeddings"),
        ("emb_params", "textual inversion"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_unsupported_kinds_of_adapters_are_refused_by_name(key: str, name: str, alone: bool, write: Write) -> None:
    path = write({key: torch.ones(4, 4)} | ({} if alone else _pair(KOHYA)))
    with pytest.raises(SourceError, match=rf"style\.safetensors: holds {name} \("):
        open_lora(path)


@pytest.mark.parametrize(
    ("tensors", "error", "match"),
    [
        ({"model.diffusion_model.out.2.weight": torch.ones(4, 4)}, SourceError, "is not a LoRA"),
        (
            _pair(KOHYA) | {"unet.conv_in.bias": torch.ones(4)},
            SourceError,
            "'unet.conv_in.bias' is not a LoRA tensor",
        ),
        (_peft("transformer.blocks.0.attn.to_q"), SourceError, "'transformer.* belongs to no component of SDXL"),
        (_pair("lora_te3_encoder_block_0"), SourceError, "'lora_te3.* belongs to no component of SDXL"),
        (
            _peft() | {key: 2 * tensor for key, tensor in _pair(f"unet.{MODULE}").items()},
            SourceError,
            "lora_down.*lora_A.* name the same module but differ",
        ),
        (
            _peft() | _pair(f"unet.{MODULE}", "lora_A.other.weight", "lora_B.one.weight"),
            SourceError,
            "the adapters 'one' and 'other'; save one per file",
        ),
        ({"bundle_emb.me.clip_l": torch.ones(2, 4)}, SourceError, "holds only embeddings"),
        ({f"{KOHYA}.lora_down.weight": torch.ones(4, 8)}, CorruptError, "lacks its up weight"),
        ({f"{KOHYA}.lora_up.weight": torch.ones(8, 4)}, CorruptError, "lacks its down weight"),
        ({f"{KOHYA}.alpha": torch.tensor(1.0)}, CorruptError, "lacks its down weight"),
        (_pair(KOHYA) | {f"{KOHYA}.lora_up.weight": torch.ones(8, 5)}, CorruptError, "do not chain"),
        (_pair(KOHYA) | {f"{KOHYA}.lora_mid.weight": torch.ones(4, 5, 3, 3)}, CorruptError, "do not chain"),
        (_pair(KOHYA) | {f"{KOHYA}.lora_up.weight": torch.ones(8)}, CorruptError, "is a vector"),
        (_pair(KOHYA) | {f"{KOHYA}.lora_up.weight": torch.ones(8, 4).int()}, CorruptError, "I32"),
        (_pair(KOHYA) | {f"{KOHYA}.lora_down.weight": torch.ones(0, 8)}, CorruptError, r"\[0, 8\]"),
        (_pair(KOHYA) | {f"{KOHYA}.lora_up.weight": torch.full((8, 4), math.nan)}, CorruptError, "holds NaN"),
        (_pair(KOHYA) | {f"{KOHYA}.alpha": torch.ones(2)}, CorruptError, "not one finite number"),
        (_pair(KOHYA) | {f"{KOHYA}.alpha": torch.tensor(math.nan)}, CorruptError, "not one finite number"),
        (_pair(KOHYA) | {f"{KOHYA}.alpha": torch.ones(0)}, CorruptError, "not one finite number"),
    ],
)
def test_a_file_that_cannot_be_fused_is_refused(
    tensors: dict[str, torch.Tensor], error: type[SdxlTrtError], match: str, write: Write
) -> None:
    path = write(tensors)
    with pytest.raises(error, match=rf"style\.safetensors: .*{match}") as raised:
        open_lora(path)
    assert "\n" not in str(raised.value)


def test_a_key_cannot_break_the_error_line(write: Write) -> None:
    with pytest.raises(SourceError) as raised:
        open_lora(write(_pair(KOHYA) | {"a\nb\x1b[31m": torch.ones(1)}))
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("style.pt", SourceError, "pickled"),
        ("style.ckpt", SourceError, "pickled"),
        ("style", SourceError, "one .safetensors file"),
        ("folder.safetensors", UsageError, "no such file"),
        ("absent.safetensors", UsageError, "no such file"),
        ("broken.safetensors", SourceError, "is pickled"),
    ],
)
def test_paths_that_are_not_loras(name: str, error: type[SdxlTrtError], match: str, tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    for file in ("style.pt", "style.ckpt", "style", "broken.safetensors"):
        (tmp_path / file).write_bytes(b"\x80\x04not a tensor")
    with pytest.raises(error, match=match):
        open_lora(tmp_path / name)


def test_a_truncated_file_is_corrupt(write: Write) -> None:
    path = write(_pair(KOHYA))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptError, match="broken safetensors"):
        open_lora(path)


@pytest.mark.parametrize(
    ("header", "scaling"),
    [
        ({}, 1.0),
        ({"unet.r": 4, "unet.lora_alpha": 8}, 2.0),
        ({"unet.r": 4, "unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0),
        ({"text_encoder.lora_alpha": 8}, 1.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"proj_in": 1}}, 0.25),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"0.proj_in": 1, "proj_in": 2}}, 0.25),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {f"^{MODULE}": 1}}, 0.25),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"^proj_in": 1, "oj_in": 1}}, 2.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {r"attentions\.0\.proj_in": 1}}, 0.25),
        ({"unet.lora_alpha": 8, "unet.init_lora_weights": "gaussian", "unet.use_dora": False}, 2.0),
    ],
)
def test_settings_in_the_header_decide_the_scaling(header: dict[str, Any], scaling: float, write: Write) -> None:
    assert _only(open_lora(write(_peft(), **{HEADER: header}))).scaling == scaling


def test_patterns_are_sorted_once_however_many_modules_there_are(tmp_path: Path) -> None:
    seen = 0

    class Counted(dict[str, Any]):
        def items(self) -> Any:
            nonlocal seen
            seen += len(self)
            return super().items()

    given = Counted({f"block{number}.proj_in": number for number in range(99)} | {"^proj_in": 3, "proj_in": 7})
    read = AdapterSettings(tmp_path, {"unet": {"lora_alpha": 1, "alpha_pattern": given}})
    down = StoredTensor(tmp_path, "x", (1, 8), "F32")
    modules = ["block5.proj_in", "a.block98.proj_in", "block.proj_in", "proj_in", "proj_out"]
    branches = [Branch(Place("unet", module, ""), "LoRA", {"down": down}) for module in modules]
    assert [read.scaling(branch) for branch in branches] == [5, 98, 7, 3, 1]
    assert seen == len(given)


def test_settings_of_another_kind_are_refused_even_with_an_alpha(write: Write) -> None:
    path = write(_peft() | {f"unet.{MODULE}.alpha": torch.tensor(1.0)}, **{HEADER: {"unet.use_dora": True}})
    with pytest.raises(SourceError, match="use_dora is True"):
        open_lora(path)


def test_a_modules_alpha_overrides_the_header(write: Write) -> None:
    path = write(_peft() | {f"unet.{MODULE}.alpha": torch.tensor(1.0)}, **{HEADER: {"unet.lora_alpha": 8}})
    assert _only(open_lora(path)).scaling == 0.25


@pytest.mark.parametrize(
    ("header", "error", "match"),
    [
        ({"unet.use_dora": True}, SourceError, "use_dora is True .* has no magnitude vector"),
        ({"unet.peft_type": "LOKR", "unet.alpha": 1}, SourceError, "is of a LoRA, .* settings are for a LOKR"),
        ({"unet.lora_bias": True}, SourceError, "lora_bias"),
        ({"unet.init_lora_weights": "lora_ga"}, SourceError, "lora_ga"),
        ({"unet.fan_in_fan_out": True}, SourceError, "fan_in_fan_out"),
        ({"unet.init_lora_weights": "pissa_niter_4"}, SourceError, "pissa_niter_4"),
        ({"unet.alpha_pattern": {"(a+)+b": 1}}, SourceError, "not a module's name"),
        ({"unet.alpha_pattern": [1]}, CorruptError, "alpha_pattern"),
        ({"unet.lora_alpha": "8"}, CorruptError, "lora_alpha '8'"),
        ({"unet.lora_alpha": True}, CorruptError, "lora_alpha True"),
        ({"unet.lora_alpha": math.inf}, CorruptError, "lora_alpha inf"),
        ({"unet.lora_alpha": 10**400}, CorruptError, "lora_alpha 1000.* is not a finite number"),
        ([], CorruptError, "not a JSON object"),
    ],
)
def test_settings_that_do_not_fit_a_lora_are_refused(
    header: Any, error: type[SdxlTrtError], match: str, write: Write
) -> None:
    with pytest.raises(error, match=match):
        open_lora(write(_peft(), **{HEADER: header}))


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")])
def test_settings_that_are_not_json_are_corrupt(text: str, tmp_path: Path) -> None:
    save_file(_peft(), tmp_path / "a.safetensors", {HEADER: text})
    with pytest.raises(CorruptError, match="not JSON"):
        open_lora(tmp_path / "a.safetensors")


def test_the_settings_of_a_peft_folder_are_read(write: Write) -> None:
    path = write(_peft(f"base_model.model.{MODULE}"))
    bare = open_lora(path)
    side = path.with_name("adapter_config.json")
    side.write_text(json.dumps({"r": 4, "lora_alpha": 16, "peft_type": "LORA"}))
    lora = open_lora(path)
    assert (_only(bare).scaling, _only(lora).scaling) == (1.0, 4.0)
    side.write_text(json.dumps({"r": 4, "lora_alpha": 2}))
    changed = open_lora(path)
    assert _only(changed).scaling == 0.5
    assert len({bare.sha256, lora.sha256, changed.sha256}) == 3


def test_a_huge_settings_file_is_refused_without_reading_it(write: Write) -> None:
    path = write(_peft(f"base_model.model.{MODULE}"))
    with path.with_name("adapter_config.json").open("wb") as side:
        side.truncate(1 << 34)  # sparse
    with pytest.raises(UsageError, match=r"reading .*adapter_config\.json: is larger than 16 MiB; give a smaller one"):
        open_lora(path)


def test_a_settings_file_beside_other_files_is_ignored(write: Write) -> None:
    path = write(_pair(KOHYA))
    path.with_name("adapter_config.json").write_text("{")
    assert _only(open_lora(path)).scaling == 1.0


FRAGMENTS = [
    "lora_unet_", "unet.", "lora_te_", "base_model.model.", ".processor.", "mid_block", "to_out", "_lora", ".lora", "x",
    ".alpha", ".lora_down.weight", ".lora_A.weight", ".lora_up.weight", "_lora.up.weight", ".",
]  # fmt: skip


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    keys=st.lists(st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=4).map("".join), max_size=4, unique=True),
    shape=st.sampled_from([(), (1,), (2, 2), (1, 1, 1, 1)]),
)
def test_any_keys_open_or_raise_an_sdxl_trt_error(keys: list[str], shape: tuple[int, ...], write: Write) -> None:
    path = write({key: torch.ones(shape) for key in keys})
    try:
        lora = open_lora(path)
    except SdxlTrtError:
        return
    held = sum(len(branch.infos) for branches in lora.branches.values() for branch in branches)
    # All tensors are equal here, so that two spellings of a part count once.
    parts = {(place_module(module), part) for module, part in filter(None, map(split_key, keys)) if part != "alpha"}
    assert held == len(parts), "every tensor has a place"
    assert all(split_key(key) is not None for key in keys)
