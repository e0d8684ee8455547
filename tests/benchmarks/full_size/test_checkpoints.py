"""Checkpoints of random weights load like the published ones: as folders, as shards and as a single file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdxl_trt.benchmarks.full_size import checkpoints
from sdxl_trt.benchmarks.full_size.architectures import SIZES, architecture
from sdxl_trt.benchmarks.full_size.checkpoints import main, write_checkpoint
from sdxl_trt.engines.errors import UsageError

pytestmark = pytest.mark.slow

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Return write_checkpoint for the tiny size, with each checkpoint written once."""
    made: dict[Any, Path] = {}

    def get(role: Any = "base", kind: Any = "diffusers", dtype: Any = "fp32", **settings: Any) -> Path:
        key = (role, kind, dtype, *settings.items())
        if key not in made:
            out = tmp_path_factory.mktemp("checkpoint")
            made[key] = write_checkpoint("tiny", role, out, kind=kind, dtype=dtype, **settings)
        return made[key]

    return get


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' scheduler and numpy 2
@pytest.mark.parametrize("role", ["base", "refiner"])
def test_diffusers_loads_a_folder_and_draws(write: Write, role: str) -> None:
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    pipeline_class = StableDiffusionXLPipeline if role == "base" else StableDiffusionXLImg2ImgPipeline
    loaded = pipeline_class.from_pretrained(write(role), dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    _, report = type(loaded.unet).from_pretrained(write(role) / "unet", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    size = {"height": 32, "width": 32} if role == "base" else {"image": torch.zeros(1, 3, 32, 32), "strength": 0.9}
    picture = loaded("a fox", num_inference_steps=2, output_type="pt", **size).images
    assert torch.isfinite(picture).all()
    assert picture.std() > 0


def test_sharded_weights_are_the_same_weights(write: Write) -> None:
    from diffusers import UNet2DConditionModel

    folder = write(kind="sharded", shard_bytes=500_000) / "unet"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    assert index["metadata"]["total_size"] == sum(t.nbytes for shard in shards for t in shard.values())
    whole = UNet2DConditionModel.from_pretrained(write() / "unet").state_dict()
    sharded = UNet2DConditionModel.from_pretrained(folder).state_dict()
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


@pytest.mark.parametrize("role", ["base", "refiner"])
def test_a_single_file_holds_the_folders_weights(write: Write, role: str) -> None:
    """diffusers' own converters, independent of ours, give the folder's weights from the file's."""
    from diffusers.loaders import single_file_utils as theirs

    stored, folder = load_file(write(role, "single-file")), write(role)
    for name in ("unet", "vae"):
        config = json.loads((folder / name / "config.json").read_text())
        convert = theirs.convert_ldm_unet_checkpoint if name == "unet" else theirs.convert_ldm_vae_checkpoint
        expected = load_file(folder / name / "diffusion_pytorch_model.safetensors")
        _assert_same(convert(dict(stored), config=config), expected)
    assert sum("in_proj_weight" in name for name in stored) == 2
    number = 1 if role == "base" else 0
    projection = load_file(folder / "text_encoder_2/model.safetensors")["text_projection.weight"]
    assert torch.equal(stored[f"conditioner.embedders.{number}.model.text_projection"], projection.T)


def _assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [
        name for name in expected if not torch.equal(found[name].reshape(expected[name].shape), expected[name])
    ] == []


def test_base_and_refiner_share_what_the_published_pair_shares(write: Write) -> None:
    for part in ("vae/diffusion_pytorch_model", "text_encoder_2/model"):
        assert (write("base") / f"{part}.safetensors").read_bytes() == (
            write("refiner") / f"{part}.safetensors"
        ).read_bytes()
    name = "conv_in.weight"
    file = "unet/diffusion_pytorch_model.safetensors"
    assert not torch.equal(load_file(write("base") / file)[name], load_file(write("refiner") / file)[name])


def test_sdxls_size_is_the_published_one() -> None:
    from sdxl_trt.export.graph.models import build_model

    published = {"base": 2_567_463_684, "refiner": 2_259_526_660}
    for role, parameters in published.items():
        config = architecture("sdxl", role).models["unet"]  # type: ignore[arg-type]
        state = build_model("UNet2DConditionModel", config, "unet").state
        assert sum(torch.Size(shape).numel() for shape in state.values()) == parameters


def test_every_size_has_consistent_configs() -> None:
    for size in SIZES:
        base, refiner = (architecture(size, role) for role in ("base", "refiner"))  # type: ignore[arg-type]
        widths = [base.models[name]["hidden_size"] for name in ("text_encoder", "text_encoder_2")]
        assert base.models["unet"]["cross_attention_dim"] == sum(widths)
        assert refiner.models["unet"]["cross_attention_dim"] == widths[1]
        assert "text_encoder" not in refiner.models


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(checkpoints, "write_file", fail)
    with pytest.raises(RuntimeError, match="planted"):
        write_checkpoint("tiny", "base", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_checkpoint_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(UsageError, match="exists"):
        write_checkpoint("tiny", "base", tmp_path)
    assert main(["--out", str(tmp_path), "--size", "tiny", "--base"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
