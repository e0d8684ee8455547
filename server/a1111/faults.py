"""What went wrong, with the fields' own names in it, and no path of this machine."""

__all__ = ["as_api_error", "check_ended", "without_paths"]

import re

from sdxl_trt.engines import ResourceError, SdxlTrtError, UsageError
from sdxl_trt.server.desk import Ended
from sdxl_trt.server.http import ApiError
from sdxl_trt.server.options import Options
from sdxl_trt.server.refusals import RefusedError

_OPTION = re.compile(r"--[a-z][a-z0-9-]*")
_FIELDS = {
    "--negative": "negative_prompt", "--guidance": "cfg_scale", "--sampler": "sampler_name", "--schedule": "scheduler",
    "--handoff-step": "refiner_switch_at", "--refine": "refiner_checkpoint", "--no-refiner": "refiner_checkpoint None",
    "--image": "init_images", "--strength": "denoising_strength", "--mask": "mask", "--width": "width",
    "--height": "height", "--steps": "steps", "--seed": "seed", "--prompt": "prompt", "--lora": "prompt",
    "--control": "alwayson_scripts.controlnet", "--aesthetic-score": "sdxl_refiner_high_aesthetic_score",
}  # fmt: skip
"""The fields that say what an option of trt-generate says."""


def as_api_error(exc: Exception, options: Options) -> ApiError:
    """Return the answer to an error of the desk or the runtime: 422 for what was asked, 500 for what failed here."""
    if isinstance(exc, ApiError):
        return exc
    if isinstance(exc, UsageError):
        message = without_paths(str(exc), options)
        found = [_FIELDS[word].split()[0] for word in _OPTION.findall(message) if word in _FIELDS]
        text = _OPTION.sub(lambda word: _FIELDS.get(word[0], word[0]), message)
        return ApiError(422, text, "invalid_value", param=found[0] if found else "")
    if isinstance(exc, ResourceError):
        return ApiError(500, "the machine has too little memory for this request; ask for fewer or smaller pictures",
                        "out_of_memory")  # fmt: skip
    code = "engine_error" if isinstance(exc, SdxlTrtError) else "internal_error"
    return ApiError(500, "the picture could not be drawn; the log of the server says why", code)


def without_paths(message: str, options: Options) -> str:
    """Return a message of the runtime without the folders of this machine that `options` name."""
    for folder in (options.lora_dir, options.embedding_dir, options.engines):
        if folder is not None:
            message = message.replace(f"{folder}/", "").replace(str(folder), "the server's folder")
    return message


def check_ended(ended: Ended, options: Options) -> None:
    """Raise ApiError unless an order ended with its pictures, or was interrupted."""
    if ended.outcome == "failed":
        if isinstance(ended.error, RefusedError):
            raise ended.error
        raise as_api_error(ended.error or RuntimeError("no reason was told"), options)
    if ended.outcome == "deadline":
        raise ApiError(504, "the pictures were not finished within the deadline; ask for fewer steps or pictures",
                       "deadline_exceeded")  # fmt: skip
    if ended.outcome == "cancelled":
        raise ApiError(503, "the request was stopped before a picture was finished", "cancelled")
