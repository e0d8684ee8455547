"""From what is asked to a Request, as A1111 would draw it where the runtime can, with a sentence where it cannot."""

__all__ = ["Translated", "Translator"]

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.bundle import Manifest
from sdxl_trt.engines.plans import PlanLimits
from sdxl_trt.runtime import Request
from sdxl_trt.runtime.adapters import LoraUse, find_named
from sdxl_trt.runtime.controls import ControlUse
from sdxl_trt.runtime.diffusion.schedules import Schedule, make_comfyui_schedule, make_schedule
from sdxl_trt.runtime.images import as_input
from sdxl_trt.runtime.request import Side
from sdxl_trt.server.a1111.body import ENDING, Asked, AskedControl, Prompt, invalid, names_in, read_prompt
from sdxl_trt.server.a1111.pictures import Paste, Prepared, Size, control_picture, prepare
from sdxl_trt.server.a1111.refiner import switch_step
from sdxl_trt.server.options import Options

_STRONGEST = 0.999
"""A1111 adds noise for at most this strength."""
_WITH_MEMORY = frozenset({"lms", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "uni_pc"})
"""Samplers that use the steps before."""
_HALF = 0.5


@dataclass(frozen=True, eq=False)
class Translated:
    """A Request, what is laid over its pictures, how many steps each takes, and what its answer warns of."""

    request: Request
    paste: Paste | None
    steps: int
    warnings: tuple[str, ...]
    unit: bool = True
    """Whether the first noise is larger by the unit variance of latents, as A1111's sgm_noise_multiplier has it."""


