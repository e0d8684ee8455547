"""The report of a cold load: every way reads the same bytes, bars decide, a timeline is drawn to scale."""

from pathlib import Path

import msgspec
import pytest

from sdxl_trt.benchmarks.cold_load import reading
from sdxl_trt.benchmarks.cold_load.__main__ import Report, Row, _row, bars, table
from sdxl_trt.benchmarks.cold_load.reading import WAYS, Lap, _prepared, make_file
from sdxl_trt.benchmarks.cold_load.timeline import RATES_4090, Span, Timeline, _timeline, draw
from sdxl_trt.engines.errors import CorruptError

GB = 1_000_000_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_file(tmp_path / "work" / "plan.bin", 1 << 20)
    return tmp_path / "work" / "plan.bin"


@pytest.mark.parametrize("way", WAYS)
def test_every_way_reads_the_file(path: Path, way: str) -> None:
    before = path.stat().st_mtime_ns
    make_file(path, 1 << 20)
    assert path.stat().st_mtime_ns == before, "it is made once"
    _prepared(way, path, 2)()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    if way != "sha256":  # it reads no more than a block
        with pytest.raises(CorruptError):
            _prepared(way, path, 2)()


def test_a_measurement_is_json(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    monkeypatch.setattr(reading.os, "write", lambda _, data: written.append(data))
    reading.main("stream", path, 2)
    lap = msgspec.json.decode(written[0], type=Lap)
    assert (lap.way, lap.threads) == ("stream", 2)
    assert lap.seconds > 0


def _laps(way: str, threads: int, seconds: tuple[float, ...], memory: int = GB) -> list[Lap]:
    return [Lap(way, threads, each, each * threads, memory) for each in seconds]


def test_ratios_are_of_the_same_round() -> None:
    others = [_laps(way, 1, (1.0 * n, 2.0 * n, 3.0 * n)) for n, way in enumerate(("file", "sha256", "before"), start=1)]
    row = _row(_laps("whole", 2, (0.5, 1.0, 3.0)), GB, others)
    assert (row.to_file, row.to_memory, row.to_before) == (2.0, 4.0, 6.0)
    assert (row.gigabytes_per_second, row.processor) == (1.0, 2.0)


def _rows(ratio: float, memory: int) -> list[Row]:
    return [Row(way, 2, 2.0, 0.7, 1.95, ratio, 2.5, memory, []) for way in ("whole", "touched", "stream")]


def test_the_bars_decide() -> None:
    assert [bar.met for bar in bars(_rows(1.8, GB + (64 << 20)), GB)] == [True, None] * 3 + [True]
    assert [bar.met for bar in bars(_rows(1.7, GB + (65 << 20)), GB)] == [False, None] * 3 + [False]


def test_a_timeline_states_the_stall_and_is_drawn_to_scale() -> None:
    spans = [
        Span("read", "unet", 0.0, 2.0), Span("load", "unet", 1.0, 2.0), Span("step", "unet", 2.0, 3.0),
        Span("step", "unet", 3.0, 4.0), Span("step", "refiner_unet", 6.0, 7.0), Span("step", "vae_decoder", 7.0, 8.0),
    ]  # fmt: skip
    timeline = _timeline("swap", spans)
    assert (timeline.first_step, timeline.stall, timeline.end) == (2.0, 2.0, 8.0)
    assert draw(timeline, 8.0, 8) == ["read    |BB      |", "load    | B      |", "compute |  BB  RD|"]


def test_the_report_says_that_rates_are_given() -> None:
    timeline = Timeline("swap", 1.0, 0.5, 2.0, [])
    rows = _rows(1.9, GB)
    text = table(Report({"cores": 2}, GB, 3, (0.1, 0.2), rows, RATES_4090, 5.0, [timeline], bars(rows, GB)))
    assert "Rates are given for an RTX 4090, not measured" in text
    assert "| swap | 1.00 s | 0.50 s | 2.00 s |" in text
    assert "| read and checked into new memory | 2 | 2.00 | 0.70 | 1.95 | 1.90 | 2.50 | 1000 MB |" in text
