"""What fits is resident, what does not is swapped; unknown memory is no reason to swap."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from sdxl_trt.engines import memory
from sdxl_trt.engines.bundle import Bundle, Component
from sdxl_trt.engines.memory import Residency, available_host_memory, choose_residency, host_need

GIB = 1 << 30


@pytest.fixture
def bundle(component_of: Callable[..., Component], bundle_of: Callable[..., Bundle]) -> Bundle:
    """Return a bundle of two UNets with 100 million parameters each, and a large autoencoder's encoder."""
    unet = component_of("unet", 100_000_000)
    return bundle_of({"unet": unet, "refiner_unet": unet, "vae_encoder": component_of("vae_encoder", 10**12)})


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that stands for /proc and /sys."""
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


def test_a_component_needs_its_weights_in_fp32_and_more(component_of: Callable[..., Component]) -> None:
    fp32, fp16 = (host_need(component_of("unet", 1_000_000, precision)) for precision in ("fp32", "fp16"))
    assert 1.4 * 4_000_000 <= fp32 <= 2 * 4_000_000
    assert 1.9 * 4_000_000 <= fp16 <= 2.5 * 4_000_000


def test_what_fits_is_resident_what_does_not_is_swapped(bundle: Bundle) -> None:
    needed = 2 * host_need(bundle.manifest.components["unet"])
    assert choose_residency(bundle, "auto", 2 * needed) == "resident"
    assert choose_residency(bundle, "auto", needed) == "swap", "the last byte is not ours to take"
    assert choose_residency(bundle, "auto", needed // 2) == "swap"
    assert choose_residency(bundle, "auto", 0) == "swap"


@pytest.mark.parametrize("available", [None, 0, 1 << 50])
@pytest.mark.parametrize("wanted", get_args(Residency))
def test_a_stated_policy_is_kept(bundle: Bundle, wanted: str, available: int | None) -> None:
    assert choose_residency(bundle, wanted, available) == wanted


def test_unknown_memory_is_no_reason_to_swap(bundle: Bundle) -> None:
    assert choose_residency(bundle, "auto", None) == "resident"


MEMINFO = "MemTotal:       65536 kB\nMemFree:  1 kB\nMemAvailable:    4096 kB\nHugePages_Total:       0\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"meminfo": MEMINFO}, 4 << 20),
        ({"meminfo": "MemTotal: 65536 kB\n"}, None),
        ({"memory.max": "max\n", "memory.current": "5\n"}, None),
        ({"meminfo": MEMINFO, "memory.max": "max\n", "memory.current": "5\n"}, 4 << 20),
        ({"meminfo": MEMINFO, "memory.max": "3000\n", "memory.current": "1000\n"}, 2000),
        ({"meminfo": MEMINFO, "memory.max": f"{GIB}\n", "memory.current": "0\n"}, 4 << 20),
        ({"meminfo": MEMINFO, "memory.max": "1000\n", "memory.current": "3000\n"}, 0),
        ({"memory.max": "1000\n"}, None),
    ],
)
def test_the_smaller_limit_counts(machine: Path, files: dict[str, str], expected: int | None) -> None:
    for name, text in files.items():
        (machine / name).write_text(text)
    assert available_host_memory() == expected


def test_this_machine_has_some_memory() -> None:
    available = available_host_memory()
    assert available is None or available > 0
