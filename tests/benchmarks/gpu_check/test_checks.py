"""gpu-check on the simulated device: the whole list goes through, and what a check measures, skips and reports."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from sdxl_trt.benchmarks.gpu_check import __main__ as gpu_check
from sdxl_trt.benchmarks.gpu_check.checks import Check, Workplace, all_checks, graphs, memory, order, plans, timing
from sdxl_trt.benchmarks.gpu_check.checks import workplace as workplaces
from sdxl_trt.benchmarks.gpu_check.child import run_check
from sdxl_trt.benchmarks.measure.gpu_record import CheckResult, read_gpu_report
from sdxl_trt.engines.backends.trt.environment import current_environment
from sdxl_trt.engines.bundle.bundle import read_bundle, write_manifest
from sdxl_trt.engines.residency.pool import EnginePool

pytestmark = pytest.mark.slow
ResultOf = Callable[[str], CheckResult]
NOT_HERE = {"fused attention: base UNet", "fused attention: refiner UNet", "plans over 2 GiB load",
            "8 bits against fp16", "two operator sets"}  # fmt: skip
"""Checks that need models of SDXL's size, or another export."""


def test_everything_is_checked_on_the_simulated_device(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """TensorRT for RTX and ONNX Runtime for GPUs are not installed; the rest passes, with existing plans."""
    monkeypatch.setattr(gpu_check, "no_driver", lambda: None)
    code = gpu_check.main(
        ["--quick", "--out", str(tmp_path / "report")], lambda _: lambda check, seconds: run_check(check, workplace)
    )
    out, progress = capsys.readouterr()
    report = read_gpu_report(tmp_path / "report" / "report.json")
    assert [check.name for check in report.checks] == [check.name for check in all_checks()]
    here = {check.name: check.outcome for check in report.checks if check.name.startswith("tensorrt: ")}
    expected = {name: "skipped" if name.removeprefix("tensorrt: ") in NOT_HERE else "ok" for name in here}
    assert here == expected, out
    assert {check.outcome for check in report.checks if check.name not in here} == {"skipped"}
    assert (code, report.gpu, report.model) == (0, "Simulated GPU", "the embedded pair")
    assert (tmp_path / "report" / "report.md").read_text() == out
    assert "| tensorrt: the handoff | base step while the refiner loads |" in out
    assert f"check 1 of {len(all_checks())}, " in progress
    for text in (out, (tmp_path / "report" / "report.json").read_text()):
        assert str(tmp_path) not in text
        assert str(Path.home()) not in text


def test_a_gpu_without_bf16_has_other_plans(
    result_of: ResultOf, workplace: Workplace, simulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Turing TensorRT runs the decoder, not its twin: the builder makes no plan of the twin, and no check asks."""
    simulated.compute_capability = (7, 5)
    bundle = read_bundle(workplace.root)
    stage = bundle.manifest.base
    twin = msgspec.structs.replace(bundle.manifest.components[stage.vae.decoder], precision="bf16")
    stage = msgspec.structs.replace(stage, vae=msgspec.structs.replace(stage.vae, decoder_bf16="twin"))
    environment = current_environment("tensorrt")
    plans_here = tuple(
        msgspec.structs.replace(each, key=msgspec.structs.replace(each.key, environment=environment))
        for each in bundle.manifest.plans
    )
    components = {**bundle.manifest.components, "twin": twin}
    write_manifest(workplace.root, msgspec.structs.replace(
        bundle.manifest, base=stage, components=components, plans=plans_here))  # fmt: skip
    assert "twin" not in workplace.components("tensorrt")
    assert timing._decoder(read_bundle(workplace.root), "tensorrt") == stage.vae.decoder
    estimates = [
        workplace.estimate("tensorrt", "swap"),
        workplace.estimate("tensorrt", "swap", workplace.run_sizes("tensorrt")),
    ]
    for estimate in estimates:
        assert "twin" not in {need.component for need in estimate.needs}
    simulated.compute_capability = (8, 9)
    assert "twin" in workplace.components("tensorrt")
    assert timing._decoder(read_bundle(workplace.root), "tensorrt") == "twin"


def test_the_planned_memory_is_that_of_the_picture_that_is_drawn(workplace: Workplace) -> None:
    """A large pair's picture has the smallest size, whose profile is not that of the usual size."""
    workplace.quick = False
    run, usual = workplace.run_sizes("tensorrt"), workplaces.sizes_of(read_bundle(workplace.root))
    assert (run.height, run.width, run.rows) == (usual.height.min, usual.width.min, 2)
    drawn = memory.planned_figures("tensorrt", workplace, "resident")
    assert drawn.peak == workplace.estimate("tensorrt", "resident", run).peak
    assert drawn.peak != workplace.estimate("tensorrt", "resident").peak


def test_half_of_few_weights_shows_no_saving(result_of: ResultOf, simulated: Any) -> None:
    simulated.ignores_budgets = True
    result = result_of("tensorrt: half of the weights streamed: base UNet")
    assert (result.outcome, result.seen.endswith("is too little to see the saving")) == ("ok", True), result.seen


def test_plans_that_do_not_fit_on_the_disk_are_not_built(
    result_of: ResultOf, workplace: Workplace, simulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = read_bundle(workplace.root).manifest.components["unet"].weights.size
    monkeypatch.setattr(plans, "build_plans", _never)
    simulated.compute_capability = (9, 0)
    monkeypatch.setattr(workplaces.shutil, "disk_usage", lambda _: SimpleNamespace(free=weights))
    result = result_of("tensorrt: plans are built: base UNet")
    assert result.outcome == "skipped"
    assert result.seen.startswith("plans of unet need about ")


def _never(*_: Any, **__: Any) -> None:
    raise AssertionError("it must not be called")


def test_slow_steps_are_not_lost_in_the_median() -> None:
    """The first step captures and does not count."""
    middle, slowest = timing._beside_the_load([9.0, 1.0, 1.0, 5.0])
    assert (middle.value, slowest.value) == (1.0, 5.0)


def test_a_load_is_watched_until_it_ends() -> None:
    """The load ends with the third call; two turns follow, in which the captures that waited are made."""
    left = [3]

    class Pool:
        loaded = 0

        @property
        def preparing(self) -> bool:
            return left[0] > 0

        def free(self) -> None:
            left[0] = 3

        def phase(self, *names: str, next_engines: tuple[str, ...] = ()) -> tuple[str, ...]:
            assert next_engines or not left[0], "the load was not waited for"
            return names

    def one_call(engine: str, feed: dict[str, Any]) -> Any:
        left[0] = max(left[0] - 1, 0)
        return feed["x"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "call", one_call)
        one = np.ones(1)
        beside = graphs._computed_while_loading(cast(EnginePool, Pool()), ("a", "b"), [{"x": one}], [one])
    assert (beside.loads, beside.calls, beside.during, beside.captures) == (2, 2 * 5, 2 * 3, 0)


@pytest.mark.parametrize(("name", "outcome"), [
    ("tensorrt-rtx: the bindings import", "ok"),
    ("tensorrt-rtx: a whole picture matches ort-cpu", "ok"),
    ("tensorrt-rtx: CUDA graphs are used", "skipped"),
    ("tensorrt-rtx: compiled kernels are kept", "FAILED"),
])  # fmt: skip
def test_tensorrt_for_rtx_is_checked_if_installed(
    name: str, outcome: str, simulated: Any, embedded: Callable[..., Path], tmp_path: Path, references: Path
) -> None:
    """The simulated TensorRT for RTX has no cache of kernels."""
    simulated.install("tensorrt-rtx")
    embedded()
    workplaces.make_workplace(tmp_path, ours=True)
    (check,) = [check for check in all_checks() if check.name == name]
    for file in references.glob("run-ort-cpu-*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    result = run_check(check, Workplace(tmp_path))
    assert result.outcome == outcome, result.seen


def test_checks_are_skipped_if_the_plans_are_for_another_machine(result_of: ResultOf, simulated: Any) -> None:
    simulated.compute_capability = (9, 0)
    result = result_of("tensorrt: a whole picture matches ort-cpu")
    assert result.outcome == "skipped"
    assert "compute capability is 9.0" in result.seen


def test_plans_are_built_only_if_none_fit(
    result_of: ResultOf, workplace: Workplace, simulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds: list[tuple[Any, ...]] = []
    monkeypatch.setattr(plans, "build_plans", lambda *arguments, **named: builds.append((*arguments, named)))
    assert result_of("tensorrt: plans are built: base UNet").seen.startswith("1 plans already built")
    assert builds == []
    simulated.compute_capability = (9, 0)
    result_of("tensorrt: plans are built: base UNet")
    assert builds == [(workplace.root, "tensorrt", {"flags": workplace.flags, "components": ["unet"]})]
    assert workplace.flags.weight_streaming


def test_a_reference_that_does_not_fit_into_host_memory_skips_the_check(
    result_of: ResultOf, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = workplace.folder / "workplace.json"
    settings.write_text(settings.read_text().replace('"quick":true', '"quick":false'))
    monkeypatch.setattr(workplaces, "available_host_memory", lambda: 1000)
    for file in workplace.folder.glob("*.npz"):
        file.unlink()
    for name in ("a whole picture matches ort-cpu", "sizes off the optimum: base UNet"):
        result = result_of(f"tensorrt: {name}")
        assert result.outcome == "skipped", result
        assert "the reference on the CPU needs about" in result.seen


def test_on_a_small_gpu_resident_is_not_tried(result_of: ResultOf, simulated: Any) -> None:
    simulated.memory_limit = 8 << 20
    found = {name: result_of(f"tensorrt: {name}") for name in (
        "a whole picture matches ort-cpu", "residencies give the same picture", "memory is what was planned",
        "the handoff", "an engine loads while another captures")}  # fmt: skip
    assert [each.outcome for each in found.values()] == ["ok", "ok", "ok", "ok", "skipped"], found
    assert "3 steps, swap: " in found["the handoff"].seen
    assert "resident not tried: residency resident needs" in found["residencies give the same picture"].seen
    assert "resident does not fit" in found["memory is what was planned"].seen


def test_results_are_shared_by_the_checks_processes(workplace: Workplace, simulated: Any) -> None:
    first = workplace.run("tensorrt", "resident")
    executed = len(simulated.executed)
    again = Workplace(workplace.folder).run("tensorrt", "resident")
    assert len(simulated.executed) == executed
    assert (again.latents == first.latents).all()
    assert again.figures == first.figures


def test_paths_do_not_reach_the_report(workplace: Workplace) -> None:
    def fail(_: Workplace) -> Any:
        raise ValueError(f"{workplace.root}/plans is\nbad | worse")

    result = run_check(Check("first", fail), workplace)
    assert (result.outcome, result.seen) == ("FAILED", "ValueError: BUNDLE/plans is bad | worse")


def test_the_checks_names_differ_and_the_important_ones_come_first() -> None:
    checks = all_checks()
    assert len({check.name for check in checks}) == len(checks)
    assert checks[0].name == "tensorrt: the bindings import"
    assert checks[-1].name == "tensorrt-rtx: two operator sets"
    assert all(check.needs <= check.most for check in checks)
    assert checks[-1].needs == 8 * all_checks(compared=True)[-1].needs == 8 * 60
    assert json.dumps([check.name for check in checks]).isascii()
    assert order.MINUTE == 60
