"""Whether a diffusers pipeline folder holds a base or a refiner, whatever class it was saved as."""

__all__ = ["BASE_CLASS", "REFINER_CLASS", "Role", "check_class", "check_role", "needs_score"]

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from sdxl_trt.engines import SourceError

Role = Literal["base", "refiner"]
Configs = Mapping[str, Mapping[str, Any]]
BASE_CLASS = "StableDiffusionXLPipeline"
REFINER_CLASS = "StableDiffusionXLImg2ImgPipeline"
INPAINT_CLASS = "StableDiffusionXLInpaintPipeline"
"""Usually a base whose UNet receives the mask, but bases and refiners are saved as this class too."""
_USUAL: dict[str, Role] = {BASE_CLASS: "base", REFINER_CLASS: "refiner", INPAINT_CLASS: "base"}
_SCORE = "requires_aesthetics_score"


def check_class(found: Any, where: str) -> None:
    """Raise SourceError unless the pipeline's class is one that a base or refiner is saved as."""
    if isinstance(found, str) and found in _USUAL:
        return
    if isinstance(found, str) and found.startswith("StableDiffusionXL"):
        raise SourceError(f"{where}: is a {found}, which is not supported; give the text-to-image, image-to-image or"
                          " inpainting pipeline")  # fmt: skip
    raise SourceError(f"{where}: is a {found}, not SDXL; give a {BASE_CLASS} or a {REFINER_CLASS}")


def check_role(asked: Role, index: Mapping[str, Any], configs: Configs, root: Path) -> None:
    """Raise SourceError if a folder does not hold the `asked` role.

    `index` is its model_index.json, `configs` its models' configs. A UNet with five time ids is a refiner's; a first
    text encoder is a base's. If neither decides, the class that the folder was saved as does.
    """
    class_name = str(index["_class_name"])
    held = _held(index, configs)
    if held == asked:
        return
    what = f"a {class_name}" if _USUAL[class_name] == held else f"an SDXL {held} saved as {class_name}"
    raise SourceError(f"--{asked} {root}: is {what}, which goes to --{held}; --{asked} takes an SDXL {asked}")


def _held(index: Mapping[str, Any], configs: Configs) -> Role:
    class_name = str(index["_class_name"])
    ids = _time_ids(configs)
    if ids == 5:
        return "refiner"
    scored = class_name in (REFINER_CLASS, INPAINT_CLASS) and bool(index.get(_SCORE, False)) and ids is None
    if "text_encoder" in configs and not scored:
        return "base"
    return _USUAL[class_name]


def needs_score(role: Role, index: Mapping[str, Any], configs: Configs) -> bool:
    """Return whether the last time id is an aesthetic score, as a refiner's is.

    The index states it, except for a refiner saved as a text-to-image pipeline; then the UNet's config decides.
    """
    if role == "base":
        return False
    return bool(index.get(_SCORE, False)) or (index["_class_name"] == BASE_CLASS and _time_ids(configs) == 5)


def _time_ids(configs: Configs) -> int | None:
    """Return how many time ids the UNet takes, or None if the configs do not determine it."""
    unet, encoder = configs.get("unet", {}), configs.get("text_encoder_2", {})
    sizes = (unet.get("projection_class_embeddings_input_dim"), unet.get("addition_time_embed_dim"),
             encoder.get("projection_dim"))  # fmt: skip
    if not all(type(size) is int and size > 0 for size in sizes):
        return None
    total, width, pooled = (int(size) for size in sizes if size is not None)
    return (total - pooled) // width if (total - pooled) % width == 0 else None
