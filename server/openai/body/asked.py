"""What a body of /v1/images asks for: every field checked, used, refused or told to have no effect.

Nothing here touches a file, a model or the network; the translation into a Request is in `translate`.
"""

__all__ = ["Asked", "NamedLora", "Output", "read_asked"]

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sdxl_trt.runtime.diffusion.samplers import sampler_names
from sdxl_trt.runtime.request import Request, settings_of
from sdxl_trt.server.http import ApiError
from sdxl_trt.server.openai.body.fields import Fields, invalid
from sdxl_trt.server.openai.body.sizes import Size, parse_size

MOST_PROMPT = 32_000
MOST_PICTURES = 10
MOST_PARTIALS = 3
MOST_GUIDANCE = 100.0
"""As in ComfyUI; beyond it latents only overflow."""
MOST_SCORE = 1000.0
"""Of an aesthetic score, as in ComfyUI; pictures are rated from 1 to 10."""
MOST_LORAS = 32
MAX_SEED = 2**64 - 1
DRAWN = -1
QUALITIES = ("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd")
FORMATS = ("png", "jpeg", "webp")
RESPONSES = ("b64_json", "url")
IGNORED = ("moderation", "user", "safety_identifier", "style", "complexity", "input_fidelity")
"""They would change no picture here. `user` may be a person: none of them is logged or repeated."""
REFUSED = ("frame_count", "frame_duration_ms", "svg", "markup")
"""They ask for other things than pictures."""
Format = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True)
class Output:
    """The file of each picture: its format, and the quality of a JPEG or a WebP, 0 to 100."""

    format: Format = "png"
    quality: int = 100


@dataclass(frozen=True)
class NamedLora:
    """A LoRA by its name in `--lora-dir`, and its scales; `text_scale` None is the UNet's."""

    name: str
    scale: float = 1.0
    text_scale: float | None = None


@dataclass(frozen=True)
class Asked:
    """A checked body. `size` None is the usual one; `seed` None is drawn; `steps` None follows `quality`.

    `handoff` is a fraction, None for the base alone, or "auto". `as_url` and `as_base64` are what the answer holds.
    `warnings` are short sentences on what has no effect.
    """

    prompt: str
    model: str | None = None
    n: int = 1
    size: Size | None = None
    quality: str = "auto"
    output: Output = field(default_factory=Output)
    as_base64: bool = True
    as_url: bool = False
    stream: bool = False
    partial_images: int = 0
    negative: str | None = None
    steps: int | None = None
    guidance: float | None = None
    refiner_guidance: float | None = None
    seed: int | None = None
    sampler: str | None = None
    schedule: str | None = None
    handoff: float | Literal["auto"] | None = "auto"
    aesthetic_score: float | None = None
    negative_aesthetic_score: float | None = None
    strength: float | None = None
    compat: Literal["diffusers", "comfyui"] = "diffusers"
    cache: int | None = None
    refiner_cache: int | None = None
    loras: tuple[NamedLora, ...] = ()
    warnings: tuple[str, ...] = ()


def read_asked(body: Mapping[str, Any], *, edit: bool = False, form: bool = False, lenient: bool = False) -> Asked:
    """Return what `body` asks for; `edit` is that of /v1/images/edits, and `form` one whose values are all text.

    With `lenient` unknown fields are named in the warnings. Raises ApiError (400) that names the field.
    """
    fields = Fields(body, form=form)
    prompt = fields.text("prompt", MOST_PROMPT)
    if not prompt:
        raise ApiError(400, f"prompt: give 1 to {MOST_PROMPT} characters", "missing_required_parameter", param="prompt")
    model = fields.text("model", 200)
    _refuse(fields)
    asked: dict[str, Any] = {"prompt": prompt, "model": model, "n": fields.whole("n", 1, MOST_PICTURES) or 1}
    asked |= {"size": parse_size(fields.text("size", 40)), "quality": fields.choice("quality", QUALITIES) or "auto"}
    asked |= {"output": _output(fields), "stream": fields.flag("stream")}
    asked |= {"partial_images": fields.whole("partial_images", 0, MOST_PARTIALS) or 0}
    asked |= _responses(fields, model) | _settings(fields) | {"loras": tuple(_loras(fields.json("loras")))}
    if edit:
        asked["strength"] = fields.number("strength", 0.0, 1.0, without_low=True)
    for name in IGNORED:
        fields.take(name)
    return Asked(**asked, warnings=tuple(_unknown(fields.rest(), lenient=lenient)))


