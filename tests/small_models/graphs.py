"""A graph small enough to compute by hand, and a bundle of it."""

import hashlib
from pathlib import Path

import numpy as np

from sdxl_trt.engines.bundle.bundle import Bundle
from sdxl_trt.engines.bundle.manifest import Component, Manifest, Scheduler, Source, Stage, TensorSpec, Vae
from sdxl_trt.engines.bundle.records import FileRecord


def tiny_graph(weights: np.ndarray) -> bytes:
    """Return the graph out_sample = sample @ weights + text_embeds, scaled = timestep * 2, with external weights."""
    from onnx import TensorProto, helper

    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=weights.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "weights.data", "offset": "0", "length": str(weights.nbytes)}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    width = weights.shape[1]
    inputs = {"sample": ["rows", len(weights)], "timestep": ["rows"], "text_embeds": ["rows", width]}
    outputs = {"out_sample": ["rows", width], "scaled": ["rows"]}
    nodes = [
        helper.make_node("MatMul", ["sample", "w"], ["product"]),
        helper.make_node("Add", ["product", "text_embeds"], ["out_sample"]),
        helper.make_node("Add", ["timestep", "timestep"], ["scaled"]),
    ]
    values = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in side.items()]
        for side in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "g", *values, initializer=[tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def _record(path: Path) -> FileRecord:
    content = path.read_bytes()
    return FileRecord(file=path.name, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def _specs(**shapes: tuple[str | int, ...]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in shapes.items())


def tiny_bundle(root: Path, weights: np.ndarray, graph: bytes) -> Bundle:
    """Return a bundle of one component, a UNet of `graph` with `weights` in a file beside it."""
    (root / "model.onnx").write_bytes(graph)
    (root / "weights.data").write_bytes(weights.tobytes())
    width = weights.shape[1]
    component = Component(
        kind="unet", precision="fp32", opset=17, config={}, source=Source(name="n", class_name="c", sha256="0" * 64),
        graph=_record(root / "model.onnx"), weights=_record(root / "weights.data"),
        inputs=_specs(sample=("rows", len(weights)), timestep=("rows",), text_embeds=("rows", width)),
        outputs=_specs(out_sample=("rows", width), scaled=("rows",)),
    )  # fmt: skip
    vae = Vae(decoder="v", encoder=None, scaling_factor=1.0, latent_channels=4, factor=8)
    stage = Stage(
        unet="unet", text_encoders=(), vae=vae, scheduler=Scheduler(), time_ids=(), sample_size=16, size_multiple=8,
        force_zeros_for_empty_prompt=True,
    )  # fmt: skip
    manifest = Manifest(
        format="f", format_version=1, generator="g", precision="fp32", components={"unet": component}, tokenizers={},
        base=stage,
    )  # fmt: skip
    return Bundle(root, manifest)
