"""DoRA, LoHa, LoKr and full differences: fused weights against the formulas of LyCORIS, ComfyUI and peft."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdxl_trt.engines.adapters.file import Lora, open_lora
from sdxl_trt.engines.errors import CorruptError, SdxlTrtError, SourceError
from sdxl_trt.export.checkpoints.checkpoint import Checkpoint, open_file
from sdxl_trt.export.lora.fuse import check_fits, fuse_loras

LINEAR, CONV, POINT, NORM = "mid_block.linear", "mid_block.conv", "mid_block.point", "mid_block.norm"
SHAPES = {
    f"{LINEAR}.weight": (12, 8), f"{LINEAR}.bias": (12,), f"{CONV}.weight": (12, 8, 3, 3), f"{CONV}.bias": (12,),
    f"{POINT}.weight": (12, 8, 1, 1), f"{NORM}.weight": (8,), f"{NORM}.bias": (8,),
}  # fmt: skip
# It lists no module: LDM names are not tested here.
CONFIG = {"block_out_channels": [4], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base") / "unet.safetensors"
    save_file({name: torch.randn(shape) for name, shape in SHAPES.items()}, path)
    return open_file(path)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[Tensors], Lora]:
    files: Iterator[int] = iter(range(99))

    def opened(tensors: Tensors) -> Lora:
        path = tmp_path / f"{next(files)}.safetensors"
        save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path)
        return open_lora(path)

    return opened


def _fused(base: Checkpoint, lora: Lora, scale: float = 1.0) -> Tensors:
    check_fits([lora], {"unet": SimpleNamespace(state=SHAPES, config=CONFIG)})  # type: ignore[dict-item]
    return dict(fuse_loras(base, "unet", [(lora, scale)], CONFIG).read(SHAPES))


def _named(module: str, parts: Mapping[str, torch.Tensor]) -> Tensors:
    """Return the tensors under kohya's and LyCORIS' names."""
    return {f"lora_unet_{module.replace('.', '_')}.{part}": tensor for part, tensor in parts.items()}


def _random(*shapes: tuple[int, ...]) -> Iterator[torch.Tensor]:
    torch.manual_seed(1)
    return (torch.randn(shape) for shape in shapes)


def _tucker(core: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """LyCORIS' rebuild_tucker in loops: sum over i and j of core[i, j] · a[i, out] · b[j, in]."""
    result = torch.zeros(a.shape[1], b.shape[1], *core.shape[2:])
    for i in range(core.shape[0]):
        for j in range(core.shape[1]):
            result += torch.outer(a[i], b[j])[:, :, None, None] * core[i, j]
    return result


