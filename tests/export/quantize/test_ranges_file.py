"""Ranges survive a file; a file of another model, a damaged or a hostile one is refused in one line."""

import contextlib
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdxl_trt.engines.errors import CorruptError, UsageError
from sdxl_trt.export.eight_bit import Ranges
from sdxl_trt.export.quantize import ranges_file
from sdxl_trt.export.quantize.ranges_file import load_ranges, save_ranges

UNET = Ranges("unet", {"a.input": (-1.25, 3.5), "b.output": (0.0, 1e-7), "c.q": (-float(np.float32(0.1)), 7.0)})
REFINER = Ranges("refiner_unet", {"a.input": (-2.0, 2.0)})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_ranges(tmp_path / "ranges.npz", {"unet": ("1f", UNET), "refiner_unet": ("2e", REFINER)})
    return tmp_path / "ranges.npz"


def test_ranges_are_read_as_they_were_written(saved: Path) -> None:
    found = load_ranges(saved, {"refiner_unet": "2e", "unet": "1f"})
    assert found == {"unet": UNET, "refiner_unet": REFINER}
    assert found["unet"].digest() == UNET.digest()
    assert load_ranges(saved, {"unet": "1f"}) == {"unet": UNET}
    assert [path.name for path in saved.parent.iterdir()] == ["ranges.npz"]


def test_ranges_of_another_model_or_component_are_refused(saved: Path) -> None:
    with pytest.raises(UsageError, match="the ranges of unet were measured on another model, or with other LoRAs"):
        load_ranges(saved, {"unet": "2e"})
    with pytest.raises(UsageError, match="has no ranges of vae_decoder; measure them"):
        load_ranges(saved, {"unet": "1f", "vae_decoder": "3d"})
    with pytest.raises(UsageError, match=r"missing\.npz: No such file"):
        load_ranges(saved.with_name("missing.npz"), {"unet": "1f"})


def _rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    with np.load(path) as content:
        arrays = {name: content[name] for name in content.files}
    change(arrays)
    np.savez(path, **arrays)


@pytest.mark.parametrize("spans", [(np.nan, 1.0), (0.0, np.inf), (-np.inf, 0.0), (2.0, 1.0)])
def test_ranges_that_are_no_numbers_are_refused(spans: tuple[float, float], saved: Path) -> None:
    _rewrite(saved, lambda arrays: arrays["unet/spans"].__setitem__(1, spans))
    with pytest.raises(CorruptError, match=r"the range of b\.output in unet is .* no range of numbers"):
        load_ranges(saved, {"unet": "1f"})


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("spans", np.zeros((2, 2))), ("spans", np.zeros(6)), ("spans", np.zeros((3, 2), np.int64)),
        ("spans", np.zeros((3, 2), complex)), ("names", np.zeros(3)), ("names", np.array("a.input")),
    ],
)  # fmt: skip
def test_arrays_of_another_kind_are_refused(part: str, value: Any, saved: Path) -> None:
    _rewrite(saved, lambda arrays: arrays.update({f"unet/{part}": value}))
    with pytest.raises(CorruptError, match="the ranges of unet are damaged"):
        load_ranges(saved, {"unet": "1f"})


class _Bomb:
    def __reduce__(self) -> Any:
        return pytest.fail, ("unpickled",)


def _archive(**members: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"unet/{name}", data)
    return content.getvalue()


def _npy(header: str) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"", b"a red fox\n", pickle.dumps(_Bomb()), _archive(digest=b"1f", names=b"a", spans=b"0 1"),
        _archive(**{"names.npy": _npy("{'descr': '|O', 'fortran_order': False, 'shape': ()}") + pickle.dumps(_Bomb())}),
        _archive(**{"spans.npy": _npy("{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999, 2)}")}),
        _archive(**{"spans.npy": _npy("{'descr': 'x', 'fortran_order': 3}")}),
    ],
    ids=["empty", "prompts", "pickle", "no arrays", "pickled array", "petabytes", "broken header"],
)  # fmt: skip
def test_files_of_another_kind_are_refused_and_nothing_in_them_runs(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ranges.npz"
    path.write_bytes(content)
    with pytest.raises(CorruptError) as caught:
        load_ranges(path, {"unet": "1f"})
    assert "\n" not in str(caught.value)
    assert "ranges.npz" in str(caught.value)


def test_a_file_that_is_too_large_or_unpacks_to_too_much_is_not_read(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = saved.stat().st_size
    _rewrite(saved, lambda arrays: arrays.update(padding=np.zeros(1 << 20)))
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("read"))
    monkeypatch.setattr(ranges_file, "_MOST_BYTES", 1 << 20)
    with pytest.raises(CorruptError, match="larger than 1 MiB"):
        load_ranges(saved, {"unet": "1f"})
    content = io.BytesIO()
    np.savez_compressed(content, padding=np.zeros(1 << 20))
    assert len(content.getvalue()) < 1 << 20
    saved.write_bytes(content.getvalue())
    with pytest.raises(CorruptError, match="unpacks to more than 1 MiB"):
        load_ranges(saved, {"unet": "1f"})
    assert size < 1 << 20


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_states_the_same_ranges(data: st.DataObject, saved: Path) -> None:
    whole = saved.read_bytes()
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = saved.with_name("damaged.npz")
    path.write_bytes(damaged[: data.draw(st.integers(len(whole) // 2, len(whole)))])
    with contextlib.suppress(UsageError, CorruptError):  # nothing else
        assert load_ranges(path, {"unet": "1f"}) == {"unet": UNET}


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        save_ranges(tmp_path / "missing" / "ranges.npz", {"unet": ("1f", UNET)})
    assert list(tmp_path.iterdir()) == []
