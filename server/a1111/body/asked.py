"""What a body of txt2img or img2img asks for: every field used, refused by name, or told to have no effect."""

__all__ = ["DEFAULTS", "Asked", "AskedControl", "AskedMask", "AskedStart", "echo", "read_asked"]

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdxl_trt.runtime.request import Request, settings_of
from sdxl_trt.server.a1111.body.fields import Fields, invalid
from sdxl_trt.server.a1111.body.models import Models
from sdxl_trt.server.a1111.body.samplers import DEFAULT_SAMPLER, Chosen, SamplerKind, choose
from sdxl_trt.server.a1111.body.settings import Settings, changed
from sdxl_trt.server.http import ApiError

MOST_PROMPT = 32_000
MOST_GUIDANCE = 100.0
MOST_PICTURES = 1000
MOST_SIDE = 16384
MOST_SEED = 2**64 - 1
DRAWN_SEEDS = 4294967294
"""A1111 draws seeds below this."""
MOST_NAME = 400
_NOISE = (
    "seed: its noise is that of A1111's options randn_source CPU, sgm_noise_multiplier and enable_quantization; A1111"
    " with others draws other pictures"
)
MOST_STEPS = int(settings_of(Request)["steps"].high or 1000)

DEFAULTS: Mapping[str, Any] = {
    "prompt": "", "negative_prompt": "", "styles": None, "seed": -1, "subseed": -1, "subseed_strength": 0,
    "seed_resize_from_h": -1, "seed_resize_from_w": -1, "sampler_name": None, "scheduler": None, "batch_size": 1,
    "n_iter": 1, "steps": 50, "cfg_scale": 7.0, "width": 512, "height": 512, "restore_faces": None, "tiling": None,
    "do_not_save_samples": False, "do_not_save_grid": False, "eta": None, "denoising_strength": None,
    "s_min_uncond": None, "s_churn": None, "s_tmax": None, "s_tmin": None, "s_noise": None, "override_settings": None,
    "override_settings_restore_afterwards": True, "refiner_checkpoint": None, "refiner_switch_at": None,
    "disable_extra_networks": False, "firstpass_image": None, "comments": None, "enable_hr": False,
    "firstphase_width": 0, "firstphase_height": 0, "hr_scale": 2.0, "hr_upscaler": None, "hr_second_pass_steps": 0,
    "hr_resize_x": 0, "hr_resize_y": 0, "hr_checkpoint_name": None, "hr_sampler_name": None, "hr_scheduler": None,
    "hr_prompt": "", "hr_negative_prompt": "", "force_task_id": None, "sampler_index": "Euler", "script_name": None,
    "script_args": [], "send_images": True, "save_images": False, "alwayson_scripts": {}, "infotext": None,
}  # fmt: skip
"""The fields of txt2img, and A1111's defaults."""
OF_PICTURES: Mapping[str, Any] = {
    "init_images": None, "resize_mode": 0, "image_cfg_scale": None, "mask": None, "mask_blur_x": 4, "mask_blur_y": 4,
    "mask_blur": None, "mask_round": True, "inpainting_fill": 0, "inpaint_full_res": True,
    "inpaint_full_res_padding": 0, "inpainting_mask_invert": 0, "initial_noise_multiplier": None, "latent_mask": None,
    "include_init_images": False,
}  # fmt: skip
"""What img2img has besides."""
_HEAVY = ("init_images", "mask", "latent_mask", "firstpass_image", "alwayson_scripts", "infotext")
"""Fields that hold pictures, which answers do not repeat."""
_IDLE = (
    "do_not_save_samples", "do_not_save_grid", "save_images", "override_settings_restore_afterwards", "comments",
    "tags", "clip_skip", "disable_extra_networks", "hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x",
    "hr_resize_y", "hr_checkpoint_name", "hr_sampler_name", "hr_scheduler", "hr_prompt", "hr_negative_prompt",
    "hr_cfg", "hr_additional_modules", "firstphase_width", "firstphase_height", "script_args", "image_cfg_scale",
    "distilled_cfg_scale", "url", "auth", "model", "subseed", "user", "session_hash",
)  # fmt: skip
"""Fields that change no picture here: of the second pass that is refused, of files, of other programs."""