def _kron(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The Kronecker product block by block: every element of `first` times the whole of `second`."""
    rows = [torch.cat([value * second for value in row], dim=1) for row in first]
    return torch.cat(rows, dim=0)


Case = tuple[str, dict[str, torch.Tensor], torch.Tensor]


def _cases() -> Iterator[tuple[str, Case]]:
    """Yield (name, (module, parts, difference)), each kind's formula written out."""
    a, b, c, d = _random((12, 2), (2, 8), (12, 3), (3, 8))
    loha = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
    yield "LoHa", (LINEAR, loha, (a @ b) * (c @ d))
    yield "LoHa, alpha", (LINEAR, loha | {"alpha": torch.tensor(5.0)}, (a @ b) * (c @ d) * 5 / 2)
    yield "LoHa, 1x1", (POINT, loha, ((a @ b) * (c @ d))[:, :, None, None])
    a, b, c, d = _random((12, 2), (2, 72), (12, 2), (2, 72))
    flat = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
    yield "LoHa, 3x3", (CONV, flat, ((a @ b) * (c @ d)).reshape(12, 8, 3, 3))
    a, b, c, d, s, t = _random((2, 12), (3, 8), (2, 12), (3, 8), (2, 3, 3, 3), (2, 3, 3, 3))
    tucker = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "hada_t1": s, "hada_t2": t}
    yield "LoHa, Tucker", (CONV, tucker | {"alpha": torch.tensor(2.0)}, _tucker(s, a, b) * _tucker(t, c, d) * 2 / 3)

    small, large, a, b = _random((3, 2), (4, 4), (4, 2), (2, 4))
    # Whole matrices have no rank: alpha, which LyCORIS writes anyway, has no meaning (as in ComfyUI).
    whole = {"lokr_w1": small, "lokr_w2": large, "alpha": torch.tensor(100.0)}
    yield "LoKr", (LINEAR, whole, _kron(small, large))
    factored = {"lokr_w1": small, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(3.0)}
    yield "LoKr, w2 factored", (LINEAR, factored, _kron(small, a @ b) * 3 / 2)
    c, d = _random((3, 2), (2, 2))
    first = {"lokr_w1_a": c, "lokr_w1_b": d, "lokr_w2": large, "alpha": torch.tensor(3.0)}
    yield "LoKr, w1 factored", (LINEAR, first, _kron(c @ d, large) * 3 / 2)
    both = {"lokr_w1_a": c, "lokr_w1_b": d, "lokr_w2_a": a, "lokr_w2_b": b}
    yield "LoKr, both factored", (LINEAR, both, _kron(c @ d, a @ b))
    yield "LoKr, 1x1", (POINT, factored, (_kron(small, a @ b) * 3 / 2)[:, :, None, None])
    (kernel,) = _random((4, 4, 3, 3))
    yield "LoKr, 3x3", (CONV, {"lokr_w1": small, "lokr_w2": kernel}, _kron(small, kernel))
    a, b = _random((4, 2), (2, 36))
    # The kernel is in the columns of w2, innermost.
    flat = {"lokr_w1": small, "lokr_w2_a": a, "lokr_w2_b": b}
    yield "LoKr, 3x3 flat", (CONV, flat, _kron(small, (a @ b).reshape(4, 4, 3, 3)))
    a, b, t = _random((2, 4), (3, 4), (2, 3, 3, 3))
    parts = {"lokr_w1": small, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": t, "alpha": torch.tensor(6.0)}
    yield "LoKr, Tucker", (CONV, parts, _kron(small, _tucker(t, a, b)) * 6 / 3)

    for module, shape in ((LINEAR, (12, 8)), (CONV, (12, 8, 3, 3)), (NORM, (8,))):
        (diff,) = _random(shape)
        yield f"difference of {module}", (module, {"diff": diff}, diff)
    yield "difference of a norm", (NORM, {"w_norm": diff}, diff)
    (diff,) = _random((12, 8))
    yield "difference, 1x1", (POINT, {"diff": diff}, diff[:, :, None, None])


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in _cases()])
@pytest.mark.parametrize("scale", [1.0, -0.4])
def test_each_kind_adds_its_difference(
    case: Case, scale: float, base: Checkpoint, opened: Callable[[Tensors], Lora]
) -> None:
    module, parts, difference = case
    fused, plain = _fused(base, opened(_named(module, parts)), scale), dict(base.read(SHAPES))
    name = f"{module}.weight"
    torch.testing.assert_close(fused[name], plain[name] + scale * difference, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(fused[other], plain[other]) for other in SHAPES if other != name)
    assert difference.abs().max() > 0.1


@pytest.mark.parametrize(("module", "part"), [(LINEAR, "diff_b"), (NORM, "b_norm"), (CONV, "diff_b")])
def test_biases_change_with_any_kind_of_weight_change(
    module: str, part: str, base: Checkpoint, opened: Callable[[Tensors], Lora]
) -> None:
    (bias,) = _random(SHAPES[f"{module}.bias"])
    up, down = _random((12, 2), (2, 8))
    low_rank = {"lora_up.weight": up, "lora_down.weight": down} if module == LINEAR else {}
    fused, plain = _fused(base, opened(_named(module, {part: bias} | low_rank)), 0.5), dict(base.read(SHAPES))
    torch.testing.assert_close(fused[f"{module}.bias"], plain[f"{module}.bias"] + 0.5 * bias)
    difference = 0.5 * up @ down if low_rank else torch.zeros(())
    torch.testing.assert_close(fused[f"{module}.weight"], plain[f"{module}.weight"] + difference)


