"""trt-bench as a command, with scripts as contestants, and once for real on the embedded pair."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from sdxl_trt.benchmarks.cli import main
from sdxl_trt.benchmarks.contest import bench
from sdxl_trt.benchmarks.contest.bench import BenchOptions, run_bench, settled_spec
from sdxl_trt.benchmarks.contest.sweeps import is_usual, sweep_asks
from sdxl_trt.benchmarks.measure.subjects import Subject, find_subject
from sdxl_trt.benchmarks.report.records import BenchReport, read_report
from sdxl_trt.engines.errors import EngineError, SizeError, UsageError

# A contestant that answers every question with fixed figures; code to run first is in its arguments.
FAKE = """
import json, sys
name, first = sys.argv[1:]
exec(first)
tasks = ["picture", "base UNet step"]
for line in sys.stdin:
    ask = json.loads(line)
    answer = {"prepare": {"type": "ready", "precision": "fp32", "import_seconds": 1, "load_seconds": 2, "tasks": tasks,
                          "note": "a note"},
              "run": {"type": "ran", "seconds": 2.5, "stages": {"base": 2}}, "quit": {"type": "bye"},
              "memory": {"type": "memory", "peak_rss": 5}}[ask["do"]]
    print(json.dumps(answer), flush=True)
    if ask["do"] == "quit":
        break
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the user's cache folder."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def subject(cache: Path) -> Subject:
    return find_subject(None, None, None, cache / "sdxl-trt" / "bench", lambda _: None)


