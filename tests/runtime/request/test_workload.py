"""What memory is planned for: the components that a request uses beside those of every run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines import IncompatibleError
from sdxl_trt.engines.bundle import USUAL_RUN, Bundle, Workload, read_bundle
from sdxl_trt.runtime import Request
from sdxl_trt.runtime.cli.generate import _workload
from sdxl_trt.runtime.cli.options import make_parser
from sdxl_trt.runtime.controls import ControlUse
from sdxl_trt.runtime.request import workload_of

FOX = Request("a fox")
GREY = np.zeros((64, 64, 3), np.uint8)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, USUAL_RUN),
        ({"image": GREY}, Workload(from_image=True)),
        ({"vae": "tiny"}, Workload(tiny=True)),
        ({"cache": 2}, Workload(cached=("base", "refiner"))),
        ({"cache": 2, "refiner_cache": 1}, Workload(cached=("base",))),
        ({"refiner_cache": 3}, Workload(cached=("refiner",))),
        ({"cache": 2, "handoff": None}, Workload(cached=("base",))),
        ({"cache": 2, "image": GREY, "refine": True}, Workload(from_image=True, cached=("refiner",))),
    ],
)
def test_a_request_says_what_it_uses(embedded: Bundle, changes: dict[str, Any], expected: Workload) -> None:
    assert workload_of(replace(FOX, **changes), embedded.manifest) == expected


def test_controlnets_count_by_component(controlled: Path, embedded: Bundle) -> None:
    manifest = read_bundle(controlled).manifest
    uses = tuple(ControlUse(GREY, net=net.name) for net in reversed(manifest.controlnets))
    found = workload_of(replace(FOX, controls=uses), manifest)
    assert found == Workload(controls=tuple(net.component for net in reversed(manifest.controlnets)))
    with pytest.raises(IncompatibleError, match="the bundle has no ControlNet"):
        workload_of(replace(FOX, controls=uses), embedded.manifest)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], USUAL_RUN),
        (["--vae", "tiny", "--cache", "2"], Workload(cached=("base", "refiner"), tiny=True)),
        (["--cache", "2", "--refiner-cache", "1"], Workload(cached=("base",))),
        (["--cache", "2", "--no-refiner"], Workload(cached=("base",))),
        (["--refine", "a.png", "--cache", "2"], Workload(cached=("refiner",))),
    ],
)
def test_options_say_the_same(embedded: Bundle, options: list[str], expected: Workload) -> None:
    """Whether there is a picture is known once it is read, or from the workflow."""
    arguments = make_parser().parse_args(["a fox", *options])
    assert _workload(arguments, embedded, from_image=False) == expected
    changed = _workload(arguments, embedded, {"unet": 1}, from_image=True)
    assert changed == replace(expected, from_image=True, adapted=("unet",))