@dataclass(frozen=True)
class AskedMask:
    """A mask as base64, and how A1111 uses it: see `pictures`."""

    picture: str
    blur: tuple[int, int]
    fill: bool
    invert: bool
    whole: bool
    padding: int
    rounded: bool


@dataclass(frozen=True)
class AskedStart:
    """A picture to start from as base64, how it is brought to the size (0, 1 or 2), and how much changes."""

    picture: str
    resize_mode: int
    strength: float
    mask: AskedMask | None = None
    include: bool = False


@dataclass(frozen=True)
class AskedControl:
    """A unit of ControlNet: its picture as base64, the bundle's model, its weight, and the part of the steps."""

    picture: str
    net: str
    weight: float
    resize_mode: int
    start: float
    end: float


@dataclass(frozen=True)
class Asked:
    """A checked body. `seed` is drawn by now; `switch_at` None with `refines` changes before the first step.

    `warnings` are short sentences on what has no effect, or another one than in A1111.
    """

    prompt: str
    negative: str
    seed: int
    steps: int
    guidance: float
    width: int
    height: int
    batch_size: int
    n_iter: int
    chosen: Chosen
    settings: Settings
    refines: bool = False
    switch_at: float | None = None
    start: AskedStart | None = None
    controls: tuple[AskedControl, ...] = ()
    send_images: bool = True
    id_task: str = ""
    stated_size: bool = True
    warnings: tuple[str, ...] = ()
    loras: tuple[Any, ...] = field(default=())

    @property
    def pictures(self) -> int:
        """Return how many pictures are drawn."""
        return self.batch_size * self.n_iter


def echo(body: Mapping[str, Any], *, img2img: bool, include: bool = False) -> dict[str, Any]:
    """Return the `parameters` of an answer: the known fields of a body, with pictures only if they are to `include`."""
    known = {**DEFAULTS, **OF_PICTURES} if img2img else DEFAULTS
    heavy = () if include else _HEAVY
    return {name: default if name in heavy else body.get(name, default) for name, default in known.items()}


def read_asked(body: Mapping[str, Any], models: Models, settings: Settings, *, img2img: bool = False) -> Asked:
    """Return what `body` asks for, with the server's `settings`. Raises ApiError: 422 that names the field, or 404."""
    given = Fields(body)
    _refuse(given)
    used, warnings = changed(settings, given.object("override_settings"), models, "override_settings")
    warnings = [f"override_settings: {each}" for each in warnings]
    chosen = _sampler(given)
    warnings += _sampler_warnings(given, chosen.sampler)
    seed, drawn = _seed(given)
    refines = models.refines(given.text("refiner_checkpoint", MOST_NAME))
    switch_at = given.number_or_none("refiner_switch_at", 0.0, 1.0)
    warnings += [*drawn, *_refiner_warnings(switch_at, refines=refines)]
    stated = any(body.get(name) is not None for name in ("width", "height"))
    start, controls = _start(given) if img2img else None, tuple(_scripts(given))
    asked = Asked(
        prompt=given.text("prompt", MOST_PROMPT),
        negative=given.text("negative_prompt", MOST_PROMPT),
        seed=seed,
        steps=given.whole("steps", 1, MOST_STEPS, 50),
        guidance=given.number("cfg_scale", 0.0, MOST_GUIDANCE, 7.0),
        width=given.whole("width", 1, MOST_SIDE, 512),
        height=given.whole("height", 1, MOST_SIDE, 512),
        batch_size=given.whole("batch_size", 1, MOST_PICTURES, 1),
        n_iter=given.whole("n_iter", 1, MOST_PICTURES, 1),
        chosen=chosen,
        settings=used,
        refines=refines,
        switch_at=switch_at,
        start=start,
        controls=controls,
        send_images=given.flag("send_images", default=True),
        id_task=given.text("force_task_id", MOST_NAME),
        stated_size=stated,
        warnings=(*warnings, *_idle(given)),
    )
    if asked.seed + asked.pictures - 1 > MOST_SEED:
        raise invalid("seed", f"the last picture's would be above {MOST_SEED}; give a lower one")
    return asked


