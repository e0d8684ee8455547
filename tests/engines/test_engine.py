"""An engine's inputs are checked by name, dtype and shape before a backend sees them."""

import re
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from sdxl_trt.engines.bundle.manifest import Component, Source, TensorSpec
from sdxl_trt.engines.bundle.records import FileRecord
from sdxl_trt.engines.engine import Array, check_inputs, fill_optional, numpy_dtype, rows_of, with_rows
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


@pytest.fixture
def controlled(component: Component) -> Component:
    """A component with a picture of eight times the sides, and an optional residual of half of them."""
    more = (
        TensorSpec(name="picture", dtype="float16", shape=("rows", 3, "8*height", "8*width")),
        TensorSpec(name="scales", dtype="float32", shape=(10,)),
        TensorSpec(name="residual", dtype="float16", shape=("rows|1", 5, "height/2|1", "width/2|1")),
    )
    return msgspec.structs.replace(component, inputs=(*component.inputs, *more))


def _controlled(good: Inputs, residual: tuple[int, ...] = (2, 5, 4, 8)) -> Inputs:
    added = {"picture": np.zeros((2, 3, 64, 128), np.float16), "scales": np.zeros(10, np.float32)}
    return good | added | {"residual": np.zeros(residual, np.float16)}


def test_axes_that_follow_from_another_are_compared_with_it(controlled: Component, good: Inputs) -> None:
    for residual in ((2, 5, 4, 8), (1, 5, 1, 1), (2, 5, 1, 8)):
        check_inputs(controlled, _controlled(good, residual))
    for residual in ((3, 5, 4, 8), (2, 5, 8, 8), (2, 5, 2, 8)):
        with pytest.raises(UsageError, match=r"input residual: shape .* given, \['rows\|1', 5, 'height/2\|1'"):
            check_inputs(controlled, _controlled(good, residual))
    with pytest.raises(UsageError, match=r"input picture: shape \[2, 3, 32, 128\] given"):
        check_inputs(controlled, _controlled(good) | {"picture": np.zeros((2, 3, 32, 128), np.float16)})


def test_an_optional_input_is_zeros_of_one_row_and_one_pixel(controlled: Component, good: Inputs) -> None:
    given = _controlled(good)
    del given["residual"]
    filled = fill_optional(controlled, given)
    assert {name: array.shape for name, array in filled.items()} == {"residual": (1, 5, 1, 1)}
    check_inputs(controlled, given | filled)
    assert fill_optional(controlled, _controlled(good)) == {}


def test_only_inputs_with_a_row_each_are_cut(controlled: Component, good: Inputs) -> None:
    given = _controlled(good)
    assert rows_of(controlled, {"sample": given["sample"][:1], "scales": given["scales"]}) == 1
    assert rows_of(controlled, {"scales": given["scales"]}) is None
    cut = with_rows(controlled, given, 1)
    assert {name: len(array) for name, array in cut.items()} == {
        "sample": 1, "timestep": 1, "input_ids": 1, "picture": 1, "scales": 10, "residual": 2,
    }  # fmt: skip