def _low_rank(module: str) -> tuple[Tensors, torch.Tensor]:
    """Return LoRA's parts of rank 2 with alpha 3, and their difference."""
    shape = SHAPES[f"{module}.weight"]
    up, down = _random((12, 2), (2, *shape[1:]))
    parts = {"lora_up.weight": up.reshape(12, 2, *(1 for _ in shape[2:])), "lora_down.weight": down,
             "alpha": torch.tensor(3.0)}  # fmt: skip
    return parts, ((up @ down.flatten(1)) * 3 / 2).reshape(shape)


def _norms(weight: torch.Tensor, axis: int) -> torch.Tensor:
    return weight.square().sum([d for d in range(weight.dim()) if d != axis], keepdim=True).sqrt()


@pytest.mark.parametrize("module", [LINEAR, CONV, POINT])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scale", [1.0, 0.3, -1.0])
def test_dora_of_lycoris_equals_comfyuis(
    module: str, axis: int, scale: float, base: Checkpoint, opened: Callable[[Tensors], Lora]
) -> None:
    weight = dict(base.read(SHAPES))[f"{module}.weight"]
    parts, difference = _low_rank(module)
    magnitude = _norms(weight, axis) * (1 + 0.1 * torch.rand_like(_norms(weight, axis)))
    lora = opened(_named(module, parts | {"dora_scale": magnitude}))
    # ComfyUI's weight_decompose; for norms per output (axis 0) it uses those of the original weight, but LyCORIS,
    # OneTrainer and the DoRA paper use those of the changed one: the export follows these, with a note.
    changed = weight + difference
    decomposed = changed * (magnitude / (_norms(changed, axis) + torch.finfo(torch.float32).eps))
    expected = weight + scale * (decomposed - weight)
    torch.testing.assert_close(_fused(base, lora, scale)[f"{module}.weight"], expected, rtol=1e-5, atol=1e-5)
    assert [("ComfyUI" in note) for note in lora.notes] == ([True] if axis == 0 else [])
    theirs = changed * (magnitude / _norms(weight, axis))
    assert (theirs - decomposed).abs().max() > 0.05


def test_dora_works_with_the_other_kinds(base: Checkpoint, opened: Callable[[Tensors], Lora]) -> None:
    weight = dict(base.read(SHAPES))[f"{LINEAR}.weight"]
    cases = dict(_cases())
    for name in ("LoHa, alpha", "LoKr, w2 factored"):
        module, parts, difference = cases[name]
        magnitude = 2 * _norms(weight, 1)
        fused = _fused(base, opened(_named(module, parts | {"dora_scale": magnitude})))[f"{LINEAR}.weight"]
        torch.testing.assert_close(_norms(fused, 1), magnitude)
        torch.testing.assert_close(fused / _norms(fused, 1), (weight + difference) / _norms(weight + difference, 1))


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("module", [LINEAR, CONV])
def test_dora_of_peft_scales_before_normalizing(
    module: str, scale: float, base: Checkpoint, opened: Callable[[Tensors], Lora]
) -> None:
    weight = dict(base.read(SHAPES))[f"{module}.weight"]
    parts, difference = _low_rank(module)
    magnitude = 1.1 * _norms(weight, 0)
    stored = magnitude.flatten() if module == LINEAR else magnitude.transpose(0, 1)
    lora = opened(_named(module, parts) | {f"lora_unet_{module.replace('.', '_')}.lora_magnitude_vector": stored})
    changed = weight + scale * difference
    expected = changed * magnitude / _norms(changed, 0)
    torch.testing.assert_close(_fused(base, lora, scale)[f"{module}.weight"], expected, rtol=1e-5, atol=1e-5)
    assert lora.notes == ()


