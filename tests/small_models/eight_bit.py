"""A bundle's copy whose UNets have a few linear layers in 8 bits, quantized here and not by the exporter."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

LAYERS = (".attn1.to_q.weight", ".attn1.to_out.0.weight")
"""The ends of the names of the weights that are stored in 8 bits."""


def make_eight_bit(source: Path, root: Path, precision: str = "int8") -> None:
    """Copy a bundle in floats, with the UNets' LAYERS in int8 or fp8: one scale for each output channel.

    Activations stay floats, so that all graphs of a UNet have the same node before a weight's users.
    """
    import msgspec

    from sdxl_trt.engines.bundle import read_bundle, read_table, write_manifest

    shutil.copytree(source, root)
    bundle = read_bundle(source)
    manifest = bundle.manifest
    parts = dict(manifest.components)
    for name in [name for name, part in parts.items() if part.kind == "unet"]:
        parts[name] = _quantize(root, name, parts[name], read_table(bundle, name), precision)
    for stage in manifest.stages().values():  # none of the layers is in the shallow UNet, and the others stay in place
        if stage.shallow is not None:
            parts[stage.shallow] = msgspec.structs.replace(
                parts[stage.shallow], precision=precision, weights=parts[stage.unet].weights
            )  # type: ignore[arg-type]
    write_manifest(root, msgspec.structs.replace(manifest, components=parts, precision=precision, plans=()))  # type: ignore[arg-type]


def _quantize(root: Path, name: str, part: Any, table: Any, precision: str) -> Any:
    import msgspec

    from sdxl_trt.engines.bundle import FileRecord, Quantization

    def record(path: Path) -> FileRecord:
        import hashlib

        content = path.read_bytes()
        return FileRecord(file=f"{name}/{path.name}", size=len(content), sha256=hashlib.sha256(content).hexdigest())

    weights = root / name / "weights.data"
    stored, data = np.dtype(np.int8) if precision == "int8" else _float8(), weights.read_bytes()
    kept, moved, scales = [], [], {}
    for tensor in table.tensors:
        if not tensor.name.endswith(LAYERS):
            kept.append(tensor)
            continue
        floats = np.dtype(tensor.dtype)
        raw = np.frombuffer(data, floats, tensor.nbytes // floats.itemsize, tensor.offset or 0)
        matrix = raw.reshape(tensor.stored_shape).astype(np.float32)
        axis = 0 if tensor.permutation is None else tensor.permutation.index(0)  # that of the output channels
        largest = 127.0 if precision == "int8" else 448.0
        scale = np.maximum(np.abs(matrix).max(axis=1 - axis, keepdims=True) / largest, 1e-6).astype(floats)
        values = matrix / scale.astype(np.float32)
        bits = (np.rint(values) if precision == "int8" else values).astype(stored)
        scales[tensor.name] = scale.ravel(), axis
        moved.append(msgspec.structs.replace(tensor, dtype=_NAMES[precision], offset=len(data)))
        data += bits.tobytes() + bytes(-bits.nbytes % 64)
    weights.write_bytes(data)
    table = msgspec.structs.replace(table, tensors=(*kept, *moved))
    (root / name / "adapters.json").write_bytes(msgspec.json.encode(table))
    graphs = {field: getattr(part, field) for field in ("graph", "cpu_graph", "slot_graph")}
    for each in graphs.values():
        _rewrite(root / each.file, {tensor.name: tensor for tensor in moved}, scales)
    excluded = {tensor.name.removesuffix(".weight"): "kept by this test" for tensor in kept if len(tensor.shape) == 4}
    return msgspec.structs.replace(
        part, precision=precision, weights=record(weights), adapters=record(root / name / "adapters.json"),
        quantization=Quantization(calibration="no pictures, since only weights are in 8 bits", ranges="0" * 64,
                                  linears=len(moved), convolutions=0, excluded=excluded),
        **{field: record(root / each.file) for field, each in graphs.items()},
    )  # fmt: skip


_NAMES: dict[str, Any] = {"int8": "int8", "fp8": "float8e4m3fn"}


def _float8() -> Any:
    import ml_dtypes

    return np.dtype(ml_dtypes.float8_e4m3fn)


def _rewrite(path: Path, records: dict[str, Any], scales: dict[str, Any]) -> None:
    """Let each of the weights `records` be the output of a DequantizeLinear in the graph at `path`."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path, load_external_data=False)
    graph, nodes = model.graph, []
    for tensor in [tensor for tensor in graph.initializer if tensor.name in records]:
        found, (scale, axis) = records[tensor.name], scales[tensor.name]
        place = {entry.key: entry for entry in tensor.external_data}
        place["offset"].value, place["length"].value = str(found.offset), str(found.nbytes)
        output, tensor.name = tensor.name, f"{tensor.name}.bits"
        tensor.data_type = TensorProto.INT8 if found.dtype == "int8" else TensorProto.FLOAT8E4M3FN
        graph.initializer.append(numpy_helper.from_array(scale, f"{output}.scale"))
        # Without a zero point for each channel, ONNX Runtime's optimizers make up one for the whole tensor, and fail.
        zeros = helper.make_tensor(f"{output}.zero", tensor.data_type, scale.shape, bytes(len(scale)), raw=True)
        graph.initializer.append(zeros)
        given = [tensor.name, f"{output}.scale", zeros.name]
        nodes.append(helper.make_node("DequantizeLinear", given, [output], axis=axis))
    assert len(nodes) == len(records)
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    path.write_bytes(model.SerializeToString())
