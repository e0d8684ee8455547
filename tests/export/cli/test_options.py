"""The plan options of export-engines: the timing cache."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.export.cli.options import add_plan_options, plan_options


def _timing_cache(*arguments: str) -> Any:
    parser = argparse.ArgumentParser()
    add_plan_options(parser.add_argument_group("plans"))
    parsed = parser.parse_args(["--engine", "tensorrt", *arguments])
    options = plan_options(argparse.Namespace(**vars(parsed), layout="bundle"), lambda: True)
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
