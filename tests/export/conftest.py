"""Changes to an exported bundle that its manifest vouches for, as a wrong export would have made them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

Change = Callable[[NDArray[Any]], NDArray[Any]]


def _vouch(bundle: Path, component: str, part: str) -> None:
    """Give the manifest the size and digest of a file that was changed."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_bytes())
    record = manifest["components"][component][part]
    content = (bundle / record["file"]).read_bytes()
    record["size"], record["sha256"] = len(content), hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(manifest))


@pytest.fixture
def edit_weight() -> Callable[[Path, str, str, Change], None]:
    """Return a function that changes one tensor of a component in ``weights.data``."""

    def edit(bundle: Path, component: str, name: str, change: Change) -> None:
        model = onnx.load(bundle / component / "model.onnx", load_external_data=False)
        stored = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        place = {entry.key: entry.value for entry in stored.external_data}
        dtype = onnx.helper.tensor_dtype_to_np_dtype(stored.data_type)
        array = np.memmap(bundle / component / place["location"], dtype, "r+", int(place["offset"]), tuple(stored.dims))
        changed = change(np.array(array))
        assert not np.array_equal(changed, array)
        array[:] = changed
        array.flush()
        del array
        _vouch(bundle, component, "weights")

    return edit


@pytest.fixture
def edit_graph() -> Callable[[Path, str, Callable[[Any], None]], None]:
    """Return a function that lets another change the ``onnx.GraphProto`` of a component."""

    def edit(bundle: Path, component: str, change: Callable[[Any], None]) -> None:
        path = bundle / component / "model.onnx"
        model = onnx.load(path, load_external_data=False)
        before = model.SerializeToString()
        change(model.graph)
        assert model.SerializeToString() != before
        path.write_bytes(model.SerializeToString())
        _vouch(bundle, component, "graph")

    return edit
