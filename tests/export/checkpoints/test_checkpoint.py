"""Checkpoints from safetensors: valid, broken, incomplete, hostile and old ones."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdxl_trt.engines.errors import CorruptError, SourceError
from sdxl_trt.export.checkpoints.checkpoint import Checkpoint, digest_tensors, open_checkpoint, resolve_names

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4, dtype=torch.float16)}
STEM = "model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def shards(tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    """Return a function that writes two shards and an index with the given weight map."""
    (tmp_path / "outside.safetensors").write_bytes(b"")
    folder = tmp_path / "unet"
    folder.mkdir()
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, folder / f"{name[0]}.safetensors")

    def write(weight_map: dict[str, str]) -> Path:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder

    return write


def _never(message: str) -> None:
    pytest.fail(f"warned: {message}")


def test_tensors_are_read_by_name_in_the_requested_order(folder: Path) -> None:
    checkpoint = open_checkpoint(folder, STEM)
    assert {name: (info.shape, info.dtype) for name, info in checkpoint.tensors.items()} == {
        "a.weight": ((2, 3), "F32"),
        "b.bias": ((4,), "F16"),
    }
    read = list(checkpoint.read(["b.bias", "a.weight"]))
    assert [name for name, _ in read] == ["b.bias", "a.weight"]
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in read)


def test_shards_are_one_checkpoint(shards: Callable[[dict[str, str]], Path]) -> None:
    folder = shards({"a.weight": "a.safetensors", "b.bias": "b.safetensors"})
    checkpoint = open_checkpoint(folder, STEM)
    assert {name: tensor.tolist() for name, tensor in checkpoint.read(["b.bias", "a.weight"])} == {
        name: tensor.tolist() for name, tensor in TENSORS.items()
    }


@pytest.mark.parametrize("keep", [0, 4, 8, 20, -8, -1])
def test_a_truncated_file_is_corrupt(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptError, match=r"model\.safetensors: broken safetensors.*download it again") as caught:
        open_checkpoint(folder, STEM)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "raw",
    [b"not safetensors at all", struct.pack("<Q", 2**40), struct.pack("<Q", 2) + b"{}" + b"junk",
     struct.pack("<Q", 9) + b"[" * 9, b"\x80\x07}q\x00."],
)  # fmt: skip
def test_a_file_that_is_not_safetensors_is_corrupt(folder: Path, raw: bytes) -> None:
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(CorruptError):
        open_checkpoint(folder, STEM)


def test_a_file_that_broke_after_it_was_opened_is_corrupt(folder: Path) -> None:
    checkpoint = open_checkpoint(folder, STEM)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptError):
        list(checkpoint.read(["a.weight"]))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "weights.pt", "m.pth", "m.pkl"])
def test_pickled_weights_are_refused_with_the_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02")
    with pytest.raises(SourceError, match=rf"pickled weights \({name}\).*safe_serialization=True") as caught:
        open_checkpoint(tmp_path, STEM)
    assert caught.value.exit_code == 2


def test_a_safetensors_file_beside_a_pickled_one_is_used(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert open_checkpoint(folder, STEM).tensors.keys() == TENSORS.keys()


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "model.non_ema.safetensors"])
def test_the_only_variant_is_used_with_a_log_line(folder: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with caplog.at_level("INFO"):
        assert open_checkpoint(folder, STEM).tensors.keys() == TENSORS.keys()
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert f"no plain model.safetensors; using {name}" in caplog.text


def test_the_plain_file_is_preferred_unless_a_variant_is_requested(folder: Path) -> None:
    save_file({"half": torch.ones(1, dtype=torch.float16)}, folder / "model.fp16.safetensors")
    assert "a.weight" in open_checkpoint(folder, STEM).tensors
    assert list(open_checkpoint(folder, STEM, "fp16").tensors) == ["half"]
    assert "a.weight" in open_checkpoint(folder, STEM, "bf16").tensors


def test_a_single_file_beside_shards_is_used_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    assert open_checkpoint(folder, STEM).tensors.keys() == TENSORS.keys()
    assert "has both model.safetensors and model.safetensors.index.json; using the first" in caplog.text


def test_a_tensor_in_two_shards_is_corrupt(shards: Callable[[dict[str, str]], Path]) -> None:
    folder = shards({"a.weight": "a.safetensors", "b.bias": "b.safetensors"})
    save_file(TENSORS, folder / "b.safetensors")
    with pytest.raises(CorruptError, match=r"b\.safetensors: a\.weight is also in a\.safetensors"):
        open_checkpoint(folder, STEM)


def test_several_variants_without_a_plain_file_are_listed(folder: Path) -> None:
    save_file(TENSORS, folder / "model.bf16.safetensors")
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(SourceError, match=r"no plain.*model\.bf16\.safetensors, model\.fp16\.safetensors; keep one"):
        open_checkpoint(folder, STEM)


def test_weights_of_another_name_are_listed(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "pytorch_model.safetensors")
    with pytest.raises(SourceError, match=r"found pytorch_model\.safetensors; rename it"):
        open_checkpoint(tmp_path, STEM)


@pytest.mark.parametrize(
    "index", ["model.safetensors.index.json", "model.fp16.safetensors.index.json", "model.safetensors.index.fp16.json"]
)
def test_shards_are_found_by_every_name_of_their_index(shards: Callable[[dict[str, str]], Path], index: str) -> None:
    folder = shards({"a.weight": "a.safetensors", "b.bias": "b.safetensors"})
    (folder / "model.safetensors.index.json").rename(folder / index)
    assert open_checkpoint(folder, STEM).tensors.keys() == TENSORS.keys()


@pytest.mark.parametrize("index", ["model.fp16.safetensors.index.json", "model.safetensors.index.fp16.json"])
def test_a_variant_index_cannot_name_files_elsewhere(shards: Callable[[dict[str, str]], Path], index: str) -> None:
    folder = shards({"a.weight": "../outside.safetensors"})
    (folder / "model.safetensors.index.json").rename(folder / index)
    with pytest.raises(CorruptError):
        open_checkpoint(folder, STEM)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_written_by_transformers_are_read(tmp_path: Path, variant: str | None) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                            num_attention_heads=2)  # fmt: skip
    model = CLIPTextModel(config)
    model.save_pretrained(tmp_path, max_shard_size="5KB", variant=variant)
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    checkpoint = open_checkpoint(tmp_path, STEM)
    state = model.state_dict()
    assert {name: tensor.shape for name, tensor in checkpoint.read(checkpoint.tensors)} == {
        name: tensor.shape for name, tensor in state.items()
    }


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_written_by_diffusers_are_read(tmp_path: Path, variant: str | None) -> None:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(block_out_channels=(16,), norm_num_groups=4)
    model.save_pretrained(tmp_path, max_shard_size="20KB", variant=variant)
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    checkpoint = open_checkpoint(tmp_path, "diffusion_pytorch_model")
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }


def test_an_empty_folder_has_no_weights(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r": no model\.safetensors"):
        open_checkpoint(tmp_path, STEM)


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..\\outside.safetensors", "a.bin", "",
     "a\0.safetensors", "gone.safetensors", "n" * 300 + ".safetensors", "..", 7, None],
)  # fmt: skip
def test_an_index_cannot_name_files_elsewhere(shards: Callable[[dict[str, str]], Path], name: str) -> None:
    folder = shards({"a.weight": name})
    with pytest.raises(CorruptError):
        open_checkpoint(folder, STEM)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b"{}", b'{"weight_map": 7}', b'{"weight_map": {"a": []}}', b"\xff", b"[" * 100_000],
)
def test_a_broken_index_is_corrupt(shards: Callable[[dict[str, str]], Path], raw: bytes) -> None:
    folder = shards({})
    (folder / "model.safetensors.index.json").write_bytes(raw)
    with pytest.raises(CorruptError, match="download the model again"):
        open_checkpoint(folder, STEM)


def test_a_linked_shard_is_followed_as_in_a_hub_cache(shards: Callable[[dict[str, str]], Path]) -> None:
    folder = shards({"a.weight": "linked.safetensors"})
    (folder / "linked.safetensors").symlink_to(folder / "a.safetensors")
    assert list(open_checkpoint(folder, STEM).tensors) == ["a.weight"]


def _checkpoint(folder: Path, *names: str, shape: tuple[int, ...] = (2, 3)) -> Checkpoint:
    save_file({name: torch.ones(shape) for name in names}, folder / "model.safetensors")
    return open_checkpoint(folder, STEM)


@pytest.mark.parametrize(
    ("published", "stored"),
    [
        ("text_model.encoder.layers.0.self_attn.q_proj.weight", "encoder.layers.0.self_attn.q_proj.weight"),
        ("text_model.final_layer_norm.bias", "text_model.final_layer_norm.bias"),
        ("decoder.mid_block.attentions.0.to_q.weight", "decoder.mid_block.attentions.0.query.weight"),
        ("decoder.mid_block.attentions.0.to_k.weight", "decoder.mid_block.attentions.0.key.weight"),
        ("decoder.mid_block.attentions.0.to_v.bias", "decoder.mid_block.attentions.0.value.bias"),
        ("encoder.mid_block.attentions.0.to_out.0.weight", "encoder.mid_block.attentions.0.proj_attn.weight"),
    ],
)
def test_older_names_are_known(tmp_path: Path, published: str, stored: str) -> None:
    resolved = resolve_names(_checkpoint(tmp_path, stored), {published: (2, 3)}, "vae", _never)
    assert [(name, tensor.shape) for name, tensor in resolved.read([published])] == [(published, (2, 3))]


def test_the_published_name_wins(tmp_path: Path) -> None:
    save_file({"text_model.a": torch.zeros(1), "a": torch.ones(1)}, tmp_path / "model.safetensors")
    warned: list[str] = []
    resolved = resolve_names(open_checkpoint(tmp_path, STEM), {"text_model.a": (1,)}, "te", warned.append)
    assert next(resolved.read(["text_model.a"]))[1].item() == 0
    assert len(warned) == 1


def test_a_1x1_convolution_is_a_matrix(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path, "q.weight", shape=(2, 3, 1, 1))
    assert resolve_names(checkpoint, {"q.weight": (2, 3)}, "vae", _never).tensors["q.weight"].shape == (2, 3)


@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 1), (6,), (2, 4), (2, 3, 1, 2), (1, 1, 2, 3)])
def test_a_misshapen_tensor_names_both_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    checkpoint = _checkpoint(tmp_path, "q.weight", shape=shape)
    with pytest.raises(CorruptError, match=r"unet: tensor q\.weight has shape \[.*config expects \[2, 3\]"):
        resolve_names(checkpoint, {"q.weight": (2, 3)}, "unet", _never)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="unet: tensor missing is missing; the checkpoint is incomplete"):
        resolve_names(_checkpoint(tmp_path, "a"), {"a": (2, 3), "missing": (1,)}, "unet", _never)


def test_extra_tensors_are_ignored_with_a_warning(tmp_path: Path) -> None:
    warned: list[str] = []
    checkpoint = _checkpoint(tmp_path, "a", "later", "ema", "embeddings.position_ids")
    resolved = resolve_names(checkpoint, {"a": (2, 3)}, "unet", warned.append)
    assert list(resolved.tensors) == ["a"]
    assert warned == ["unet: ignored 2 tensors that the model does not use, for example ema"]


@pytest.mark.parametrize(
    "name",
    ["text_model.embeddings.position_ids", "logit_scale", "text_projection.weight", "text_projection",
     "model_ema.decay", "model_ema.diffusion_modelout2weight", "loss.discriminator.main.0.weight",
     "first_stage_model.loss.logvar", "denoiser.sigmas", "alphas_cumprod", "betas", "sqrt_alphas_cumprod",
     "conditioner.embedders.1.model.logit_scale", "log_one_minus_alphas_cumprod"],
)  # fmt: skip
def test_known_extras_of_published_files_cause_no_warning(tmp_path: Path, name: str) -> None:
    assert list(resolve_names(_checkpoint(tmp_path, "a", name), {"a": (2, 3)}, "unet", _never).tensors) == ["a"]


@pytest.mark.parametrize(
    "name", ["logit_scaler", "position_ids.weight", "model_emaa.x", "alphas.weight", "loss", "v_pred", "ztsnr"]
)
def test_unknown_extras_cause_a_warning(tmp_path: Path, name: str) -> None:
    warned: list[str] = []
    resolve_names(_checkpoint(tmp_path, "a", name), {"a": (2, 3)}, "unet", warned.append)
    assert len(warned) == 1


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_quantized_weights_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"a": torch.ones(2, 3).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(CorruptError, match="quantized; give the model in fp16"):
        resolve_names(open_checkpoint(tmp_path, STEM), {"a": (2, 3)}, "unet", _never)


def test_parts_of_rows_and_transposes_are_read_from_the_stored_tensor(tmp_path: Path) -> None:
    stored = {"fused": torch.arange(36.0).reshape(6, 6), "bias": torch.arange(6.0), "square": torch.randn(2, 3)}
    save_file(stored, tmp_path / "model.safetensors")
    infos = open_checkpoint(tmp_path, STEM).tensors
    views = {f"{name}.{i}": infos[name].part(i, 3) for name in ("fused", "bias") for i in range(3)}
    views |= {"T": infos["square"].transpose(), "TT": infos["square"].transpose().transpose()}
    views["late"] = infos["fused"].part(2, 3).transpose()
    checkpoint = Checkpoint(views)
    read = dict(checkpoint.read(views))
    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == {
        name: info.shape for name, info in checkpoint.tensors.items()
    }
    for name in ("fused", "bias"):
        for index, rows in enumerate(stored[name].chunk(3)):
            assert torch.equal(read[f"{name}.{index}"], rows)
    assert torch.equal(read["T"], stored["square"].T)
    assert read["T"].is_contiguous()
    assert torch.equal(read["TT"], stored["square"])
    assert torch.equal(read["late"], stored["fused"][4:].T)


def test_rows_that_do_not_divide_evenly_disagree_with_the_config(tmp_path: Path) -> None:
    save_file({"fused": torch.ones(7, 2), "scalar": torch.tensor(1.0)}, tmp_path / "model.safetensors")
    infos = open_checkpoint(tmp_path, STEM).tensors
    for name in ("fused", "scalar"):
        with pytest.raises(CorruptError, match="tensor q has shape"):
            resolve_names(Checkpoint({"q": infos[name].part(0, 3)}), {"q": (3, 2)}, "te", _never)


def test_a_resolved_part_is_still_a_part(tmp_path: Path) -> None:
    checkpoint = Checkpoint({"q": _checkpoint(tmp_path, "fused", shape=(6, 2)).tensors["fused"].part(1, 3)})
    resolved = resolve_names(checkpoint, {"q": (2, 2)}, "te", _never)
    assert next(resolved.read(["q"]))[1].shape == (2, 2)


def test_names_are_sorted_in_file_order(tmp_path: Path) -> None:
    # safetensors sorts tensors by dtype and name: here the last name comes first.
    save_file({"a": torch.ones(2, dtype=torch.float16), "b": torch.ones(6), "c": torch.ones(2, dtype=torch.float64)},
              tmp_path / "model.safetensors")  # fmt: skip
    checkpoint = open_checkpoint(tmp_path, STEM)
    header = json.loads((tmp_path / "model.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}")
    offsets = {name: entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
    assert checkpoint.in_file_order("abc") == sorted("abc", key=offsets.__getitem__)
    assert checkpoint.in_file_order("abc") != ["a", "b", "c"]
    parts = Checkpoint({str(i): checkpoint.tensors["b"].part(i, 3) for i in (2, 0, 1)})
    assert parts.in_file_order(parts.tensors) == ["0", "1", "2"]


def test_a_digest_covers_name_dtype_shape_and_bytes(tmp_path: Path) -> None:
    variants = {
        "first": {"a": torch.zeros(2, 3), "b": torch.ones(1)},
        "byte": {"a": torch.zeros(2, 3).index_put((torch.tensor(1),), torch.tensor(1e-45)), "b": torch.ones(1)},
        "shape": {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        "dtype": {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.ones(1)},
    }
    digests = {}
    for name, tensors in variants.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        digests[name] = digest_tensors(open_checkpoint(tmp_path / name, STEM), ["b", "a"])
    assert len(set(digests.values())) == len(variants)
    assert digest_tensors(open_checkpoint(tmp_path / "first", STEM), ["a", "b"]) == digests["first"]
    assert digest_tensors(open_checkpoint(tmp_path / "first", STEM), ["a"]) != digests["first"]


def test_a_digest_supports_any_dtype_and_scalars(tmp_path: Path) -> None:
    save_file(
        {"bf16": torch.ones(3, dtype=torch.bfloat16), "scalar": torch.tensor(1.0)}, tmp_path / "model.safetensors"
    )
    assert len(digest_tensors(open_checkpoint(tmp_path, STEM), ["bf16", "scalar"])) == 64
