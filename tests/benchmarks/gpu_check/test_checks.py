"""`make gpu-check` on the simulated device: every check can pass and can fail, and a missing GPU is reported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.benchmarks.gpu_check import __main__ as gpu_check
from sdxl_trt.benchmarks.gpu_check import checks as gpu_checks
from sdxl_trt.benchmarks.gpu_check.__main__ import Result, main, report, run_check, run_checks
from sdxl_trt.benchmarks.gpu_check.checks import Check, all_checks
from sdxl_trt.benchmarks.gpu_check.workplace import Skipped, Workplace
from sdxl_trt.benchmarks.measure import gpu as measured_gpu
from sdxl_trt.benchmarks.measure.gpu import no_driver
from sdxl_trt.engines.backends.cuda import driver
from sdxl_trt.engines.backends.cuda.driver import Driver, Gpu, Problem
from sdxl_trt.engines.backends.cuda.streams import Stream
from sdxl_trt.engines.backends.ort import providers as ort_providers

pytestmark = pytest.mark.slow


@pytest.fixture
def make_workplace(simulated: Any, pairs: Callable[[str], Any], tmp_path: Path) -> Callable[..., Workplace]:
    """Return a function that makes a workplace with plans for the simulated device, built with the given settings."""
    from simulated.bundles import make_simulated_bundle

    def make(**settings: Any) -> Workplace:
        bundle = make_simulated_bundle(simulated, pairs("outline").bundle, tmp_path / "bundle", **settings)
        return Workplace(tmp_path, bundle)

    return make


@pytest.fixture
def workplace(make_workplace: Callable[..., Workplace]) -> Workplace:
    return make_workplace()


def check(name: str) -> Check:
    (found,) = [each for each in all_checks() if each.name == name]
    return found


def test_without_a_gpu_the_report_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_check, "no_driver", lambda: "no NVIDIA driver on this machine")
    for arguments in ([], ["--look"]):
        assert main(arguments) == 3
        out = capsys.readouterr().out
        assert "**no GPU**: no NVIDIA driver on this machine. Nothing was checked." in out
        assert "- system: " in out
        assert "| check |" not in out


@pytest.mark.parametrize(
    ("cuda", "extras"), [((13, 0), "gpu,tensorrt,verify"), ((12, 4), "gpu-cu12,tensorrt-cu12,verify")]
)
def test_look_prints_the_extras_that_the_driver_runs(
    cuda: tuple[int, int], extras: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver, "find_driver", lambda: Driver(cuda, (Gpu("a GPU", (8, 9), 1),)))
    monkeypatch.setattr(gpu_check, "no_driver", lambda: None)
    assert main(["--look"]) == 0
    assert capsys.readouterr().out == f"{extras}\n"


def test_the_driver_says_why_it_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("the NVIDIA driver finds no GPU", "look for it")
    monkeypatch.setattr(measured_gpu, "find_driver", lambda: Driver((13, 0), problem=problem))
    assert no_driver() == "the NVIDIA driver finds no GPU; look for it"
    monkeypatch.setattr(measured_gpu, "find_driver", lambda: Driver((13, 0), (Gpu("a GPU", (8, 9), 1),)))
    assert no_driver() is None


def test_everything_is_checked_on_the_simulated_device(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorRT for RTX and ONNX Runtime for GPUs are not installed; everything else passes, with existing plans."""
    monkeypatch.setattr(gpu_check, "no_driver", lambda: None)
    monkeypatch.setattr(ort_providers, "_has_plugin", lambda: False)
    code = main(["--bundle", str(workplace.root)])
    out, progress = capsys.readouterr()
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    outcomes = {row[0].removeprefix("| "): row[1] for row in rows if row[1] in ("ok", "skipped", "**FAILED**")}
    assert outcomes.keys() == {each.name for each in all_checks()}
    expected = {name: "ok" if name.startswith("tensorrt: ") else "skipped" for name in outcomes}
    assert outcomes == expected, out
    assert code == 0
    assert "Simulated GPU, compute capability 8.9" in out
    assert "no benchmark" in out
    assert "| tensorrt | swap | 3 |" in out
    assert str(workplace.root) not in out + progress


def test_tensorrt_for_rtx_is_checked_if_installed(simulated: Any, make_workplace: Callable[..., Workplace]) -> None:
    """Features that only RTX has are not simulated: their checks may fail, but must end and report something."""
    simulated.install("tensorrt-rtx")
    workplace = make_workplace()
    # Without the comparisons with ONNX Runtime: they are the same for both flavours.
    checks = [each for each in all_checks() if each.name.startswith("tensorrt-rtx: ") and "matches" not in each.name]
    assert len(checks) == 9
    results = {result.name: result for result in run_checks(checks, workplace, lambda _: None)}
    own = {name for name in results if "kernels" in name}
    assert {name for name, result in results.items() if result.outcome != "ok"} <= own, results
    assert all(result.seen for result in results.values())


def test_plans_with_weight_streaming_are_run_streamed(make_workplace: Callable[..., Workplace]) -> None:
    result = run_check(check("tensorrt: residencies give the same picture"), make_workplace(weight_streaming=True))
    assert result.outcome == "ok", result.seen
    assert "swap differs from resident by" in result.seen
    assert "stream differs from resident by" in result.seen


