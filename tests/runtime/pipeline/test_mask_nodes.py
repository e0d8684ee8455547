"""ComfyUI's mask nodes against loops over pixels; whole runs are compared in tests/references."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.comfyui import Loaded, Mask, Padded, Scaled
from sdxl_trt.runtime.pipeline import mask_nodes
from sdxl_trt.runtime.pipeline.chain_masks import ChainMasks
from sdxl_trt.runtime.pipeline.mask_nodes import canvas_mask, cropped_mask, feathered, greyed, grown, widened

MOVED = mask_nodes._moved


@pytest.fixture
def mask(rng: np.random.Generator) -> np.ndarray:
    return (rng.random((9, 12)) ** 3).astype(np.float32)


@pytest.mark.parametrize("by", [0, 1, 2, 5, 6])
def test_widened_is_the_square_convolution(by: int, mask: np.ndarray) -> None:
    expected = np.rint(mask)
    if by:
        before = -(-(by - 1) // 2)
        padded = np.pad(expected, before)
        for y, x in np.ndindex(mask.shape):
            expected[y, x] = padded[y : y + by, x : x + by].max()
    np.testing.assert_array_equal(widened(mask, by), expected)


@pytest.mark.parametrize("by", [-7, -2, 0, 1, 3, 6, 13, 40])
@pytest.mark.parametrize("tapered", [True, False])
def test_grown_takes_the_extreme_of_the_neighbours(by: int, tapered: bool, mask: np.ndarray) -> None:
    expected = mask
    for _ in range(abs(by)):
        padded = np.pad(expected, 1, mode="edge")
        near = [(y, x) for y in range(3) for x in range(3) if not tapered or 1 in (y, x)]
        parts = [padded[y : y + 9, x : x + 12] for y, x in near]
        expected = np.max(parts, axis=0) if by > 0 else np.min(parts, axis=0)
    np.testing.assert_array_equal(grown(mask, by, tapered=tapered), expected)


@pytest.mark.parametrize("tapered", [True, False])
def test_a_mask_grows_any_distance_in_few_steps(tapered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Counter[str]()
    monkeypatch.setattr(mask_nodes, "_moved", lambda *args: steps.update(["moved"]) or MOVED(*args))
    start = np.zeros((8, 3000), np.float32)
    start[0, 0] = 1.0
    made = grown(start, 2000, tapered=tapered)
    reached = np.add.outer(np.arange(8) * tapered, np.arange(3000)) <= 2000
    np.testing.assert_array_equal(made, reached)
    assert steps["moved"] <= 4 * 12


def test_what_a_mask_is_made_of_is_no_larger_than_a_loaded_picture(tmp_path: Path) -> None:
    Image.new("RGB", (1000, 900)).save(tmp_path / "a.png")
    masks, image = ChainMasks(tmp_path, 8), Loaded("a.png")
    masks.read(image)
    thrice = Scaled(Scaled(Scaled(image, "bilinear", by=8.0), "bilinear", by=2.0), "bilinear", by=8.0, node="7")
    for refused, size in (
        (thrice, "128000x115200"),
        (Padded(image, (16000, 8000, 0, 0), node="7"), "17000x8900"),
        (Scaled(image, "bilinear", size=(17000, 8), node="7"), "17000x8"),
        (Mask("channel", image=thrice, channel="red", node="7"), "128000x115200"),
        (Mask("grown", Mask("solid", values=(1.0, 16384, 16384)), values=(1, 1), node="7"), "16384x16384"),
    ):
        with pytest.raises(UsageError, match=f"^node 7: makes {size}, more than 89478485 pixels or 16384 on a side"):
            masks.check(refused)
    masks.check(Mask("fitted", Mask("solid", values=(1.0, 64, 64)), Scaled(image, "bilinear", by=8.0)))


def test_feathered_falls_toward_the_edges(mask: np.ndarray) -> None:
    expected = mask.copy()
    for x in range(4):
        expected[:, x] *= (x + 1) / 4
    for y in range(9):  # more than the height
        expected[-(y + 1)] *= (y + 1) / 9
    np.testing.assert_allclose(feathered(mask, (4, 0, 0, 100)), expected, rtol=1e-6)


def test_a_canvas_without_room_for_feathering_has_hard_edges() -> None:
    hard, soft = canvas_mask((8, 8), (2, 0, 0, 0), 4), canvas_mask((8, 8), (2, 0, 0, 0), 3)
    assert set(np.unique(hard)) == {0.0, 1.0}
    np.testing.assert_allclose(soft[0, :6], [1, 1, 1, 4 / 9, 1 / 9, 0], rtol=1e-6)


def test_grey_and_crop_follow_the_rounded_mask(mask: np.ndarray) -> None:
    assert cropped_mask(mask, 4).shape == (8, 12)
    np.testing.assert_array_equal(cropped_mask(mask, 8), mask[0:8, 2:10])
    pixels = np.zeros((1, 3, 9, 12), np.float32)
    np.testing.assert_array_equal(greyed(pixels, mask)[0, 0], np.rint(mask) / 2)
