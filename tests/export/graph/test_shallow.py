"""Shallow UNets: what the full graph keeps, the shallow one continues from, exactly; planted faults must show."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from sdxl_trt.engines.backends.ort.engine import OrtEngine
from sdxl_trt.engines.bundle import Bundle, read_bundle
from sdxl_trt.engines.engine import numpy_dtype
from sdxl_trt.export.graph.shallow import cut_shallow, mark_deep
from sdxl_trt.export.graph.slots import add_slots
from sdxl_trt.mini.embedded import bundle_path

Arrays = dict[str, np.ndarray]
DEEP = "deep_feature"
STATE = {"conv_in.weight": (2, 1, 3, 3), "up_blocks.0.resnets.0.norm1.weight": (9,),
         "up_blocks.1.resnets.0.norm1.weight": (5,)}  # fmt: skip


class Pairing:
    """A UNet and its shallow one on ONNX Runtime, on the graphs for a CPU or on those for all backends."""

    def __init__(self, bundle: Bundle, stage: str, *, standard: bool) -> None:
        names = bundle.manifest.stages()[stage]
        assert names.shallow is not None
        self.full = OrtEngine(bundle, names.unet, standard=standard)
        self.shallow = OrtEngine(bundle, names.shallow, standard=standard)
        self.full.load()
        self.shallow.load()

    def inputs(self, rng: np.random.Generator, **axes: int) -> Arrays:
        sizes = {"rows": 2, "height": 16, "width": 8, "tokens": 77} | axes
        found = {}
        for spec in self.full.component.inputs:
            shape = [sizes[axis.partition("|")[0]] if isinstance(axis, str) and "/" not in axis else axis
                     for axis in spec.shape]  # fmt: skip
            if spec.optional and any(isinstance(axis, str) for axis in shape):
                continue  # of a level within, which is not the shallow UNet's
            found[spec.name] = rng.standard_normal(shape).astype(numpy_dtype(spec))
        return found

    def run_full(self, inputs: Arrays) -> Arrays:
        return self.full.infer(inputs, ("out_sample", DEEP))

    def run_shallow(self, inputs: Arrays, new: Any, old: Any, factor: np.ndarray) -> np.ndarray:
        known = {spec.name for spec in self.shallow.component.inputs}
        given = {name: value for name, value in inputs.items() if name in known}
        given |= {"deep_new": new, "deep_old": old, "deep_factor": factor.astype(np.float32)}
        return self.shallow.infer(given)["out_sample"]


@pytest.fixture(scope="module")
def embedded() -> Mapping[tuple[str, bool], Pairing]:
    bundle = read_bundle(bundle_path())
    return {(stage, standard): Pairing(bundle, stage, standard=standard)
            for stage in ("base", "refiner") for standard in (False, True)}  # fmt: skip


@given(rows=st.integers(1, 3), height=st.integers(1, 4), width=st.integers(1, 4), seed=st.integers(0, 99),
       stage=st.sampled_from(("base", "refiner")), standard=st.booleans())  # fmt: skip
@settings(max_examples=8)
def test_with_a_factor_of_0_it_continues_from_the_newer_state_exactly(
    embedded: Mapping[tuple[str, bool], Pairing],
    rows: int,
    height: int,
    width: int,
    seed: int,
    stage: str,
    standard: bool,
) -> None:
    pairing, rng = embedded[stage, standard], np.random.default_rng(seed)
    inputs = pairing.inputs(rng, rows=rows, height=8 * height, width=8 * width)
    exact = pairing.run_full(inputs)
    # As far from the newer one as fp16 goes: a difference in fp16 would be infinite, and 0 times that is no number.
    old = np.where(exact[DEEP] > 0, -65504, 65504).astype(exact[DEEP].dtype)
    found = pairing.run_shallow(inputs, exact[DEEP], old, np.zeros(rows))
    np.testing.assert_array_equal(found, exact["out_sample"])


@given(factors=st.lists(st.floats(0, 2, width=16), min_size=2, max_size=2), seed=st.integers(0, 99),
       stage=st.sampled_from(("base", "refiner")), standard=st.booleans())  # fmt: skip
@settings(max_examples=8)
def test_each_row_is_extrapolated_with_its_own_factor(
    embedded: Mapping[tuple[str, bool], Pairing], factors: list[float], seed: int, stage: str, standard: bool
) -> None:
    pairing, rng = embedded[stage, standard], np.random.default_rng(seed)
    inputs = pairing.inputs(rng)
    new = pairing.run_full(inputs)[DEEP]
    old = (new + rng.standard_normal(new.shape) / 4).astype(new.dtype)
    wide, factor = new.astype(np.float32), np.array(factors, np.float32)
    deep = (wide + (wide - old) * factor[:, None, None, None]).astype(new.dtype)
    found = pairing.run_shallow(inputs, new, old, factor)
    np.testing.assert_array_equal(found, pairing.run_shallow(inputs, deep, new, np.zeros(2)))


def test_what_a_full_step_returns_is_as_before(embedded: Mapping[tuple[str, bool], Pairing], tmp_path: Path) -> None:
    """Without the new output, the graph returns the same bits."""
    pairing = embedded["base", True]
    bundle = read_bundle(bundle_path())
    path = bundle.path(pairing.full.component.graph)
    model = onnx.load(path, load_external_data=False)
    model.graph.output.remove(next(each for each in model.graph.output if each.name == DEEP))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "weights.data").write_bytes((path.parent / "weights.data").read_bytes())
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    inputs = pairing.inputs(np.random.default_rng(0))
    np.testing.assert_array_equal(pairing.full.infer(inputs)["out_sample"], session.run(["out_sample"], inputs)[0])


def test_kept_states_stay_valid_for_two_calls(embedded: Mapping[tuple[str, bool], Pairing]) -> None:
    pairing, rng = embedded["base", False], np.random.default_rng(0)
    calls = [pairing.inputs(rng) for _ in range(2)]
    exact = [pairing.run_full(call) for call in calls]
    kept = []
    for call, expected in zip(calls, exact, strict=True):
        host, held = pairing.full.infer_keeping(call, [DEEP], ["out_sample"])
        assert host.keys() == {"out_sample"}
        np.testing.assert_array_equal(host["out_sample"], expected["out_sample"])
        kept.append(held[DEEP])
    old, new = kept
    found = pairing.run_shallow(calls[1], new, old, np.array([0.5, 1.0]))
    expected_found = pairing.run_shallow(calls[1], exact[1][DEEP], exact[0][DEEP], np.array([0.5, 1.0]))
    np.testing.assert_array_equal(found, expected_found)


def test_residuals_of_a_controlnet_reach_the_shallow_level(controlled: Path) -> None:
    pairing, rng = Pairing(read_bundle(controlled), "base", standard=True), np.random.default_rng(0)
    inputs = pairing.inputs(rng)
    residuals = {name for name in inputs if name.startswith("down_residual")}
    assert residuals == {spec.name for spec in pairing.shallow.component.inputs if spec.optional}
    assert residuals
    exact = pairing.run_full(inputs)
    found = pairing.run_shallow(inputs, exact[DEEP], exact[DEEP], np.ones(2))
    np.testing.assert_array_equal(found, exact["out_sample"])
    plain = {name: value for name, value in inputs.items() if name not in residuals}
    assert np.abs(pairing.run_shallow(plain, exact[DEEP], exact[DEEP], np.ones(2)) - found).max() > 1e-2


@pytest.mark.parametrize("standard", [True, False])
def test_8_bit_graphs_are_cut_alike(eight_bit_bundle: Path, standard: bool) -> None:
    """On a CPU the graph computes in fp32, and the state is rounded to fp16 on its way."""
    for stage in ("base", "refiner"):
        pairing, rng = Pairing(read_bundle(eight_bit_bundle), stage, standard=standard), np.random.default_rng(0)
        inputs = pairing.inputs(rng)
        exact = pairing.run_full(inputs)
        found = pairing.run_shallow(inputs, exact[DEEP], 2 * exact[DEEP], np.zeros(2))
        wide = exact["out_sample"].astype(np.float32)
        assert np.linalg.norm(found - wide) <= (0 if standard else 2e-2) * np.linalg.norm(wide)


def _unet(up_blocks: int = 2, axis: int = 1) -> ir.Model:
    """Return a graph like a UNet's end: a state is joined with a skip connection, and both are normalized."""
    sample = helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["rows", 1, "height", "width"])
    unused = helper.make_tensor_value_info("encoder_hidden_states", TensorProto.FLOAT, ["rows", "tokens", 1])
    output = helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, ["rows", 5, "height", "width"])
    norm = f"up_blocks.{up_blocks - 1}.resnets.0.norm1"
    weights = [helper.make_tensor("conv.weight", TensorProto.FLOAT, [3, 1, 1, 1], [1.0, 2.0, 3.0]),
               helper.make_tensor("skip.weight", TensorProto.FLOAT, [2, 1, 1, 1], [5.0, 7.0]),
               helper.make_tensor(f"{norm}.weight", TensorProto.FLOAT, [5], [1.0] * 5),
               helper.make_tensor(f"{norm}.bias", TensorProto.FLOAT, [5], [0.0] * 5)]  # fmt: skip
    nodes = [
        helper.make_node("ReduceSum", ["encoder_hidden_states"], ["prompt"], keepdims=0),
        helper.make_node("Add", ["sample", "prompt"], ["shifted"]),
        helper.make_node("Conv", ["shifted", "conv.weight"], ["deep"]),
        helper.make_node("Conv", ["sample", "skip.weight"], ["skip"]),
        helper.make_node("Concat", ["deep", "skip"], ["joined"], axis=axis),
        helper.make_node("GroupNormalization", ["joined", f"{norm}.weight", f"{norm}.bias"], ["out_sample"],
                         num_groups=1),
    ]  # fmt: skip
    graph = helper.make_graph(nodes, "unet", [sample, unused], [output], weights)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def _run(model: ir.Model, **inputs: np.ndarray) -> Arrays:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def test_the_cut_is_where_the_last_up_block_begins(rng: np.random.Generator) -> None:
    model = _unet()
    assert mark_deep(model, STATE, ir.DataType.FLOAT)
    sample = rng.standard_normal((2, 1, 3, 4), np.float32)
    full = _run(model, sample=sample, encoder_hidden_states=np.ones((2, 1, 1), np.float32))
    np.testing.assert_allclose(full[DEEP], (sample + 2) * np.float32([1, 2, 3])[None, :, None, None], rtol=1e-6)
    cut_shallow(model, ir.DataType.FLOAT)
    assert [value.name for value in model.graph.inputs] == ["sample", "deep_new", "deep_old", "deep_factor"]
    assert [value.name for value in model.graph.outputs] == ["out_sample"]
    assert "conv.weight" not in model.graph.initializers
    found = _run(model, sample=sample, deep_new=full[DEEP], deep_old=sample.repeat(3, 1),
                 deep_factor=np.zeros(2, np.float32))  # fmt: skip
    np.testing.assert_array_equal(found["out_sample"], full["out_sample"])
    old, factor = rng.standard_normal((2, 3, 3, 4), np.float32), np.array([0.5, 2], np.float32)
    deep = full[DEEP] + (full[DEEP] - old) * factor[:, None, None, None]
    found = _run(model, sample=sample, deep_new=full[DEEP], deep_old=old, deep_factor=factor)
    expected = _run(model, sample=sample, deep_new=deep, deep_old=old, deep_factor=np.zeros(2, np.float32))
    np.testing.assert_allclose(found["out_sample"], expected["out_sample"], atol=1e-5)
    assert np.abs(found["out_sample"] - full["out_sample"]).max() > 0.1


