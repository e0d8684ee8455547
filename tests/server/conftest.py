"""What the tests of every API share: recorded requests, the embedded pair opened once, and a picture of it."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.runtime import Picture, Pipeline, Request, open_bundle


@pytest.fixture(scope="session")
def replay() -> Any:
    """Import the file beside this one, which is not on sys.path, once."""
    name = "replay"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("replay.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def pipeline() -> Iterator[Pipeline]:
    with open_bundle() as pipeline:
        yield pipeline


@pytest.fixture(scope="session")
def picture(pipeline: Pipeline) -> Picture:
    """A picture with a true record; the others of the tests are made of it."""
    return next(pipeline.generate(Request("a red fox", steps=2, seed=7, width=64, height=64)))
