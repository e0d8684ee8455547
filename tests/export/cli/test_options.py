"""The plan options of export-engines."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.engines.host import Parser
from sdxl_trt.export.cli.options import add_plan_options, plan_options


def _parsed(*options: str) -> argparse.Namespace:
    parser = Parser(prog="export-engines")
    add_plan_options(parser)
    parser.set_defaults(layout="bundle")
    return parser.parse_args(["--engine", "tensorrt", *options])


@pytest.mark.parametrize(
    ("options", "ampere", "same"),
    [
        ([], False, False),
        (["--hardware-compatible"], True, False),
        (["--hardware-compatible", "--static"], True, False),
        (["--hardware-compatible", "ampere"], True, False),
        (["--hardware-compatible", "same"], False, True),
        (["--hardware-compatible=same"], False, True),
    ],
)
def test_hardware_compatibility_has_two_levels(options: list[str], ampere: bool, same: bool) -> None:
    """Without a value it keeps the meaning that it had before it took one."""
    plans = plan_options(_parsed(*options), lambda: True)
    assert plans is not None
    assert (plans.flags.hardware_compatible, plans.flags.same_compute_capability) == (ampere, same)


def test_another_level_is_an_error_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        _parsed("--hardware-compatible", "turing")
    assert "--hardware-compatible: invalid choice: 'turing'" in capsys.readouterr().err


def _timing_cache(*arguments: str) -> Any:
    options = plan_options(_parsed(*arguments), lambda: True)
    assert options is not None
    return options.timing_cache


def test_the_timing_cache_is_the_default_one_a_file_or_none() -> None:
    assert _timing_cache() is True
    assert _timing_cache("--timing-cache", "a.cache") == Path("a.cache")
    assert _timing_cache("--no-timing-cache") is False


def test_a_timing_cache_and_none_at_once_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _timing_cache("--no-timing-cache", "--timing-cache", "a.cache")
    assert "not allowed with argument" in capsys.readouterr().err


def test_plans_for_loras_are_built_only_if_they_are_asked_for() -> None:
    plain, both = (plan_options(_parsed(*options), lambda: True) for options in ((), ("--lora-rank", "64")))
    assert plain is not None
    assert both is not None
    assert (plain.lora_rank, both.lora_rank) == (0, 64)
    assert plain.told == "a tensorrt plan of every component"
    assert both.told == f"{plain.told}, and another for LoRAs of UNets and text encoders, rank 64"
    with pytest.raises(UsageError, match=r"--lora-rank, .* apply to plans, but none would be built here"):
        plan_options(_parsed("--lora-rank", "64", "--engine", "none"), lambda: False)


@pytest.mark.parametrize("text", ["-1", "2000", "many", "1.5"])
def test_a_rank_is_a_number_that_plans_can_have(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parsed(f"--lora-rank={text}")
    assert f"{text}: expected the largest rank of a request's LoRAs, 1 to 1024, or 0" in capsys.readouterr().err
