"""adapters.json of the embedded bundle against the graphs, and broken tables."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest

from sdxl_trt.engines.bundle import Bundle, FileRecord, read_bundle
from sdxl_trt.engines.bundle.tensor_table import ADAPTERS_FILE, AdapterTable, TensorRecord, read_table
from sdxl_trt.engines.errors import CorruptError, IncompatibleError, SdxlTrtError
from sdxl_trt.mini.embedded import bundle_path

NUMBER = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16}


@pytest.fixture(scope="module")
def mini() -> Bundle:
    return read_bundle(bundle_path())


COMPONENTS = ("unet", "refiner_unet", "text_encoder", "text_encoder_2", "vae_decoder", "vae_encoder", "vae_tiny")


@pytest.mark.parametrize("name", COMPONENTS)
def test_the_table_is_that_of_the_graphs(mini: Bundle, name: str) -> None:
    component, table = mini.manifest.components[name], read_table(mini, name)
    stored = {tensor.name: tensor for tensor in table.tensors if tensor.offset is not None}
    for record in (component.graph, component.cpu_graph):
        if record is None:
            continue
        graph = onnx.load(mini.path(record), load_external_data=False).graph
        external = {tensor.name: tensor for tensor in graph.initializer if tensor.external_data}
        assert external.keys() == stored.keys()
        for key, tensor in external.items():
            place = {entry.key: entry.value for entry in tensor.external_data}
            mine = stored[key]
            assert (int(place["offset"]), int(place["length"])) == (mine.offset, mine.nbytes)
            assert tuple(tensor.dims) == mine.stored_shape
            assert tensor.data_type == NUMBER[mine.dtype]
    assert sum(math.prod(tensor.shape) for tensor in stored.values()) == component.parameters


Write = Callable[[bytes], Bundle]


@pytest.fixture
def write(mini: Bundle, tmp_path: Path) -> Write:
    """Return a function that makes the embedded bundle's UNet have other bytes as its table."""

    def write(content: bytes) -> Bundle:
        (tmp_path / ADAPTERS_FILE).write_bytes(content)
        record = FileRecord(file=ADAPTERS_FILE, size=len(content), sha256=hashlib.sha256(content).hexdigest())
        unet = msgspec.structs.replace(mini.manifest.components["unet"], adapters=record)
        manifest = msgspec.structs.replace(mini.manifest, components=mini.manifest.components | {"unet": unet})
        return Bundle(tmp_path, manifest)

    return write


def _tensor(name: str = "a", **changes: Any) -> Any:
    return {"name": name, "shape": [4, 2], "dtype": "float16", "offset": 0} | changes


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ([_tensor(), _tensor("b")], "b at byte 0 overlaps another tensor"),
        ([_tensor("a", offset=64), _tensor("b", offset=0)], "b at byte 0 overlaps"),
        ([_tensor(offset=1 << 40)], "lies outside the"),
        ([_tensor(offset=3)], "a at byte 3 overlaps"),
        ([_tensor(shape=[1 << 31] * 8)], "lies outside the"),
        ([_tensor(shape=[1 << 40])], "broken table"),
        ([_tensor(shape=[0])], "broken table"),
        ([_tensor(shape=[1] * 9)], "broken table"),
        ([_tensor(offset=-2)], "broken table"),
        ([_tensor(dtype="int16")], "broken table"),
        ([_tensor(dtype="int8")], "is int8, but its component is not in 8 bits"),
        ([_tensor(permutation=[0, 0])], r"in the order \[0, 0\]"),
        ([_tensor(permutation=[0])], r"in the order \[0\]"),
        ([_tensor(), _tensor(offset=64)], "names 2 tensors, 1 of them different"),
    ],
)
def test_a_table_that_does_not_fit_its_weights_is_corrupt(tensors: Any, match: str, write: Write) -> None:
    with pytest.raises(CorruptError, match=match) as caught:
        read_table(write(msgspec.json.encode({"tensors": tensors})), "unet")
    assert str(caught.value).endswith("run export-engines again")


@pytest.mark.parametrize(
    ("content", "error"),
    [(b"", CorruptError), (b"[]", CorruptError), (b"[" * 100_000, CorruptError), (b"\xff", CorruptError),
     (b'{"version": 2, "tensors": []}', IncompatibleError)],
)  # fmt: skip
def test_a_broken_table_is_one_line(content: bytes, error: type[SdxlTrtError], write: Write) -> None:
    with pytest.raises(error) as caught:
        read_table(write(content), "unet")
    assert "\n" not in str(caught.value)


def test_another_table_than_the_manifest_records_is_corrupt(write: Write) -> None:
    bundle = write(msgspec.json.encode(AdapterTable(tensors=())))
    (bundle.root / ADAPTERS_FILE).write_bytes(b'{"tensors":[ ]}')
    with pytest.raises(CorruptError, match="export-engines again"):
        read_table(bundle, "unet")


def test_a_bundle_of_an_older_version_says_to_export_again(mini: Bundle) -> None:
    unet = msgspec.structs.replace(mini.manifest.components["unet"], adapters=None)
    older = Bundle(mini.root, msgspec.structs.replace(mini.manifest, components={"unet": unet}))
    with pytest.raises(IncompatibleError, match=r"unet has no adapters\.json, which LoRAs need.*run export-engines"):
        read_table(older, "unet")


def test_stored_shapes_are_permuted() -> None:
    record = TensorRecord(name="a", shape=(2, 3, 5), dtype="float16", permutation=(2, 0, 1))
    assert (record.stored_shape, record.nbytes) == ((5, 2, 3), 60)