W1, W2 = torch.ones(3, 2), torch.ones(4, 4)
UP, DOWN = torch.ones(12, 2), torch.ones(2, 8)
LOHA = {"hada_w1_a": UP, "hada_w1_b": DOWN, "hada_w2_a": UP, "hada_w2_b": DOWN}
LORA = {"lora_up.weight": UP, "lora_down.weight": DOWN}


@pytest.mark.parametrize(
    ("parts", "error", "match"),
    [
        ({"lokr_w1": W1}, CorruptError, "lacks its lokr_w2 weight"),
        ({"lokr_w2": W2}, CorruptError, "lacks its lokr_w1 weight"),
        ({"lokr_w1": W1, "lokr_w2_a": W2}, CorruptError, "lacks its lokr_w2_b weight"),
        ({"lokr_w1": W1, "lokr_w2_a": W2, "lokr_w2_b": torch.ones(3, 4)}, CorruptError, "do not chain"),
        ({"lokr_w1": W1, "lokr_w2": W2, "lokr_w2_a": W2, "lokr_w2_b": W2}, SourceError, "has both .*remove one"),
        ({"lokr_w1": W1, "lokr_w2": W2, "lokr_t2": torch.ones(2, 2, 3, 3)}, CorruptError, "lacks its lokr_w2_a"),
        ({"lokr_w1": W2, "lokr_w2": W2}, SourceError, r"another model.*shape \[12, 8\]"),
        ({"lokr_w1": torch.ones(6, 2), "lokr_w2": torch.ones(2, 4, 3, 3)}, SourceError, r"shape \[12, 8\]"),
        (
            {"lokr_w1": W1, "lokr_w2_a": torch.ones(2, 4), "lokr_w2_b": torch.ones(2, 4), "lokr_t2": torch.ones(2, 2)},
            CorruptError, r"lokr_t2' \[2, 2\] has no kernel",
        ),
        (LORA | {"lora_mid.weight": torch.ones(2, 2)}, CorruptError, r"lora_mid\.weight' \[2, 2\] has no kernel"),
        (
            {"lokr_w1_a": torch.ones(3, 1), "lokr_w1_b": torch.ones(1, 2), "lokr_w2_a": torch.ones(4, 2),
             "lokr_w2_b": torch.ones(2, 4), "alpha": torch.tensor(1.0)},
            SourceError, "have ranks 1 and 2, but one alpha for both",
        ),
        ({"lokr_w1": W1, "lokr_w2": W2, "lokr_t1": W2}, SourceError, "lokr_t1.* is not a LoRA tensor"),
        ({"hada_w1_a": UP, "hada_w1_b": DOWN}, CorruptError, "lacks its hada_w2_a weight"),
        (LOHA | {"hada_t1": torch.ones(2, 2, 3, 3)}, CorruptError, "lacks its hada_t2"),
        (LOHA | {"hada_w2_b": torch.ones(2, 9)}, SourceError, r"another model.*shape \[12, 8\]"),
        (LOHA | {"hada_w1_b": torch.ones(3, 8)}, CorruptError, "do not chain"),
        (LOHA | {"hada_w1_b": torch.ones(2)}, CorruptError, "is a vector"),
        (LORA | LOHA, SourceError, "which exclude each other"),
        (LORA | {"diff": torch.ones(12, 8)}, SourceError, "which exclude each other"),
        ({"dora_scale": torch.ones(12, 1), "diff": torch.ones(12, 8)}, SourceError, "which exclude each other"),
        ({"dora_scale": torch.ones(12, 1)}, CorruptError, "lacks its down weight"),
        (LORA | {"dora_scale": torch.ones(12)}, SourceError, r"dora_scale' \[12\]"),
        (LORA | {"dora_scale": torch.ones(9, 1)}, SourceError, r"dora_scale' \[9, 1\].*shape \[12, 8\]"),
        (LORA | {"lora_magnitude_vector": torch.ones(8)}, SourceError, r"magnitude_vector' \[8\].*shape \[12, 8\]"),
        (LORA | {"lora_magnitude_vector": UP[:, 0], "dora_scale": UP[:, :1]}, SourceError, "exclude each other"),
        (LORA | {"dora_scale": torch.full((12, 1), math.nan)}, CorruptError, "dora_scale.* NaN"),
        (LORA | {"diff_b": torch.full((12,), math.inf)}, CorruptError, "diff_b.* infinite"),
        ({"diff": torch.ones(8, 12)}, SourceError, r"another model.*\[8, 12\].*shape \[12, 8\]"),
        ({"diff_b": torch.ones(8)}, SourceError, r"another model.*bias of shape \[12\]"),
        ({"diff": torch.ones(12, 8).int()}, CorruptError, "is I32"),
    ],
)  # fmt: skip
def test_parts_that_cannot_be_fused_are_refused(
    parts: Tensors, error: type[SdxlTrtError], match: str, base: Checkpoint, opened: Callable[[Tensors], Lora]
) -> None:
    with pytest.raises(error, match=match) as raised:
        _fused(base, opened(_named(LINEAR, parts)))
    assert "\n" not in str(raised.value)