@pytest.mark.parametrize("beside", [frozenset(), frozenset({"conv"})], ids=["in the kernel", "beside an 8-bit one"])
def test_a_lora_changes_what_is_kept(beside: frozenset[str], rng: np.random.Generator) -> None:
    """An 8-bit layer's LoRA is a sum after it, which is then what the last up block takes, and the output."""
    model = _unet()
    assert mark_deep(model, STATE, ir.DataType.FLOAT)
    add_slots(model, beside=beside)
    assert [value.name for value in model.graph.outputs] == ["out_sample", DEEP]
    sample = rng.standard_normal((2, 1, 3, 4), np.float32)
    factors = {
        f"{module}.lora_{part}": rng.standard_normal(shape).astype(np.float32)
        for module, maps in (("conv", 3), ("skip", 2))
        for part, shape in (("down", (1, 1)), ("up", (maps, 1)))
    }
    inputs = {"sample": sample, "encoder_hidden_states": np.ones((2, 1, 1), np.float32), **factors}
    full = _run(model, **inputs)
    kernel = np.float32([1, 2, 3]) + (factors["conv.lora_up"] @ factors["conv.lora_down"]).ravel()
    np.testing.assert_allclose(full[DEEP], (sample + 2) * kernel[None, :, None, None], rtol=1e-4, atol=1e-5)
    cut_shallow(model, ir.DataType.FLOAT)
    names = [value.name for value in model.graph.inputs]
    assert names == ["sample", "deep_new", "deep_old", "deep_factor", "skip.lora_down", "skip.lora_up"]
    given = {name: value for name, value in inputs.items() if name in names}
    found = _run(model, deep_new=full[DEEP], deep_old=full[DEEP], deep_factor=np.ones(2, np.float32), **given)
    np.testing.assert_array_equal(found["out_sample"], full["out_sample"])