@pytest.fixture(autouse=True)
def _in_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Replace all contestants by scripts; return a dict of the code each one runs first, by name."""
    first: dict[str, str] = {}

    def command(entry: Any, _: Path) -> list[str]:
        return [sys.executable, "-S", "-c", FAKE, entry.name, first.get(entry.name, "")]

    monkeypatch.setattr(bench, "command", command)
    monkeypatch.setattr(bench, "unable", lambda entry, **_: "no GPU" if "gpu" in entry.needs else "")
    monkeypatch.setattr(bench, "cpu_rates", lambda threads: ({"fp32": {1: 51e9, 2: 98e9}, "int8": {1: 2e11}}, ""))
    monkeypatch.setattr(bench, "cpu_floors", lambda *_: ({"base UNet step": 0.5}, "floors: as told"))
    return first


def test_every_contestant_is_in_the_report(subject: Subject, fakes: dict[str, str]) -> None:
    fakes["eager"] = "sys.exit('no torch')"
    fakes["compile"] = "print('compiling')"
    said: list[str] = []
    report = run_bench(subject, BenchOptions(runs=2, components=True, sweeps=True), said.append)
    reasons = {one.name: one.missing for one in report.contestants}
    assert reasons["ort-cuda"] == reasons["tensorrt"] == "no GPU"
    assert reasons["eager"] == "prepare: it ended with exit code 1 (no torch)"
    assert "which is not a valid answer" in reasons["compile"]
    running = {name for name, reason in reasons.items() if not reason}
    openvino = {"openvino", "openvino-bf16", "openvino-int8", "openvino-int8-scoped", "openvino-int8-bf16"}
    assert (
        running
        == {"sdxl-trt", "sdxl-trt-int8", "sdxl-trt-openvino", "onnxruntime", "eager-bf16", "diffusers", "optimum"}
        | {"sdxl-trt-fast", "sdxl-trt-fastest", "sdxl-trt-fastest-openvino", "compile-bf16"}
        | openvino
    )
    compared = [(one.what, one.contestant) for one in report.measurements if not one.sweep]
    assert {name for what, name in compared if what == "picture"} == running
    assert {what for what, _ in compared} == {"picture", "base UNet step"}
    assert {one.median for one in report.ratios} == {1.0}
    assert {one.contestant for one in report.ratios} == {"sdxl-trt", "sdxl-trt-int8", "sdxl-trt-fastest-openvino"}
    assert {one.sweep for one in report.measurements} == {"", "size", "batch", "handoff"}
    assert {one.contestant for one in report.measurements if one.sweep} == {"sdxl-trt"}
    assert report.floors == {"base UNet step": 0.5}
    assert report.notes[0] == "floors: as told"
    assert report.machine["fp32_GEMM"] == "51 and 98 GFLOP/s on 1 and 2 threads"
    assert report.machine["int8_GEMM"] == "200 GOP/s on 1 thread"
    assert {one.note for one in report.contestants if one.name == "openvino-int8"} == {"a note"}
    assert report.of("sdxl-trt", "base UNet step").rows == 2  # type: ignore[union-attr]
    assert next(one for one in report.contestants if one.name == "openvino").peak_rss == 5
    assert "eager: preparing" in said


def test_without_ours_there_is_no_benchmark(subject: Subject, fakes: dict[str, str]) -> None:
    fakes["sdxl-trt"] = "sys.exit('broken')"
    with pytest.raises(EngineError, match="broken"):
        run_bench(subject, BenchOptions(against="eager"))


@pytest.mark.parametrize(
    ("options", "error"),
    [(BenchOptions(steps=0), UsageError), (BenchOptions(batch=0), UsageError), (BenchOptions(runs=-1), UsageError),
     (BenchOptions(width=100), SizeError), (BenchOptions(against="nobody"), UsageError)],
)  # fmt: skip
def test_invalid_options_are_refused_before_anything_starts(
    subject: Subject, options: BenchOptions, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "Child", None)
    with pytest.raises(error):
        run_bench(subject, options)


def test_sweeps_contain_sizes_that_the_unets_take(subject: Subject) -> None:
    spec = settled_spec(subject, BenchOptions())
    asks = list(sweep_asks(spec, 8))
    sizes = [(ask.width, ask.height) for name, ask in asks if name == "size"]
    assert sizes == [(64, 64), (96, 96), (128, 128)]
    assert [ask.batch for name, ask in asks if name == "batch"] == [1, 2, 4]
    handoffs = [ask.handoff for name, ask in asks if name == "handoff"]
    assert handoffs == [0.25, 0.5, 0.75, 0.8, 0.9, "none"]
    assert all(ask.varied for _, ask in asks)
    usual = [(name, ask.width or ask.batch or ask.handoff) for name, ask in asks if is_usual(ask, spec)]
    assert usual == [("size", 128), ("batch", 1), ("handoff", 0.8)]
    alone = settled_spec(subject, BenchOptions(handoff=None))
    assert {name for name, _ in sweep_asks(alone, 64)} == {"size", "batch"}
    assert min(ask.width or 64 for _, ask in sweep_asks(alone, 128)) == 64


def test_the_command_writes_pages_and_prints_one_object(
    fakes: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    assert main(["--against", "eager,tensorrt", "--quick", "--json", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    report = msgspec.convert(json.loads(printed.out), BenchReport)
    assert report.command == ("trt-bench", "--against", "eager,tensorrt", "--quick", "--json", "--out", str(out))
    assert (report.settings.steps, report.settings.runs) == (5, 3)
    assert [one.name for one in report.contestants] == ["sdxl-trt", "eager", "tensorrt"]
    assert read_report(out / "report.json") == report
    assert {path.name for path in out.iterdir()} == {"report.json", "report.md", "report.html"}
    assert "round" not in printed.err
    assert "tensorrt: no GPU\n" in printed.err


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["--against", "nobody"], 2, "--against nobody"),
        (["--size", "big"], 2, "give width and height in pixels"),
        (["--size", "100x128"], 2, "--width 100"),
        (["--runs", "0"], 2, "--runs 0"),
        (["--refiner", "x"], 2, "--refiner"),
        (["--engines", "/nowhere"], 2, "/nowhere"),
        (["--estimate", "voodoo2"], 2, "voodoo2"),
        (["--against"], 2, "--against"),
    ],
)
def test_errors_are_one_line(argv: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        found = main(argv)
    except SystemExit as exc:
        found = int(exc.code or 0)
    printed = capsys.readouterr()
    assert found == code
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert says in printed.err


def test_an_estimate_runs_no_contestant(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "Child", None)
    assert main(["--estimate", "h100", "--json"]) == 0
    assert "H100" in json.loads(capsys.readouterr().out)["gpu"]["name"]


def test_quality_below_its_limit_is_an_error(
    fakes: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quality = SimpleNamespace(
        VARIANTS=("fp32",), measure_quality=lambda *_: ("a row",), verdict=lambda rows: f"quality: {rows[0]} is off"
    )
    monkeypatch.setitem(sys.modules, "sdxl_trt.benchmarks.quality", quality)
    monkeypatch.setattr("sdxl_trt.benchmarks.report.markdown_report", lambda report: "# all of it\n")
    assert main(["--against", "none", "--quick", "--quality"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "# all of it\n", printed.err
    assert printed.err.endswith("error: quality: a row is off\n")


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; sys.modules['numpy'] = sys.modules['msgspec'] = None\nfrom sdxl_trt.benchmarks.cli import main\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "main(['--help'])"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "--estimate" in done.stdout


@pytest.mark.slow
def test_the_embedded_pair_for_real(subject: Subject) -> None:
    """Ours and plain ONNX Runtime on the same graphs, in separate processes, have the same output."""
    options = BenchOptions(against="onnxruntime", steps=2, runs=1, components=True, floors=False)
    report = run_bench(subject, options)
    assert [one.missing for one in report.contestants] == ["", ""]
    done = {(one.what, one.contestant) for one in report.measurements}
    steps = {(f"{stage} UNet step", name) for stage in ("base", "refiner") for name in ("sdxl-trt", "onnxruntime")}
    parts = {"picture", "text encoders", "VAE decode", "handoff", "handoff resident"}
    assert done == steps | {(part, "sdxl-trt") for part in parts}
    picture = report.of("sdxl-trt", "picture")
    assert picture is not None
    assert set(picture.stages) == {"encode", "load", "base", "refiner", "decode"}
    assert 0 < sum(picture.stages.values()) <= picture.seconds[0]
    other = report.of("onnxruntime", "base UNet step")
    assert other is not None
    assert other.difference is not None
    assert other.difference < 0.01
    assert all((one.peak_rss or 0) > 1 << 26 for one in report.contestants)
