"""ComfyUI's formulas for masks in torch, on diffusers' models."""

import warnings
from typing import Any

import numpy as np

from independent.inpainting import PROMPT, Experts


def unit(pixels: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32) / 255.0)


class ComfyUI:
    """ComfyUI's masks in torch, after its documentation and sources, on diffusers' models; a latent spans 2 pixels."""

    def __init__(self, experts: Experts) -> None:
        import torch

        self.pipe = experts.pipelines["base"]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            positive, negative, pooled, negative_pooled = self.pipe.encode_prompt(PROMPT, negative_prompt="blurry")
        self.hidden, self.pooled = torch.cat([positive, negative]), torch.cat([pooled, negative_pooled])

    def encode(self, pixels: Any) -> Any:
        import torch

        with torch.no_grad():
            mean = self.pipe.vae.encode(pixels * 2.0 - 1.0).latent_dist.mean
        return mean * self.pipe.vae.config.scaling_factor

    def sample(self, run: Any, latent: Any, noise_mask: Any = None, concat: Any = None) -> np.ndarray:
        """Euler's method with KSamplerX0Inpaint, with the grid, the noise and the guidance of `run`."""
        import torch

        request, noise = run.request, torch.from_numpy(run.initial)
        sigmas, timesteps = (torch.from_numpy(each) for each in (request.schedule.sigmas, request.schedule.timesteps))
        latent = latent.repeat(len(noise) // len(latent), 1, 1, 1)
        x = latent + noise * np.float32(request.schedule.initial_scale)
        mask = None
        if noise_mask is not None:
            mask = torch.nn.functional.interpolate(noise_mask[None, None], size=noise.shape[2:], mode="bilinear")
        size = (float(request.height), float(request.width))
        ids = torch.tensor([[*size, 0.0, 0.0, *size]])

        def model(x: Any, sigma: Any, timestep: Any) -> Any:
            rows = []
            for side in (0, 1):
                given = x / (sigma**2 + 1) ** 0.5
                if concat is not None:
                    given = torch.cat([given, concat.repeat(len(x), 1, 1, 1)], dim=1)
                conds = {
                    "text_embeds": self.pooled[side : side + 1].repeat(len(x), 1),
                    "time_ids": ids.repeat(len(x), 1),
                }
                hidden = self.hidden[side : side + 1].repeat(len(x), 1, 1)
                rows.append(self.pipe.unet(given, timestep, hidden, added_cond_kwargs=conds).sample)
            return x - sigma * (rows[1] + request.request.guidance * (rows[0] - rows[1]))

        with torch.no_grad():
            for sigma, after, timestep in zip(sigmas[:-1], sigmas[1:], timesteps, strict=True):
                given = x
                if mask is not None:
                    given = x * mask + (latent + noise * sigma) * (1.0 - mask)
                denoised = model(given, sigma, timestep)
                if mask is not None:
                    denoised = denoised * mask + latent * (1.0 - mask)
                x = x + (x - denoised) / sigma * (after - sigma)
        return x.numpy()

    @staticmethod
    def fitted(mask: Any, pixels: Any) -> Any:
        import torch

        return torch.nn.functional.interpolate(mask[None, None], size=pixels.shape[2:], mode="bilinear")[0, 0]

    def for_inpaint(self, pixels: Any, mask: Any, grow: int) -> tuple[Any, Any]:
        """VAEEncodeForInpaint: the latents of the greyed pixels, and the noise mask."""
        import torch

        mask = self.fitted(mask, pixels)
        wide = mask.round()
        if grow:
            kernel, padding = torch.ones(1, 1, grow, grow), -(-(grow - 1) // 2)
            wide = torch.nn.functional.conv2d(mask.round()[None, None], kernel, padding=padding).clamp(0, 1)[0, 0]
        return self.encode(self.greyed(pixels, mask)), wide[: mask.shape[0], : mask.shape[1]].round()

    @staticmethod
    def greyed(pixels: Any, mask: Any) -> Any:
        return (pixels - 0.5) * (1.0 - mask.round()) + 0.5
