"""Intact bundles pass, and every wrong weight or graph is found and named."""

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.errors import CorruptError, VerificationError
from sdxl_trt.export.components import ComponentPlan, Options, StagePlan, plan_components
from sdxl_trt.export.sources.source import BASE_CLASS, REFINER_CLASS, open_pipeline
from sdxl_trt.export.verify.report import VerifyReport
from sdxl_trt.export.verify.verify import verify_bundle

Plans = tuple[dict[str, ComponentPlan], dict[str, StagePlan]]
TEXT = ("text_encoder", "text_encoder_2")
Q_PROJ = "text_model.encoder.layers.1.self_attn.q_proj.weight"


def _plans(base: Path, refiner: Path | None, only: tuple[str, ...] = ()) -> Plans:
    opened = open_pipeline(refiner, REFINER_CLASS) if refiner else None
    components, stages = plan_components(
        open_pipeline(base, BASE_CLASS), opened, Options(precision="fp32", vae_precision="fp32"), lambda _: None
    )
    return {name: plan for name, plan in components.items() if not only or name in only}, stages


@pytest.mark.slow
def test_an_intact_pair_passes_with_a_report(pairs: Callable[[str], Any], tmp_path: Path) -> None:
    pair = pairs("legacy")
    root = Path(shutil.copytree(pair.bundle, tmp_path / "bundle"))
    events: list[tuple[str, str]] = []
    components, stages = _plans(pair.base, pair.refiner)
    report = verify_bundle(read_bundle(root), components, stages, progress=lambda *each: events.append(each))
    report.require()
    manifest = read_bundle(root).manifest
    full = {name: part for name, part in manifest.components.items() if part.kind != "shallow_unet"}
    for_cpu = {part.cpu_graph.file for part in full.values() if part.cpu_graph}
    assert for_cpu == {f"{name}/cpu.onnx" for name, part in components.items() if part.kind != "text_encoder"}
    assert set(components) == set(full)
    assert sum("shallow" in what for _, what in events) == 4, "two UNets, on two graphs each"
    assert set(report.components) == set(components) | for_cpu
    assert list(dict.fromkeys(name for name, _ in events)) == sorted(
        components, key=lambda name: ("text_encoder", "unet", "vae_decoder", "vae_encoder").index(components[name].kind)
    )
    written = json.loads((root / "verify.json").read_bytes())
    assert written["passed"] is True
    assert written["versions"]["onnxruntime"] == version("onnxruntime")
    assert len(report.lines()) == len(report.components)
    _check_cases(report)


def _check_cases(report: VerifyReport) -> None:
    """Every component ran with one row and with several, and the UNets with the inputs of SDXL's runs."""
    for name, part in report.components.items():
        first = [next(iter(case.shapes.values())) for case in part.cases]
        assert len({shape[0] for shape in first}) > 1, name
        assert part.kind == "text_encoder" or len({shape[2:] for shape in first}) > 1, name
        assert all(case.comparisons[0].figures.cosine > 0.999999 for case in part.cases), name
    for name in ("unet", "refiner_unet"):
        part = report.components[name]
        assert {case.shapes["encoder_hidden_states"][1] for case in part.cases} == {77, 154}
        assert {case.shapes["sample"][0] for case in part.cases} == {1, 2}
    assert any("timestep 751.3" in case.title for case in report.components["unet"].cases)


