"""How a checkpoint states its quantization: plain scaled fp8 is supported, every other way is refused by name."""

__all__ = ["check_header", "check_layer", "read_quantization", "unquantized"]

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from sdxl_trt.engines import CorruptError, SourceError
from sdxl_trt.export.checkpoints.fp8_scales import BLOCK

_REMEDY = "give the model in fp16 or fp32"
_HEADER = "_quantization_metadata"
_MARKER = "scaled_fp8"
_CONFIG = "quantization_config"
_FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")
# ComfyUI's settings of a layer: its format, and how it multiplies, which changes no weight.
_HARMLESS = {"format", "full_precision_matrix_mult"}
# Tensors that reveal other ways of quantizing, and the names of those.
_OTHERS: tuple[tuple[str, str], ...] = (
    (r"(.*\.)?(wscales|ascales|wcscales|wtscale|smooth_factor(_orig)?|proj_down|proj_up)", "SVDQuant"),
    (r".*\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*|SCB|weight_format)", "bitsandbytes"),
    (r".*\.(qweight|qzeros|scales|g_idx)", "GPTQ or AWQ"),
    (r".*\.weight_scale_2", "NVFP4"),
    (r".*\.(weight_packed|weight_shape|weight_g_idx)", "compressed-tensors, packed"),
    (r".*\._(data|scale|shift)", "quanto"),
    (r".*(zero_point|zero_points|zp)", "a zero point"),
)


def unquantized(config: dict[str, Any]) -> dict[str, Any]:
    """Return a model's config without its quantization settings, since an export dequantizes the weights."""
    return {name: value for name, value in config.items() if name != _CONFIG}


def read_quantization(config: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    """Return the (rows, columns) of the blocks in which the fp8 weights of a model with this `config` are scaled.

    The default is `BLOCK`. Returns None if `config` has no quantization settings; fp8 weights then need no scales.

    Raises SourceError, naming it, for every other way of quantizing.
    """
    settings = config.get(_CONFIG)
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise CorruptError(f"{where}: {_CONFIG} is not a JSON object; restore the model's config.json")
    method = str(settings.get("quant_method", "unnamed"))
    if method == "fp8":
        return _block(settings.get("weight_block_size"), where)
    if method == "compressed-tensors" and _is_plain_fp8(settings):
        blocks = {str(weights.get("block_structure")): weights.get("block_structure") for weights in _groups(settings)}
        if len(blocks) == 1:
            return _block(next(iter(blocks.values())), where)
    kind = settings.get("format", settings.get("quant_algo", settings.get("quant_type", "")))
    named = f"{method}, {kind}" if kind else method
    raise SourceError(f"{where}: the weights are quantized ({named}), which is not supported; {_REMEDY}")


def _groups(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups = settings.get("config_groups")
    found = [group.get("weights") for group in groups.values() if isinstance(group, dict)] if (
        isinstance(groups, dict)) else []  # fmt: skip
    return [weights for weights in found if isinstance(weights, dict)]


def _is_plain_fp8(settings: Mapping[str, Any]) -> bool:
    """Return whether compressed-tensors' settings describe fp8 weights with scales and nothing else."""
    groups = _groups(settings)
    plain = all(
        (weights.get("num_bits"), weights.get("type"), weights.get("symmetric", True)) == (8, "float", True)
        and weights.get("strategy", "tensor") in ("tensor", "channel", "block")
        for weights in groups
    )
    sparse = (settings.get("sparsity_config") or {}).get("format", "dense") != "dense"
    known = settings.get("format") in ("float-quantized", "naive-quantized")
    return bool(groups) and plain and known and not sparse and not settings.get("transform_config")


def _block(value: Any, where: str) -> tuple[int, int]:
    if value is None:
        return BLOCK
    if isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value):
        return (value[0], value[1])
    raise CorruptError(f"{where}: block size is {value!r}, expected two integers; restore the model's config.json")


def check_header(names: Collection[str], metadata: Mapping[str, str], where: str) -> None:
    """Raise SourceError if a file's header, or the name of a tensor, states that it is quantized in another way."""
    for name in names:
        for pattern, what in _OTHERS:
            if re.fullmatch(pattern, name):
                raise SourceError(f"{where}: the checkpoint is quantized ({what}: it has {name}), which is not"
                                  f" supported; {_REMEDY}")  # fmt: skip
    if _MARKER in names and not any(name.endswith(".scale_weight") for name in names):
        raise SourceError(f"{where}: states that its fp8 weights are scaled ({_MARKER}), but has no scales; {_REMEDY}")
    if _HEADER not in metadata:
        return
    try:
        layers = json.loads(metadata[_HEADER])["layers"]
        items = list(layers.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise CorruptError(f"{where}: {_HEADER} in the header is broken; download it again") from exc
    present = set(names)
    for layer, settings in items:
        _check_format(settings, layer, where)
        scale = f"{layer}.weight_scale"
        if scale not in present and not any(name.endswith(f".{scale}") for name in present):
            raise SourceError(f"{where}: the header states that {layer} is scaled fp8, but it has no scale; {_REMEDY}")


def check_layer(mark: bytes, name: str, where: str) -> None:
    """Raise SourceError unless ComfyUI's mark of a layer, the JSON in its ``comfy_quant``, states plain scaled fp8."""
    try:
        settings = json.loads(mark)
    except (ValueError, RecursionError) as exc:
        raise CorruptError(f"{where}: {name} is not JSON; download it again") from exc
    _check_format(settings, name, where)


def _check_format(settings: Any, layer: str, where: str) -> None:
    if isinstance(settings, str):
        settings = {"format": settings}
    if not isinstance(settings, dict):
        raise CorruptError(f"{where}: the quantization settings of {layer} are not a JSON object; download it again")
    stated = settings.get("format")
    unknown = sorted(settings.keys() - _HARMLESS)
    if stated not in _FP8_FORMATS or unknown:
        label = f"{stated} with {', '.join(unknown)}" if unknown else str(stated)
        raise SourceError(f"{where}: {layer} is quantized ({label}), which is not supported; {_REMEDY}")
