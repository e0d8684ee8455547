"""trt-bench's contestants OpenVINO on a CPU, at its best: converted from PyTorch, static shapes, for latency.

In fp32, with its bf16 hint, or quantized by NNCF: in its default scope, or without the layers that we leave out too.
"""

__all__ = ["OpenVino"]

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_trt.benchmarks.contestants.diffusers_runs import draw, load_source, watch
from sdxl_trt.benchmarks.contestants.openvino_models import (
    Cache,
    Model,
    Parts,
    converted,
    eight_bit_layers,
    example,
    parts_of,
    quantized,
    recorded,
    unet_feed,
)
from sdxl_trt.benchmarks.contestants.ours import versions
from sdxl_trt.benchmarks.contestants.protocol import Ask, Done, Ready, Spec, Task

_STAGES = {"base UNet step": "base", "refiner UNet step": "refiner"}


@dataclass(frozen=True)
class _Way:
    """`hint` is OpenVINO's inference precision, `folder` the cache's of models in 8 bits, or "" for none."""

    precision: str
    hint: str
    folder: str = ""
    sensitive: bool = False


_WAYS = {
    "openvino": _Way("fp32", "f32"),
    "openvino-bf16": _Way("bf16", "bf16"),
    "openvino-int8": _Way("int8", "f32", "int8-default", sensitive=True),
    "openvino-int8-scoped": _Way("int8", "f32", "int8-scoped"),
    "openvino-int8-bf16": _Way("int8", "bf16", "int8-scoped"),
}


