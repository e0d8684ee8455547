"""From prompt to pictures, stage by stage: encode, base, handoff, refiner, decode.

A request runs phase by phase: encode all images and prompts, take the base steps of all pictures, switch the experts
once, take the refiner steps of all pictures, decode all. Each phase tells the pool which engine the next one needs.
"""

__all__ = ["Handoff", "Job", "Picture", "Pipeline", "Run", "Step", "find_bundle", "open_bundle"]

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from sdxl_trt.engines import SizeError
from sdxl_trt.engines.adapters import Use, adapted
from sdxl_trt.engines.bundle import USUAL_RUN, Bundle, Stage, Vae, Workload, read_bundle
from sdxl_trt.engines.plans import RunSizes
from sdxl_trt.engines.residency import EnginePool, open_pool
from sdxl_trt.runtime.arrays import Latents
from sdxl_trt.runtime.diffusion import ControlNets, Denoiser
from sdxl_trt.runtime.diffusion.samplers import drive
from sdxl_trt.runtime.images import Picture
from sdxl_trt.runtime.pipeline.denoising import Phase, begin_refiner, control_parts, groups
from sdxl_trt.runtime.pipeline.prompts import embeds_of, texts_of
from sdxl_trt.runtime.pipeline.record import finish
from sdxl_trt.runtime.pipeline.run import Handoff, Job, Run, Step, start_job, timed
from sdxl_trt.runtime.request import Request, ResolvedRequest, StageName, resolve_request, workload_of
from sdxl_trt.runtime.text import PromptEmbeds, PromptEncoder
from sdxl_trt.runtime.vae import (
    PictureEncoder,
    Wanted,
    choose_tile,
    decode_latents,
    decoder_sizes,
    to_uint8,
    to_uint8_truncated,
)

log = logging.getLogger("sdxl_trt.runtime")
MOST_SAID = 256
"""Notes that a pipeline remembers having said."""


