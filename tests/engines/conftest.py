"""A small valid bundle as JSON and files, which the tests of the manifest damage."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.engines.backends.cuda import driver as driver_module
from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.bundle.manifest import FORMAT_VERSION, Component, Manifest, Scheduler, Source, Stage, Vae
from sdxl_trt.engines.bundle.records import FileRecord

KINDS = {"unet": "unet", "text_encoder_2": "text_encoder", "vae_decoder": "vae_decoder", "vae_encoder": "vae_encoder"}
SIGNATURES = {
    "unet": (("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"), ("out_sample",)),
    "text_encoder": (("input_ids",), ("hidden_states.0", "hidden_states.1", "text_embeds")),
    "vae_decoder": (("latent_sample",), ("sample",)),
    "vae_encoder": (("sample",), ("latent_parameters",)),
}
SHAPES = {"input_ids": ["prompts", 77], "sample": ["rows", 4, "height", "width"]}
Json = Any


def _file(root: Path, name: str) -> Json:
    path = root / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(name.encode())
    return {"file": name, "size": len(name), "sha256": hashlib.sha256(name.encode()).hexdigest()}


def _component(root: Path, name: str, kind: str) -> Json:
    inputs, outputs = (
        [{"name": tensor, "dtype": "float16", "shape": SHAPES.get(tensor, ["rows", 4])} for tensor in side]
        for side in SIGNATURES[kind]
    )
    return {
        "kind": kind, "precision": "fp16", "opset": 23, "inputs": inputs, "outputs": outputs, "parameters": 7,
        "graph": _file(root, f"{name}/model.onnx"), "weights": _file(root, f"{name}/weights.data"),
        "source": {"name": "base/unet", "class_name": "UNet2DConditionModel", "sha256": "0" * 64}, "config": {"a": [1]},
    }  # fmt: skip


def _stage() -> Json:
    return {
        "unet": "unet", "time_ids": ["original_height"], "force_zeros_for_empty_prompt": True, "sample_size": 16,
        "size_multiple": 32, "scheduler": {"beta_start": 0.00085, "timestep_spacing": "leading", "steps_offset": 1},
        "text_encoders": [{"component": "text_encoder_2", "tokenizer": "tokenizer_2", "pooled": True}],
        "vae": {"decoder": "vae_decoder", "encoder": "vae_encoder", "scaling_factor": 0.13025, "latent_channels": 4,
                "factor": 8, "latents_mean": [0.0], "latents_std": [1.0]},
    }  # fmt: skip


@pytest.fixture
def valid(tmp_path: Path) -> Json:
    """Write the files of a small bundle with base and refiner, and return its manifest."""
    tokenizer = _file(tmp_path, "tokenizer_2/tokenizer.json")
    return {
        "format": "sdxl-trt-bundle", "format_version": FORMAT_VERSION, "generator": "sdxl-trt 0", "precision": "fp16",
        "components": {name: _component(tmp_path, name, kind) for name, kind in KINDS.items()},
        "tokenizers": {"tokenizer_2": {"file": tokenizer, "max_length": 77, "bos_id": 1, "eos_id": 2, "pad_id": 0}},
        "base": _stage(), "refiner": _stage(), "note": "",
    }  # fmt: skip


@pytest.fixture
def read(tmp_path: Path) -> Callable[[Json], Bundle]:
    """Return a function that writes a manifest into the bundle and reads it."""

    def write_and_read(content: Json) -> Bundle:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (tmp_path / "manifest.json").write_bytes(raw)
        return read_bundle(tmp_path)

    return write_and_read


@pytest.fixture
def component_of() -> Callable[..., Component]:
    """Return a function that makes a component without files, from a kind and a number of parameters."""

    def make(kind: str, parameters: int, precision: str = "fp32") -> Component:
        record = FileRecord(file="f", size=0, sha256="0" * 64)
        return Component(
            kind=kind, precision=precision, opset=23, graph=record, weights=record, inputs=(), outputs=(), config={},
            source=Source(name="n", class_name="c", sha256="0" * 64), parameters=parameters,
        )  # fmt: skip

    return make


@pytest.fixture
def bundle_of() -> Callable[[dict[str, Component]], Bundle]:
    """Return a function that makes a bundle without files from its components."""

    def make(components: dict[str, Component]) -> Bundle:
        vae = Vae(decoder="vae_decoder", encoder=None, scaling_factor=1.0, latent_channels=4, factor=8)
        stage = Stage(
            unet="unet", text_encoders=(), vae=vae, scheduler=Scheduler(), time_ids=(), sample_size=16,
            size_multiple=8, force_zeros_for_empty_prompt=True,
        )  # fmt: skip
        manifest = Manifest(
            format="f", format_version=1, generator="g", precision="fp32", tokenizers={}, base=stage,
            components=components,
        )  # fmt: skip
        return Bundle(Path("nowhere"), manifest)

    return make


@pytest.fixture
def use_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[driver_module.Driver], None]]:
    """Return a function that gives this machine another NVIDIA driver."""

    def use(driver: driver_module.Driver) -> None:
        monkeypatch.setattr(driver_module, "ask_driver", lambda: driver)
        driver_module.find_driver.cache_clear()

    yield use
    driver_module.find_driver.cache_clear()
