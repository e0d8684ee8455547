"""A1111's options: those that have an effect here, in `options` and in a request's `override_settings`."""

__all__ = ["Settings", "changed", "options_told"]

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from sdxl_trt.server.a1111.body.fields import Fields, invalid
from sdxl_trt.server.a1111.body.models import Models

FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
"""A1111's `samples_format`, and Pillow's names of these."""
MOST_SCORE, MOST_CROP = 1000.0, 1 << 20
FIXED: Mapping[str, object] = {
    "randn_source": "CPU",
    "sgm_noise_multiplier": True,
    "enable_quantization": True,
    "always_discard_next_to_last_sigma": False,
    "enable_emphasis": True,
    "eta_noise_seed_delta": 0,
    "img2img_color_correction": False,
    "initial_noise_multiplier": 1.0,
    "webp_lossless": False,
    "sdxl_clip_l_skip": False,
    "comma_padding_backtrack": 20,
    "token_merging_ratio": 0.0,
    "s_churn": 0.0,
    "s_noise": 1.0,
}
"""Options of A1111 that change pictures, and as which of their values this server works, whatever is asked."""
_NO_EFFECT = frozenset({
    "CLIP_stop_at_last_layers", "samples_save", "grid_save", "save_txt", "do_not_show_images", "return_grid",
    "sd_checkpoint_hash", "show_progress_every_n_steps", "live_previews_enable", "sd_checkpoints_limit",
    "sd_checkpoint_cache", "sd_vae_checkpoint_cache", "outdir_txt2img_samples", "outdir_img2img_samples",
})  # fmt: skip
"""Options that change no picture of SDXL: A1111 ignores CLIP_stop_at_last_layers for it."""


@dataclass(frozen=True)
class Settings:
    """The options that may be set; the defaults are A1111's."""

    samples_format: str = "png"
    jpeg_quality: int = 80
    sdxl_refiner_high_aesthetic_score: float = 6.0
    sdxl_refiner_low_aesthetic_score: float = 2.5
    sdxl_crop_top: int = 0
    sdxl_crop_left: int = 0
    refiner_switch_by_sample_steps: bool = False

    @property
    def kind(self) -> str:
        """Return Pillow's name of the format of pictures."""
        return FORMATS[self.samples_format]


def options_told(settings: Settings, models: Models) -> dict[str, Any]:
    """Return what /options says; clients send all of it back to change one."""
    own = {each.name: getattr(settings, each.name) for each in fields(settings)}
    return {"sd_model_checkpoint": models.base.title, "sd_checkpoint_hash": models.base.sha256, "sd_vae": "Automatic",
            "CLIP_stop_at_last_layers": 1, **own, **FIXED}  # fmt: skip


def changed(settings: Settings, told: Mapping[str, Any], models: Models, where: str) -> tuple[Settings, list[str]]:
    """Return `settings` with what `told` changes, and sentences on what has no effect; `where` names it in errors.

    Raises ApiError: 404 for another checkpoint, 422 for another VAE and for values that an option cannot have.
    """
    given = Fields(told, within=where)
    checkpoint, vae = (given.text(name, 400) for name in ("sd_model_checkpoint", "sd_vae"))
    if checkpoint:
        models.check_base(f"{where}.sd_model_checkpoint".removeprefix("."), checkpoint)
    if vae.lower() not in ("", "automatic", "none"):
        raise invalid(
            f"{where}.sd_vae".removeprefix("."), "there is no other VAE here; leave it out, or give Automatic"
        )
    made = replace(settings, **_values(given, settings))
    given.drop(_NO_EFFECT)
    return made, [*_idle(given.rest())]


def _values(given: Fields, settings: Settings) -> dict[str, Any]:
    kind = given.text("samples_format", 20, settings.samples_format).lower()
    if kind not in FORMATS:
        raise given.invalid("samples_format", f"is not a format of this server; choose one of: {', '.join(FORMATS)}")
    found: dict[str, Any] = {"samples_format": kind}
    for name, high in (("jpeg_quality", 100), ("sdxl_crop_top", MOST_CROP), ("sdxl_crop_left", MOST_CROP)):
        found[name] = given.whole(name, int(name == "jpeg_quality"), high, getattr(settings, name))
    for name in ("sdxl_refiner_high_aesthetic_score", "sdxl_refiner_low_aesthetic_score"):
        found[name] = given.number(name, -MOST_SCORE, MOST_SCORE, getattr(settings, name))
    name = "refiner_switch_by_sample_steps"
    return {**found, name: given.flag(name, default=getattr(settings, name))}


def _idle(left: Mapping[str, Any]) -> list[str]:
    """Return a sentence on each option that changes nothing here, although its value would in A1111."""
    told = [f"{name} has no effect: this server works as with {ours}" for name, ours in FIXED.items()
            if name in left and left[name] not in (ours, None)]  # fmt: skip
    others = sum(name not in FIXED for name in left)
    return [*told, *([f"{others} options that are not known here have no effect"] if others else [])]