class Pipeline:
    """A bundle ready to generate; a context manager that frees the engines.

    `pictures_at_once` is the number of pictures that share a call of a UNet, unless plans state the number.
    """

    def __init__(self, pool: EnginePool, *, pictures_at_once: int = 4) -> None:
        self.pool = pool
        self.manifest = pool.bundle.manifest
        self.pictures_at_once = pictures_at_once if pool.limits is None else pool.limits.pictures
        """The most pictures that share a call of a UNet, each with its rows for both sides."""
        self._fewest_at_once = 1 if pool.limits is None else pool.limits.fewest
        self._encoder = PromptEncoder(pool)
        self._picture_encoder = PictureEncoder(pool)
        self._said: dict[str, None] = {}
        self.run: Run | None = None
        """The run of the latest request."""

    def generate(self, request: Request) -> Iterator[Picture]:
        """Return an iterator of the pictures of `request`. Raises UsageError before anything is loaded."""
        return (step.picture for step in self.steps(request) if step.picture is not None)

    def steps(self, request: Request) -> Iterator[Step]:
        """Return an iterator of the finished units of work of `request`; stop iterating to cancel.

        It sets `run` to this request's run. Raises UsageError before anything is loaded.
        """
        job = self.start(request)
        self.run = job.run
        return timed(job.run, self._work(job))

    def resolve(self, request: Request) -> ResolvedRequest:
        """Return `request` with every default settled, a drawn seed too, or raise what `start` raises for it.

        Nothing is loaded, drawn or changed: another thread may call it while this pipeline works.
        """
        resolved = resolve_request(request, self.manifest, self.pool.limits, self.pool.bundle)
        self.pool.check(self._all_engines(resolved))
        if self.pool.limits is not None:
            self.pool.check_room(self._sizes(resolved, self._first_rows(resolved)), self._all_engines(resolved),
                                 self._workload(resolved))  # fmt: skip
        return resolved

    def read_prompts(self, request: ResolvedRequest) -> None:
        """Tokenize the prompts of `request`: warn of what is cut off or left out. Raises UsageError for extreme ones.

        Nothing is loaded: another thread may call it while this pipeline works.
        """
        self._encoder.check([*texts_of(request, self._stages(request))], weighted=request.comfyui)

    def start(self, request: Request, resolved: ResolvedRequest | None = None) -> Job:
        """Return `request` resolved, with its noise drawn, ready for the stages.

        `resolved` is what `resolve` returned for it, so that it is not resolved again. Raises UsageError, and
        ResourceError if the plans' own figures say that it does not fit into memory; for its LoRAs also SourceError,
        CorruptError and IncompatibleError.
        """
        if resolved is None:
            resolved = resolve_request(request, self.manifest, self.pool.limits, self.pool.bundle)
            self.pool.check(self._all_engines(resolved))
        self._say((*resolved.notes, *resolved.idle_controls()))
        self.make_room(resolved, self._first_rows(resolved))
        return start_job(resolved, request, self.manifest, self.pool.computes)

    def _say(self, notes: Sequence[str]) -> None:
        """Warn of each of `notes` once, however many requests repeat it."""
        for note in notes:
            if note not in self._said:
                log.warning("%s", note)
            # The latest are kept: notes name files, and a server sees any number of them.
            self._said.pop(note, None)
            self._said[note] = None
            if len(self._said) > MOST_SAID:
                del self._said[next(iter(self._said))]

    def make_room(self, request: ResolvedRequest, rows: int, tokens: int | None = None) -> None:
        """Let the pool make room for calls of `rows` rows with `request`; unread prompts (`tokens` None) are short.

        Raises SizeError, and ResourceError if the plans' own figures say that they do not fit into memory.
        """
        if self.pool.limits is not None:
            self.pool.make_room(self._sizes(request, rows, tokens), self._all_engines(request), self._workload(request))

    def _workload(self, request: ResolvedRequest) -> Workload:
        """Return what the pool was opened for, with the ControlNets and the step cache of `request`."""
        controls = tuple(control.component for control in request.controls)
        return replace(self.pool.workload, controls=controls, cached=request.cached_stages)

    def _sizes(self, request: ResolvedRequest, rows: int, tokens: int | None = None) -> RunSizes:
        least = 1 if self.pool.limits is None else self.pool.limits.tokens.min
        return RunSizes(height=request.height, width=request.width, rows=rows, tokens=tokens or least)

    def _first_rows(self, request: ResolvedRequest) -> int:
        """Return the rows of a call for `request`, as long as its prompts are not read."""
        guided = any(request.guidance_of(name).wanted for name in self._stages(request))
        return (2 if guided else 1) * self._pictures(request)

    def _pictures(self, request: ResolvedRequest) -> int:
        """Return the number of pictures in a call for `request` alone."""
        return max(min(len(request.seeds), self.pictures_at_once), self._fewest_at_once)

    def _all_engines(self, request: ResolvedRequest) -> list[Use]:
        return [use for name in self._stages(request) for use in self._engines(request, name)]

    def _engines(self, request: ResolvedRequest, name: StageName) -> list[Use]:
        """Return the text encoders of a stage, and its UNet if it takes steps, with the request's LoRAs."""
        unet = [self.unet(request, name)] if name == "refiner" or request.base.steps else []
        return [*self._encoders(request, name), *unet, *self._shallow(request, name)]

    def expect(self, jobs: Sequence[Job]) -> None:
        """Tell the pool which components the stages of `jobs` use, in order, so that their plans are read ahead."""
        requests = [job.run.request for job in jobs]
        uses: list[Use | None] = []
        uses += [wanted.vae.encoder for request in requests for wanted in self._wanted(request)]
        uses += [use for request in requests for name in self._stages(request) for use in self._encoders(request, name)]
        uses += [self.unet(request, "base") for request in requests if request.base.steps]
        uses += [use for request in requests for use in self._shallow(request, "base")]
        uses += [control.component for request in requests for control in request.controls]
        uses += [self.unet(request, "refiner") for request in requests if request.uses_refiner]
        uses += [use for request in requests for use in self._shallow(request, "refiner")]
        uses += [self.vae(request).decoder for request in requests]
        self.pool.expect(dict.fromkeys(use for use in uses if use is not None))

    def unet(self, request: ResolvedRequest, name: StageName) -> Use:
        """Return the UNet of a stage with the request's LoRAs."""
        return adapted(self.manifest.stages()[name].unet, request.loras.get(name, ()))

    def _shallow(self, request: ResolvedRequest, name: StageName) -> tuple[Use, ...]:
        """Return the outermost level of a stage's UNet, with the request's LoRAs, if its steps are cached."""
        shallow = self.manifest.stages()[name].shallow if name in self._stages(request) else None
        if shallow is None or request.cache_of(name) is None:
            return ()
        return (adapted(shallow, request.loras.get(name, ())),)

    def _encoders(self, request: ResolvedRequest, name: StageName) -> list[Use]:
        """Return the text encoders of a stage with the LoRAs of the request's prompts, each once."""
        stage = self.manifest.stages()[name]
        sets = dict.fromkeys(prompt.loras for _, prompt in texts_of(request, {name: stage}))
        uses = (adapted(encoder.component, loras or ()) for encoder in stage.text_encoders for loras in sets)
        return [*dict.fromkeys(uses)]

    def _work(self, job: Job) -> Iterator[Step]:
        self.expect([job])
        yield from self.pictures([job])
        yield from self.encode([job])
        yield from self.base(job)
        yield from self.refine(job)
        yield from self.decode(job)

    def pictures(self, jobs: Sequence[Job]) -> Iterator[Step]:
        """Encode the images that `jobs` start from, one at a time, into their latents; do nothing if there are none."""
        starting = [(job, wanted) for job in jobs for wanted in self._wanted(job.run.request)]
        if not starting:
            return
        first = jobs[0].run.request
        next_engine = self._encoders(first, next(iter(self._stages(first))))[0]
        encoded = self._picture_encoder.encode([wanted for _, wanted in starting], next_engine)
        for done, (number, moments) in enumerate(encoded, start=1):
            job, wanted = starting[number]
            take = job.begin_from if wanted.hidden is None else job.show
            take(moments, wanted.vae)
            yield Step("picture", done, len(starting), slice(0, len(job.latents)))

    def _wanted(self, request: ResolvedRequest) -> list[Wanted]:
        """Return the pictures that a request needs encoded: none if it starts from latents or from noise.

        A base that receives the mask needs the picture without its masked part too.
        """
        if request.image is None or request.image.pixels is None:
            return []
        vae = next(iter(self._stages(request).values())).vae
        whole = Wanted(vae, request.image, (request.height, request.width), request.fit, request.request.tile)
        wanted = [whole] if request.keeps_picture else []
        if request.takes_mask and request.masking is not None and not request.refiner_only:
            wanted.append(replace(whole, hidden=request.masking.whites))
        return wanted

    def encode(self, jobs: Sequence[Job]) -> Iterator[Step]:
        """Encode the prompts of all `jobs` into their `embeds`; every encoder is loaded once for each set of LoRAs."""
        for weighted in (False, True):
            alike = [job for job in jobs if job.run.request.comfyui == weighted]
            wanted = [pair for job in alike for pair in texts_of(job.run.request, self._stages(job.run.request))]
            if wanted:
                encoded = iter(self._encoder.encode(wanted, self._first_unet(jobs), weighted=weighted))
            for job in alike:
                job.embeds = embeds_of(job.run.request, self._stages(job.run.request), encoded)
                for name, sides in job.embeds.items():
                    used = sides if job.run.request.guidance_of(name).wanted else sides[:1]
                    self._check_rows(job.run.request, used)
        yield Step("encode", 1, 1, slice(0, sum(len(job.latents) for job in jobs)))

    def base(self, job: Job, next_engine: Use = "") -> Iterator[Step]:
        """Run the base steps of `job`. `next_engine` is needed afterwards, by default the one that `job` needs next."""
        request = job.run.request
        if request.base.steps:
            yield from self._denoise("base", self.manifest.base, job, next_engine or self.next_engine(request, "base"))

    def next_engine(self, request: ResolvedRequest, name: StageName) -> Use:
        """Return what `request` needs after the steps of a stage: the refiner's UNet, or a decoder."""
        if name == "base" and self.manifest.refiner is not None and request.uses_refiner:
            return self.unet(request, "refiner")
        return self.vae(request).decoder

    def refine(self, job: Job, next_engine: Use = "") -> Iterator[Step]:
        """Run the refiner steps of `job` on the latents that the base left; do nothing for the base alone.

        With the refiner alone there is no handoff, and the run records none.
        """
        request, stage = job.run.request, self.manifest.refiner
        if stage is None or request.refiner is None:
            return
        begin_refiner(job)
        yield from self._denoise("refiner", stage, job, next_engine or self.next_engine(request, "refiner"))

    def decode(self, job: Job) -> Iterator[Step]:
        """Decode the pictures of `job` from the latents that the last expert left."""
        job.run.final = job.final()
        yield from self._decode(self.vae(job.run.request), job.run)

    def vae(self, request: ResolvedRequest) -> Vae:
        """Return the autoencoder that decodes `request`: the refiner's if it runs, else the base's.

        Its decoder is the tiny one if the request says so.
        """
        vae = list(self._stages(request).values())[-1].vae
        return vae.with_tiny_decoder() if request.request.vae == "tiny" else vae

    def _stages(self, request: ResolvedRequest) -> dict[StageName, Stage]:
        base, refiner = self.manifest.base, self.manifest.refiner if request.uses_refiner else None
        if refiner is not None and request.refiner_only:
            return {"refiner": refiner}
        return {"base": base} if refiner is None else {"base": base, "refiner": refiner}

    def _first_unet(self, jobs: Sequence[Job]) -> Use:
        alone = self.manifest.refiner is not None and all(job.run.request.refiner_only for job in jobs)
        name: StageName = "refiner" if alone else "base"
        running = (job.run.request for job in jobs if alone or not job.run.request.refiner_only)
        return self.unet(next(running), name)

    def _check_rows(self, request: ResolvedRequest, sides: Sequence[Sequence[PromptEmbeds]]) -> None:
        """Raise SizeError for conditionings that, repeated to one length, are longer or more than the plans take.

        Raises ResourceError if prompts of this length need more memory than there is.
        """
        limits, rows = self.pool.limits, [embeds for side in sides for embeds in side]
        if limits is None:
            return
        tokens = math.lcm(*(len(row.hidden) for row in rows))
        if tokens not in limits.tokens:
            raise SizeError(f"the prompts take {tokens} tokens, but the plans {limits.tokens.min} to"
                            f" {limits.tokens.max}; shorten them, or build plans: export-engines --tokens"
                            f" {limits.tokens.min}:{limits.tokens.opt}:{tokens}")  # fmt: skip
        if len(rows) > len(sides) * limits.pictures:
            raise SizeError(f"the prompts are combined from {len(rows)} conditionings, a row each, but the plans take"
                            f" {len(sides) * limits.pictures}; build plans: export-engines --batch"
                            f" 1:1:{math.ceil(len(rows) / 2)}")  # fmt: skip
        self.make_room(request, len(rows) * self._pictures(request), tokens)

    def _denoise(
        self,
        name: StageName,
        stage: Stage,
        job: Job,
        next_engine: Use,
    ) -> Iterator[Step]:
        """Take one expert's steps for all pictures; engine `next_engine` is needed afterwards.

        A sampler owns the memory it works in: it starts from a copy, callers get copies of what it yields, and the
        job's latents are written when a group has taken all its steps.
        """
        request, latents, phase = job.run.request, job.latents, Phase(job, name, stage)
        following = request.controls if name == "base" else ()
        shallow = self._shallow(request, name)
        engine, *others = self.pool.phase(
            self.unet(request, name),
            *shallow,
            *(control.component for control in following),
            next_engines=(next_engine,),
        )
        outermost, nets = others[: len(shallow)], others[len(shallow) :]
        yield _loaded(latents)
        each = groups(len(latents), self.pictures_at_once)
        total = phase.steps * len(each)
        for number, group in enumerate(each):
            x = latents[group]
            conditions = phase.conditions(engine, max(len(x), self._fewest_at_once))
            controls = ControlNets([*control_parts(request, nets)], conditions) if nets else None
            cache = phase.cache(engine, *outermost)
            denoise = Denoiser(
                engine,
                phase.schedule,
                conditions,
                phase.predicts,
                phase.guidance,
                phase.further(group),
                controls,
                cache,
            )
            sampled, taken = drive(phase.asking(group), denoise), 0
            for index, x in enumerate(sampled, start=number * phase.steps + 1):
                before, taken = taken, denoise.end_step()
                job.run.full_steps[name] = taken
                yield Step(name, index, total, group, latents=x.copy(), denoised=denoise.latest, full=taken > before)
            latents[group] = x

    def _decode(self, vae: Vae, run: Run) -> Iterator[Step]:
        """Decode one picture at a time: the decoder has the largest activations of all models."""
        (engine,) = self.pool.phase(vae.decoder)
        yield _loaded(run.final)
        count, _, height, width = run.final.shape
        takes = decoder_sizes(self.pool, vae.decoder)
        tile = choose_tile((height, width), takes, vae.factor, tiled=run.request.request.tile)
        overlay = run.request.overlay()
        for index in range(count):
            one = slice(index, index + 1)
            sample = decode_latents(engine, vae, run.final[one], tile=tile)
            pixels = (to_uint8_truncated if run.request.comfyui else to_uint8)(sample)[0]
            pixels = pixels if overlay is None else overlay.onto(pixels)
            yield Step("decode", index + 1, count, one, picture=finish(run, index, pixels))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.pool.close()


