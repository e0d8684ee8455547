"""What went wrong, as an error of this API: the fields' own names in it, and no path of this machine."""

__all__ = ["as_api_error", "check_ended"]

import re

from sdxl_trt.engines import ResourceError, SdxlTrtError, UsageError
from sdxl_trt.server.desk import Ended
from sdxl_trt.server.http import ApiError
from sdxl_trt.server.options import Options

NO_RETRY = {"x-should-retry": "false"}
"""OpenAI's clients send a request again after 5xx: a picture that failed, or took too long, would be drawn again."""
_OPTION = re.compile(r"--[a-z][a-z0-9-]*")
_FIELDS = {
    "--width": "size", "--height": "size", "--negative": "negative_prompt", "--guidance": "guidance_scale",
    "--refiner-guidance": "refiner_guidance_scale", "--schedule": "scheduler", "--lora": "loras",
    "--lora-dir": "loras", "--handoff-step": "handoff", "--no-refiner": "handoff null",
    "--aesthetic-score": "aesthetic_score",
} | {f"--{name}": name for name in ("prompt", "seed", "steps", "handoff", "sampler", "strength", "image", "mask",
                                    "compat", "cache")} | {"--refiner-cache": "refiner_cache"}  # fmt: skip
"""The fields that say what an option of trt-generate says."""


def as_api_error(exc: Exception, options: Options) -> ApiError:
    """Return the answer to an error of the desk or the runtime: 400 for what was asked, 500 for what failed here."""
    if isinstance(exc, ApiError):
        return exc
    if isinstance(exc, UsageError):
        return _of_usage(str(exc), options)
    if isinstance(exc, ResourceError):
        return ApiError(500, "the machine has too little memory for this request; ask for fewer or smaller pictures",
                        "out_of_memory", headers=NO_RETRY)  # fmt: skip
    code = "engine_error" if isinstance(exc, SdxlTrtError) else "internal_error"
    return ApiError(500, "the picture could not be drawn; the log of the server says why", code, headers=NO_RETRY)


def _of_usage(message: str, options: Options) -> ApiError:
    message = options.without_folders(message)
    found = [_FIELDS[word].split()[0] for word in _OPTION.findall(message) if word in _FIELDS]
    text = _OPTION.sub(lambda word: _FIELDS.get(word[0], word[0]), message)
    return ApiError(400, text, "invalid_value", param=found[0] if found else "")


def check_ended(ended: Ended, options: Options, *, drawn: int) -> None:
    """Raise ApiError unless an order ended with the pictures that it was to draw, or was stopped with `drawn` some."""
    if ended.outcome == "failed":
        raise as_api_error(ended.error or RuntimeError("no reason was told"), options)
    if ended.outcome == "deadline":
        raise ApiError(504, "the pictures were not finished within the deadline; ask for fewer steps or pictures",
                       "deadline_exceeded", headers=NO_RETRY)  # fmt: skip
    if ended.outcome == "cancelled" or not drawn:
        raise ApiError(503, "the request was stopped before a picture was finished", "cancelled",
                       headers=NO_RETRY if ended.outcome == "interrupted" else None)  # fmt: skip