def test_half_precision_is_kept_outside_and_bf16_never_leaves() -> None:
    model = _unet()
    assert mark_deep(model, STATE, ir.DataType.FLOAT16)
    (deep,) = (value for value in model.graph.outputs if value.name == DEEP)
    assert (deep.dtype, deep.shape) == (ir.DataType.FLOAT16, ir.Shape(["rows", 3, "height", "width"]))
    cut_shallow(model, ir.DataType.FLOAT)
    assert {value.name: value.dtype for value in model.graph.inputs} == {
        "sample": ir.DataType.FLOAT, "deep_new": ir.DataType.FLOAT16, "deep_old": ir.DataType.FLOAT16,
        "deep_factor": ir.DataType.FLOAT,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "state"),
    [
        (_unet(up_blocks=1), {key: shape for key, shape in STATE.items() if ".1." not in key}),
        (_unet(axis=2), STATE),
        (_unet(), {"conv_in.weight": (2, 1, 3, 3)}),
    ],
    ids=["one level", "another axis", "no up blocks"],
)
def test_a_unet_without_inner_levels_stays_as_it_is(model: ir.Model, state: dict[str, Any]) -> None:
    before = ir.to_proto(model).SerializeToString()
    assert not mark_deep(model, state, ir.DataType.FLOAT)
    assert ir.to_proto(model).SerializeToString() == before