def _refuse(given: Fields) -> None:
    """Raise ApiError for what would change the picture, and is not here."""
    for name, what in (("enable_hr", "a second pass in a higher size"), ("restore_faces", "restoring faces"),
                       ("tiling", "tiling pictures")):  # fmt: skip
        if given.flag(name):
            raise invalid(name, f"{what} is not supported; give false")
    for name, least, usual, why in (
        ("subseed_strength", 0.0, 0.0, "mixing the noise of two seeds"),
        ("s_churn", 0.0, 0.0, "adding noise in the steps of Euler"),
        ("s_tmin", 0.0, 0.0, "adding noise in the steps of Euler"),
        ("s_min_uncond", 0.0, 0.0, "leaving out the negative prompt"),
        ("s_noise", 0.0, 1.0, "scaling the noise of the steps"),
        ("initial_noise_multiplier", 0.0, 1.0, "scaling the first noise"),
    ):
        found = given.number_or_none(name, least, 1e6)
        if found not in (None, usual):
            raise invalid(name, f"{why} is not supported; give {usual:g}, or leave it out")
    for name in ("seed_resize_from_w", "seed_resize_from_h"):
        if given.whole(name, -(1 << 30), 1 << 30, -1) > 0:
            raise invalid(name, "noise of another size is not supported; give 0, or leave it out")
    for name in ("latent_mask", "firstpass_image"):
        if given.take(name):
            raise invalid(name, "is not supported; leave it out")
    # It only bounds the noise that s_churn adds.
    given.drop(["s_tmax"])


def _sampler(given: Fields) -> Chosen:
    names = [given.text(name, MOST_NAME) for name in ("sampler_name", "sampler_index")]
    return choose(next((name for name in names if name), DEFAULT_SAMPLER), given.text("scheduler", MOST_NAME))


def _sampler_warnings(given: Fields, sampler: SamplerKind) -> Iterator[str]:
    eta = given.number_or_none("eta", 0.0, 100.0)
    if sampler.note:
        yield f"sampler_name: {sampler.label} is not A1111's in every detail: {sampler.note}"
    if eta is None:
        return
    if sampler.name == "ddim" and eta != 0.0:
        yield "eta: has no effect: DDIM adds no noise here"
    elif sampler.adds_noise and eta != 1.0:
        raise invalid("eta", f"{eta:g} was given; {sampler.label} adds the noise of 1 here, leave it out")


def _seed(given: Fields) -> tuple[int, list[str]]:
    """Return the seed, which is drawn for -1 and for nothing, and a sentence where it means other noise in A1111."""
    value = given.take("seed")
    if value in (None, "", -1, -1.0, "-1"):
        return secrets.randbelow(DRAWN_SEEDS), []
    seed = Fields({"seed": value}).whole("seed", 0, MOST_SEED, 0)
    return seed, [_NOISE]


def _refiner_warnings(at: float | None, *, refines: bool) -> Iterator[str]:
    if refines and at is None:
        yield "refiner_switch_at: without it the refiner takes every step, as in A1111; 0.8 is usual"
    elif at is not None and not refines:
        yield "refiner_switch_at: has no effect without a refiner_checkpoint"


def _start(given: Fields) -> AskedStart:
    pictures = given.items("init_images", 64)
    if not pictures or not isinstance(pictures[0], str):
        raise ApiError(404, "Init image not found", "not_found", param="init_images")
    if len(pictures) > 1:
        raise invalid("init_images", f"{len(pictures)} pictures were given; give one")
    mode = given.whole("resize_mode", 0, 3, 0)
    if mode == 3:
        raise invalid("resize_mode", "3, scaling of latents, is not supported; choose 0, 1 or 2")
    strength = given.number("denoising_strength", 0.0, 1.0, 0.75)
    return AskedStart(pictures[0], mode, strength, _mask(given), given.flag("include_init_images"))


