"""Traces of diffusers' own base and refiner: the reference that every other implementation is compared with."""

__all__ = ["trace_diffusers"]

import contextlib
import gc
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.benchmarks.quality.traces import Trace, TraceCase
from sdxl_trt.benchmarks.report import BenchSettings
from sdxl_trt.export import MINI
from sdxl_trt.export.sources import PUBLISHED, PipelineSource, Role, open_source, tokenizer_files

Floats = NDArray[np.float32]
Model = str | Path
CLASSES: dict[Role, str] = {"base": "StableDiffusionXLPipeline", "refiner": "StableDiffusionXLImg2ImgPipeline"}


def trace_diffusers(
    model: Model, refiner: Model | None, cases: Sequence[TraceCase], settings: BenchSettings
) -> list[Trace]:
    """Return diffusers' traces of all cases in fp32 on the CPU, with Euler steps on the model's own schedule.

    `model` and `refiner` are diffusers folders, hub ids, single files or "mini"; the refiner is used if
    `settings.handoff` is set. One of the two is in memory at a time. Raises SourceError for an invalid source.
    """
    fraction = settings.handoff if refiner is not None else None
    with _opened(model, refiner) as sources, _quiet():
        traces = _base(sources["base"], cases, settings, fraction)
        gc.collect()  # modules form reference cycles: free the base before the refiner is loaded
        return traces if fraction is None else _refined(sources["refiner"], cases, settings, traces)


def _base(
    source: PipelineSource, cases: Sequence[TraceCase], settings: BenchSettings, fraction: float | None
) -> list[Trace]:
    """Run the base steps and return their traces, which are complete if there is no handoff."""
    pipeline, traces = _load(source, "base"), []
    for case in cases:
        call = {"latents": _tensor(case.noise), "width": settings.width, "height": settings.height}
        if fraction is not None:
            call |= {"denoising_end": fraction, "output_type": "latent"}
        latents, pixels = _run(pipeline, case.prompt, settings, call)
        handoff = None if fraction is None else latents
        traces.append(Trace(_embeddings(pipeline, "base", case.prompt, settings), handoff, latents, pixels))
    return traces


def _refined(
    source: PipelineSource, cases: Sequence[TraceCase], settings: BenchSettings, traces: Sequence[Trace]
) -> list[Trace]:
    """Run the refiner steps from the base's handoff latents and return the finished traces."""
    pipeline, refined = _load(source, "refiner"), []
    for case, trace in zip(cases, traces, strict=True):
        call = {"image": _tensor(trace.final[None]), "denoising_start": settings.handoff}
        latents, pixels = _run(pipeline, case.prompt, settings, call)
        embeddings = trace.embeddings | _embeddings(pipeline, "refiner", case.prompt, settings)
        refined.append(Trace(embeddings, trace.handoff, latents, pixels))
    return refined


def _run(pipeline: Any, prompt: str, settings: BenchSettings, call: dict[str, Any]) -> tuple[Floats, NDArray[np.uint8]]:
    """Return the latents (c, h, w) after the last step, and the pixels (h, w, 3), empty if `call` asks for latents."""
    last: dict[str, Any] = {}

    def watch(_pipeline: Any, _index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        last.update(tensors)
        return tensors

    settled = {"output_type": "np"} | call
    images = pipeline(
        prompt,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=["latents"],
        **settled,
    ).images
    drawn = settled["output_type"] == "np"
    pixels = np.rint(images[0] * 255.0).astype(np.uint8) if drawn else np.zeros((0, 0, 3), np.uint8)
    return last["latents"][0].numpy(), pixels


def _embeddings(pipeline: Any, stage: str, prompt: str, settings: BenchSettings) -> dict[str, Floats]:
    """Return a pipeline's embeddings of a prompt, named as in Trace."""
    guided = settings.guidance > 1
    hidden, negative, pooled, negative_pooled = pipeline.encode_prompt(prompt, do_classifier_free_guidance=guided)
    named = {f"{stage} hidden": hidden, f"{stage} pooled": pooled}
    if guided:
        named |= {f"{stage} negative hidden": negative, f"{stage} negative pooled": negative_pooled}
    return {name: tensor[0].detach().numpy() for name, tensor in named.items()}


def _load(source: PipelineSource, role: Role) -> Any:
    """Load one pipeline in fp32 and replace its scheduler by Euler's, which the engines use too."""
    import diffusers  # noqa: PLC0415 - takes seconds to import
    import torch  # noqa: PLC0415

    cls = getattr(diffusers, CLASSES[role])
    settings = {"dtype": torch.float32, "add_watermarker": False}
    if source.root.is_dir():
        pipeline = cls.from_pretrained(source.root, **settings)
    else:
        with _published(role) as configs:
            pipeline = cls.from_single_file(str(source.root), config=configs, local_files_only=True, **settings)
    # The config as the exporter reads it: a single file may state that it was trained for v-prediction.
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(source.scheduler_config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextlib.contextmanager
def _opened(model: Model, refiner: Model | None) -> Iterator[dict[Role, PipelineSource]]:
    """Yield the sources by role; the embedded pair's files are deleted when the context ends."""
    specs: dict[Role, Model] = {"base": model}
    if refiner is not None:
        specs["refiner"] = refiner
    with contextlib.ExitStack() as stack:
        mini: dict[Role, Path] = {}
        if MINI in specs.values():
            from sdxl_trt.mini import materialize  # noqa: PLC0415 - only when the embedded pair is asked for

            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sdxl-trt-mini-"))
            mini = dict(zip(("base", "refiner"), materialize(folder), strict=True))
        yield {role: open_source(mini[role] if spec == MINI else spec, role) for role, spec in specs.items()}


@contextlib.contextmanager
def _published(role: Role) -> Iterator[str]:
    """Yield a folder with the published configs and complete tokenizers, which a single file lacks."""
    with tempfile.TemporaryDirectory(prefix="sdxl-trt-configs-") as folder:
        configs = Path(shutil.copytree(PUBLISHED / role, Path(folder) / role))
        for tokenizer in configs.glob("tokenizer*"):
            for name, content in tokenizer_files(PUBLISHED / role / tokenizer.name).items():
                (tokenizer / name).write_bytes(content)
        yield str(configs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' progress bars and warnings while the context is open."""
    from diffusers.utils import logging as of_diffusers  # noqa: PLC0415
    from transformers.utils import logging as of_transformers  # noqa: PLC0415

    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in (of_diffusers, of_transformers):
            stack.callback(library.set_verbosity, library.get_verbosity())
            library.set_verbosity_error()
            if library.is_progress_bar_enabled():
                stack.callback(library.enable_progress_bar)
                library.disable_progress_bar()
        yield


def _tensor(array: Floats) -> Any:
    import torch  # noqa: PLC0415

    return torch.from_numpy(array.copy())
