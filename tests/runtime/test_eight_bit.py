"""LoRAs of requests on a bundle whose UNets are in 8 bits: refused, or as on the bundle in floats."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdxl_trt.engines.errors import IncompatibleError
from sdxl_trt.mini import bundle_path
from sdxl_trt.runtime import Request, open_bundle
from sdxl_trt.runtime.adapters.use import LoraUse
from sdxl_trt.runtime.cli.generate import main as trt_generate
from sdxl_trt.runtime.pairs import PAIRS
from sdxl_trt.runtime.pipeline.batch import Batch

SMALL = Request("a red star", steps=2, width=64, height=64, seed=1, handoff=None)
REFUSED = PAIRS["LoRA", "8 bits"].refused
MakeLora = Callable[..., Path]


def _with(*files: Path) -> Request:
    return replace(SMALL, loras=tuple(LoraUse(str(file), 0.5) for file in files))


def _latents(bundle: Path, provider: str, *requests: Request) -> list[np.ndarray]:
    with open_bundle(bundle, provider=provider) as pipeline:
        return [picture.latents for request in requests for picture in pipeline.generate(request)]


def test_a_lora_of_an_8_bit_unet_is_refused_before_anything_is_loaded(
    partly_int8_bundle: Path, make_lora: MakeLora, tmp_path: Path, fails: Callable[..., str]
) -> None:
    lora = make_lora(tmp_path / "ink.safetensors")
    own = make_lora(tmp_path / "own.safetensors", "unet", refiner=True)
    with open_bundle(partly_int8_bundle, provider="ort-cpu") as pipeline:
        for request in (_with(lora), replace(SMALL, handoff=0.5, refiner_loras=(LoraUse(str(own)),))):
            with pytest.raises(IncompatibleError, match=REFUSED):
                Batch(pipeline, [SMALL, request])
        assert pipeline.pool.loads == []
    argv = ["a red star", "--engines", str(partly_int8_bundle), "--provider", "ort-cpu", "--lora", str(lora)]
    line = fails(trt_generate, argv, 3)
    assert line.startswith(
        f"error: unet is int8, and {REFUSED}; fuse them at export (export-engines --lora FILE --int8)"
    )


def test_a_lora_of_text_encoders_works_beside_8_bit_unets(
    partly_int8_bundle: Path, make_lora: MakeLora, tmp_path: Path
) -> None:
    words = make_lora(tmp_path / "words.safetensors", "text_encoder", "text_encoder_2")
    plain, worn = _latents(partly_int8_bundle, "ort-cpu", SMALL, _with(words))
    (floats,) = _latents(bundle_path(), "ort-cpu", _with(words))
    assert 0 < np.linalg.norm(worn - floats) < 0.1 * np.linalg.norm(worn - plain)


def test_the_slots_of_an_8_bit_unet_take_loras(
    partly_int8_bundle: Path, make_lora: MakeLora, tmp_path: Path, simulated: Any
) -> None:
    lora = make_lora(tmp_path / "ink.safetensors")
    planned = simulated.bundle(partly_int8_bundle, tmp_path / "planned", lora_rank=4)
    plain, worn = _latents(Path(planned), "tensorrt", SMALL, _with(lora))
    (floats,) = _latents(bundle_path(), "ort-cpu", _with(lora))
    bias = tmp_path / "bias.safetensors"
    save_file({"diffusion_model.out.2.diff_b": np.ones(4, np.float32)}, bias)
    with pytest.raises(IncompatibleError, match=r"with export-engines --lora, or export the bundle with --fp16$"):
        _latents(Path(planned), "tensorrt", _with(bias))
    assert 0 < np.linalg.norm(worn - floats) < 0.1 * np.linalg.norm(worn - plain)
