"""What a single file states about its schedule: the prediction type, and zero terminal SNR."""

__all__ = ["SCHEDULE_WORDS", "said_schedule"]

from collections.abc import Callable, Collection, Mapping
from typing import Any

SCHEDULE_WORDS = ("v_pred", "ztsnr")
"""Empty tensors with which trainers mark a checkpoint."""
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
    """Return the entries that a file changes in its scheduler's config: none if it states nothing, or epsilon.

    `names` are its tensors, `metadata` is its header's. An empty tensor ``v_pred`` means v-prediction, and ``ztsnr``
    with it a zero terminal SNR; ``ztsnr`` without v-prediction means nothing. Source: ComfyUI's ``SDXL.model_type``.
    v-prediction only in the header (Stability's ModelSpec, or kohya's training arguments) is followed too, with a
    warning, since ComfyUI ignores it; if the two disagree, the tensor wins.
    """
    stated = _stated(metadata, where, warn)
    changes: dict[str, Any] = {}
    if "v_pred" in names:
        changes["prediction_type"] = "v_prediction"
        against = [word for word, says_v in stated.items() if not says_v]
        if against:
            warn(f"{where}: the tensor v_pred means v-prediction, but the header states otherwise"
                 f" ({', '.join(against)}); using v-prediction")  # fmt: skip
    elif any(stated.values()):
        changes["prediction_type"] = "v_prediction"
        words = ", ".join(word for word, says_v in stated.items() if says_v)
        but = "" if all(stated.values()) else ", though another entry states otherwise"
        warn(f"{where}: using v-prediction, as the header states ({words}){but}; there is no tensor v_pred: if pictures"
             " come out wrong, generate with --prediction-type epsilon")  # fmt: skip
    zero = ["ztsnr"] if "ztsnr" in names else []
    zero += [_ZERO_SNR] if _FLAGS.get(metadata.get(_ZERO_SNR, "").lower(), False) else []
    if zero and changes:
        changes["rescale_betas_zero_snr"] = True
    elif zero:
        warn(f"{where}: ignored {' and '.join(zero)} (zero terminal SNR), which needs v-prediction, and the file does"
             " not state v-prediction")  # fmt: skip
    if metadata.get(_RANGE, "0,1000") not in ("0,1000", "0,999", "None,None"):
        warn(f"{where}: was trained on only part of the timesteps ({_RANGE} {metadata[_RANGE]}), but is used for all"
             " timesteps of its stage")  # fmt: skip
    return changes


def _stated(metadata: Mapping[str, str], where: str, warn: Callable[[str], None]) -> dict[str, bool]:
    """Return {entry: whether it means v-prediction} for the header's entries on the prediction type."""
    stated: dict[str, bool] = {}
    for entry, words in ((_SPEC, _HEADER_WORDS), (_KOHYA, _FLAGS)):
        value = metadata.get(entry)
        if value is None or value.lower() in ("", "none"):
            continue
        if value.lower() in words:
            stated[f"{entry} {value}"] = words[value.lower()]
        else:
            warn(f"{where}: ignored {entry} {value!r} in the header, which is unknown")
    return stated
