"""The whole application on the embedded pair, in this process."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from starlette.testclient import TestClient

from sdxl_trt.runtime import Pipeline
from sdxl_trt.server import Options, create_app

ADDRESS = "http://127.0.0.1:8188"
Served = Callable[..., AbstractContextManager[TestClient]]


@pytest.fixture
def opened(
    pipeline: Pipeline, borrow: Callable[[Pipeline], Pipeline], monkeypatch: pytest.MonkeyPatch
) -> list[Pipeline]:
    """The pipelines that the application has opened, on the engines of the tests."""
    made: list[Pipeline] = []

    def open_bundle(*_: Any, **__: Any) -> Pipeline:
        made.append(borrow(pipeline))
        return made[-1]

    monkeypatch.setattr("sdxl_trt.server.app.open_bundle", open_bundle)
    return made


@pytest.fixture
def served(opened: list[Pipeline]) -> Iterator[Served]:
    """Return a context manager that serves with `options`, as a client of the warm server."""

    @contextmanager
    def serve(**options: Any) -> Iterator[TestClient]:
        app = create_app(Options(**options))
        with TestClient(app, base_url=ADDRESS, client=("10.0.0.9", 1)) as client:
            assert client.portal is not None
            assert client.portal.call(app.state.desk.warm)
            yield client

    yield serve
    for pipeline in opened:
        assert pipeline.pool.closed, "every pipeline is closed, once"  # type: ignore[attr-defined]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


@pytest.fixture
def graph() -> dict[str, Any]:
    """A graph of two steps of the base."""
    return {
        "3": node("KSampler", seed=7, steps=2, cfg=7.0, sampler_name="euler", scheduler="normal", denoise=1.0,
                  model=["4", 0], positive=["6", 0], negative=["6", 0], latent_image=["5", 0]),
        "4": node("CheckpointLoaderSimple", ckpt_name="base"),
        "5": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "6": node("CLIPTextEncode", text="a red star", clip=["4", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
    }  # fmt: skip
