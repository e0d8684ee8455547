"""trt-bench's contestants in PyTorch: eager in fp32 or a half precision, torch.compile, diffusers' pipelines."""

__all__ = ["Torch"]

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_trt.benchmarks.contestants.diffusers_runs import draw, load_source, watch
from sdxl_trt.benchmarks.contestants.ours import versions
from sdxl_trt.benchmarks.contestants.protocol import Ask, Done, Ready, Spec, Task

_STAGES = {"base UNet step": "base", "refiner UNet step": "refiner"}
_PARTS = ("text encoders", *_STAGES, "VAE decode")
# Tasks by contestant; the others are left out because another contestant runs them identically.
_TASKS = {
    "eager": _PARTS,
    "eager-bf16": ("picture", *_STAGES),
    "eager-fp16": ("picture", *_STAGES),
    "compile": ("picture", *_STAGES),
    "compile-bf16": ("picture", *_STAGES),
    "diffusers": ("picture",),
}
_ELSEWHERE = {
    "eager": {"picture": "the contestant diffusers measures this"},
    "diffusers": dict.fromkeys(_PARTS, "the contestant eager measures this"),
}
_HALVES = {"eager-bf16": "bfloat16", "compile-bf16": "bfloat16", "eager-fp16": "float16"}
_COMPILED = ("compile", "compile-bf16")
_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class Torch:
    """diffusers' models, loaded from the checkpoint.

    On a GPU, diffusers and torch.compile run in fp16, the usual choice, and torch.compile uses max-autotune and also
    compiles the autoencoder; on a CPU they run in fp32, and only the UNets are compiled. Autoencoders are in
    channels_last, which is faster everywhere, and most in bf16; so are UNets on a GPU, while a CPU gains nothing there.
    """

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._inputs: Mapping[str, Any] = np.load(spec.inputs)
        on_gpu = spec.device == "cuda" and spec.name in ("compile", "diffusers")
        self._dtype = _HALVES.get(spec.name, "float16" if on_gpu else "float32")
        self._experts: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}

    def ready(self) -> Ready:
        """Import, load both pipelines, and for "compile" compile the models by calling them once."""
        # Keeps compiled kernels for the next run; the default folder is in /tmp.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(self._spec.cache).absolute() / "inductor")
        started = time.perf_counter()
        import torch  # noqa: PLC0415 - its time is measured
        from diffusers import (  # type: ignore[attr-defined,unused-ignore] # noqa: PLC0415
            StableDiffusionXLImg2ImgPipeline,
            StableDiffusionXLPipeline,
        )

        torch.set_num_threads(self._spec.threads)
        imported = time.perf_counter()
        dtype = getattr(torch, self._dtype)
        self._experts["base"] = load_source(StableDiffusionXLPipeline, self._spec.base, torch_dtype=dtype)
        if self._refined:
            refiner = load_source(StableDiffusionXLImg2ImgPipeline, self._spec.refiner, torch_dtype=dtype)
            self._experts["refiner"] = refiner
        for pipeline in self._experts.values():
            pipeline.to(self._spec.device)
            pipeline.vae.to(memory_format=torch.channels_last)
            if self._spec.device == "cuda":
                pipeline.unet.to(memory_format=torch.channels_last)
        self._synchronize()
        loaded = time.perf_counter()
        self._seconds = watch(self._experts["base"], self._experts.get("refiner"))
        tasks = [name for name in _TASKS[self._spec.name] if self._refined or name != "refiner UNet step"]
        compiled = self._compile() if self._spec.name in _COMPILED else None
        return Ready(
            precision=_PRECISIONS[self._dtype],
            import_seconds=imported - started,
            load_seconds=loaded - imported,
            compile_seconds=compiled,
            versions=versions(("torch", "diffusers", "transformers")),
            tasks=tuple(tasks),
            not_run=_ELSEWHERE.get(self._spec.name, {}),
        )

    def task(self, ask: Ask) -> Task:
        """Return a task at the run's own size."""
        if ask.varied:
            raise ValueError("only the run's own size is measured")
        if ask.task == "picture":
            return lambda: draw(self._experts["base"], self._experts.get("refiner"), self._spec,
                                self._inputs["latents"], self._seconds)  # fmt: skip
        if ask.task in _STAGES:
            return self._step(_STAGES[ask.task])
        return {"text encoders": self._encode, "VAE decode": self._decode}[ask.task]

    def peak_gpu(self) -> int | None:
        """Return the peak bytes of GPU memory that PyTorch reserved."""
        if self._spec.device != "cuda":
            return None
        import torch  # noqa: PLC0415

        return int(torch.cuda.max_memory_reserved())

    @property
    def _refined(self) -> bool:
        return bool(self._spec.refiner) and self._spec.handoff is not None

    def _synchronize(self) -> None:
        if self._spec.device == "cuda":
            import torch  # noqa: PLC0415

            torch.cuda.synchronize()

    def _compile(self) -> float:
        """Compile and return the seconds of the first calls, which compile; the longest over all runs so far.

        A later run finds compiled kernels in the cache, so its own time would be far too short.
        """
        import torch  # noqa: PLC0415

        # Both UNets are one class: without this the second would be compiled with dynamic shapes, and be slower.
        settings: dict[str, Any] = {"dynamic": False} | (
            {"mode": "max-autotune"} if self._spec.device == "cuda" else {}
        )
        for pipeline in self._experts.values():
            pipeline.unet = torch.compile(pipeline.unet, **settings)
        started = time.perf_counter()
        for stage in self._experts:
            self._step(stage)()
        if self._spec.device == "cuda":
            last = list(self._experts.values())[-1]
            last.vae.decoder = torch.compile(last.vae.decoder, **settings)
            draw(self._experts["base"], self._experts.get("refiner"), self._spec, self._inputs["latents"],
                 self._seconds)  # fmt: skip
        kept = Path(self._spec.cache) / "inductor" / f"{self._spec.name}.json"
        known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else 0.0
        seconds = max(time.perf_counter() - started, known)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(seconds), encoding="utf-8")
        return seconds

    def _tensor(self, name: str) -> Any:
        import torch  # noqa: PLC0415

        return torch.from_numpy(self._inputs[name]).to(self._spec.device, getattr(torch, self._dtype))

    def _step(self, stage: str) -> Task:
        """Return a UNet step, called exactly as diffusers' pipelines call it, so that compiled code is shared."""
        import torch  # noqa: PLC0415

        unet = self._experts[stage].unet
        sample, states = self._tensor(f"{stage}/sample"), self._tensor(f"{stage}/encoder_hidden_states")
        timestep = torch.tensor(float(self._inputs[f"{stage}/timestep"][0]), device=self._spec.device)
        added = {name: self._tensor(f"{stage}/{name}") for name in ("text_embeds", "time_ids")}

        def step() -> Done:
            with torch.no_grad():
                (result,) = unet(sample, timestep, encoder_hidden_states=states, timestep_cond=None,
                                 cross_attention_kwargs=None, added_cond_kwargs=added, return_dict=False)  # fmt: skip
                self._synchronize()
                return Done(result.float().cpu().numpy())

        return step

    def _encode(self) -> Done:
        import torch  # noqa: PLC0415

        base = self._experts["base"]
        states = []
        with torch.no_grad():
            for number, encoder in enumerate((base.text_encoder, base.text_encoder_2)):
                ids = torch.from_numpy(self._inputs[f"ids/{number}"]).to(self._spec.device)
                states.append(encoder(ids, output_hidden_states=True).hidden_states[-2])
            return Done(torch.cat(states, dim=-1).float().cpu().numpy())

    def _decode(self) -> Done:
        import torch  # noqa: PLC0415

        vae = list(self._experts.values())[-1].vae
        with torch.no_grad():
            decoded = vae.decode(self._tensor("decode/latent_sample"), return_dict=False)[0]
            return Done(decoded.float().cpu().numpy())
