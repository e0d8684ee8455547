"""Write SDXL checkpoints of random weights in the published architecture, for measurements at the real size.

``python -m sdxl_trt.benchmarks.full_size.checkpoints --out DIR`` writes `base/` and `refiner/` as diffusers
folders, 13 GB at fp16, in constant memory. Names, shapes and configs are the published ones; the models draw noise.
"""

__all__ = ["Format", "checkpoint_pair", "main", "write_checkpoint"]

import argparse
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sdxl_trt.benchmarks.full_size.architectures import ROLES, SIZES, Architecture, Role, architecture
from sdxl_trt.benchmarks.full_size.random_weights import (
    Chunks,
    DType,
    RandomTensor,
    bytes_of,
    random_tensors,
    split,
    write_file,
)
from sdxl_trt.benchmarks.measure import Say, measure
from sdxl_trt.engines import EngineError, SdxlTrtError, UsageError

Format = Literal["diffusers", "sharded", "single-file"]
FORMATS: tuple[Format, ...] = ("diffusers", "sharded", "single-file")
SHARD_BYTES = 2 << 30
_STEMS = {"transformers": "model", "diffusers": "diffusion_pytorch_model"}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
Tensors = dict[str, RandomTensor]


def write_checkpoint(
    size: str,
    role: Role,
    out: Path,
    *,
    kind: Format = "diffusers",
    dtype: DType = "fp16",
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the `role` of `size` as `out`/role (a folder) or `out`/role.safetensors, and return its path.

    The write is atomic, and the same arguments give the same bytes. As in the published pair, base and refiner have
    equal weights in the second encoder and the autoencoder. Raises UsageError if the target exists.
    """
    shape = architecture(size, role)
    target = out / (f"{role}.safetensors" if kind == "single-file" else role)
    if target.exists():
        raise UsageError(f"{target}: exists; remove it, or write to another --out")
    out.mkdir(parents=True, exist_ok=True)
    if kind == "single-file":
        write_file(target, _ldm_tensors(shape, dtype), dtype)
        return target
    partial = Path(tempfile.mkdtemp(prefix=f".{role}.", suffix=".partial", dir=out))
    try:
        _write_folder(partial, shape, dtype, shard_bytes if kind == "sharded" else None)
        partial.chmod(0o755)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def checkpoint_pair(folder: Path, size: str, say: Say) -> list[Path]:
    """Return the folders of base and refiner of `size` in fp32; a missing one is first written by a separate process.

    Raises EngineError if that fails.
    """
    for role in ROLES:
        if not (folder / role).is_dir():
            say(f"writing {folder / role}")
            command = [sys.executable, "-m", "sdxl_trt.benchmarks.full_size.checkpoints", "--out", str(folder)]
            done = measure([*command, "--size", size, "--dtype", "fp32", f"--{role}"])
            if not done.ok:
                raise EngineError(f"the checkpoint {folder / role} was not written: {done.output}")
    return [folder / role for role in ROLES]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the requested checkpoints and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sdxl_trt.benchmarks.full_size.checkpoints", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for base and refiner")
    parser.add_argument("--size", choices=SIZES, default="sdxl", help="the published size (default) or a cousin")
    parser.add_argument("--format", choices=FORMATS, default="diffusers", dest="kind")
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16")
    which = parser.add_mutually_exclusive_group()
    for role in ROLES:
        which.add_argument(f"--{role}", dest="roles", action="store_const", const=(role,), help=f"only the {role}")
    arguments = parser.parse_args(argv)
    try:
        for role in arguments.roles or ROLES:
            path = write_checkpoint(arguments.size, role, arguments.out, kind=arguments.kind, dtype=arguments.dtype)
            sys.stdout.write(f"{path}\n")
    except SdxlTrtError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return exc.exit_code
    return 0


def _tensors(shape: Architecture, model: str, dtype: DType) -> Tensors:
    """Return the tensors of one model under their published names."""
    from sdxl_trt.export.graph import build_model  # noqa: PLC0415 - torch, diffusers, transformers

    built = build_model(shape.class_name(model), shape.models[model], model)
    seed = f"{shape.role} unet" if model == "unet" else model
    return random_tensors(built.state, dtype, seed)


def _write_folder(root: Path, shape: Architecture, dtype: DType, shard_bytes: int | None) -> None:
    from sdxl_trt.export.sources import tokenizer_files  # noqa: PLC0415 - brings the exporter's libraries

    for model, config in shape.models.items():
        folder, stem = root / model, _STEMS[shape.index[model][0]]
        folder.mkdir()
        _write_json(folder / "config.json", config)
        tensors = _tensors(shape, model, dtype)
        if shard_bytes is None:
            write_file(folder / f"{stem}.safetensors", tensors, dtype)
        else:
            _write_shards(folder, stem, tensors, dtype, shard_bytes)
    for name, source in shape.tokenizers.items():
        (root / name).mkdir()
        for file, content in tokenizer_files(source).items():
            (root / name / file).write_bytes(content)
    (root / "scheduler").mkdir()
    _write_json(root / "scheduler" / "scheduler_config.json", shape.scheduler)
    _write_json(root / "model_index.json", shape.index)


def _write_shards(folder: Path, stem: str, tensors: Tensors, dtype: DType, limit: int) -> None:
    shards = split(tensors, dtype, limit)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard, dtype)
        places |= dict.fromkeys(shard, name)
    total = sum(bytes_of(tensor.shape, dtype) for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    _write_json(folder / f"{stem}.safetensors.index.json", index)


def _ldm_tensors(shape: Architecture, dtype: DType) -> Tensors:
    """Return all tensors of a pipeline under the names of a single file, as sgm writes them."""
    from sdxl_trt.engines.adapters import unet_prefixes  # noqa: PLC0415 - only for single files
    from sdxl_trt.export.checkpoints import vae_prefixes  # noqa: PLC0415

    models = {model: _tensors(shape, model, dtype) for model in shape.models}
    stored = _renamed(models["unet"], unet_prefixes(shape.models["unet"]), "model.diffusion_model.")
    stored |= _renamed(models["vae"], vae_prefixes(shape.models["vae"]), "first_stage_model.")
    if "text_encoder" in models:
        prefix = "conditioner.embedders.0.transformer."
        stored |= {prefix + name: tensor for name, tensor in models["text_encoder"].items()}
    number = len(models) - 3  # OpenCLIP's encoder is the base's second and the refiner's only one
    stored |= _open_clip(models["text_encoder_2"], shape.models["text_encoder_2"], f"conditioner.embedders.{number}.")
    return stored


def _renamed(tensors: Tensors, modules: dict[str, str], prefix: str) -> Tensors:
    theirs = {ours: theirs for theirs, ours in modules.items()}
    renamed = {}
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        # A single file stores the autoencoder's attention projections as 1×1 convolutions.
        pixel = prefix == "first_stage_model." and ".attentions." in name and len(tensor.shape) == 2
        shape = (*tensor.shape, 1, 1) if pixel else tensor.shape
        renamed[f"{prefix}{theirs[module]}.{parameter}"] = RandomTensor(shape, tensor.draw)
    return renamed


def _open_clip(tensors: Tensors, config: dict[str, Any], prefix: str) -> Tensors:
    """Return an encoder's tensors as OpenCLIP stores them: one projection for query, key and value, one transposed."""
    from sdxl_trt.export.checkpoints import open_clip_prefixes  # noqa: PLC0415 - only for single files

    stored = {
        "model.positional_embedding": tensors["text_model.embeddings.position_embedding.weight"],
        "model.text_projection": _transposed(tensors["text_projection.weight"]),
    }
    for theirs, ours in open_clip_prefixes(config).items():
        for parameter in ("weight", "bias"):
            if ours.endswith(".self_attn"):
                parts = [tensors[f"{ours}.{part}.{parameter}"] for part in _PROJECTIONS]
                stored[f"model.{theirs}.in_proj_{parameter}"] = _joined(parts)
            elif f"{ours}.{parameter}" in tensors:
                stored[f"model.{theirs}.{parameter}"] = tensors[f"{ours}.{parameter}"]
    return {prefix + name: tensor for name, tensor in stored.items()}


def _joined(parts: list[RandomTensor]) -> RandomTensor:
    def draw() -> Iterator[Any]:
        return itertools.chain.from_iterable(part.draw() for part in parts)

    return RandomTensor((sum(part.shape[0] for part in parts), *parts[0].shape[1:]), draw)


def _transposed(tensor: RandomTensor) -> RandomTensor:
    def draw() -> Chunks:
        yield np.ascontiguousarray(np.concatenate(list(tensor.draw())).reshape(tensor.shape).T)

    return RandomTensor(tensor.shape[::-1], draw)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    sys.exit(main())
