"""The benchmark's arithmetic, and one build with a model so small that its figures mean nothing."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from sdxl_trt.benchmarks.full_size import build
from sdxl_trt.benchmarks.full_size.build import Build, Report, bars, main, merged, table
from sdxl_trt.benchmarks.full_size.build_cases import cases
from sdxl_trt.benchmarks.full_size.layer_types import Count, LayerTypes
from sdxl_trt.benchmarks.full_size.tensorrt_on_cpu import unavailable
from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.mini.embedded import bundle_path

MB, GB = 10**6, 10**9


def _build(activations: float = 300, plan: float = 1.02, anonymous: float = 2.2) -> Build:
    weights = 5 * GB
    return Build(
        component="unet",
        profiles="rows 2",
        weights=weights,
        plan=int(plan * weights),
        activations=int(activations * MB),
        layers=9,
        parse_seconds=0.5,
        seconds=80,
        peak_anonymous=int(anonymous * weights),
        peak_file=GB,
    )


def _eight_bit(plan: float = 0.55, linears: float = 0.96, convolutions: float = 0.81, attentions: int = 70) -> Build:
    shares = Count(700, 690, linears), Count(50, 38, convolutions), Count(70, attentions, attentions / 70)
    return msgspec.structs.replace(_build(plan=1.02 * plan), layer_types=LayerTypes(*shares, fused_attentions=70))


def _all_good() -> dict[str, Build]:
    return {case.name: _eight_bit() if case.export.eight_bit else _build() for case in cases()}


def test_figures_within_their_bars_are_met() -> None:
    assert [bar.met for bar in bars(_all_good())] == [True] * 25


@pytest.mark.parametrize(
    ("name", "worse", "missed"),
    [
        ("base UNet, static", _build(311), [0]),
        ("base UNet, static", _build(plan=1.04), [1]),
        ("base UNet, static", _build(anonymous=2.4), [2]),
        ("refiner UNet, static", _build(339), []),
        ("refiner UNet, static", _build(341, 1.04, 2.4), [3, 4, 5]),
        ("VAE decoder fp16, static", _build(1501), [6]),
        ("VAE decoder bf16, static", _build(1501), [7]),
        ("VAE decoder fp32, 512² tile", _build(801), [10]),
        ("VAE decoder bf16, as exported", _build(1501), [8]),
        ("VAE decoder fp32, as exported", _build(801), [9]),
        ("base UNet, dynamic", _build(9999, 9, 9), []),
        ("base UNet INT8, static", _eight_bit(0.57), [11]),
        ("base UNet INT8, static", _eight_bit(attentions=0), []),
        ("base UNet FP8, static", _eight_bit(linears=0.94), [15]),
        ("refiner UNet INT8, static", _eight_bit(convolutions=0.79), [20]),
        ("refiner UNet FP8, static", _eight_bit(attentions=69), [24]),
    ],
)
def test_a_figure_over_its_bar_is_missed(name: str, worse: Build, missed: list[int]) -> None:
    found = bars(_all_good() | {name: worse})
    assert [i for i, bar in enumerate(found) if bar.met is False] == missed


def test_a_build_that_did_not_run_is_not_measured() -> None:
    found = bars({"refiner UNet, static": _build()})
    assert [bar.met for bar in found] == [None] * 3 + [True] * 3 + [None] * 19
    found = bars({"base UNet INT8, static": _eight_bit()})
    assert [bar.met for bar in found[10:14]] == [None, None, True, True], "fp16's plan was not built"


def test_names_differ_and_static_means_static() -> None:
    found = {case.name: case for case in cases()}
    assert len(found) == len(cases())
    for name, case in found.items():
        fixed = all(axis.min == axis.max for axes in case.axes for axis in axes.values())
        assert fixed == ("dynamic" not in name and "UNet, as exported" not in name), name
    assert [axes["rows"].opt for axes in found["base UNet, --static"].axes] == [1, 2]
    assert str(found["refiner UNet, dynamic, batch 1:1:4"].axes[0]["rows"]) == "1:2:8"


def test_a_pattern_without_a_plan_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "base UNet INT4*", "--results", str(tmp_path / "x.json")])
    assert "--only base UNet INT4*: the plans are base UNet, static; " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_failure_is_in_the_table() -> None:
    report = Report({}, {}, False, {"a plan": _build()}, {"another": "it failed"}, [])
    text = table(report)
    assert "| a plan | rows 2 | 300 MB | 5.000 GB | 5.100 GB (1.020×) | 9 | 0.50 s | 80 s | 11.00 GB (2.20×)" in text
    assert "| another | failed: it failed |" in text


def test_the_table_tells_what_computes_in_8_bits() -> None:
    name = "refiner UNet FP8, static"
    text = table(Report({}, {}, False, {name: _eight_bit()}, {}, []))
    assert f"| {name} | 690 of 700 (96.0%) | 38 of 50 (81.0%) | 70 of 70 (100.0%) | 70 |" in text
    assert "in 8 bits" not in table(Report({}, {}, False, {name: _build()}, {}, []))


def _report(**builds: Build) -> Report:
    return Report({"processor": "P", "cores": 2}, {"sdxl-trt": "1"}, False, builds, {}, bars(builds))


def test_merged_results_keep_the_cases_that_did_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "build.json"
    static, ranged, exported = "base UNet, static", "base UNet, dynamic", "base UNet, as exported"
    assert merged(_report(**{ranged: _build()}), path) == _report(**{ranged: _build()}), "there is nothing to keep"
    path.write_bytes(msgspec.json.encode(_report(**{ranged: _build(1), static: _build(2)})))
    new = msgspec.structs.replace(
        _build(4), profile_activations=(1 * MB, 4 * MB), measured="2030-01-02", load=3.0, cpu_seconds=50.0
    )
    found = merged(_report(**{exported: new, ranged: _build(3)}), path)
    assert found.builds == {static: _build(2), ranged: _build(3), exported: new}
    assert list(found.builds) == [static, ranged, exported], "in the order of the cases"
    assert found.bars == bars(found.builds)
    text = table(found)
    assert f"| {exported} | rows 2 | 1, 4 MB |" in text
    assert "| 80 s (50 s of CPU) |" in text
    assert "| 3.0 on 2030-01-02 |" in text
    other = msgspec.structs.replace(found, versions={"sdxl-trt": "2"})
    with pytest.raises(UsageError, match="another version or size"):
        merged(other, path)


def test_a_build_on_another_machine_names_its_processor(tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "build.json", {"processor": "Q", "cores": 4}
    static, ranged = "base UNet, static", "base UNet, dynamic"
    path.write_bytes(msgspec.json.encode(_report(**{static: _build()})))
    new = msgspec.structs.replace(_build(), measured="2030-01-02", load=1.0)
    found = merged(msgspec.structs.replace(_report(**{ranged: new}), machine=elsewhere), path)
    assert found.machine == _report().machine
    assert found.builds == {static: _build(), ranged: msgspec.structs.replace(new, processor="Q, 4 cores")}
    assert "| 1.0 on 2030-01-02, Q, 4 cores |" in table(found)


@pytest.mark.skipif(bool(unavailable()), reason=f"no TensorRT parser: {unavailable()}")
def test_a_run_measures_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedded pair replaces the benchmark's exports, which take 15 seconds."""
    monkeypatch.setenv("PYTHONPATH", "")  # the benchmark sets it for its children
    monkeypatch.setattr(build, "_export", lambda *_: read_bundle(bundle_path()))
    results = tmp_path / "results.json"
    options = ["--work", str(tmp_path / "work"), "--only", "VAE decoder fp16, static"]
    code = main(["--quick", "--results", str(results), *options])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    report: dict[str, Any] = msgspec.json.decode(results.read_bytes())
    figures = report["builds"]["VAE decoder fp16, static"]
    assert figures["profiles"] == "pictures 1, height 1024, width 1024"
    assert figures["activations"] > 0
    assert figures["plan"] > figures["weights"]
    assert not list((tmp_path / "work").rglob("plan"))
    assert results.with_suffix(".md").read_text() == printed.out
    assert str(tmp_path) not in results.read_text()
