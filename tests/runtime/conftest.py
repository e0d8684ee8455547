"""LoRA files for the embedded pair, made in a test: rank 2, a few modules, random weights."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdxl_trt.engines.bundle import Bundle, read_bundle, read_table
from sdxl_trt.mini import bundle_path
from sdxl_trt.runtime import open_bundle

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
LAYERS = (".to_q.weight", ".q_proj.weight")
MakeLora = Callable[..., Path]


@pytest.fixture(scope="session")
def embedded() -> Bundle:
    """Return the embedded pair, of which only the manifest is read."""
    return read_bundle(bundle_path())


@pytest.fixture
def unloaded() -> Iterator[Any]:
    """Return a pipeline of the embedded pair that resolves requests; a test that runs one loads the engines."""
    with open_bundle() as pipeline:
        yield pipeline


@pytest.fixture(scope="session")
def make_lora(embedded: Bundle) -> MakeLora:
    """Return a function that writes a LoRA in kohya's names for some parts of the base, or of the refiner."""

    def make(
        path: Path,
        *parts: str,
        seed: int = 0,
        refiner: bool = False,
        wider: int = 0,
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        rng, tensors = np.random.default_rng(seed), {}
        for part in parts or tuple(PREFIXES):
            component = "refiner_unet" if refiner and part == "unet" else part
            shapes = read_table(embedded, component).shapes
            for name in [name for name in shapes if name.endswith(LAYERS)][:2]:
                module = f"{PREFIXES[part]}_{name.removesuffix('.weight').replace('.', '_')}"
                outputs, inputs = shapes[name]
                tensors[f"{module}.lora_down.weight"] = rng.standard_normal((2, inputs + wider), dtype=np.float32)
                tensors[f"{module}.lora_up.weight"] = rng.standard_normal((outputs, 2), dtype=np.float32)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata=dict(metadata or {}))
        return path

    return make
