"""LoRAs as factors: up · down equals the difference that merging makes, for every kind that has factors."""

import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdxl_trt.engines.adapters.factors import Factors, SlotFactors, factors_of, plan_factors, rank_of
from sdxl_trt.engines.adapters.file import open_lora
from sdxl_trt.engines.adapters.kinds import Branch, LoraKind
from sdxl_trt.engines.adapters.merge import merge
from sdxl_trt.engines.adapters.names import Place
from sdxl_trt.engines.adapters.scaled import ScaledLora
from sdxl_trt.engines.adapters.tensors import StoredTensor
from sdxl_trt.engines.bundle.tensor_table import Slot
from sdxl_trt.engines.errors import IncompatibleError

MATRIX, KERNEL = (12, 8), (12, 8, 3, 3)
PLACE = Place("unet", "module", "")
Shapes = dict[str, tuple[int, ...]]
# The weight's shape, the parts' shapes, and the rank of the product.
KINDS: dict[str, tuple[LoraKind, tuple[int, ...], Shapes, int]] = {
    "LoRA": ("LoRA", MATRIX, {"down": (4, 8), "up": (12, 4)}, 4),
    "LoRA stored as 1x1 convolutions": ("LoRA", MATRIX, {"down": (4, 8, 1, 1), "up": (12, 4, 1, 1)}, 4),
    "LoCon": ("LoRA", KERNEL, {"down": (4, 8, 3, 3), "up": (12, 4, 1, 1)}, 4),
    "LoCon with a mid": ("LoRA", KERNEL, {"down": (5, 8, 1, 1), "up": (12, 4, 1, 1), "mid": (4, 5, 3, 3)}, 4),
    "LoHa": ("LoHa", MATRIX, {"hada_w1_a": (12, 2), "hada_w1_b": (2, 8), "hada_w2_a": (12, 3), "hada_w2_b": (3, 8)}, 6),
    "LoHa of a kernel": (
        "LoHa", KERNEL, {"hada_w1_a": (12, 2), "hada_w1_b": (2, 72), "hada_w2_a": (12, 3), "hada_w2_b": (3, 72)}, 6),
    "LoHa with cores": ("LoHa", KERNEL, {
        "hada_t1": (2, 3, 3, 3), "hada_w1_a": (2, 12), "hada_w1_b": (3, 8),
        "hada_t2": (2, 3, 3, 3), "hada_w2_a": (2, 12), "hada_w2_b": (3, 8)}, 4),
    "LoKr": ("LoKr", MATRIX, {"lokr_w1": (3, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)}, 4),
    "LoKr, both decomposed": ("LoKr", MATRIX, {
        "lokr_w1_a": (3, 1), "lokr_w1_b": (1, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)}, 2),
    "LoKr, both whole": ("LoKr", MATRIX, {"lokr_w1": (2, 4), "lokr_w2": (6, 2)}, 4),
    "LoKr of a kernel": ("LoKr", KERNEL, {"lokr_w1": (3, 2), "lokr_w2": (4, 4, 3, 3)}, 8),
    "LoKr with the kernel in its columns": (
        "LoKr", KERNEL, {"lokr_w1": (3, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 36)}, 4),
    "LoKr with a core": (
        "LoKr", KERNEL, {"lokr_w1": (3, 2), "lokr_t2": (2, 3, 3, 3), "lokr_w2_a": (2, 4), "lokr_w2_b": (3, 4)}, 4),
}  # fmt: skip


def _branch(kind: LoraKind, shapes: Shapes, scaling: float = 0.25) -> Branch:
    parts = {part: StoredTensor(Path("a"), part, shape, "F32") for part, shape in shapes.items()}
    return Branch(PLACE, kind, parts, scaling)


@pytest.mark.parametrize("name", KINDS)
def test_the_factors_make_the_difference_that_merging_makes(name: str, rng: np.random.Generator) -> None:
    kind, shape, shapes, rank = KINDS[name]
    branch = _branch(kind, shapes)
    assert branch.fits(shape)
    tensors = {part: rng.standard_normal(each).astype(np.float32) for part, each in shapes.items()}
    merged = np.zeros(shape, np.float32)
    merge(merged, branch, tensors, -0.5)
    found = factors_of(branch, tensors, -0.5 * branch.scaling)
    assert found.rank == rank_of(branch) == rank
    assert found.down.shape == (rank, math.prod(shape[1:]))
    np.testing.assert_allclose((found.up @ found.down).reshape(shape), merged, atol=2e-6)