def test_a_weight_of_norm_zero_cannot_be_rescaled(tmp_path: Path, opened: Callable[[Tensors], Lora]) -> None:
    save_file({f"{LINEAR}.weight": torch.zeros(12, 8)}, tmp_path / "zeros.safetensors")
    zero = {key: torch.zeros_like(tensor) for key, tensor in LORA.items()}
    lora = opened(_named(LINEAR, zero | {"lora_magnitude_vector": torch.ones(12)}))
    with pytest.raises(CorruptError, match=r"makes mid_block\.linear\.weight infinite"):
        dict(
            fuse_loras(open_file(tmp_path / "zeros.safetensors"), "unet", [(lora, 1.0)], CONFIG).read(
                [f"{LINEAR}.weight"]
            )
        )


@pytest.mark.parametrize("extra", [{"bundle_emb.me.clip_l": UP}, {"bundle_emb.a:b.string_to_param.*": UP}])
def test_embeddings_in_a_lora_are_ignored_with_a_note(
    extra: Any, base: Checkpoint, opened: Callable[[Tensors], Lora]
) -> None:
    lora = opened(_named(LINEAR, LORA) | extra)
    [note] = lora.notes
    assert f"ignored the LoRA's embeddings {next(iter(extra)).split('.')[1]!r}" in note
    alone = opened(_named(LINEAR, LORA))
    assert all(torch.equal(tensor, _fused(base, alone)[name]) for name, tensor in _fused(base, lora).items())


@pytest.mark.parametrize("prefix", ["lora_te1_", "text_encoder.", "clip_l.", "text_encoders.clip_l.transformer."])
def test_the_first_encoders_projection_is_ignored_with_a_note(
    prefix: str, base: Checkpoint, opened: Callable[[Tensors], Lora]
) -> None:
    projection = {f"{prefix}text_projection.{part}": tensor for part, tensor in LORA.items()}
    lora = opened(_named(LINEAR, LORA) | projection)
    [note] = lora.notes
    assert "ignored the LoRA's projection of the first text encoder" in note
    assert list(lora.branches) == ["unet"]
    with pytest.raises(SourceError, match="changes only a projection"):
        opened(projection)


def test_an_alpha_beside_a_difference_is_ignored_with_a_note(opened: Callable[[Tensors], Lora]) -> None:
    lora = opened(_named(NORM, {"w_norm": torch.ones(8), "alpha": torch.tensor(4.0)}))
    assert "norm.alpha', which has no low-rank weight to scale" in lora.notes[0]
