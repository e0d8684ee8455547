"""A diffusers folder of an SDXL pipeline: its components, their configs, and what the host must know of them.

Only what is listed here is read: class names come from ``model_index.json`` but never choose code outside this
project's own table, pickled weights are refused, and no file of the folder is executed.
"""

__all__ = ["BASE_CLASS", "REFINER_CLASS", "ModelSource", "PipelineSource", "open_pipeline"]

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from sdxl_trt.engines.bundle import Scheduler
from sdxl_trt.engines.errors import CorruptError, SourceError, explain_os_error
from sdxl_trt.export.tensors import Checkpoint, open_checkpoint

log = logging.getLogger("sdxl_trt.export")
BASE_CLASS = "StableDiffusionXLPipeline"
REFINER_CLASS = "StableDiffusionXLImg2ImgPipeline"
_OPTION = {BASE_CLASS: "--base", REFINER_CLASS: "--refiner"}
_STEMS = {"transformers": "model", "diffusers": "diffusion_pytorch_model"}
_MODELS = ("text_encoder", "text_encoder_2", "unet", "vae")
_REQUIRED = ("text_encoder_2", "unet", "vae", "tokenizer_2", "scheduler")
# Settings that the runtime's schedules do not know: anything but these values changes the grid.
_USUAL_SCHEDULER = {
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False, "trained_betas": None,
    "rescale_betas_zero_snr": False, "interpolation_type": "linear", "final_sigmas_type": "zero",
    "timestep_type": "discrete", "use_flow_sigmas": False,
}  # fmt: skip
_SCHEDULER_WORDS = {
    "beta_schedule": ("scaled_linear", "linear"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
}
MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True)
class ModelSource:
    """One model of a pipeline folder: class and config; the weights are opened when asked for."""

    folder: Path
    class_name: str
    config: dict[str, Any]
    stem: str

    def checkpoint(self) -> Checkpoint:
        """Open the model's safetensors."""
        return open_checkpoint(self.folder, self.stem)


@dataclass(frozen=True)
class PipelineSource:
    """A base or refiner folder whose configs have been read."""

    root: Path
    name: str
    models: dict[str, ModelSource]
    tokenizers: dict[str, Path]
    scheduler: Scheduler
    requires_aesthetics_score: bool
    force_zeros_for_empty_prompt: bool


def open_pipeline(root: Path, expected_class: str) -> PipelineSource:
    """Read the diffusers folder at `root`, which must hold a pipeline of `expected_class`.

    Raises SourceError for a folder that is missing, incomplete, or of another class; CorruptError for broken JSON.
    """
    index = _read_index(root, expected_class)
    parts = {name: value for name, value in index.items() if isinstance(value, list) and value and value[0]}
    # The first encoder is optional, as in diffusers, but it comes with its tokenizer.
    pair = [name for name in ("text_encoder", "tokenizer") if "text_encoder" in parts or "tokenizer" in parts]
    missing = [name for name in (*_REQUIRED, *pair) if name not in parts or not (root / name).is_dir()]
    if missing:
        raise SourceError(f"{root}: has no {', '.join(missing)}; download the whole model folder")
    models = {name: _open_model(root / name, parts[name]) for name in _MODELS if name in parts}
    refiner = expected_class == REFINER_CLASS
    return PipelineSource(
        root=root,
        name=root.resolve().name,
        models=models,
        tokenizers={name: root / name for name in ("tokenizer", "tokenizer_2") if name in parts},
        scheduler=_read_scheduler(root / "scheduler" / "scheduler_config.json"),
        requires_aesthetics_score=bool(index.get("requires_aesthetics_score", False)) and refiner,
        force_zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", True)),
    )


def _read_index(root: Path, expected_class: str) -> dict[str, Any]:
    option = _OPTION[expected_class]
    if not root.is_dir():
        raise SourceError(f"{option} {root}: no such folder; give the folder of a diffusers model, or 'mini'")
    if not (root / "model_index.json").is_file():
        raise SourceError(f"{option} {root}: has no model_index.json, so it is not a diffusers pipeline folder;"
                          " give the folder that save_pretrained wrote")  # fmt: skip
    index = read_json(root / "model_index.json")
    found = index.get("_class_name")
    if found == expected_class:
        return index
    if isinstance(found, str) and found in _OPTION:
        raise SourceError(f"{option} {root}: is a {found}, which goes to {_OPTION[found]}; {option} takes a"
                          f" {expected_class}")  # fmt: skip
    raise SourceError(f"{option} {root}: is a {found}, not SDXL; {option} takes a {expected_class}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise SourceError where it is missing and CorruptError where it is broken."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CorruptError(f"{path}: larger than {MAX_JSON_BYTES >> 20} MiB, so not a config")
        value = json.loads(path.read_bytes())
    except FileNotFoundError as exc:
        raise SourceError(f"{path}: missing; download the whole model folder") from exc
    except OSError as exc:
        raise explain_os_error(exc, f"reading {path}") from exc
    except (ValueError, RecursionError) as exc:
        raise CorruptError(f"{path}: broken JSON ({exc}); download it again") from exc
    if not isinstance(value, dict):
        raise CorruptError(f"{path}: expected a JSON object, found {type(value).__name__}; download it again")
    return value


def _open_model(folder: Path, entry: list[Any]) -> ModelSource:
    library, class_name = [str(part) for part in entry[:2]] if len(entry) >= 2 else ("", "")
    if library not in _STEMS:
        raise SourceError(f"{folder}: model_index.json names {library}.{class_name}; custom code is never loaded")
    return ModelSource(folder, class_name, read_json(folder / "config.json"), _STEMS[library])


def _read_scheduler(path: Path) -> Scheduler:
    config = read_json(path)
    config["class_name"] = str(config.get("_class_name", "EulerDiscreteScheduler"))
    ignored = [name for name, usual in _USUAL_SCHEDULER.items() if config.get(name, usual) != usual]
    if ignored:
        log.warning("%s: %s is not followed yet; the grid is made without it", path, ", ".join(ignored))
    known = {name: config[name] for name in Scheduler.__struct_fields__ if config.get(name) is not None}
    try:
        scheduler = msgspec.convert(known, Scheduler)
    except msgspec.ValidationError as exc:
        raise CorruptError(f"{path}: {exc}; download it again") from exc
    for name, words in _SCHEDULER_WORDS.items():
        if getattr(scheduler, name) not in words:
            raise SourceError(f"{path}: {name} {known[name]!r} is not supported; {', '.join(words)} are")
    return scheduler