def test_balanced_factors_are_the_same_product_and_fit_into_halves(rng: np.random.Generator) -> None:
    down, up = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 8), (12, 4)))
    given = Factors(down * 1024, up * np.float32(1e-6))
    balanced = given.balanced()
    np.testing.assert_array_equal(balanced.up @ balanced.down, given.up @ given.down)  # powers of two: exact
    assert 0.4 < np.abs(balanced.up).max() / np.abs(balanced.down).max() < 2.5
    zeros = Factors(down, np.zeros_like(up))
    assert zeros.balanced() is zeros


PROJ = "mid_block.attentions.0.proj_in"
SLOTS = {
    PROJ: Slot(module=PROJ, inputs=8, outputs=12),
    "conv_in": Slot(module="conv_in", inputs=4, outputs=6, kernel=(3, 3)),
}
SHAPES: Shapes = {
    f"{PROJ}.weight": MATRIX, f"{PROJ}.bias": (12,),
    "conv_in.weight": (6, 4, 3, 3), "conv_norm_out.weight": (16,), "conv_out.weight": (4, 16, 3, 3),
}  # fmt: skip
CONFIG = {
    "block_out_channels": [16], "layers_per_block": 1, "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"], "transformer_layers_per_block": 1,
}  # fmt: skip


def _planned(path: Path, tensors: dict[str, np.ndarray], *others: ScaledLora, scale: float = 1.0) -> SlotFactors:
    save_file(tensors, path)
    return plan_factors([ScaledLora(open_lora(path), scale), *others], "unet", SHAPES, CONFIG, SLOTS.keys())


def _lora(rank: int, rng: np.random.Generator, module: str = PROJ) -> dict[str, np.ndarray]:
    slot = SLOTS[module]
    kernel = {"down": (rank, slot.inputs, *slot.kernel), "up": (slot.outputs, rank, *(1 for _ in slot.kernel))}
    return {f"unet.{module}.lora_{part}.weight": rng.standard_normal(shape).astype(np.float32)
            for part, shape in kernel.items()}  # fmt: skip


def test_two_loras_are_concatenated_and_smaller_slots_are_filled_up(tmp_path: Path, rng: np.random.Generator) -> None:
    one, other = _lora(2, rng) | _lora(1, rng, "conv_in"), _lora(3, rng)
    save_file(other, tmp_path / "other.safetensors")
    second = ScaledLora(open_lora(tmp_path / "other.safetensors"), -0.4)
    planned = _planned(tmp_path / "one.safetensors", one, second, scale=0.7)
    assert planned.rank == 5
    assert planned.told == "one.safetensors (rank 2) and other.safetensors (rank 3)"
    found = dict(planned.each())
    assert {factors.rank for factors in found.values()} == {5}
    for module, parts in ((PROJ, [(one, 0.7), (other, -0.4)]), ("conv_in", [(one, 0.7)])):
        key = f"unet.{module}.lora_"
        expected = sum(
            scale * lora[f"{key}up.weight"].reshape(SLOTS[module].outputs, -1)
            @ lora[f"{key}down.weight"].reshape(-1, SLOTS[module].columns)
            for lora, scale in parts
        )  # fmt: skip
        np.testing.assert_allclose(found[module].up @ found[module].down, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({f"unet.{PROJ}.diff": MATRIX}, f"{PROJ}.weight by a full difference"),
        ({f"unet.{PROJ}.diff_b": (12,)}, f"the bias {PROJ}.bias"),
        ({"unet.conv_norm_out.w_norm": (16,)}, "conv_norm_out.weight by a full difference"),
        ({f"unet.{PROJ}.lora_down.weight": (2, 8),
          f"unet.{PROJ}.lora_up.weight": (12, 2),
          f"unet.{PROJ}.dora_scale": (12, 1)}, f"{PROJ}.weight by DoRA"),
        ({"unet.conv_out.lora_down.weight": (2, 16, 3, 3), "unet.conv_out.lora_up.weight": (4, 2, 1, 1)},
         "conv_out.weight, which has no input for LoRAs"),
    ],
    ids=["difference", "bias", "normalization", "DoRA", "no slot"],
)  # fmt: skip
def test_what_no_slot_takes_is_refused_by_name(tensors: Shapes, said: str, tmp_path: Path) -> None:
    given = {key: np.ones(shape, np.float32) for key, shape in tensors.items()}
    with pytest.raises(IncompatibleError, match="fuse it with export-engines --lora, or run on") as caught:
        _planned(tmp_path / "one.safetensors", given)
    assert f"one.safetensors: changes {said}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert _planned(tmp_path / "one.safetensors", given, scale=0.0).rank == 0
