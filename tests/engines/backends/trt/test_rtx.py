"""Features of TensorRT for RTX, on substitutes written from its documentation; nothing was verified on a GPU."""

import inspect
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines.backends.ort.engine import OrtEngine
from sdxl_trt.engines.backends.trt.engine import TrtEngine, open_device
from sdxl_trt.engines.backends.trt.rtx import KernelCache
from sdxl_trt.engines.bundle.bundle import read_bundle

SIMULATED = Path(__file__).parents[3] / "simulated"
DIGEST = "0123456789abcdef" * 4
TRT = types.SimpleNamespace(
    ExecutionContextAllocationStrategy=types.SimpleNamespace(USER_MANAGED="user managed"),
    CudaGraphStrategy=types.SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole graph"),
)


class _Cache:
    def __init__(self) -> None:
        self.content = b"compiled kernels"

    def serialize(self) -> bytes:
        return self.content

    def deserialize(self, blob: bytes) -> bool:
        self.content = blob
        return True


class _Config:
    cuda_graph_strategy = "none"
    strategy = cache = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> _Cache:
        return _Cache()

    def set_runtime_cache(self, cache: _Cache) -> bool:
        self.cache = cache
        return True


class _Engine:
    def create_runtime_config(self) -> _Config:
        return _Config()

    def create_execution_context(self, runtime_config: Any) -> Any:
        return runtime_config


BINDING = json.loads((SIMULATED / "tensorrt_rtx_1_7.json").read_text(encoding="utf-8"))["classes"]


@pytest.mark.parametrize(
    ("substitute", "original"), [(_Cache, "IRuntimeCache"), (_Config, "IRuntimeConfig"), (_Engine, "ICudaEngine")]
)
def test_the_substitutes_offer_no_more_than_the_published_binding(substitute: type, original: str) -> None:
    """Methods with the names of their arguments, and properties that can be set."""
    methods, properties = BINDING[original]["methods"], BINDING[original].get("properties", {})
    for name, method in vars(substitute).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            arguments = [each for each in inspect.signature(method).parameters if each != "self"]
            assert any(all(f"{each}: " in signature for each in arguments) for signature in methods[name]), name
    assert properties.get("cuda_graph_strategy", "rw") == "rw"
    assert {"USER_MANAGED"} <= BINDING["ExecutionContextAllocationStrategy"]["members"].keys()
    assert {"WHOLE_GRAPH_CAPTURE"} <= BINDING["CudaGraphStrategy"]["members"].keys()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sdxl-trt" / "rtx"


def test_kernels_are_kept_for_the_next_process(folder: Path) -> None:
    first = KernelCache(TRT, _Engine(), DIGEST)
    assert first.usable
    context = first.create_context(_Engine())
    assert (context.strategy, context.cuda_graph_strategy) == ("user managed", "whole graph")
    context.cache.content = b"compiled here"
    first.save()
    (file,) = folder.iterdir()
    assert file.read_bytes() == b"compiled here"
    assert file.stat().st_mode & 0o777 == 0o600
    assert KernelCache(TRT, _Engine(), DIGEST).create_context(_Engine()).cache.content == b"compiled here"
    other = KernelCache(TRT, _Engine(), DIGEST[::-1]).create_context(_Engine())
    assert other.cache.content == b"compiled kernels", "the cache of another plan was used"


def test_kernels_that_others_can_write_are_not_used(folder: Path) -> None:
    KernelCache(TRT, _Engine(), DIGEST).save()
    (file,) = folder.iterdir()
    file.write_bytes(b"planted")
    file.chmod(0o666)
    assert KernelCache(TRT, _Engine(), DIGEST).create_context(_Engine()).cache.content == b"compiled kernels"


def test_a_folder_that_cannot_be_written_costs_only_time(folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_text("a file at its path")
    KernelCache(TRT, _Engine(), DIGEST).save()
    assert folder.read_text() == "a file at its path"


def test_without_the_api_nothing_is_cached(folder: Path) -> None:
    cache = KernelCache(TRT, object(), DIGEST)
    assert not cache.usable
    cache.save()
    assert not folder.exists()


@pytest.fixture(scope="session")
def exported(pairs) -> Path:
    return Path(pairs("outline").bundle)


def test_the_rtx_flavour_runs_without_these_features(exported: Path, simulated, tmp_path: Path) -> None:
    simulated.install("tensorrt-rtx")
    bundle = read_bundle(simulated.bundle(exported, tmp_path / "bundle", height=16, width=16))
    record = next(record for record in bundle.manifest.plans if record.key.component == "vae_decoder")
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    reference = OrtEngine(bundle, "vae_decoder")
    reference.load()
    with open_device("tensorrt-rtx") as device:
        engine = TrtEngine(bundle, record, device)
        engine.load()
        for _ in range(3):
            found = engine.infer({"latent_sample": latents})
            np.testing.assert_allclose(
                found["sample"], reference.infer({"latent_sample": latents})["sample"], atol=1e-3
            )
        engine.unload()
    assert simulated.calls["cudaGraphLaunch"] == 2