def _swap(graph: onnx.GraphProto) -> None:
    names = {"deep_new": "deep_old", "deep_old": "deep_new"}
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def _turn(graph: onnx.GraphProto) -> None:
    next(node for node in graph.node if node.name == "deep/sum").op_type = "Sub"


@pytest.mark.parametrize("fault", [_swap, _turn])
def test_verify_finds_a_wrong_shallow_graph(
    fault: Callable[[onnx.GraphProto], None], tmp_path: Path, edit_shallow: Callable[..., Bundle]
) -> None:
    from sdxl_trt.export.verify.recording import Call
    from sdxl_trt.export.verify.shallow import check_shallow

    bundle = edit_shallow(tmp_path / "bundle", fault)
    sound = Pairing(read_bundle(bundle_path()), "base", standard=True)
    inputs = sound.inputs(np.random.default_rng(0))
    call = Call("a step", {name: value.astype(np.float32) for name, value in inputs.items()}, {})
    assert check_shallow(read_bundle(bundle_path()), "unet", "unet_shallow", [call], standard=True) == []
    found = check_shallow(bundle, "unet", "unet_shallow", [call], standard=True)
    assert found
    assert all(line.startswith("unet_shallow: a step: out_sample") for line in found)


@pytest.fixture
def edit_shallow() -> Callable[..., Bundle]:
    """Return a function that copies the embedded bundle and edits its base's shallow graph."""
    import shutil

    import msgspec

    from sdxl_trt.engines.bundle import write_manifest
    from sdxl_trt.export.components import file_record

    def edit(root: Path, change: Callable[[onnx.GraphProto], None]) -> Bundle:
        shutil.copytree(bundle_path(), root)
        manifest = read_bundle(root).manifest
        component = manifest.components["unet_shallow"]
        path = root / component.graph.file
        model = onnx.load(path, load_external_data=False)
        change(model.graph)
        path.write_bytes(model.SerializeToString())
        changed = msgspec.structs.replace(component, graph=file_record(root, path))
        parts = {**manifest.components, "unet_shallow": changed}
        write_manifest(root, msgspec.structs.replace(manifest, components=parts))
        return read_bundle(root)

    return edit
