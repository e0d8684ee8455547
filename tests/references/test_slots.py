"""The slot graph of a UNet with two LoRAs as inputs against diffusers and peft, which add them in every layer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.numpy import save_file

from sdxl_trt.engines.adapters.factors import plan_factors
from sdxl_trt.engines.adapters.file import open_lora
from sdxl_trt.engines.adapters.scaled import ScaledLora
from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.bundle.tensor_table import read_table

TOLERANCE = 1e-5
SCALES = {"one": 0.7, "other": -0.4}
SIZES = {"rows": 2, "height": 16, "width": 16, "tokens": 77}


def _write(path: Path, slots: list[Any], rank: int, rng: np.random.Generator) -> Path:
    tensors = {}
    for slot in slots:
        shapes = {"A": (rank, slot.inputs, *slot.kernel), "B": (slot.outputs, rank, *(1 for _ in slot.kernel))}
        for part, shape in shapes.items():
            values = rng.standard_normal(shape).astype(np.float32) / 16
            tensors[f"unet.{slot.module}.lora_{part}.weight"] = values
    save_file(tensors, path)
    return path


def _theirs(base: Path, files: dict[str, Path], feed: dict[str, np.ndarray]) -> np.ndarray:
    pipeline = StableDiffusionXLPipeline.from_pretrained(base, dtype=torch.float32)
    for name, path in files.items():
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    pipeline.set_adapters(list(SCALES), list(SCALES.values()))
    given = {name: torch.from_numpy(array) for name, array in feed.items()}
    conditions = {name: given[name] for name in ("text_embeds", "time_ids")}
    with torch.inference_mode():
        output = pipeline.unet(given["sample"], given["timestep"], given["encoder_hidden_states"],
                               added_cond_kwargs=conditions, return_dict=False)  # fmt: skip
    result: np.ndarray = output[0].numpy()
    return result


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # two adapters are meant
def test_two_loras_equal_those_of_diffusers(
    pairs: Callable[[str], Any], tmp_path: Path, rng: np.random.Generator
) -> None:
    pair = pairs("outline")
    bundle = read_bundle(pair.bundle)
    component, table = bundle.manifest.components["unet"], read_table(bundle, "unet")
    slots = list(table.slots_by_module.values())
    files = {"one": _write(tmp_path / "one.safetensors", slots, 4, rng),
             "other": _write(tmp_path / "other.safetensors", slots, 2, rng)}  # fmt: skip
    feed = {spec.name: rng.standard_normal([SIZES.get(str(axis), axis) for axis in spec.shape]).astype(np.float32)
            for spec in component.inputs}  # fmt: skip
    loras = [ScaledLora(open_lora(path), SCALES[name]) for name, path in files.items()]
    factors = plan_factors(loras, "unet", table.shapes, component.config, table.slots_by_module.keys())
    given = dict(feed)
    for module, found in factors.each():
        slot = table.slots_by_module[module]
        arrays = (found.down, found.up) if slot.kernel else (found.down.T, found.up.T)
        given |= {name: np.ascontiguousarray(array).reshape(shape)
                  for (name, shape), array in zip(slot.sizes(factors.rank).items(), arrays, strict=True)}  # fmt: skip
    options = ort.SessionOptions()
    options.log_severity_level = 3
    sessions = [ort.InferenceSession(bundle.root / "unet" / file, options, providers=["CPUExecutionProvider"])
                for file in ("adapters.onnx", "model.onnx")]  # fmt: skip
    (ours,), (plain,) = sessions[0].run(["out_sample"], given), sessions[1].run(["out_sample"], feed)
    theirs = _theirs(pair.base, files, feed)
    assert np.abs(theirs - plain).max() > 0.05, "the LoRAs have no effect"
    assert np.abs(ours - theirs).max() <= TOLERANCE * max(1.0, float(np.abs(theirs).max()))