def test_a_failing_check_does_not_stop_the_others(workplace: Workplace) -> None:
    def fail(_: Workplace) -> str:
        raise ValueError(f"{workplace.root}/plans is\nbad | worse")

    def skip(_: Workplace) -> str:
        raise Skipped("nothing to check")

    checks = [Check("first", fail), Check("second", skip), Check("third", lambda _: "seen")]
    reported: list[Result] = []
    results = run_checks(checks, workplace, reported.append)
    assert reported == results
    assert [(result.name, result.outcome, result.seen) for result in results] == [
        ("first", "FAILED", "ValueError: BUNDLE/plans is bad | worse"),
        ("second", "skipped", "nothing to check"),
        ("third", "ok", "seen"),
    ]
    text = report({"GPU": "one"}, results)
    assert "| first | **FAILED** |" in text
    assert "bad \\| worse" in text
    assert "1 ok, 1 FAILED, 1 skipped." in text


def test_a_failure_makes_the_exit_code_1(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Workplace) -> str:
        raise AssertionError("wrong")

    monkeypatch.setattr(gpu_check, "no_driver", lambda: None)
    monkeypatch.setattr(gpu_check, "all_checks", lambda: [Check("one", fail)])
    assert main(["--bundle", str(workplace.root)]) == 1
    assert "| one | **FAILED** |" in capsys.readouterr().out


def test_checks_are_skipped_if_the_plans_are_for_another_machine(workplace: Workplace, simulated: Any) -> None:
    simulated.compute_capability = (9, 0)
    result = run_check(check("tensorrt: a whole picture matches ort-cpu"), workplace)
    assert result.outcome == "skipped"
    assert "compute capability is 9.0" in result.seen


def test_plans_are_built_only_if_none_fit(
    workplace: Workplace, simulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds: list[tuple[Any, ...]] = []
    monkeypatch.setattr(gpu_checks, "build_plans", lambda *arguments, **named: builds.append((*arguments, named)))
    build = check("tensorrt: plans are built")
    assert run_check(build, workplace).seen.startswith("6 plans already built")
    assert builds == []
    simulated.compute_capability = (9, 0)
    result = run_check(build, workplace)
    assert builds == [(workplace.root, "tensorrt", {"flags": workplace.flags})]
    assert result.outcome == "FAILED", "the stubbed build leaves no plan that fits"


def test_a_damaged_plan_fails_the_check_that_loads_it(workplace: Workplace) -> None:
    (plan, *_) = sorted((workplace.root / "plans").glob("unet-*.plan"))
    content = bytearray(plan.read_bytes())
    content[-1] ^= 1
    plan.write_bytes(content)
    result = run_check(check("tensorrt: plans load and unload"), workplace)
    assert result.outcome == "FAILED"
    assert "CorruptError" in result.seen


@pytest.mark.parametrize(
    ("name", "setting", "said"),
    [
        ("plans load and unload", ("LEFT_BEHIND", -1), "were not freed"),
        ("a whole picture matches ort-cpu", ("LATENTS_TOLERANCE", -1.0), "latents differ"),
        ("residencies give the same picture", ("SAME_TOLERANCE", -1.0), "swap differs from resident"),
        ("memory is what was planned", ("OVERHEAD", -(1 << 40)), "planned, which is too much"),
    ],
)
def test_values_beyond_their_tolerance_fail(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, name: str, setting: tuple[str, float], said: str
) -> None:
    monkeypatch.setattr(gpu_checks, *setting)
    result = run_check(check(f"tensorrt: {name}"), workplace)
    assert result.outcome == "FAILED"
    assert said in result.seen


def test_a_graph_that_cannot_be_captured_is_a_failure(workplace: Workplace, simulated: Any) -> None:
    simulated.fail_capture()
    result = run_check(check("tensorrt: CUDA graphs are used"), workplace)
    assert result.outcome == "FAILED"
    assert "could not be captured" in result.seen


def test_no_graph_at_all_is_a_failure(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdxl_trt.engines.backends.trt.context import ShapedContext

    monkeypatch.setattr(ShapedContext, "wants_graph", property(lambda self: False))
    result = run_check(check("tensorrt: CUDA graphs are used"), workplace)
    assert (result.outcome, "no CUDA graph was launched" in result.seen) == ("FAILED", True)


def test_a_component_with_wrong_outputs_is_named(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    download = Stream.download

    def negated(self: Stream, target: Any, address: int, doing: str) -> None:
        download(self, target, address, doing)
        self.synchronize(doing)
        if "refiner_unet" in doing:
            target[...] = -target

    monkeypatch.setattr(Stream, "download", negated)
    records = workplace.records("tensorrt")
    few = {name: records[name] for name in ("refiner_unet", "text_encoder")}
    monkeypatch.setattr(workplace, "records", lambda flavour: few)
    result = run_check(check("tensorrt: every component matches ONNX Runtime"), workplace)
    assert result.outcome == "FAILED"
    assert "refiner_unet" in result.seen
    assert "text_encoder" not in result.seen, "its outputs are right"
