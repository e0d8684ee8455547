"""Run a workflow's samplers one after the other, with scaling, decoding and encoding between them.

Each sampler is a request of its own, on the base or on the refiner, and continues from the latents before it. All
prompts are encoded first; results that several pictures need are computed once.
"""

__all__ = ["Chain", "check_chain"]

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.bundle import Manifest, Vae
from sdxl_trt.runtime.comfyui import (
    NO_FILES,
    Decoded,
    Empty,
    Encoded,
    Experts,
    Image,
    LatentSource,
    Loaded,
    LoraFiles,
    Mask,
    Masked,
    Output,
    Padded,
    PictureFiles,
    Repeated,
    Resized,
    Sampled,
    Scaled,
    Workflow,
    ancestry,
    blamed,
    mask_sources,
    names_tiny,
    noise_mask,
    part_of,
    sampling_request,
    vae_stage,
)
from sdxl_trt.runtime.images import InputPicture, Picture, as_input, new_size, resize
from sdxl_trt.runtime.pipeline.chain_masks import ChainMasks
from sdxl_trt.runtime.pipeline.mask_nodes import canvas, greyed, scaled_mask, widened
from sdxl_trt.runtime.pipeline.pipeline import Pipeline
from sdxl_trt.runtime.pipeline.record import FileFact, facts_of, finish
from sdxl_trt.runtime.pipeline.run import Job, Run, Step, start_job, timed
from sdxl_trt.runtime.request import Request, ResolvedRequest, StageName, takes_mask
from sdxl_trt.runtime.vae import (
    choose_tile,
    decode_latents,
    decoder_sizes,
    encode_sample,
    encoder_sizes,
    from_unit,
    to_unit,
)

Values = NDArray[np.float32]
Made = Generator[Step, None, Values]
Size = tuple[int, int]
MOST_PIXELS = 1 << 28
"""Larger than any picture that the UNets take; scaling beyond it is a mistake."""


@dataclass(frozen=True)
class _Batch:
    """The number of pictures, and their size (height, width) in latents or in pixels."""

    count: int
    size: Size


