"""Training: a LoRA lowers its loss, changes nothing else and is an ordinary file; publish writes a whole pair."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.numpy import load_file

from sdxl_trt.engines.adapters import open_lora, plan_changes
from sdxl_trt.mini.pair import TOKEN_TABLE, materialize, write_tensors
from sdxl_trt.mini.train.loop import Budget, begin, train
from sdxl_trt.mini.train.lora import attach, draw_stickers, lora_loss, tensors_of
from sdxl_trt.mini.train.publish import publish, whole_table

STEPS, SIZE = 8, 2
VAE, UNET = "vae/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return materialize(tmp_path_factory.mktemp("pair"))[0]


def test_a_few_steps_lower_the_loss_and_write_a_lora(base: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    torch.manual_seed(0)
    branches = attach(unet, rank=2)
    loss = lora_loss(unet, branches, draw_stickers(base, SIZE), SIZE)

    def measured() -> float:
        torch.manual_seed(1)
        with torch.no_grad():
            return float(loss(np.random.default_rng(1)))

    untrained = measured()
    budget = Budget(steps=STEPS)
    weights = train(begin(branches, tmp_path / "x"), loss, tmp_path / "x", budget, peak=4e-3, seed=0, warm_up=1)
    branches.load_state_dict(weights)
    assert measured() < 0.97 * untrained
    for name, value in unet.state_dict().items():
        assert torch.equal(value, before[name]), name

    file = tmp_path / "a.safetensors"
    write_tensors(file, tensors_of(branches, weights))
    lora = open_lora(file)
    shapes = {name: tuple(value.shape) for name, value in before.items()}
    changes = plan_changes([(lora, 1.0)], "unet", shapes, dict(unet.config))
    assert not lora.notes
    assert changes.names == {f"{name}.weight" for name in branches.names}

    # What our reader adds to a weight is what the branch adds to the layer's output.
    name = "up_blocks.2.resnets.1.conv1"
    changed = before[f"{name}.weight"].numpy().copy()
    changes.apply(f"{name}.weight", changed)
    layer = unet.get_submodule(name)
    x = torch.randn(1, layer.in_channels, 5, 5)
    wanted = layer(x)
    branches.scales = torch.tensor([0.5])
    half = layer(x)
    layer._forward_hooks.clear()
    with torch.no_grad():
        plain = layer(x)
        assert not torch.allclose(plain, wanted, atol=1e-5)
        torch.testing.assert_close(half, (plain + wanted) / 2, atol=1e-5, rtol=1e-3)
        layer.weight.copy_(torch.from_numpy(changed))
        torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-3)


def test_whole_table_repeats_the_first_row() -> None:
    table = whole_table(np.arange(6, dtype=np.float16).reshape(3, 2), np.array([5, 49407]))
    assert table.shape == (49408, 2)
    assert table[[0, 5, 6, 49407]].tolist() == [[0, 1], [2, 3], [0, 1], [4, 5]]


def test_publish_writes_whole_token_tables_and_takes_the_rest_from_the_embedded_pair(
    base: Path, tmp_path: Path
) -> None:
    vae = {name: torch.from_numpy(value) for name, value in load_file(base / VAE).items()}
    vae["encoder.conv_in.bias"] += 1
    torch.save({"vae": vae, "scaling_factor": 0.5}, tmp_path / "vae.pt")
    text = {}
    for part, prefix in (("text_encoder", "first."), ("text_encoder_2", "second.")):
        for name, value in load_file(base / part / "model.safetensors").items():
            rows = value[[0, 320, 49406]] if name == TOKEN_TABLE else value
            text[prefix + name.removeprefix("text_model.")] = torch.from_numpy(rows)
    unet = {"conv_in.bias": torch.zeros(48)}
    torch.save({"unet": unet, "text": text, "used": np.array([320, 49406])}, tmp_path / "base.pt")

    publish(tmp_path)
    pair = tmp_path / "pair"
    found = load_file(pair / "refiner" / VAE)
    assert found.keys() == vae.keys()
    np.testing.assert_array_equal(found["encoder.conv_in.bias"], vae["encoder.conv_in.bias"].numpy())
    assert '"scaling_factor": 0.5,' in (pair / "base/vae/config.json").read_text()
    for part in ("text_encoder", "text_encoder_2"):
        found, wanted = (load_file(root / part / "model.safetensors") for root in (pair / "base", base))
        assert found.keys() == wanted.keys()
        table = found[TOKEN_TABLE]
        np.testing.assert_array_equal(table[[320, 49406]], wanted[TOKEN_TABLE][[320, 49406]])
        assert (table[[5, 2368]] == wanted[TOKEN_TABLE][0]).all()
    assert load_file(pair / "base" / UNET).keys() == unet.keys()
    refiner = Path("refiner") / UNET
    assert (pair / refiner).read_bytes() == (base.parent / refiner).read_bytes()
