"""Measure how far tiled decoding is from decoding the whole picture, for our tiles and for diffusers'.

``python -m sdxl_trt.benchmarks.quality.tiling`` writes ``benchmarks/results/tiling.md``. Both decode with the embedded
pair's autoencoder in fp32, with the same tile size and minimum overlap, from encoded drawn scenes. Several pictures are
averaged, since the error depends on where edges in a picture meet tile borders.
"""

__all__ = ["Row", "main", "table"]

import argparse
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from sdxl_trt.benchmarks.measure import RESULTS_FOLDER
from sdxl_trt.engines.host import atomic_write
from sdxl_trt.mini.scenes import EVALUATION_SEEDS, render, sample_scene
from sdxl_trt.runtime.vae import decode_tiled, tile_starts

RESULTS = RESULTS_FOLDER / "tiling.md"
COMMAND = "python -m sdxl_trt.benchmarks.quality.tiling"
# Sides of picture and tile in pixels: plans of fp32 and mixed decoders take 512.
SIZES = ((512, 256), (1024, 512))
FACTOR = 8
PICTURES = 4
SCENE = 192
PEAK = 2.0  # samples are -1 to 1

Floats = NDArray[np.float32]


class Row(msgspec.Struct, frozen=True):
    """Pictures of one kind at one size: PSNR in dB of tiled against whole, over all of them."""

    kind: str
    pictures: int
    side: int
    tile: int
    tiles: int
    ours: float
    theirs: float


def main(argv: list[str] | None = None) -> int:
    """Measure, write the table and print it; return 1 if diffusers' tiles are nearer to the whole than ours."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="Markdown file to write")
    arguments = parser.parse_args(argv)
    autoencoder = _autoencoder()
    rows = [
        measure(autoencoder, kind, [draw(side, seed) for seed in EVALUATION_SEEDS[:PICTURES]], tile)
        for side, tile in SIZES
        for kind, draw in (("many scenes", _many), ("one scene", _one))
    ]
    text = table(rows)
    with atomic_write(arguments.results) as file:
        file.write(text.encode())
    sys.stdout.write(text)
    return 0 if all(row.ours >= row.theirs for row in rows) else 1


def measure(autoencoder: Any, kind: str, pictures: Sequence[NDArray[np.uint8]], tile: int) -> Row:
    """Compare both ways of tiling with whole decodes of `pictures` (side, side, 3)."""
    errors = np.mean([_errors(autoencoder, _encode(autoencoder, picture), tile) for picture in pictures], axis=0)
    ours, theirs = (float(10 * np.log10(PEAK**2 / error)) for error in errors)
    side = len(pictures[0])
    tiles = len(tile_starts(side // FACTOR, tile // FACTOR)) ** 2
    return Row(kind=kind, pictures=len(pictures), side=side, tile=tile, tiles=tiles, ours=ours, theirs=theirs)


def table(rows: Sequence[Row]) -> str:
    """Return the figures as Markdown, with the command that produces them."""
    lines = [
        f"Pictures decoded in tiles beside the same decoded whole, PSNR (`{COMMAND}`): the embedded pair's autoencoder",
        f"in fp32, drawn scenes. diffusers {version('diffusers')} has tiles of the same size and least overlap,",
        "a quarter of a tile.",
        "",
        "| pictures | size | tile | tiles | ours | diffusers |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.pictures} of {row.kind} | {row.side}² | {row.tile}² | {row.tiles} | {row.ours:.1f} dB"
        f" | {row.theirs:.1f} dB |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _errors(autoencoder: Any, latents: Floats, tile: int) -> tuple[float, float]:
    """Return the mean squared error against the whole decode of our tiles and of diffusers'."""
    import torch  # noqa: PLC0415 - only where it is used

    autoencoder.tile_sample_min_size, autoencoder.tile_latent_min_size = tile, tile // FACTOR
    whole = _decode(autoencoder, latents)
    with torch.no_grad():
        theirs = autoencoder.tiled_decode(torch.from_numpy(latents)).sample.numpy()
    ours = decode_tiled(lambda part: _decode(autoencoder, part), latents, (tile // FACTOR, tile // FACTOR))
    return float(np.mean((ours - whole) ** 2)), float(np.mean((theirs - whole) ** 2))


def _autoencoder() -> Any:
    from diffusers import AutoencoderKL  # noqa: PLC0415 - takes seconds to import

    from sdxl_trt.mini import materialize  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        base, _ = materialize(folder)
        return AutoencoderKL.from_pretrained(base, subfolder="vae").float().eval()


def _encode(autoencoder: Any, picture: NDArray[np.uint8]) -> Floats:
    """Return the mode of the encoder's latent distribution, (1, 4, h, w)."""
    import torch  # noqa: PLC0415

    sample = picture.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1.0
    with torch.no_grad():
        latents: Floats = autoencoder.encode(torch.from_numpy(sample)).latent_dist.mode().numpy()
    return latents


def _decode(autoencoder: Any, latents: Floats) -> Floats:
    import torch  # noqa: PLC0415

    with torch.no_grad():
        sample: Floats = autoencoder.decode(torch.from_numpy(np.ascontiguousarray(latents))).sample.numpy()
    return sample


def _many(side: int, seed: int) -> NDArray[np.uint8]:
    """Return scenes side by side at a random offset: all tiles see a similar mixture."""
    rng = np.random.default_rng(seed)
    top, left = rng.integers(0, SCENE, 2)
    each = range(side // SCENE + 2)
    scenes = np.block([[[_scene(rng, SCENE)] for _ in each] for _ in each])
    return scenes[top : top + side, left : left + side]


def _one(side: int, seed: int) -> NDArray[np.uint8]:
    """Return one scene as large as the picture: some tiles see only background."""
    return _scene(np.random.default_rng(seed), side)


def _scene(rng: np.random.Generator, side: int) -> NDArray[np.uint8]:
    from PIL import Image  # noqa: PLC0415

    return np.asarray(Image.fromarray(render(sample_scene(rng))).resize((side, side), Image.Resampling.BICUBIC))


if __name__ == "__main__":
    sys.exit(main())