def _perturb(array: Any) -> Any:
    changed = array.copy()
    changed.flat[: changed.size // 4] *= 1.25
    return changed


def _swap_states(graph: Any) -> None:
    """Swap the names of two hidden states."""
    names = {"hidden_states.1": "hidden_states.2", "hidden_states.2": "hidden_states.1"}
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


@pytest.mark.slow
@pytest.mark.parametrize("component", TEXT)
@pytest.mark.parametrize("wrong", ["perturbed", "transposed", "swapped"])
def test_a_wrong_encoder_fails_by_name(
    wrong: str, component: str, pairs: Callable[[str], Any], tmp_path: Path, edit_weight: Any, edit_graph: Any
) -> None:
    pair = pairs("legacy")
    root = Path(shutil.copytree(pair.bundle, tmp_path / "bundle"))
    if wrong == "swapped":
        edit_graph(root, component, _swap_states)
    else:
        edit_weight(root, component, Q_PROJ, np.transpose if wrong == "transposed" else _perturb)
    report = verify_bundle(read_bundle(root), *_plans(pair.base, None, TEXT))
    assert [name for name, part in report.components.items() if not part.passed] == [component]
    assert json.loads((root / "verify.json").read_bytes())["passed"] is False
    with pytest.raises(VerificationError, match=f"^{component}: ONNX Runtime against PyTorch fp32: hidden_states"):
        report.require()


def _swap_waves(graph: Any) -> None:
    """Swap the sines and cosines of the first sinusoidal embedding."""
    waves = {node.output[0] for node in graph.node if node.op_type in ("Sin", "Cos")}
    joined = next(node for node in graph.node if node.op_type == "Concat" and waves >= set(node.input))
    joined.input[:] = list(reversed(joined.input))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "failed"),
    [
        ("graph", ["unet"]),
        ("cpu_graph", ["unet/cpu.onnx"]),
        ("weights", ["unet", "unet/cpu.onnx"]),
    ],
)
def test_a_wrong_unet_fails_by_name(
    wrong: str, failed: list[str], pairs: Callable[[str], Any], tmp_path: Path, edit_weight: Any, edit_graph: Any
) -> None:
    pair = pairs("legacy")
    root = Path(shutil.copytree(pair.bundle, tmp_path / "bundle"))
    if wrong != "weights":
        edit_graph(root, "unet", _swap_waves, part=wrong)
    else:
        edit_weight(root, "unet", "mid_block.resnets.0.conv1.weight", _perturb)
    report = verify_bundle(read_bundle(root), *_plans(pair.base, None, (*TEXT, "unet")))
    assert [name for name, part in report.components.items() if not part.passed] == failed
    assert f"failed: {failed[0]}: ONNX Runtime against PyTorch fp32: out_sample" in "\n".join(report.lines())


@pytest.mark.slow
def test_components_can_be_verified_separately(pairs: Callable[[str], Any], tmp_path: Path) -> None:
    pair = pairs("legacy")
    root = Path(shutil.copytree(pair.bundle, tmp_path / "bundle"))
    report = verify_bundle(read_bundle(root), *_plans(pair.base, pair.refiner, ("refiner_unet", "vae_encoder")))
    report.require()
    cases = {"refiner_unet": 4, "refiner_unet/cpu.onnx": 4, "vae_encoder": 2, "vae_encoder/cpu.onnx": 2}
    assert {name: len(part.cases) for name, part in report.components.items()} == cases


@pytest.mark.slow
def test_fp16_does_not_hide_small_errors(tmp_path: Path, edit_weight: Any) -> None:
    from sdxl_trt.mini.embedded import bundle_path
    from sdxl_trt.mini.pair import materialize

    materialize(tmp_path)
    components, stages = plan_components(
        open_pipeline(tmp_path / "base", BASE_CLASS), None, Options(precision="fp16"), pytest.fail
    )
    plans = {"text_encoder_2": components["text_encoder_2"]}
    root = Path(shutil.copytree(bundle_path(), tmp_path / "bundle"))
    sound = verify_bundle(read_bundle(root), plans, stages)
    sound.require()
    weight = "text_model.encoder.layers.1.mlp.fc2.weight"
    edit_weight(root, "text_encoder_2", weight, lambda array: array * array.dtype.type(1.005))
    report = verify_bundle(read_bundle(root), plans, stages)
    with pytest.raises(VerificationError, match=r"text_encoder_2: ONNX Runtime is .* times as far"):
        report.require()


@pytest.mark.slow
def test_a_file_that_does_not_match_the_manifest_is_an_error(pairs: Callable[[str], Any], tmp_path: Path) -> None:
    pair = pairs("legacy")
    root = Path(shutil.copytree(pair.bundle, tmp_path / "bundle"))
    weights = root / "text_encoder" / "weights.data"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CorruptError, match="sha256"):
        verify_bundle(read_bundle(root), *_plans(pair.base, None, ("text_encoder",)))
    assert not (root / "verify.json").exists()
