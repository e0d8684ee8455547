"""trt-bench's contestant plain ONNX Runtime: the bundle's graphs in sessions with default options."""

__all__ = ["PlainOnnxRuntime"]

import time
from typing import Any

import numpy as np

from sdxl_trt.benchmarks.contestants.ours import versions
from sdxl_trt.benchmarks.contestants.protocol import Ask, Done, Ready, Spec, Task


class PlainOnnxRuntime:
    """Runs only the UNets, on the CPU: the baseline for this project's session options and graph changes."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._inputs: Any = np.load(spec.inputs)
        self._sessions: dict[str, Any] = {}

    def ready(self) -> Ready:
        """Create a session for every UNet."""
        started = time.perf_counter()
        import onnxruntime  # noqa: PLC0415 - its time is measured

        from sdxl_trt.engines.bundle import read_bundle  # noqa: PLC0415

        imported = time.perf_counter()
        bundle = read_bundle(self._spec.bundle)
        manifest = bundle.manifest
        for stage, expert in manifest.stages().items():
            graph = bundle.path(manifest.components[expert.unet].graph)
            session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
            self._sessions[f"{stage} UNet step"] = session
        return Ready(
            precision=manifest.precision,
            import_seconds=imported - started,
            load_seconds=time.perf_counter() - imported,
            versions=versions(("onnxruntime", "onnxruntime-gpu")),
            tasks=tuple(self._sessions),
            not_run={"picture": "it runs single graphs and has no pipeline"},
        )

    def task(self, ask: Ask) -> Task:
        """Return a UNet step."""
        if ask.varied:
            raise ValueError("a UNet step is measured only at the run's size")
        session, stage = self._sessions[ask.task], ask.task.split()[0]
        types = {"tensor(float16)": np.float16, "tensor(float)": np.float32}
        feed = {one.name: self._inputs[f"{stage}/{one.name}"].astype(types[one.type]) for one in session.get_inputs()}
        return lambda: Done(session.run(["out_sample"], feed)[0].astype(np.float32))

    def peak_gpu(self) -> int | None:
        """Return None: it runs on the CPU."""
        return None