def _refuse(fields: Fields) -> None:
    if fields.choice("background", ("auto", "opaque", "transparent")) == "transparent":
        raise invalid("background", "the pictures have no transparency; choose opaque or auto")
    for name in REFUSED:
        if fields.take(name) is not None:
            raise invalid(name, "is not supported: single pictures of pixels are drawn here; leave it out")


def _output(fields: Fields) -> Output:
    chosen: Any = fields.choice("output_format", FORMATS)
    quality = fields.whole("output_compression", 0, 100)
    return Output(chosen or "png", 100 if quality is None else quality)


def _responses(fields: Fields, model: str | None) -> dict[str, bool]:
    """Return what the answer holds. LangChain asks for a dall-e without a word, and reads the url alone."""
    form = fields.choice("response_format", RESPONSES)
    both = form is None and model is not None and model.startswith("dall-e")
    return {"as_base64": form != "url", "as_url": both or form == "url"}


def _settings(fields: Fields) -> dict[str, Any]:
    """Return the settings of diffusion, which are ours: OpenAI's models have none."""
    compat = fields.choice("compat", ("diffusers", "comfyui")) or "diffusers"
    seed = fields.whole("seed", DRAWN, MAX_SEED)
    most_steps = settings_of(Request)["steps"].high or 1000

    def guidance(name: str) -> float | None:
        return fields.number(name, 0.0, MOST_GUIDANCE)

    def score(name: str) -> float | None:
        return fields.number(name, 0.0, MOST_SCORE)

    return {
        "negative": fields.text("negative_prompt", MOST_PROMPT),
        "steps": fields.either("steps", "num_inference_steps", lambda name: fields.whole(name, 1, int(most_steps))),
        "guidance": fields.either("guidance_scale", "cfg_scale", guidance),
        "refiner_guidance": guidance("refiner_guidance_scale"),
        "seed": None if seed == DRAWN else seed,
        "sampler": fields.choice("sampler", sampler_names(comfyui=compat == "comfyui")),
        "schedule": fields.text("scheduler", 100),
        "handoff": _handoff(fields),
        "aesthetic_score": score("aesthetic_score"),
        "negative_aesthetic_score": score("negative_aesthetic_score"),
        "compat": compat,
        "cache": fields.whole("cache", 1, int(most_steps)),
        "refiner_cache": fields.whole("refiner_cache", 1, int(most_steps)),
    }


def _handoff(fields: Fields) -> float | str | None:
    """Return the fraction, None where it is null, "auto" where the body says nothing of it."""
    names = [name for name in ("handoff", "refiner_switch_at") if fields.has(name)]
    if len(names) > 1:
        raise invalid("refiner_switch_at", "is another name of handoff; give one of them")
    if not names:
        return "auto"
    fraction = fields.number(names[0], 0.0, 1.0, without_low=True)
    if fraction == 1.0:
        raise invalid(names[0], "1 was given; choose a fraction above 0 and below 1, or null for the base alone")
    return fraction


def _loras(value: Any) -> Iterator[NamedLora]:
    """Yield the LoRAs of a list of names and of objects {name, scale, text_scale}; None is none."""
    if value is None:
        return
    items = [value] if isinstance(value, str | dict) else value
    if not isinstance(items, list) or len(items) > MOST_LORAS:
        raise invalid("loras", f"give a list of at most {MOST_LORAS} names, or of objects with name and scale")
    for item in items:
        named = {"name": item} if isinstance(item, str) else item
        if not isinstance(named, dict) or named.keys() - {"name", "scale", "text_scale"}:
            raise invalid("loras", "an entry is no name, and no object with name, scale and text_scale alone")
        yield _lora(Fields(named))


def _lora(entry: Fields) -> NamedLora:
    try:
        name = entry.text("name", 255)
        scale, text_scale = (entry.number(key, -100.0, 100.0) for key in ("scale", "text_scale"))
    except ApiError as exc:
        raise invalid("loras", exc.message) from exc
    if not name:
        raise invalid("loras", "an entry has no name; give the name of a LoRA of this server")
    return NamedLora(name, 1.0 if scale is None else scale, text_scale)


def _unknown(names: list[str], *, lenient: bool) -> Iterator[str]:
    """Yield a warning for each unknown field. Raises ApiError for the first one unless `lenient`."""
    for name in names:
        plain = json.dumps(name[:40])[1:-1] or '""'
        if not lenient:
            raise ApiError(400, f"{plain}: is not a field of this endpoint; leave it out", "unknown_parameter",
                           param=plain)  # fmt: skip
        yield f"{plain}: is unknown, and has no effect"
