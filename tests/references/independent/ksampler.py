"""A reference KSamplerAdvanced in torch, with the weights that diffusers and transformers load.

It is an independent implementation of ComfyUI's nodes: prompts are given as weighted segments, both sides of guidance
run separately, so that their lengths may differ, and grids are made here.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

Segments = list[tuple[str, float]]


@dataclass(frozen=True)
class Cond:
    """The conditioning of one side of a UNet, as torch tensors of one row."""

    hidden: Any
    pooled: Any
    ids: Any


@dataclass(frozen=True)
class Grid:
    """sigmas (steps + 1,), the model's timestep for each, and the scale of the noise at a start from step 0."""

    sigmas: Any
    timesteps: Any
    full: float


def chunks(tokenizer: Any, segments: Segments) -> tuple[list[list[int]], list[list[float]]]:
    """Return ids and weights in chunks of 77; every segment here is long enough to be split between two."""
    pad = 0 if tokenizer.pad_token == "!" else tokenizer.eos_token_id
    tokens = [(token, weight) for text, weight in segments
              for token in tokenizer(text, add_special_tokens=False).input_ids]  # fmt: skip
    ids, weights = [], []
    for start in range(0, max(len(tokens), 1), 75):
        part = tokens[start : start + 75]
        row = [tokenizer.bos_token_id, *(token for token, _ in part), tokenizer.eos_token_id]
        ids.append(row + [pad] * (77 - len(row)))
        weights.append([1.0, *(weight for _, weight in part), *[1.0] * (76 - len(part))])
    return ids, weights


def _read(encoder: Any, tokenizer: Any, segments: Segments, count: int) -> tuple[Any, Any]:
    """Return hidden states (1, tokens, width) of `count` chunks, and the first one's pooled vector."""
    import torch

    ids, weights = chunks(tokenizer, segments)
    empty, _ = chunks(tokenizer, [])
    ids += empty * (count - len(ids))
    weights += [[1.0] * 77] * (count - len(weights))
    out = encoder(torch.tensor(ids + empty), output_hidden_states=True)
    hidden, scale = out.hidden_states[-2], torch.tensor(weights)[:, :, None]
    weighted = (hidden[:-1] - hidden[-1]) * scale + hidden[-1]
    pooled = out.text_embeds[:1] if hasattr(out, "text_embeds") else None
    return weighted.reshape(1, -1, hidden.shape[-1]), pooled


class Reference:
    """diffusers' modules of a pair, with ComfyUI's nodes on top."""

    def __init__(self, pair: Any) -> None:
        from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.base = StableDiffusionXLPipeline.from_pretrained(pair.base)
            self.refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(pair.refiner)

    def base_cond(self, text_g: Segments, text_l: Segments, ids: list[float]) -> Cond:
        """CLIPTextEncodeSDXL: the shorter of both texts is padded with empty chunks."""
        import torch

        pipe = self.base
        pairs = ((pipe.text_encoder, pipe.tokenizer, text_l), (pipe.text_encoder_2, pipe.tokenizer_2, text_g))
        count = max(len(chunks(tokenizer, text)[0]) for _, tokenizer, text in pairs)
        (left, _), (right, pooled) = (_read(*each, count) for each in pairs)
        return Cond(torch.cat([left, right], dim=-1), pooled, torch.tensor([ids], dtype=torch.float32))

    def refiner_cond(self, text: Segments, ids: list[float]) -> Cond:
        import torch

        pipe = self.refiner
        count = len(chunks(pipe.tokenizer_2, text)[0])
        return Cond(*_read(pipe.text_encoder_2, pipe.tokenizer_2, text, count), torch.tensor([ids]))


def normal(steps: int) -> Grid:
    """ComfyUI's `normal`: evenly spaced timesteps, sigmas interpolated in log sigma, whole timesteps for the model."""
    import torch

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1.0 - betas, dim=0)
    table = ((1 - alphas) / alphas).sqrt().float()
    times = torch.linspace(999, 0, steps)
    low, high, weight = times.floor().long(), times.ceil().long(), times.frac()
    sigmas = ((1 - weight) * table.log()[low] + weight * table.log()[high]).exp()
    whole = (sigmas.log()[:, None] - table.log()).abs().argmin(dim=1)
    return Grid(torch.cat([sigmas, torch.zeros(1)]), whole.float(), float((1 + sigmas[0] ** 2).sqrt()))


def denoised(steps: int, denoise: float) -> Grid:
    """KSampler's own grid: the end of a longer one; the noise is scaled by its first sigma."""
    longer = normal(int(steps / denoise))
    sigmas = longer.sigmas[-(steps + 1) :]
    return Grid(sigmas, longer.timesteps[-steps:], float(sigmas[0]))


def ksampler(
    unet: Any, grid: Grid, positive: Cond | list[Cond], negative: Cond, cfg: float, latent: Any, noise: Any, *,
    start: int = 0, end: int = 10_000, add_noise: bool = True, leftover: bool = False,
) -> Any:  # fmt: skip
    """KSamplerAdvanced with euler: it cuts the end first, then the start."""
    import torch

    sigmas = grid.sigmas.clone()
    if end < len(sigmas) - 1:
        sigmas = sigmas[: end + 1]
        if not leftover:
            sigmas[-1] = 0
    if start >= len(sigmas) - 1:
        return latent
    sigmas, times = sigmas[start:], grid.timesteps[start:]
    x = latent + (noise if add_noise else torch.zeros_like(noise)) * (grid.full if start == 0 else sigmas[0])
    for sigma, after, time in zip(sigmas[:-1], sigmas[1:], times, strict=False):
        scaled = x / (sigma**2 + 1).sqrt()
        guesses = []
        for side in (positive, negative):
            combined = []
            for cond in side if isinstance(side, list) else [side]:
                rows = len(x)
                added = {"text_embeds": cond.pooled.repeat(rows, 1), "time_ids": cond.ids.repeat(rows, 1)}
                hidden = cond.hidden.repeat(rows, 1, 1)
                combined.append(unet(scaled, time, encoder_hidden_states=hidden, added_cond_kwargs=added).sample)
            guesses.append(torch.stack(combined).mean(dim=0))
        clean, unguided = (x - sigma * guess for guess in guesses)
        clean = unguided + (clean - unguided) * cfg
        x = x + (x - clean) / sigma * (after - sigma)
    return x


def encoded(reference: Any, pixels: np.ndarray) -> Any:
    """VAEEncode: the posterior's mean, in the sampler's scale."""
    import torch

    sample = torch.from_numpy(pixels.astype(np.float32) / 255.0).permute(2, 0, 1)[None] * 2.0 - 1.0
    return reference.base.vae.encode(sample).latent_dist.mean * 0.13025
