"""trt-bench's contestant optimum-onnx: its own export of the same weights under diffusers' pipelines."""

__all__ = ["Optimum"]

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_trt.benchmarks.contestants.diffusers_runs import draw, load_source, watch
from sdxl_trt.benchmarks.contestants.ours import versions
from sdxl_trt.benchmarks.contestants.protocol import Ask, Done, Ready, Spec, Task

_STAGES = {"base UNet step": "base", "refiner UNet step": "refiner"}
_CLASSES = {"base": "ORTStableDiffusionXLPipeline", "refiner": "ORTStableDiffusionXLImg2ImgPipeline"}
_TASKS = {"base": "text-to-image", "refiner": "image-to-image"}


class Optimum:
    """Exported once in fp32, as a CPU requires, into the run's cache; `compile_seconds` is the export's time."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._inputs: Any = np.load(spec.inputs)
        self._experts: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}

    def ready(self) -> Ready:
        """Import, export unless the cache has the export, and create the sessions."""
        started = time.perf_counter()
        import onnxruntime  # noqa: PLC0415 - its time is measured
        from optimum import onnxruntime as optimum  # type: ignore[attr-defined,import-not-found,import-untyped,unused-ignore] # noqa: PLC0415

        imported = time.perf_counter()
        sources = {"base": self._spec.base} | ({"refiner": self._spec.refiner} if self._refined else {})
        folders = {stage: self._export(stage, source) for stage, source in sources.items()}
        exported = time.perf_counter()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._spec.threads
        for stage, folder in folders.items():
            made = load_source(getattr(optimum, _CLASSES[stage]), str(folder), session_options=options)
            self._experts[stage] = made
        loaded = time.perf_counter()
        self._seconds = watch(self._experts["base"], self._experts.get("refiner"))
        return Ready(
            precision="fp32",
            import_seconds=imported - started,
            load_seconds=loaded - exported,
            compile_seconds=sum(_seconds_of(folder) for folder in folders.values()),
            versions=versions(("optimum-onnx", "onnxruntime", "diffusers", "transformers", "torch")),
            tasks=("picture", *(f"{stage} UNet step" for stage in self._experts)),
        )

    def task(self, ask: Ask) -> Task:
        """Return a task at the run's own size."""
        if ask.varied:
            raise ValueError("only the run's own size is measured")
        if ask.task == "picture":
            return lambda: draw(self._experts["base"], self._experts.get("refiner"), self._spec,
                                self._inputs["latents"], self._seconds)  # fmt: skip
        return self._step(_STAGES[ask.task])

    def peak_gpu(self) -> int | None:
        """Return None: it runs on the CPU."""
        return None

    @property
    def _refined(self) -> bool:
        return bool(self._spec.refiner) and self._spec.handoff is not None

    def _export(self, stage: str, source: str) -> Path:
        """Return the folder of optimum's own export; a missing one is exported and then renamed into place."""
        from optimum.exporters.onnx import main_export  # type: ignore[import-not-found,import-untyped,unused-ignore] # noqa: PLC0415

        target = Path(self._spec.cache) / "optimum" / stage
        if not target.is_dir():
            partial = target.with_name(f".{stage}.partial")
            started = time.perf_counter()
            main_export(source, str(partial), task=_TASKS[stage], dtype="fp32", do_validation=False)
            (partial / "seconds.json").write_text(json.dumps(time.perf_counter() - started), encoding="utf-8")
            partial.rename(target)
        return target

    def _step(self, stage: str) -> Task:
        """Return a UNet step as its pipeline calls it, on torch tensors."""
        import torch  # noqa: PLC0415

        unet = self._experts[stage].unet
        names = ("sample", "encoder_hidden_states", "text_embeds", "time_ids")
        given = {name: torch.from_numpy(self._inputs[f"{stage}/{name}"]) for name in names}
        sample, states = given.pop("sample"), given.pop("encoder_hidden_states")
        timestep = torch.tensor(float(self._inputs[f"{stage}/timestep"][0]))

        def step() -> Done:
            result = unet(sample, timestep, encoder_hidden_states=states, added_cond_kwargs=given, return_dict=False)
            return Done(result[0].numpy())

        return step


def _seconds_of(folder: Path) -> float:
    return float(json.loads((folder / "seconds.json").read_text(encoding="utf-8")))