class OpenVino:
    """Text encoders, UNets and decoder on OpenVINO, below diffusers' pipelines.

    `compile_seconds` is converting, quantizing and compiling them; the first two are done once, into the run's cache.
    """

    def __init__(self, spec: Spec) -> None:
        self._spec, self._way = spec, _WAYS[spec.name]
        self._inputs: Mapping[str, Any] = np.load(spec.inputs)
        self._experts: dict[str, Any] = {}
        self._requests: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}

    def ready(self) -> Ready:
        """Import, load the pipelines, convert and quantize what the cache lacks, and compile. Raises ValueError."""
        started = time.perf_counter()
        import openvino  # type: ignore[import-not-found,unused-ignore] # noqa: PLC0415 - its time is measured
        import torch  # noqa: PLC0415
        from diffusers import (  # type: ignore[attr-defined,unused-ignore] # noqa: PLC0415
            StableDiffusionXLImg2ImgPipeline,
            StableDiffusionXLPipeline,
        )

        torch.set_num_threads(self._spec.threads)
        core = openvino.Core()
        if self._way.hint == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise ValueError("this CPU does not compute in bf16")
        imported = time.perf_counter()
        self._experts["base"] = load_source(StableDiffusionXLPipeline, self._spec.base)
        if self._spec.refiner and self._spec.handoff is not None:
            self._experts["refiner"] = load_source(StableDiffusionXLImg2ImgPipeline, self._spec.refiner)
        parts = parts_of(self._experts)
        loaded = time.perf_counter()
        folders, making = self._made(openvino, core, parts)
        begun = time.perf_counter()
        note = self._compile(core, parts, folders)
        compiling = time.perf_counter() - begun
        self._seconds = watch(self._experts["base"], self._experts.get("refiner"))
        alone = ("VAE decode",) if self._spec.batch == 1 else ()  # its decoder takes the whole batch
        return Ready(
            precision=self._way.precision,
            import_seconds=imported - started,
            load_seconds=loaded - imported,
            compile_seconds=making + compiling,
            versions=versions(("openvino", "nncf", "torch", "diffusers", "transformers")),
            tasks=("picture", *(f"{stage} UNet step" for stage in self._experts), *alone),
            note=note,
        )

    def task(self, ask: Ask) -> Task:
        """Return a task at the run's own size."""
        if ask.varied:
            raise ValueError("only the run's own size is measured")
        if ask.task == "picture":
            return lambda: draw(self._experts["base"], self._experts.get("refiner"), self._spec,
                                self._inputs["latents"], self._seconds)  # fmt: skip
        part = f"{_STAGES[ask.task]} unet" if ask.task in _STAGES else "decoder"
        request, feed = self._requests[part], example(part, self._inputs, self._spec.batch)
        return lambda: Done(_first(request.infer(feed)))

    def peak_gpu(self) -> int | None:
        """Return None: it runs on the CPU."""
        return None

    def _made(self, openvino: Any, core: Any, parts: Parts) -> tuple[list[Cache], float]:
        """Return the cache's folders, the preferred one first, and the seconds that making their models took."""
        spec, way = self._spec, self._way
        size = f"{spec.width}x{spec.height}x{len(self._inputs['base/sample'])}"
        root = Path(spec.cache) / "openvino"
        plain = Cache(root / f"fp32-{size}")

        def convert() -> dict[str, Model]:
            return {part: converted(openvino, part, module, example(part, self._inputs, spec.batch))
                    for part, module in parts.items()}  # fmt: skip

        def quantize() -> dict[str, Model]:
            feeds = recorded(self._experts, spec, self._inputs["latents"].shape)
            return {part: quantized(core.read_model(plain.path(part)), given, sensitive=way.sensitive)
                    for part, given in feeds.items()}  # fmt: skip

        seconds = plain.made(convert, openvino.save_model)
        if not way.folder:
            return [plain], seconds
        narrow = Cache(root / f"{way.folder}-{size}")
        return [narrow, plain], seconds + narrow.made(quantize, openvino.save_model)

    def _compile(self, core: Any, parts: Parts, folders: list[Cache]) -> str:
        """Compile every part and put it below its pipeline; return a sentence on what runs in 8 bits."""
        settings = {"INFERENCE_PRECISION_HINT": self._way.hint, "PERFORMANCE_HINT": "LATENCY",
                    "INFERENCE_NUM_THREADS": self._spec.threads}  # fmt: skip
        counts = []
        for part, module in parts.items():
            path = next(path for path in (folder.path(part) for folder in folders) if path)
            compiled = core.compile_model(core.read_model(path), "CPU", settings)
            narrow, every = eight_bit_layers(compiled)
            if path.parent == folders[0].folder and self._way.folder and not narrow:
                raise ValueError(f"none of the {every} layers of the {part} runs in 8 bits on this CPU")
            if narrow:
                counts.append(f"{part} {narrow} of {every}")
            self._requests[part] = compiled.create_infer_request()
            _replace(part, module, self._requests[part])
        if not self._way.folder:
            return ""
        return f"convolutions and matrix products in 8 bits: {', '.join(counts)}; none in the text encoders"


class _Encoded(tuple[Any]):
    """A text encoder's first output, and its penultimate hidden state where diffusers looks for it."""

    hidden_states: tuple[Any, ...]


def _replace(part: str, module: Any, request: Any) -> None:
    """Have `module` call `request`, and drop its weights, which nothing reads any more."""
    import torch  # noqa: PLC0415

    def unet(*given: Any, **named: Any) -> Any:
        return (torch.from_numpy(_first(request.infer(unet_feed(*given, **named)))),)

    def decode(latents: Any, **_: Any) -> Any:
        return (torch.from_numpy(_first(request.infer({"latent_sample": latents.numpy()}))),)

    def encode(ids: Any, **_: Any) -> Any:
        first, state = (torch.from_numpy(one.copy()) for one in request.infer({"input_ids": ids.numpy()}).values())
        encoded = _Encoded((first,))
        encoded.hidden_states = (state, None)
        return encoded

    if part == "decoder":
        module.decode = decode
    else:
        module.forward = unet if part.endswith("unet") else encode
    for weight in module.parameters():
        weight.data = torch.empty(0, dtype=weight.dtype)


def _first(outputs: Any) -> Any:
    """Return a copy of the first output: the request reuses its memory."""
    return next(iter(outputs.values())).copy()
