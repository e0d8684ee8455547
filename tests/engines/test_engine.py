"""An engine's inputs are checked by name, dtype and shape before a backend sees them."""

import re
from collections.abc import Callable

import numpy as np
import pytest

from sdxl_trt.engines.bundle.manifest import Component, Source, TensorSpec
from sdxl_trt.engines.bundle.records import FileRecord
from sdxl_trt.engines.engine import Array, check_inputs, numpy_dtype
from sdxl_trt.engines.errors import UsageError

Inputs = dict[str, Array]


@pytest.fixture
def component() -> Component:
    record = FileRecord(file="f", size=0, sha256="0" * 64)
    return Component(
        kind="unet", precision="fp16", opset=23, graph=record, weights=record, outputs=(), config={},
        source=Source(name="n", class_name="c", sha256="0" * 64),
        inputs=(
            TensorSpec(name="sample", dtype="float16", shape=("rows", 4, "height", "width")),
            TensorSpec(name="timestep", dtype="float32", shape=("rows",)),
            TensorSpec(name="input_ids", dtype="int64", shape=("rows", 77)),
        ),
    )  # fmt: skip


@pytest.fixture
def good() -> Inputs:
    return {
        "sample": np.zeros((2, 4, 8, 16), np.float16),
        "timestep": np.zeros(2, np.float32),
        "input_ids": np.zeros((2, 77), np.int64),
    }


def test_fitting_inputs_pass(component: Component, good: Inputs) -> None:
    check_inputs(component, good)
    check_inputs(component, dict(reversed(good.items())))


def test_dtypes_are_numpy_s(component: Component) -> None:
    assert [numpy_dtype(spec) for spec in component.inputs] == [np.float16, np.float32, np.int64]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda good: good.pop("timestep"), "['input_ids', 'sample'] given, but the graph takes"),
        (lambda good: good.update(extra=good["timestep"]), "['extra', 'input_ids', 'sample', 'timestep'] given"),
        (lambda good: good.update(timestep=np.zeros(2)), "timestep: dtype float64 given, float32 expected; cast it"),
        (lambda good: good.update(sample=np.zeros((2, 4, 8, 16), np.float32)), "sample: dtype float32 given, float16"),
        (lambda good: good.update(input_ids=np.zeros((2, 77), np.int32)), "input_ids: dtype int32 given, int64"),
        (lambda good: good.update(input_ids=np.zeros((2, 76), np.int64)), "input_ids: shape [2, 76] given"),
        (lambda good: good.update(sample=np.zeros((2, 3, 8, 16), np.float16)), "sample: shape [2, 3, 8, 16] given"),
        (lambda good: good.update(sample=np.zeros((2, 4, 8), np.float16)), "sample: shape [2, 4, 8] given"),
        (lambda good: good.update(sample=np.zeros((2, 4, 8, 16, 1), np.float16)), "sample: shape [2, 4, 8, 16, 1]"),
        (lambda good: good.update(timestep=np.zeros((), np.float32)), "timestep: shape [] given"),
        (lambda good: good.update(timestep=np.zeros(1, np.float32)), "timestep: shape [1] given"),
        (lambda good: good.update(timestep=np.zeros((2, 1), np.float32)), "timestep: shape [2, 1] given"),
    ],
)
def test_inputs_that_do_not_fit_are_named(
    component: Component, good: Inputs, change: Callable[[Inputs], object], words: str
) -> None:
    change(good)
    with pytest.raises(UsageError, match=re.escape(words)):
        check_inputs(component, good)


def test_rows_that_disagree_name_the_size_of_the_axis(component: Component, good: Inputs) -> None:
    good["timestep"] = np.zeros(3, np.float32)
    with pytest.raises(UsageError, match=r"shape \[3\] given, \['rows'\] where \{'rows': 2,"):
        check_inputs(component, good)