def _mask(given: Fields) -> AskedMask | None:
    """Return the mask; clients send what is said of one without it, too."""
    mask = given.take("mask")
    both = given.take("mask_blur")
    across, down = (given.whole(f"mask_blur_{axis}", 0, 1024, 4) for axis in "xy")
    if both is not None:
        across = down = Fields({"mask_blur": both}).whole("mask_blur", 0, 1024, 4)
    fill = given.whole("inpainting_fill", 0, 3, 0)
    whole = not given.flag("inpaint_full_res", default=True)
    padding = given.whole("inpaint_full_res_padding", 0, MOST_SIDE, 0)
    invert = given.whole("inpainting_mask_invert", 0, 1, 0)
    rounded = given.flag("mask_round", default=True)
    if mask in (None, ""):
        return None
    if not isinstance(mask, str):
        raise invalid("mask", "give a picture as base64")
    if fill > 1:
        raise invalid("inpainting_fill", f"{fill}, which starts from noise or nothing, is not supported; choose 0 or 1")
    return AskedMask(mask, (across, down), fill == 0, bool(invert), whole, padding, rounded)


def _scripts(given: Fields) -> Iterator[AskedControl]:
    """Yield the units of ControlNet; every other script is refused, as A1111 does for one that it lacks."""
    if given.text("script_name", MOST_NAME):
        raise invalid("script_name", "there is no script here; leave it out")
    for name, value in given.object("alwayson_scripts").items():
        if name.lower() != "controlnet":
            raise invalid("alwayson_scripts", "the only script here is controlnet; leave the others out")
        if not isinstance(value, dict):
            raise invalid("alwayson_scripts.controlnet", 'give an object: {"args": […]}')
        for unit in Fields(value, "alwayson_scripts.controlnet").items("args", 16):
            if isinstance(unit, dict):
                yield from _unit(Fields(unit, "alwayson_scripts.controlnet"))
            elif unit not in (None, False):
                raise invalid("alwayson_scripts.controlnet", "an argument is no object; give its fields by name")


_MODES = {"just resize": 0, "crop and resize": 1, "scale to fit (inner fit)": 1, "resize and fill": 2,
          "envelope (outer fit)": 2, "inner fit (scale to fit)": 1, "outer fit (shrink to fit)": 2}  # fmt: skip


def _unit(unit: Fields) -> Iterator[AskedControl]:
    if not unit.flag("enabled", default=True):
        return
    module = unit.text("module", MOST_NAME).lower()
    if module not in ("", "none"):
        raise unit.invalid("module", "preprocessors are not here; send the finished picture, and module none")
    balanced = unit.take("control_mode")
    if balanced not in (None, 0, "0", "Balanced"):
        raise unit.invalid("control_mode", "only Balanced is supported")
    picture = unit.take("image")
    picture = unit.take("input_image") if picture is None else picture
    if isinstance(picture, dict):
        if picture.get("mask"):
            raise unit.invalid("image", "a mask is not supported; send the picture alone")
        picture = picture.get("image")
    if not isinstance(picture, str) or not picture:
        raise unit.invalid("image", "give a picture as base64")
    if unit.take("mask") or unit.take("mask_image") or unit.take("effective_region_mask"):
        raise unit.invalid("mask", "is not supported; leave it out")
    start, end = (unit.number(f"guidance_{name}", 0.0, 1.0, usual) for name, usual in (("start", 0.0), ("end", 1.0)))
    yield AskedControl(picture, unit.text("model", MOST_NAME), unit.number("weight", -100.0, 100.0, 1.0),
                       _resize_mode(unit), start, end)  # fmt: skip


def _resize_mode(unit: Fields) -> int:
    mode = unit.take("resize_mode")
    mode = _MODES.get(mode.lower(), mode) if isinstance(mode, str) else mode
    return Fields({"resize_mode": mode}, "alwayson_scripts.controlnet").whole("resize_mode", 0, 2, 1)


def _idle(given: Fields) -> Iterator[str]:
    """Yield a sentence on each field that has no effect, and might have been meant to have one."""
    if given.items("styles", 1000):
        yield "styles: there are none here, so they have no effect"
    if given.text("infotext", 1 << 20):
        yield "infotext: has no effect; give the fields themselves"
    given.drop(_IDLE)
    given.drop(OF_PICTURES)
    given.drop(["denoising_strength", "alwayson_scripts", "script_name"])
    if unknown := given.rest():
        yield f"{len(unknown)} fields are not known here, and have no effect"
