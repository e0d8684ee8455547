"""Kernels of plans are counted as the builder's log lists them: layers.log is an excerpt of a real one, in FP8."""

from pathlib import Path

import pytest

from sdxl_trt.benchmarks.full_size.layer_types import Count, count_layer_types

LOG = Path(__file__).with_name("layers.log")


def _changed(folder: Path, *changes: tuple[str, str, str]) -> Path:
    """Write the log with `(start of a line, old, new)` changed in every line with that start."""
    lines = LOG.read_text().splitlines()
    for start, old, new in changes:
        assert any(line.startswith(start) and old in line for line in lines), (start, old)
        lines = [line.replace(old, new) if line.startswith(start) else line for line in lines]
    (folder / "changed.log").write_text("\n".join(lines))
    return folder / "changed.log"


def test_every_kind_of_kernel_is_counted_with_its_share_of_the_operations() -> None:
    found = count_layer_types(LOG)
    narrow, wide = 128 * 96 * (96 + 288 + 96), 2 * 224 * 256
    assert found.linears == Count(4, 3, round(narrow / (narrow + wide), 4))
    narrow, wide = 2 * 16 * 16 * 64 * 64 * 9 * 2 + 2 * 8 * 8 * 64 * 64 * 9, 2 * 16 * 16 * 4 * 64 * 9
    assert found.convolutions == Count(4, 3, round(narrow / (narrow + wide), 4))
    assert found.attentions == Count(2, 2, 1.0)
    assert found.fused_attentions == 1, "the other is two products"


@pytest.mark.parametrize("operand", ["Inputs", "Constants"])
def test_a_layer_that_reads_one_float_operand_is_not_in_8_bits(operand: str, tmp_path: Path) -> None:
    name = "model.down_blocks.1.attentions.0/node_MatMul_10"
    line = next(line for line in LOG.read_text().splitlines() if line.startswith(f"Name: {name}"))
    given = line[line.index(operand) :].partition("FP8")[0]
    assert (
        count_layer_types(_changed(tmp_path, (f"Name: {name}", f"{given}FP8", f"{given}Half"))).linears.eight_bit == 2
    )


@pytest.mark.parametrize("name", ["_gemm_mha_v2", "model.mid_block.attentions.0"])
def test_an_attention_with_one_float_operand_is_not_in_8_bits(name: str, tmp_path: Path) -> None:
    line = next(line for line in LOG.read_text().splitlines() if line.startswith(f"Name: {name}"))
    given = line.partition("FP8")[0]
    found = count_layer_types(_changed(tmp_path, (f"Name: {name}", f"{given}FP8", f"{given}Half")))
    assert found.attentions == Count(2, 1, 0.5)


def test_a_layer_of_a_size_that_varies_is_refused_but_no_product_with_a_lora(tmp_path: Path) -> None:
    assert "-1]" in LOG.read_text(), "the rank of LoRAs varies"
    name = "Name: model.down_blocks.1.attentions.0/node_MatMul_10"
    with pytest.raises(ValueError, match="only plans for one size can be counted"):
        count_layer_types(_changed(tmp_path, (name, "[128,96]", "[-1,96]")))


def test_a_log_without_types_is_refused(tmp_path: Path) -> None:
    """This is how TensorRT lists layers unless it is asked for more."""
    (tmp_path / "x.log").write_text("[V] Engine Layer Information:\nLayer(Myelin): {ForeignNode[a...b]}, Tactic: 0x0\n")
    with pytest.raises(ValueError, match=r"x\.log: has no list of layers"):
        count_layer_types(tmp_path / "x.log")
