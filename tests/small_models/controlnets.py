"""A bundle's copy with toy ControlNets, which are ONNX graphs of a few nodes."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np


def _toy_controlnet(unet: Any, factor: int, rng: np.random.Generator) -> Any:
    """Return an ONNX ControlNet for a UNet's component: a residual is a projection of the picture and the sample."""
    from onnx import TensorProto, helper, numpy_helper

    from sdxl_trt.export.graph.residuals import EARLIER
    from sdxl_trt.export.graph.signatures import residual_names, residual_shapes

    kinds = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
    kind = kinds[unet.input("sample").dtype]
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    shapes = residual_shapes(unet.config)
    inputs = [helper.make_tensor_value_info(spec.name, kinds[spec.dtype], spec.shape)
              for spec in unet.inputs if not spec.optional]  # fmt: skip
    picture = ["rows", 3, f"{factor}*height", f"{factor}*width"]
    inputs += [helper.make_tensor_value_info("controlnet_cond", kind, picture),
               helper.make_tensor_value_info("scales", TensorProto.FLOAT, ["rows", len(shapes)])]  # fmt: skip
    nodes = [helper.make_node("Cast", ["scales"], ["cast"], to=kind)]
    weights = [numpy_helper.from_array(np.array([2, 3], np.int64), "axes")]
    outputs, late = [], []
    for index, (name, (channels, divisor)) in enumerate(zip(residual_names(len(shapes)), shapes, strict=True)):
        sides = [f"{axis}/{divisor}" if divisor > 1 else axis for axis in ("height", "width")]
        outputs.append(helper.make_tensor_value_info(name, kind, ["rows", channels, *sides]))
        late.append(helper.make_tensor_value_info(
            EARLIER + name, kind, ["rows|1", channels, *(f"{side}|1" for side in sides)]))  # fmt: skip
        parts = []
        for source, span, width in (("controlnet_cond", factor * divisor, 3), ("sample", divisor, 4)):
            weight, pooled, made = (f"{name}.{source}.{part}" for part in ("weight", "pooled", "made"))
            values = rng.standard_normal((channels, width, 1, 1)) / 8
            weights.append(numpy_helper.from_array(values.astype(dtype), weight))
            square = {"kernel_shape": [span, span], "strides": [span, span]}
            nodes.append(helper.make_node("AveragePool", [source], [pooled], **square))
            nodes.append(helper.make_node("Conv", [pooled, weight], [made], kernel_shape=[1, 1]))
            parts.append(made)
        weights.append(numpy_helper.from_array(np.array([index], np.int64), f"{name}.index"))
        nodes += [
            helper.make_node("Add", parts, [f"{name}.sum"]),
            helper.make_node("Gather", ["cast", f"{name}.index"], [f"{name}.scale"], axis=1),
            helper.make_node("Unsqueeze", [f"{name}.scale", "axes"], [f"{name}.column"]),
            helper.make_node("Mul", [f"{name}.sum", f"{name}.column"], [f"{name}.own"]),
            helper.make_node("Add", [f"{name}.own", EARLIER + name], [name]),
        ]
    graph = helper.make_graph(nodes, "controlnet", [*inputs, *late], outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", unet.opset)], ir_version=10)


def _write_component(root: Path, name: str, like: Any, model: Any, file: str = "model.onnx", **changes: Any) -> Any:
    """Write an ONNX model into the folder `name` of the bundle at `root`, and return its record."""
    import msgspec

    from sdxl_trt.engines.bundle import TensorSpec
    from sdxl_trt.export.components.convert import file_record

    (root / name).mkdir(exist_ok=True)
    (root / name / file).write_bytes(model.SerializeToString())
    weights = root / name / "weights.data"
    if not weights.exists():
        weights.write_bytes(bytes(64))
    types = {1: "float32", 10: "float16"}

    def spec(value: Any) -> TensorSpec:
        tensor = value.type.tensor_type
        shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        return TensorSpec(name=value.name, dtype=types[tensor.elem_type], shape=shape)  # type: ignore[arg-type]

    return msgspec.structs.replace(
        like, graph=file_record(root, root / name / file), weights=file_record(root, weights), cpu_graph=None,
        inputs=tuple(map(spec, model.graph.input)), outputs=tuple(map(spec, model.graph.output)), **changes,
    )  # fmt: skip


def add_controlnets(source: Path, root: Path) -> None:
    """Copy a bundle, with residual inputs in its UNet and two toy ControlNets, called edges and poses."""
    import msgspec
    import onnx
    import onnx_ir as ir

    from sdxl_trt.engines.bundle import ControlNet, read_bundle, write_manifest
    from sdxl_trt.export.graph import cut_shallow
    from sdxl_trt.export.graph.residuals import add_residuals

    shutil.copytree(source, root)
    manifest = read_bundle(root).manifest
    unet, components = manifest.components["unet"], dict(manifest.components)
    model = ir.from_proto(onnx.load(root / "unet" / "model.onnx", load_external_data=False))
    add_residuals(model, "unet", unet.config, "unet")
    components["unet"] = _write_component(root, "unet", unet, ir.to_proto(model))
    if manifest.base.shallow is not None:
        short = model.clone()
        cut_shallow(short, ir.DataType.FLOAT16 if unet.precision == "fp16" else ir.DataType.FLOAT)
        components[manifest.base.shallow] = _write_component(
            root, "unet", components[manifest.base.shallow], ir.to_proto(short), file="shallow.onnx"
        )
    nets = []
    for number, name in enumerate(("edges", "poses"), start=1):
        component = "controlnet" if number == 1 else f"controlnet_{number}"
        toy = _toy_controlnet(unet, manifest.base.vae.factor, np.random.default_rng(number))
        components[component] = _write_component(root, component, unet, toy, kind="controlnet", parameters=1)
        nets.append(ControlNet(component=component, name=name))
    plain = {name: msgspec.structs.replace(each, adapters=None) for name, each in components.items()}
    write_manifest(root, msgspec.structs.replace(manifest, components=plain, controlnets=tuple(nets), plans=()))