class Chain:
    """The samplers of a workflow, to run on `pipeline`; `change` is applied to each sampler's request.

    Pictures are loaded from `folder`, or looked up in a table; LoRAs are among `files`. `start` makes the job of a
    request, by default the pipeline's own. Raises UsageError for what is not supported, before any engine is loaded.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        workflow: Workflow,
        found: Experts,
        folder: PictureFiles,
        change: Callable[[Request], Request],
        files: LoraFiles = NO_FILES,
        *,
        seed_given: bool = False,
        start: Callable[[Request], Job] | None = None,
    ) -> None:
        self._pipeline, self._workflow, self._experts = pipeline, workflow, found
        self._start = start or pipeline.start
        self._change, self._seed_given = change, seed_given
        self._files = files.beside(pipeline.manifest)
        self._masks = ChainMasks(folder, self._manifest.base.vae.factor)
        self._jobs: dict[str, Job] = {}
        self._planned: dict[LatentSource | Image, _Batch] = {}
        self._done: dict[LatentSource | Image, Values] = {}
        self._vaes: dict[Encoded | Decoded, Vae] = {}
        for output in workflow.outputs:
            _last_sampled(output)
            sources: list[Any] = [*ancestry(output.image), *mask_sources(output.image)]
            for each in sources:
                self._masks.read(each)
            for each in mask_sources(output.image):
                self._masks.check(each)
            self._plan(output.image)

    @property
    def runs(self) -> list[Run]:
        """Return the run of the last sampler of every picture, in the order of the workflow's outputs."""
        return [self._jobs[_last_sampled(output).sampling.node].run for output in self._workflow.outputs]

    def facts(self) -> Mapping[str, Sequence[Any]]:
        """Return what the first picture's record says of its adapters and files, by the names of a record's fields."""
        return facts_of(self.runs_of(0), self._files_of(0))

    def runs_of(self, number: int) -> list[Run]:
        """Return the runs of all samplers that output `number` needs, each after those it needs."""
        found: dict[str, Run] = {}
        self._collect(self._workflow.outputs[number].image, found)
        return [*found.values()]

    def _collect(self, source: LatentSource | Image, found: dict[str, Run]) -> None:
        for each in reversed(ancestry(source)):
            if isinstance(each, Sampled) and each.sampling.node not in found:
                run = self._jobs[each.sampling.node].run
                shown = each.sampling.shown if run.request.takes_mask and not run.request.refiner_only else None
                if shown is not None:
                    self._collect(shown.image, found)
                found[each.sampling.node] = run

    def _files_of(self, number: int) -> list[FileFact]:
        """Return what a record says of the pictures and masks that output `number` loads."""
        image = self._workflow.outputs[number].image
        loaded = [each for each in (*ancestry(image), *mask_sources(image)) if isinstance(each, Loaded | Mask)]
        return [*dict.fromkeys(self._masks.facts[each.file] for each in loaded if each.file)]

    def steps(self) -> Iterator[tuple[int, Step]]:
        """Return an iterator of the finished units of work, each with the number of its output, from 0."""
        runs = self.runs
        self._pipeline.expect([*self._jobs.values()])
        yield from ((0, step) for step in timed(runs[0], self._pipeline.encode([*self._jobs.values()])))
        for number in range(len(runs)):
            yield from ((number, step) for step in timed(runs[number], self._drawn(number)))

    def _plan(self, source: LatentSource | Image) -> _Batch:
        """Return the size of the result of `source`, after making a job for every sampler that it needs."""
        if source not in self._planned:
            self._planned[source] = self._plan_one(source)
        return self._planned[source]

    def _plan_one(self, source: LatentSource | Image) -> _Batch:
        if isinstance(source, Empty | Loaded):
            return self._plan_start(source)
        before = self._plan(source.image if isinstance(source, Encoded | Padded | Scaled) else source.latents)
        if isinstance(source, Sampled):
            return self._plan_sampled(source, before)
        if isinstance(source, Encoded | Decoded):
            return self._plan_coded(source, before)
        return self._plan_changed(source, before)

    def _plan_start(self, source: Empty | Loaded) -> _Batch:
        if isinstance(source, Empty):
            factor = self._manifest.base.vae.factor
            return _Batch(source.batch, (source.height // factor, source.width // factor))
        size = self._masks.pictures[source.file].size
        assert size is not None  # noqa: S101 - a picture has a size, and latents were refused
        return _Batch(1, size)

    def _plan_changed(self, source: Masked | Padded | Repeated | Resized | Scaled, before: _Batch) -> _Batch:
        if isinstance(source, Padded):
            left, top, right, bottom = source.margins
            size = before.size[0] + top + bottom, before.size[1] + left + right
            return _checked(_Batch(before.count, size), source)
        if isinstance(source, Repeated):
            return _Batch(before.count * source.amount, before.size)
        if isinstance(source, Resized | Scaled):
            return _checked(_Batch(before.count, self._new_size(source, before.size)), source)
        return before

    def _plan_coded(self, source: Encoded | Decoded, before: _Batch, sampled: Sampled | None = None) -> _Batch:
        sampled = sampled or _sampler_of(source, self._workflow)
        stage = self._experts[sampled.sampling.model.checkpoint]
        tiny = isinstance(source, Decoded) and names_tiny(source.vae, self._manifest)
        chosen = self._stage_vae(stage if tiny else vae_stage(source.vae, self._experts, stage, self._manifest))
        own = self._stage_vae(stage)
        if (chosen.scaling_factor, chosen.factor) != (own.scaling_factor, own.factor):
            raise UsageError(f"node {source.node}: uses another checkpoint's VAE than the sampler next to it, and the"
                             " bundle's VAEs have different scales; link the sampler's own")  # fmt: skip
        self._vaes[source] = chosen.with_tiny_decoder() if tiny else chosen
        if isinstance(source, Decoded):
            return _Batch(before.count, (before.size[0] * chosen.factor, before.size[1] * chosen.factor))
        if chosen.encoder is None:
            raise UsageError("a picture must be encoded, but the bundle has no VAE encoder; export the bundle with it:"
                             " export-engines without --components")  # fmt: skip
        return _Batch(before.count, (before.size[0] // chosen.factor, before.size[1] // chosen.factor))

    def _plan_sampled(self, source: Sampled, before: _Batch) -> _Batch:
        sampling = source.sampling
        if sampling.node in self._jobs:
            return before
        stage = self._experts[sampling.model.checkpoint]
        vae = self._stage_vae(stage)
        masked = noise_mask(source.latents) is not None
        if sampling.shown is not None and stage == "base" and takes_mask(self._manifest.base, self._manifest):
            self._plan_coded(sampling.shown, self._plan(sampling.shown.image), source)
            masked = True
        fresh = stage == "base" and isinstance(source.latents, Empty) and not masked
        # A placeholder of the right size: the latents it starts from replace it later.
        shape = (before.count, vae.latent_channels, *before.size)
        image = None if fresh else as_input(np.zeros(shape, np.float32))
        size = (before.size[0] * vae.factor, before.size[1] * vae.factor)
        request = sampling_request(
            sampling, stage, self._files, self._manifest, self._loaded, image=image, size=size, count=before.count
        )
        try:
            # A placeholder too: the mask that the latents carry replaces it.
            mask = np.ones(size, np.bool_) if masked else None
            job = self._start(self._change(replace(request, graph=self._workflow.graph, mask=mask)))
        except UsageError as exc:
            nodes = [getattr(each, "node", "") for each in ancestry(source.latents)]
            raise blamed(exc, sampling, next(filter(None, nodes), ""), seed_given=self._seed_given) from exc
        self._jobs[sampling.node] = job
        return before

    def _loaded(self, loaded: Loaded) -> InputPicture:
        """Return the picture of a LoadImage node, which is read once."""
        self._masks.read(loaded)
        return self._masks.pictures[loaded.file]

    @property
    def _manifest(self) -> Manifest:
        return self._pipeline.manifest

    @property
    def _tiled(self) -> bool:
        """Return whether tiles are asked for beside the workflow."""
        return any(job.run.request.request.tile for job in self._jobs.values())

    def _stage_vae(self, stage: StageName) -> Vae:
        return self._manifest.stages()[stage].vae

    def _new_size(self, source: Resized | Scaled, size: Size) -> Size:
        latents = isinstance(source, Resized)
        # ComfyUI's latents are an eighth of the stated size, and stand for at least 64 pixels.
        unit, least = (self._manifest.base.vae.factor, 64) if latents else (1, 1)
        return new_size(size, source.size, source.by, unit, least)

    def _drawn(self, number: int) -> Iterator[Step]:
        """Yield the units of work of output `number`, and its pictures."""
        output, run = self._workflow.outputs[number], self.runs[number]
        last = output.image.latents if isinstance(output.image, Decoded) else _last_sampled(output)
        final = yield from self._made(last)
        run.final = final
        if isinstance(output.image, Decoded):
            yield from self._decoded(output.image, final, lambda index, unit: self._finished(number, index, unit))
            return
        pixels = yield from self._made(output.image)
        for index in range(len(pixels)):
            picture = self._finished(number, index, pixels[index : index + 1])
            yield Step("decode", index + 1, len(pixels), slice(index, index + 1), picture=picture, node=output.node)

    def _finished(self, number: int, index: int, unit: Values) -> Picture:
        """Return picture `index` of output `number` from its pixels (1, 3, h, w).

        Their size may differ from that of its latents. If a workflow draws several pictures, each carries only the part
        of the graph that draws it.
        """
        pixels = from_unit(unit)[0]
        *before, run = self.runs_of(number)
        picture = finish(run, index, pixels, before, self._files_of(number))
        graph = None if picture.graph is None else part_of(picture.graph, self._workflow.outputs[number].node)
        metadata = {**picture.metadata, "width": pixels.shape[1], "height": pixels.shape[0]}
        return replace(picture, metadata=metadata, graph=graph)

    def _made(self, source: LatentSource | Image) -> Made:
        """Compute `source` once: latents in the samplers' scale, or pixels (n, 3, h, w) from 0 to 1."""
        if source not in self._done:
            self._done[source] = yield from self._make(source)
        return self._done[source]

    def _make(self, source: LatentSource | Image) -> Made:
        if isinstance(source, Empty):
            factor, channels = self._manifest.base.vae.factor, self._manifest.base.vae.latent_channels
            return np.zeros((source.batch, channels, source.height // factor, source.width // factor), np.float32)
        if isinstance(source, Loaded):
            return self._masks.pixels(source)
        made_of = source.image if isinstance(source, Encoded | Padded | Scaled) else source.latents
        before = yield from self._made(made_of)
        if isinstance(source, Sampled | Encoded | Decoded):
            return (yield from self._worked(source, before))
        return self._changed(source, before)

    def _changed(self, source: Masked | Padded | Repeated | Resized | Scaled, before: Values) -> Values:
        if isinstance(source, Padded):
            return canvas(before, source.margins)
        if isinstance(source, Repeated):
            return np.tile(before, (source.amount, 1, 1, 1))
        if isinstance(source, Resized | Scaled):
            size = self._new_size(source, (before.shape[2], before.shape[3]))
            return resize(before, size, source.method, centred=source.centred)
        return before

    def _worked(self, source: Sampled | Encoded | Decoded, before: Values) -> Made:
        """Compute a source that needs an engine."""
        if isinstance(source, Sampled):
            return (yield from self._sampled(source, before))
        if isinstance(source, Encoded):
            return (yield from self._encoded(source, before))
        decoded: list[Values] = []
        yield from self._decoded(source, before, lambda _, unit: decoded.append(unit))
        return np.concatenate(decoded)

    def _sampled(self, source: Sampled, before: Values) -> Made:
        job = self._jobs[source.sampling.node]
        job.begin(before)
        job.mask = self._noise_mask(source)
        if job.run.request.takes_mask and not job.run.request.refiner_only:
            job.further = yield from self._shown(source, job)
        for work in (self._pipeline.base(job), self._pipeline.refine(job)):
            yield from (replace(step, node=source.sampling.node) for step in work)
        latents: Values = job.latents * np.float32(job.run.request.final_scale)
        return latents

    def _noise_mask(self, source: Sampled) -> Values | None:
        """Return the mask that a sampler's latents carry (1, 1, h, w), at their size; None without one."""
        carrier = noise_mask(source.latents)
        if carrier is None or carrier.mask is None:
            return None
        job = self._jobs[source.sampling.node]
        mask = self._masks.mask(carrier.mask)
        if isinstance(carrier, Encoded):
            fitted = self._masks.fitted(carrier.mask, self._planned[carrier.image].size)
            mask = widened(fitted, carrier.grow)
        size = job.latents.shape[2], job.latents.shape[3]
        return scaled_mask(mask, size)[None, None]

    def _shown(self, source: Sampled, job: Job) -> Made:
        """Return what an inpainting UNet receives behind the latents: a mask, and a picture without what it covers.

        Without an InpaintModelConditioning, as in ComfyUI, that is the noise mask and the latents themselves.
        """
        shown = source.sampling.shown
        assert job.clean is not None  # noqa: S101 - the job has begun
        if shown is None or shown.mask is None:
            assert job.mask is not None  # noqa: S101 - a request without a mask was refused
            mask, latents = job.mask, job.clean
        else:
            latents = yield from self._made(shown)
            size = job.latents.shape[2], job.latents.shape[3]
            fitted = self._masks.fitted(shown.mask, self._planned[shown.image].size)
            # ComfyUI cuts both to the shape of the latents first.
            mask, latents = (each if each.shape[2:] == size else resize(each, size, "bilinear", centred=True)
                             for each in (fitted[None, None], latents))  # fmt: skip
        count, _, *sides = job.latents.shape
        seen = np.broadcast_to(np.rint(mask), (count, 1, *sides))
        return np.concatenate([seen, np.broadcast_to(latents, job.latents.shape)], axis=1)

    def _encoded(self, source: Encoded, pixels: Values) -> Made:
        vae, pool = self._vaes[source], self._pipeline.pool
        assert vae.encoder is not None  # noqa: S101 - a workflow without it was refused
        (engine,) = pool.phase(vae.encoder)
        yield Step("load", 1, 1, slice(0, len(pixels)), node=source.node)
        # Pixels beyond a whole number of latents are cropped on both sides.
        size = tuple(side // vae.factor * vae.factor for side in pixels.shape[2:])
        top, left = ((side - kept) // 2 for side, kept in zip(pixels.shape[2:], size, strict=True))
        takes = encoder_sizes(pool, vae.encoder, vae.factor)
        latents = size[0] // vae.factor, size[1] // vae.factor
        tile = choose_tile(latents, takes, vae.factor, tiled=source.tiled or self._tiled)
        made = []
        for index, each in enumerate(pixels):
            sample = each[None, :, top : top + size[0], left : left + size[1]]
            if source.mask is not None:
                sample = greyed(sample, self._masks.fitted(source.mask, (pixels.shape[2], pixels.shape[3])))
            sample = sample * np.float32(2.0) - np.float32(1.0)
            made.append(encode_sample(engine, vae, np.ascontiguousarray(sample), tile=tile).drawn(None, vae))
            yield Step("picture", index + 1, len(pixels), slice(index, index + 1), node=source.node)
        return np.concatenate(made)

    def _decoded(self, source: Decoded, latents: Values, keep: Callable[[int, Values], Any]) -> Iterator[Step]:
        """Decode latents one at a time; `keep` receives the index and the pixels (1, 3, h, w) of each."""
        vae, pool = self._vaes[source], self._pipeline.pool
        (engine,) = pool.phase(vae.decoder)
        yield Step("load", 1, 1, slice(0, len(latents)), node=source.node)
        size = (latents.shape[2], latents.shape[3])
        tile = choose_tile(size, decoder_sizes(pool, vae.decoder), vae.factor, tiled=source.tiled or self._tiled)
        for index in range(len(latents)):
            one = slice(index, index + 1)
            picture = keep(index, to_unit(decode_latents(engine, vae, latents[one], tile=tile)))
            yield Step("decode", index + 1, len(latents), one, picture=picture, node=source.node)


def check_chain(
    pipeline: Pipeline,
    workflow: Workflow,
    found: Experts,
    folder: PictureFiles,
    change: Callable[[Request], Request],
    files: LoraFiles = NO_FILES,
) -> list[ResolvedRequest]:
    """Return the resolved request of every sampler of a Chain of these arguments, or raise what making it raises.

    Nothing is loaded and no state of the pipeline is touched: another thread may run it meanwhile.
    """
    resolved: list[ResolvedRequest] = []

    def start(request: Request) -> Job:
        resolved.append(pipeline.resolve(request))
        return start_job(resolved[-1], request, pipeline.manifest, pipeline.pool.computes)

    Chain(pipeline, workflow, found, folder, change, files, start=start)
    return resolved


def _checked(batch: _Batch, source: Resized | Scaled | Padded) -> _Batch:
    if batch.size[0] * batch.size[1] > MOST_PIXELS:
        raise UsageError(f"node {source.node}: scales to {batch.size[1]}x{batch.size[0]}, more than {MOST_PIXELS}"
                         " pixels; choose a smaller size")  # fmt: skip
    return batch


def _last_sampled(output: Output) -> Sampled:
    return next(each for each in ancestry(output.image) if isinstance(each, Sampled))


def _sampler_of(source: Encoded | Decoded, workflow: Workflow) -> Sampled:
    """Return the sampler whose latents are decoded, or the one that continues from the encoded latents."""
    rows = [ancestry(output.image) for output in workflow.outputs]
    row = next(row for row in rows if source in row)
    place = row.index(source)
    around = row[place:] if isinstance(source, Decoded) else row[:place][::-1]
    found = next((each for each in around if isinstance(each, Sampled)), None)
    if found is None:
        raise UsageError(f"node {source.node}: no sampler makes its latents or continues from them; remove it")
    return found
