"""The cache for stages 2 and 3: every training picture's latent distribution, captions and conditioning."""

__all__ = ["Batch", "Rows", "build_cache", "draw_batch", "load_cache"]

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sdxl_trt.mini.scenes import TRAINING_SEEDS, draw_caption, example
from sdxl_trt.mini.train.text import Ids, compact, tokenize, with_fillers
from sdxl_trt.mini.train.vae import load_vae, signals

CAPTIONS_EACH = 4
PART = 1500
ENCODE_BATCH = 30


@dataclass(frozen=True)
class Rows:
    """The cache in memory, one row per picture.

    moments `(n, 8, 16, 16)` float16, ids `(n, CAPTIONS_EACH, 2, 77)` int64 compact, empty `(2, 77)` ids of "",
    time_ids `(n, 6)` float32, score `(n,)` float32, damaged `(n,)` bool, used: the CLIP id of each compact one.
    """

    moments: npt.NDArray[np.float16]
    ids: Ids
    empty: Ids
    time_ids: npt.NDArray[np.float32]
    score: npt.NDArray[np.float32]
    damaged: npt.NDArray[np.bool_]
    used: Ids


@dataclass(frozen=True)
class Batch:
    """One training batch: latents `(n, 4, 16, 16)`, compact ids `(n, 2, 77)`, time ids `(n, 6)`, scores `(n,)`."""

    latents: torch.Tensor
    ids: torch.Tensor
    time_ids: torch.Tensor
    score: torch.Tensor


@torch.no_grad()  # type: ignore[untyped-decorator]
def encode_part(folder: Path, start: int) -> dict[str, Any]:
    """The cache's columns for `PART` training pictures, starting at seed number `start`."""
    torch.set_num_threads(1)
    vae = load_vae(folder)[0].to(memory_format=torch.channels_last)
    examples = [example(TRAINING_SEEDS[start + i]) for i in range(PART)]
    batches = signals([one.picture for one in examples]).split(ENCODE_BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        moments = [vae.encode(batch).latent_dist.parameters.to(torch.float16).numpy() for batch in batches]
    captions = []
    for i, one in enumerate(examples):
        rng = np.random.default_rng((1, TRAINING_SEEDS[start + i]))
        others = [draw_caption(one.scene.asked, rng) for _ in range(CAPTIONS_EACH - 1)]
        captions.append([one.caption, *others])
    return {
        "moments": np.concatenate(moments),
        "captions": captions,
        "time_ids": np.array([one.view.time_ids for one in examples], np.float32),
        "score": np.array([one.score for one in examples], np.float32),
        "damaged": np.array([one.damage.amount > 0 for one in examples]),
    }


def build_cache(folder: Path, count: int, processes: int) -> None:
    """Render and encode `count` training pictures, rounded up to whole parts, to `cache.npz` and `captions.json`."""
    starts = range(0, count, PART)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(encode_part, [folder] * len(starts), starts))
    captions = [texts for part in parts for texts in part.pop("captions")]
    (folder / "captions.json").write_text(json.dumps(captions))
    columns: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    np.savez(folder / "cache.npz", **columns)


def load_cache(folder: Path) -> Rows:
    """Read the cache and tokenize its captions."""
    arrays = np.load(folder / "cache.npz")
    captions = json.loads((folder / "captions.json").read_text())
    flat = [text for texts in captions for text in texts]
    clip_ids = tokenize([*flat, ""])
    used = np.unique(clip_ids)
    ids = compact(clip_ids, used)
    shaped = ids[:-1].reshape(len(captions), CAPTIONS_EACH, 2, -1)
    names = ("moments", "time_ids", "score", "damaged")
    return Rows(ids=shaped, empty=ids[-1], used=used, **{name: arrays[name] for name in names})


def draw_batch(rows: Rows, size: int, damaged_share: float, scaling_factor: float, rng: np.random.Generator) -> Batch:
    """A random batch with the given share of damaged pictures; latents are drawn from their distribution."""
    pools = [np.flatnonzero(~rows.damaged), np.flatnonzero(rows.damaged)]
    bad = int(rng.binomial(size, damaged_share))
    at = np.concatenate([rng.choice(pools[0], size - bad), rng.choice(pools[1], bad)])
    moments = torch.from_numpy(rows.moments[at]).float()
    mean, log_variance = moments.chunk(2, dim=1)
    latents = mean + torch.randn_like(mean) * (0.5 * log_variance.clamp(-30, 20)).exp()
    ids = with_fillers(rows.ids[at, rng.integers(0, CAPTIONS_EACH, size)], rng)
    return Batch(
        latents * scaling_factor,
        torch.from_numpy(ids),
        torch.from_numpy(rows.time_ids[at]),
        torch.from_numpy(rows.score[at]),
    )
