"""The benchmark of merged upsampling compares two forms of one graph."""

import pytest

from sdxl_trt.benchmarks.upsampling import layer, main, measure


def test_both_forms_of_a_layer_are_timed_and_equal(capsys: pytest.CaptureFixture[str]) -> None:
    found = measure(layer(64), 4, 1)
    assert found.seconds > 0
    assert found.ratio > 0
    assert 0 < found.apart < 1e-5
    assert main(["--side", "2", "--rounds", "1"]) == 0
    assert capsys.readouterr().out.count("merged") == 4


def test_a_graph_without_upsampling_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 64 channels"):
        measure(layer(32), 4, 1)
