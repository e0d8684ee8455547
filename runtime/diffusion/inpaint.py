"""Keep the part of a picture outside a mask while a sampler changes the rest, as diffusers or as ComfyUI does it.

Latents are in the samplers' scale, clean + sigma · noise. A mask is 1 where the picture changes. Both classes wrap a
sampler in another one, which changes what it asks, is answered or yields; nothing else knows of masks.
"""

__all__ = ["Inpaint", "Keeper", "NoiseMask"]

import math
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.runtime.diffusion.samplers import Ask, Asking, Sampler

Latents = NDArray[np.float32]
Sigmas = NDArray[np.float32]


class Keeper(Protocol):
    """Keeps what is outside a mask through the steps of one stage."""

    def of(self, pictures: slice) -> Self:
        """Return the same for some of the pictures."""
        ...

    def around(self, sample: Sampler) -> Sampler:
        """Return `sample` as a sampler that keeps what is outside the mask."""
        ...

    def ended(self, x: Latents, sigma: float) -> Latents:
        """Return latents (n, c, h, w) within a run as they would be if the stage ended there, at `sigma`."""
        ...


@dataclass(frozen=True, eq=False)
class Inpaint:
    """diffusers' way (StableDiffusionXLInpaintPipeline): after each step, the picture with noise replaces the rest.

    `mask` (1 or n, 1, h, w) is 0 or 1; `clean` (n, c, h, w) are the picture's latents, `noise` theirs, of unit variance
    and the same in every step. After the last step of a stage the picture comes back without noise, also at a handoff;
    a `variance_preserving` schedule's latents are then larger than the picture's, as their scale is in diffusers.
    """

    mask: Latents
    clean: Latents
    noise: Latents
    variance_preserving: bool = False

    def of(self, pictures: slice) -> "Inpaint":
        """Return the same for some of the pictures."""
        mask = self.mask if len(self.mask) == 1 else self.mask[pictures]
        return Inpaint(mask, self.clean[pictures], self.noise[pictures], self.variance_preserving)

    def around(self, sample: Sampler) -> Sampler:
        """Return `sample` as a sampler that keeps what is outside the mask.

        It writes to the latents that `sample` yields and continues from, between its steps. If a sampler calls the
        model within a step, diffusers replaces the rest there too, with the noise of the step's end.
        """

        def kept(x: Latents, sigmas: Sigmas) -> Asking:
            grid, done = sigmas.tolist(), 0
            asking = sample(x, sigmas)
            said = next(asking, None)
            while said is not None:
                if isinstance(said, Ask):
                    if said.sigma != grid[done]:
                        self._replace(said.x, self._noised(grid[done + 1]))
                    said = asking.send((yield said))
                    continue
                done += 1
                ends = done == len(grid) - 1
                self._replace(said, self._at_end(grid[done]) if ends else self._noised(grid[done]))
                yield said
                said = next(asking, None)

        return kept

    def ended(self, x: Latents, sigma: float) -> Latents:
        """Return a copy of `x` with the picture itself outside the mask."""
        copy = x.copy()
        self._replace(copy, self._at_end(sigma))
        return copy

    def _noised(self, sigma: float) -> Latents:
        return self.clean + self.noise * np.float32(sigma)

    def _at_end(self, sigma: float) -> Latents:
        return self.clean * np.float32(math.sqrt(sigma**2 + 1.0)) if self.variance_preserving else self.clean

    def _replace(self, x: Latents, outside: Latents) -> None:
        """Write `outside` to `x` where the mask is 0: a copy, so that it stays exact."""
        np.copyto(x, outside, where=self.mask == 0.0)


@dataclass(frozen=True, eq=False)
class NoiseMask:
    """ComfyUI's way (noise_mask): the input and the estimate of every call of the model are mixed with the picture.

    `mask` (1 or n, 1, h, w) is from 0 to 1; `clean` (n, c, h, w) are the latents that the sampler started from, `noise`
    the unit-variance noise that it added to them, zeros if it added none.
    """

    mask: Latents
    clean: Latents
    noise: Latents

    def of(self, pictures: slice) -> "NoiseMask":
        """Return the same for some of the pictures."""
        mask = self.mask if len(self.mask) == 1 else self.mask[pictures]
        return NoiseMask(mask, self.clean[pictures], self.noise[pictures])

    def around(self, sample: Sampler) -> Sampler:
        """Return `sample` as a sampler whose model sees, and returns, the picture outside the mask."""
        rest = np.float32(1.0) - self.mask

        def kept(x: Latents, sigmas: Sigmas) -> Asking:
            asking = sample(x, sigmas)
            said = next(asking, None)
            while said is not None:
                if isinstance(said, Ask):
                    outside = self.noise * np.float32(said.sigma)
                    outside += self.clean
                    denoised = yield Ask(said.x * self.mask + outside * rest, said.sigma)
                    # In place: the estimate that previews show is the same memory.
                    denoised *= self.mask
                    denoised += self.clean * rest
                    said = asking.send(denoised)
                else:
                    yield said
                    said = next(asking, None)

        return kept

    def ended(self, x: Latents, sigma: float) -> Latents:  # noqa: ARG002 - it is the protocol's
        """Return a copy of `x`: ComfyUI leaves the noise of the last sigma where it is."""
        return x.copy()
