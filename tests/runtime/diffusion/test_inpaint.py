"""What is outside a mask stays: exact in diffusers' way for every sampler, mixed at every call in ComfyUI's."""

from typing import Any

import numpy as np
import pytest

from sdxl_trt.runtime.diffusion.inpaint import Inpaint, NoiseMask
from sdxl_trt.runtime.diffusion.samplers.registry import Ask, bind_sampler, drive, sampler_names

SIGMAS = np.array([8.0, 3.0, 1.0, 0.25, 0.0], np.float32)
SHAPE = 2, 3, 4, 5
Latents = np.ndarray


@pytest.fixture
def parts(rng: np.random.Generator) -> dict[str, Latents]:
    mask = (np.arange(20).reshape(1, 1, 4, 5) % 3 == 0).astype(np.float32)
    clean, noise, x = (rng.standard_normal(SHAPE, dtype=np.float32) for _ in range(3))
    return {"mask": mask, "clean": clean, "noise": noise, "x": x * 8}


def _model(seen: list[tuple[float, Latents]]) -> Any:
    def denoise(x: Latents, sigma: float) -> Latents:
        seen.append((sigma, x.copy()))
        return np.tanh(x) * np.float32(0.9) + np.float32(0.1)

    return denoise


def _sampler(name: str, *, comfyui: bool = False) -> Any:
    draws = np.random.default_rng(3)
    return bind_sampler(name, lambda *_: draws.standard_normal(SHAPE, dtype=np.float32), comfyui=comfyui)


@pytest.mark.parametrize("name", sampler_names())
def test_after_every_step_the_rest_is_the_picture_with_the_next_noise(name: str, parts: dict[str, Latents]) -> None:
    seen: list[tuple[float, Latents]] = []
    keeper = Inpaint(parts["mask"], parts["clean"], parts["noise"])
    outside = np.broadcast_to(parts["mask"] == 0, SHAPE)
    steps = [x.copy() for x in drive(keeper.around(_sampler(name))(parts["x"].copy(), SIGMAS), _model(seen))]
    assert len(steps) == 4
    for x, sigma in zip(steps, SIGMAS[1:], strict=True):
        expected = parts["clean"] + parts["noise"] * sigma if sigma else parts["clean"]
        np.testing.assert_array_equal(x[outside], expected[outside])
        assert not np.isclose(x, expected)[~outside].all()
    np.testing.assert_array_equal(seen[0][1], parts["x"], "the first call sees the start")
    grid = SIGMAS.tolist()
    for sigma, x in seen[1:]:
        level = np.float32(next(each for each in grid if each <= sigma))
        np.testing.assert_array_equal(x[outside], (parts["clean"] + parts["noise"] * level)[outside])


def test_a_white_mask_changes_nothing_but_the_memory(parts: dict[str, Latents]) -> None:
    for name in sampler_names():
        plain = [x.copy() for x in drive(_sampler(name)(parts["x"].copy(), SIGMAS), _model([]))]
        keeper = Inpaint(np.ones((1, 1, 4, 5), np.float32), parts["clean"], parts["noise"])
        masked = [x.copy() for x in drive(keeper.around(_sampler(name))(parts["x"].copy(), SIGMAS), _model([]))]
        np.testing.assert_array_equal(masked, plain)


def test_a_stage_that_ends_in_the_noise_leaves_the_picture_without_it(parts: dict[str, Latents]) -> None:
    outside = np.broadcast_to(parts["mask"] == 0, SHAPE)
    for preserving, factor in ((False, 1.0), (True, np.sqrt(2.0))):
        keeper = Inpaint(parts["mask"], parts["clean"], parts["noise"], variance_preserving=preserving)
        *_, last = drive(keeper.around(_sampler("euler"))(parts["x"].copy(), SIGMAS[:3]), _model([]))
        np.testing.assert_allclose(last[outside], (parts["clean"] * np.float32(factor))[outside], rtol=1e-6)
        # Another run that ends there takes the latents of this one from within its steps.
        whole = [x.copy() for x in drive(keeper.around(_sampler("euler"))(parts["x"].copy(), SIGMAS), _model([]))]
        np.testing.assert_array_equal(keeper.ended(whole[1], 1.0), last)


def test_pictures_of_a_group_have_their_own_latents(parts: dict[str, Latents]) -> None:
    second = slice(1, 2)
    for kind in (Inpaint, NoiseMask):
        keeper = kind(parts["mask"], parts["clean"], parts["noise"]).of(second)
        whole = kind(parts["mask"], parts["clean"], parts["noise"]).around(_sampler("euler"))
        *_, alone = drive(keeper.around(_sampler("euler"))(parts["x"][second].copy(), SIGMAS), _model([]))
        *_, both = drive(whole(parts["x"].copy(), SIGMAS), _model([]))
        np.testing.assert_array_equal(alone, both[second])


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_sde", "uni_pc"])
def test_comfyuis_model_sees_and_returns_the_picture_outside(name: str, parts: dict[str, Latents]) -> None:
    soft = np.linspace(0, 1, 20, dtype=np.float32).reshape(1, 1, 4, 5)
    keeper, calls = NoiseMask(soft, parts["clean"], parts["noise"]), []

    def watched(x: Latents, sigmas: Latents) -> Any:
        asking = _sampler(name, comfyui=True)(x, sigmas)
        said = next(asking, None)
        while said is not None:
            if not isinstance(said, Ask):
                yield said
                said = next(asking, None)
                continue
            given = said.x.copy()
            denoised = yield said
            np.testing.assert_array_equal(said.x, given, "the sampler's own latents are not written to")
            calls.append((given, said.sigma, denoised.copy()))
            said = asking.send(denoised)

    seen: list[tuple[float, Latents]] = []
    *_, last = drive(keeper.around(watched)(parts["x"].copy(), SIGMAS), _model(seen))
    assert len(calls) == len(seen)
    for (given, sigma, denoised), (_, shown) in zip(calls, seen, strict=True):
        mixed = given * soft + (parts["clean"] + parts["noise"] * np.float32(sigma)) * (1 - soft)
        np.testing.assert_allclose(shown, mixed, rtol=0, atol=1e-5)
        expected = (np.tanh(shown) * 0.9 + 0.1) * soft + parts["clean"] * (1 - soft)
        np.testing.assert_allclose(denoised, expected, rtol=0, atol=1e-5)
    if name == "euler":
        np.testing.assert_array_equal(last[:, :, 0, 0], parts["clean"][:, :, 0, 0])