def open_bundle(
    path: Bundle | Path | str | None = None,
    *,
    provider: str = "auto",
    residency: str = "auto",
    available: int | None = None,
    plan_for: Request | Workload = USUAL_RUN,
    once: bool = False,
    compute_precision: str = "auto",
) -> Pipeline:
    """Open the bundle at `path` (None: the embedded pair) for a ``with`` statement. Only the manifest is read.

    It may also be a bundle that was read. `provider`, `residency`, `available` (the memory limit in bytes), `once` and
    `compute_precision` are those of `open_pool`. Memory is planned for requests like `plan_for`, of which the image,
    the ControlNets, the step cache and the decoder count, or for a `Workload`, which says the same by component. Any
    other request may follow.
    Raises SourceError, IncompatibleError, CorruptError, UsageError, ResourceError.
    """
    bundle = path if isinstance(path, Bundle) else find_bundle(path)
    workload = workload_of(plan_for, bundle.manifest) if isinstance(plan_for, Request) else plan_for
    pool = open_pool(bundle, provider, residency, available, workload=workload, once=once,
                     compute_precision=compute_precision)  # fmt: skip
    return Pipeline(pool)


def find_bundle(path: Path | str | None = None) -> Bundle:
    """Return the bundle at `path` (None: the embedded pair); only its manifest is read. Raises as `read_bundle`."""
    if path is None:
        from sdxl_trt.mini import bundle_path  # noqa: PLC0415 - package data, only if no other bundle is named

        path = bundle_path()
    return read_bundle(path)


def _loaded(latents: Latents) -> Step:
    return Step("load", 1, 1, slice(0, len(latents)))
