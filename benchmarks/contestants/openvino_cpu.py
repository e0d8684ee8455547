"""trt-bench's contestant OpenVINO on a CPU, at its best: converted from PyTorch, fp32, static shapes, for latency."""

__all__ = ["OpenVino"]

import time
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_trt.benchmarks.contestants.ours import versions
from sdxl_trt.benchmarks.contestants.protocol import Ask, Done, Ready, Spec, Task

_INPUTS = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")


class OpenVino:
    """Runs only the UNets; `compile_seconds` is converting and compiling them."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._inputs: Any = np.load(spec.inputs)
        self._requests: dict[str, Any] = {}

    def ready(self) -> Ready:
        """Import, load the UNets into PyTorch, convert and compile them."""
        started = time.perf_counter()
        import openvino  # type: ignore[import-not-found,unused-ignore] # noqa: PLC0415 - its time is measured
        import torch  # noqa: PLC0415
        from diffusers import UNet2DConditionModel  # type: ignore[attr-defined,unused-ignore] # noqa: PLC0415

        torch.set_num_threads(self._spec.threads)
        imported = time.perf_counter()
        loading = 0.0
        for stage, source in self._sources().items():
            begun = time.perf_counter()
            unet = _load(UNet2DConditionModel, source)
            loading += time.perf_counter() - begun
            self._requests[f"{stage} UNet step"] = self._compiled(openvino, unet, stage)
        return Ready(
            precision="fp32",
            import_seconds=imported - started,
            load_seconds=loading,
            compile_seconds=time.perf_counter() - imported - loading,
            versions=versions(("openvino", "torch", "diffusers")),
            tasks=tuple(self._requests),
            not_run={"picture": "only its UNets are measured, not optimum-intel's pipelines"},
        )

    def task(self, ask: Ask) -> Task:
        """Return a UNet step."""
        if ask.varied:
            raise ValueError("a UNet step is measured only at the run's size")
        request, feed = self._requests[ask.task], self._feed(ask.task.split()[0])
        return lambda: Done(next(iter(request.infer(feed).values())))

    def peak_gpu(self) -> int | None:
        """Return None: it runs on the CPU."""
        return None

    def _sources(self) -> dict[str, str]:
        refined = self._spec.refiner and self._spec.handoff is not None
        return {"base": self._spec.base} | ({"refiner": self._spec.refiner} if refined else {})

    def _feed(self, stage: str) -> dict[str, Any]:
        return {name: self._inputs[f"{stage}/{name}"] for name in _INPUTS}

    def _compiled(self, openvino: Any, unet: Any, stage: str) -> Any:
        import torch  # noqa: PLC0415

        class Flat(torch.nn.Module):  # type: ignore[misc,unused-ignore]
            """The UNet with positional inputs, as a graph has."""

            def forward(self, sample: Any, timestep: Any, states: Any, text_embeds: Any, time_ids: Any) -> Any:
                added = {"text_embeds": text_embeds, "time_ids": time_ids}
                return unet(sample, timestep, states, added_cond_kwargs=added, return_dict=False)[0]

        feed = self._feed(stage)
        flat = Flat()
        flat.unet = unet
        with torch.no_grad():
            model = openvino.convert_model(flat, example_input=tuple(torch.from_numpy(one) for one in feed.values()))
        model.reshape({port: list(array.shape) for port, array in zip(model.inputs, feed.values(), strict=True)})
        for port, name in zip(model.inputs, feed, strict=True):
            port.tensor.set_names({name})
        settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY",
                    "INFERENCE_NUM_THREADS": self._spec.threads}  # fmt: skip
        return openvino.Core().compile_model(model, "CPU", settings).create_infer_request()


def _load(model_class: Any, source: str) -> Any:
    """Return the UNet of a source in fp32, ready to be traced."""
    if Path(source).is_file():
        return model_class.from_single_file(source).eval().float()
    return model_class.from_pretrained(source, subfolder="unet").eval().float()
