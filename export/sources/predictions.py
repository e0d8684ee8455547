"""What a single file says of its schedule: what its UNet predicts, and whether its training ended in pure noise."""

__all__ = ["SCHEDULE_WORDS", "said_schedule"]

from collections.abc import Callable, Collection, Mapping
from typing import Any

SCHEDULE_WORDS = ("v_pred", "ztsnr")
"""Empty tensors by which trainers mark a checkpoint."""
_HEADER_WORDS = {
    "v": True,
    "v_prediction": True,
    "v-prediction": True,
    "velocity": True,
    "epsilon": False,
    "eps": False,
}
_FLAGS = {"true": True, "1": True, "false": False, "0": False}
_SPEC, _KOHYA = "modelspec.prediction_type", "ss_v_parameterization"
_ZERO_SNR, _RANGE = "ss_zero_terminal_snr", "modelspec.timestep_range"


def said_schedule(
    names: Collection[str], metadata: Mapping[str, str], where: str, warn: Callable[[str], None]
) -> dict[str, Any]:
    """Return what a file changes in its scheduler's config: nothing where it says nothing, or epsilon.

    `names` are its tensors, `metadata` what its header says beside them. An empty tensor ``v_pred`` says that the UNet
    predicts v, and ``ztsnr`` beside it that the schedule was rescaled to end in pure noise; ``ztsnr`` without
    v-prediction says nothing. Source: ComfyUI's ``SDXL.model_type``. A header that says v where no tensor does
    (Stability's ModelSpec, or kohya's training arguments) is followed too, and warned of, since ComfyUI does not;
    where the two disagree the tensor counts.
    """
    stated = _stated(metadata, where, warn)
    changes: dict[str, Any] = {}
    if "v_pred" in names:
        changes["prediction_type"] = "v_prediction"
        against = [word for word, says_v in stated.items() if not says_v]
        if against:
            warn(f"{where}: its tensor v_pred says that it predicts v, its header the contrary ({', '.join(against)});"
                 " the tensor is followed")  # fmt: skip
    elif any(stated.values()):
        changes["prediction_type"] = "v_prediction"
        said = ", ".join(word for word, says_v in stated.items() if says_v)
        but = "" if all(stated.values()) else ", though another entry says the contrary"
        warn(f"{where}: its header says that it predicts v ({said}){but}, and is followed; no tensor v_pred says so: if"
             " pictures come out wrong, generate with --prediction-type epsilon")  # fmt: skip
    zero = ["ztsnr"] if "ztsnr" in names else []
    zero += [_ZERO_SNR] if _FLAGS.get(metadata.get(_ZERO_SNR, "").lower(), False) else []
    if zero and changes:
        changes["rescale_betas_zero_snr"] = True
    elif zero:
        warn(f"{where}: {' and '.join(zero)}, a schedule that ends in pure noise, is not followed, since it needs a"
             " UNet that predicts v, and the file does not say that it does")  # fmt: skip
    if metadata.get(_RANGE, "0,1000") not in ("0,1000", "0,999", "None,None"):
        warn(f"{where}: was trained for a part of the timesteps only ({_RANGE} {metadata[_RANGE]}); it is used for all"
             " that generation gives it")  # fmt: skip
    return changes


def _stated(metadata: Mapping[str, str], where: str, warn: Callable[[str], None]) -> dict[str, bool]:
    """Return which entries of a header say what is predicted, and whether that is v."""
    stated: dict[str, bool] = {}
    for entry, words in ((_SPEC, _HEADER_WORDS), (_KOHYA, _FLAGS)):
        value = metadata.get(entry)
        if value is None or value.lower() in ("", "none"):
            continue
        if value.lower() in words:
            stated[f"{entry} {value}"] = words[value.lower()]
        else:
            warn(f"{where}: its header says {entry} {value!r}, which is not known and not followed")
    return stated