class Translator:
    """Translates for a bundle with `manifest` and plans of these `limits`.

    `translate` reads files and pictures: it belongs on a thread of its own.
    """

    def __init__(self, manifest: Manifest, limits: PlanLimits | None, options: Options) -> None:
        self._manifest, self._limits, self._options = manifest, limits, options

    def translate(self, asked: Asked) -> Translated:
        """Return the Request for what is asked. Raises ApiError, and UsageError for what the runtime refuses."""
        if asked.pictures > self._options.queue_pictures:
            raise invalid("n_iter", f"with batch_size {asked.pictures} pictures were asked for; at most"
                                    f" {self._options.queue_pictures} are drawn")  # fmt: skip
        size, warnings = self._size(asked)
        schedule = self._schedule(asked)
        begin = _begin(asked, schedule)
        switch = schedule.steps
        if asked.refines:
            switch = switch_step(schedule, asked.switch_at, begin=begin,
                                 by_steps=asked.settings.refiner_switch_by_sample_steps)  # fmt: skip
        start = self._start(asked, size)
        _check_together(asked, start, switch, begin, schedule.steps)
        request = Request(
            seed=asked.seed,
            steps=asked.steps,
            guidance=asked.guidance,
            sampler=asked.chosen.sampler.name,
            schedule=asked.chosen.schedule,
            compat=asked.chosen.compat,
            height=size[0],
            width=size[1],
            count=asked.pictures,
            aesthetic_score=asked.settings.sdxl_refiner_high_aesthetic_score,
            negative_aesthetic_score=asked.settings.sdxl_refiner_low_aesthetic_score,
            crop=(asked.settings.sdxl_crop_top, asked.settings.sdxl_crop_left),
            embedding_dir=self._options.embedding_dir,
            **_begun(start, begin),
            **_refined(asked, switch, begin, schedule.steps),
        )
        request, more = self._worded(request, asked)
        controls, idle = self._controls(asked.controls, size, schedule, begin)
        told = (*asked.warnings, *warnings, *more, *idle, *_of_refiner(asked, switch, begin, schedule.steps))
        request = replace(request, controls=controls)
        unit = start is None and schedule.initial_scale > float(schedule.sigmas[0])
        return Translated(request, start.paste if start else None, schedule.steps - begin, told, unit)

    # ---------------------------------------------------------------- size and steps

    def _size(self, asked: Asked) -> tuple[Size, list[str]]:
        height, width = asked.height, asked.width
        stages = self._manifest.stages().values() if asked.refines else (self._manifest.base,)
        multiple = math.lcm(*(stage.size_multiple for stage in stages))
        warnings = []
        if self._limits is not None and not asked.stated_size:
            height, width = self._limits.height.opt, self._limits.width.opt
        if self._options.round_sizes and (height % multiple or width % multiple):
            height, width = (max(side // multiple, 1) * multiple for side in (height, width))
            warnings.append(f"width, height: were rounded down to {width}x{height}, multiples of {multiple}")
        if height * width > self._options.max_pixels:
            raise invalid("width", f"{width}x{height} was asked for; at most {self._options.max_pixels} pixels are"
                                   " drawn")  # fmt: skip
        return (height, width), warnings

    def _schedule(self, asked: Asked) -> Schedule:
        """Return the base's schedule, as the runtime makes it."""
        scheduler, chosen = self._manifest.base.scheduler, asked.chosen
        if chosen.compat == "diffusers":
            return make_schedule(scheduler, asked.steps, chosen.sampler.name, chosen.schedule)
        return make_comfyui_schedule(scheduler, asked.steps, chosen.sampler.name, chosen.schedule,
                                     zero_terminal_snr=scheduler.rescale_betas_zero_snr)  # fmt: skip

    def _start(self, asked: Asked, size: Size) -> Prepared | None:
        if asked.start is None:
            return None
        return prepare(asked.start, size, self._manifest.base.vae.factor, self._options)

    # ---------------------------------------------------------------- words

    def _worded(self, request: Request, asked: Asked) -> tuple[Request, list[str]]:
        """Return `request` with its prompts and LoRAs, and sentences on what of them is another thing in A1111."""
        names = names_in(self._options.embedding_dir)
        prompt = read_prompt("prompt", asked.prompt, names)
        negative = read_prompt("negative_prompt", asked.negative, names, negative=True)
        loras, fused = self._loras(prompt.loras)
        warnings = [*fused, *_of_weights(asked, prompt, negative)]
        if not request.comfyui:
            # diffusers zeroes the negative side for None, if the model's config says so, as A1111 does for "".
            request = replace(request, prompt=prompt.plain, negative=negative.plain or None)
        elif asked.negative:
            request = replace(request, prompt=prompt.text, negative=negative.text)
        else:
            sides = (Side(text=prompt.text, text_2=prompt.text), Side(text="", text_2="", zeroed=True))
            refiner = sides if self._manifest.refiner is not None else None
            request = replace(request, prompt=prompt.text, base_sides=sides, refiner_sides=refiner)
        return replace(request, loras=loras, lora_dir=self._options.lora_dir), warnings

    def _loras(self, uses: Sequence[LoraUse]) -> tuple[tuple[LoraUse, ...], list[str]]:
        """Return LoRAs with the paths of their files; without those that are fused into the bundle."""
        found, warnings = [], []
        for use in uses:
            path = self._lora(use.path)
            if path is not None:
                found.append(use._replace(path=path))
            elif self._is_fused(use):
                warnings.append("prompt: a LoRA of it is fused into the bundle at this weight already")
            else:
                raise invalid("prompt", "there is no LoRA, or no single one, of the name in a <lora:…> of it;"
                                        " /sdapi/v1/loras lists those of this server")  # fmt: skip
        return tuple(found), warnings

    def _lora(self, name: str) -> str | None:
        """Return the path of the only LoRA called `name`: only what lies in the server's folder is found."""
        if self._options.lora_dir is None:
            return None
        try:
            found = find_named(self._options.lora_dir, name, "prompt")
        except UsageError:
            return None
        return str(found[0]) if len(found) == 1 else None

    def _is_fused(self, use: LoraUse) -> bool:
        asked = (use.scale, use.scale if use.text_scale is None else use.text_scale)
        for record in self._manifest.loras:
            fused = (record.scale, record.scale if record.text_scale is None else record.text_scale)
            if record.name.removesuffix(ENDING) == use.path.removesuffix(ENDING) and fused == asked:
                return True
        return False

    # ---------------------------------------------------------------- ControlNets

    def _controls(
        self, asked: Sequence[AskedControl], size: Size, schedule: Schedule, begin: int
    ) -> tuple[tuple[ControlUse, ...], list[str]]:
        uses, idle = [], []
        for each in asked:
            net = self._net(each.net)
            span = _span(each, schedule, begin)
            if span is None:
                idle.append("alwayson_scripts.controlnet: no step lies between guidance_start and guidance_end")
                continue
            picture = as_input(control_picture(each, size, self._options))
            uses.append(ControlUse(picture, each.weight, *span, net))
        return tuple(uses), idle

    def _net(self, asked: str) -> str:
        """Return the name of a ControlNet of the bundle; A1111 has a hash behind it."""
        known = [net.name for net in self._manifest.controlnets]
        name = asked.partition(" [")[0].strip().lower().removesuffix(ENDING)
        found = (
            known[:1] if name in ("", "none") and len(known) == 1 else [each for each in known if each.lower() == name]
        )
        if not found:
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise invalid("alwayson_scripts.controlnet.model", f"the bundle has no ControlNet of this name; {there}")
        return found[0]


def _begin(asked: Asked, schedule: Schedule) -> int:
    """Return the first step: A1111 takes ``int(strength * steps) + 1`` of them, DDIM one less."""
    if asked.start is None:
        return 0
    taken = int(min(asked.start.strength, _STRONGEST) * asked.steps) + (asked.chosen.sampler.name != "ddim")
    return schedule.steps - min(max(taken, 1), schedule.steps)


def _begun(start: Prepared | None, begin: int) -> dict[str, Any]:
    if start is None:
        return {}
    found: dict[str, Any] = {"image": start.pixels, "base_start_step": begin, "strength": None if begin else 1.0}
    # What is kept is laid over by `Paste`, as A1111 does it.
    return found if start.mask is None else {**found, "mask": start.mask, "paste": False}


def _refined(asked: Asked, switch: int, begin: int, steps: int) -> dict[str, Any]:
    """Return what has the refiner take the steps from `switch` on."""
    if not asked.refines or switch >= steps:
        return {"handoff": None}
    if switch > begin:
        return {"handoff_step": switch}
    if asked.start is not None:
        return {"refine": True}
    # No step is the base's: the refiner adds the noise.
    return {"base_end_step": 0, "refiner_start_step": 0, "refiner_add_noise": True}


def _check_together(asked: Asked, start: Prepared | None, switch: int, begin: int, steps: int) -> None:
    """Raise ApiError for what the runtime would do in another way than A1111."""
    beta, masked = asked.chosen.compat == "diffusers", start is not None and start.mask is not None
    if beta and masked:
        raise invalid("scheduler", "Beta does not go with a mask here; choose another one")
    if beta and asked.controls:
        raise invalid("scheduler", "Beta does not go with ControlNet here; choose another one")
    if asked.refines and masked and switch < steps:
        raise invalid("refiner_checkpoint", "a refiner does not go with a mask here; leave it out")
    if asked.refines and asked.controls and switch <= begin:
        raise invalid("refiner_switch_at", "ControlNet works with the base, which would take no step; give 0.8, say")
    if beta and asked.refines and switch <= begin and start is None:
        raise invalid("refiner_switch_at", "with Beta the base must take a step; give 0.8, say")


def _of_refiner(asked: Asked, switch: int, begin: int, steps: int) -> Iterator[str]:
    """Yield sentences on how the refiner comes in otherwise than in A1111."""
    if not asked.refines:
        return
    if switch >= steps:
        yield "refiner_switch_at: the refiner takes none of the steps, in A1111 too; give less"
        return
    sampler = asked.chosen.sampler
    if switch > begin and sampler.two_calls:
        yield f"refiner_switch_at: {sampler.label} asks twice in a step, and A1111 changes within step {switch}"
    if switch > begin and (sampler.name in _WITH_MEMORY or sampler.adds_noise):
        yield f"refiner_switch_at: {sampler.label} starts anew at the refiner, as in ComfyUI; A1111's goes on"
    if asked.controls:
        yield "alwayson_scripts.controlnet: works with the base alone"


def _of_weights(asked: Asked, prompt: Prompt, negative: Prompt) -> Iterator[str]:
    weighted = [name for name, each in (("prompt", prompt), ("negative_prompt", negative)) if each.weighted]
    if not weighted:
        return
    if asked.chosen.compat == "diffusers":
        yield f"{', '.join(weighted)}: with the scheduler Beta weights have no effect"
    else:
        yield f"{', '.join(weighted)}: weights count as in ComfyUI; A1111 scales the result to its old mean"


def _span(control: AskedControl, schedule: Schedule, begin: int) -> tuple[float, float] | None:
    """Return the part of the training timesteps, as ComfyUI counts it, in which A1111's ControlNet works.

    A1111 counts steps: step i of n if ``start <= i / n <= end``. None if that is no step.
    """
    count = schedule.steps - begin
    kept = [i for i in range(count) if control.start <= i / count <= control.end]
    if not kept:
        return None
    first, last = (float(schedule.timesteps[begin + kept[place]]) for place in (0, -1))
    most = schedule.num_train_timesteps - 1
    start = 0.0 if kept[0] == 0 else 1.0 - (first + _HALF) / most
    end = 1.0 if kept[-1] == count - 1 else 1.0 - (last - _HALF) / most
    return start, end
