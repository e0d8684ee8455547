"""trt-bench's contestant for this project: the runtime on one provider, used as a Python library."""

__all__ = ["Ours", "preset_settings", "versions"]

import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_trt.benchmarks.contestants.protocol import TASKS, Ask, Done, Ready, Spec, Task

_PACKAGES = ("sdxl-trt", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt")
_STAGES = {"base UNet step": "base", "refiner UNet step": "refiner"}


EIGHT_BITS = ("--int8", "--vae-precision", "int8")
"""What export-engines makes of the checkpoints for the contestant sdxl-trt-int8."""


@dataclass(frozen=True)
class _Way:
    """The provider, the preset that pictures are drawn with or "", and whether the bundle is the one in 8 bits."""

    provider: str = "auto"
    preset: str = ""
    narrow: bool = False


_WAYS = {
    "sdxl-trt": _Way(),
    "sdxl-trt-int8": _Way(narrow=True),
    "sdxl-trt-openvino": _Way("openvino"),
    "sdxl-trt-fast": _Way(preset="fast"),
    "sdxl-trt-fastest": _Way(preset="fastest"),
    "sdxl-trt-fastest-openvino": _Way("openvino", "fastest"),
    **{provider: _Way(provider) for provider in ("ort-cuda", "ort-tensorrt", "tensorrt")},
}
_PRESET_OF = 30
"""The steps of the run that a preset's steps are stated for."""


class Ours:
    """The bundle on this machine's best provider, or on the provider that the contestant is named after.

    sdxl-trt-int8 runs a bundle of its own, exported once into the run's cache. A preset's contestant draws pictures
    alone: its single steps are those of the contestant without the preset.
    """

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._way = _WAYS[spec.name]
        self._inputs: Any = np.load(spec.inputs)
        self._pipeline: Any = None

    def ready(self) -> Ready:
        """Import the runtime and load every engine that a picture needs. Raises ValueError if the export fails."""
        exported = _exported(self._spec) if self._way.narrow else None
        started = time.perf_counter()
        from sdxl_trt.runtime import open_bundle  # noqa: PLC0415 - its time is measured

        imported = time.perf_counter()
        self._pipeline = open_bundle(self._spec.bundle if exported is None else exported, provider=self._way.provider)
        pool, manifest = self._pipeline.pool, self._pipeline.manifest
        for name in self._components():
            pool.phase(name)
        loaded = time.perf_counter()
        not_run = self._not_run()
        return Ready(
            precision=pool.computes or manifest.precision,
            import_seconds=imported - started,
            load_seconds=loaded - imported,
            compile_seconds=None if exported is None else float(_seconds(exported).read_text(encoding="utf-8")),
            versions=versions(_PACKAGES) | {"provider": pool.provider},
            tasks=tuple(task for task in TASKS if task not in not_run),
            not_run=not_run,
            note=self._note(),
        )

    def task(self, ask: Ask) -> Task:
        """Return a task; only "picture" may vary size, batch or handoff."""
        if ask.task == "picture":
            return self._picture(ask)
        if ask.varied:
            raise ValueError(f"{ask.task} is measured only at the run's size")
        tasks: dict[str, Task] = {
            "text encoders": self._encode,
            "VAE decode": self._decode,
            "handoff": partial(self._handoff, "swap"),
            "handoff resident": partial(self._handoff, "resident"),
        }
        return self._step(_STAGES[ask.task]) if ask.task in _STAGES else tasks[ask.task]

    def peak_gpu(self) -> int | None:
        """Return None: trt-bench reads the device's memory use from NVML."""
        return None

    def _not_run(self) -> dict[str, str]:
        """Return why it does not run the tasks that it leaves out."""
        if self._way.preset:
            return dict.fromkeys(TASKS[1:], "a preset changes a picture's steps, and no part of one")
        if self._pipeline.manifest.refiner is not None and self._spec.handoff is not None:
            return {}
        return dict.fromkeys(("refiner UNet step", "handoff", "handoff resident"), "there is no refiner")

    def _note(self) -> str:
        if not self._way.preset:
            return ""
        settings = preset_settings(self._way.preset, self._spec.steps)
        said = ", ".join(f"{name} {value}" for name, value in settings.items())
        return f"--{self._way.preset}, for {self._spec.steps} steps: {said}"

    def _components(self) -> list[str]:
        """Return the components of a picture in the order of a run."""
        stages = self._pipeline.manifest.stages()
        if self._spec.handoff is None:
            stages.pop("refiner", None)
        encoders = [encoder.component for stage in stages.values() for encoder in stage.text_encoders]
        unets = [stage.unet for stage in stages.values()]
        return list(dict.fromkeys([*encoders, *unets, list(stages.values())[-1].vae.decoder]))

    def _picture(self, ask: Ask) -> Task:
        from sdxl_trt.runtime import Request  # noqa: PLC0415

        spec, pipeline = self._spec, self._pipeline
        handoff = spec.handoff if ask.handoff == "spec" else None if ask.handoff == "none" else ask.handoff
        preset = self._way.preset
        request = Request(
            spec.prompt,
            **(preset_settings(preset, spec.steps) if preset else {"steps": spec.steps}),
            handoff=handoff if pipeline.manifest.refiner is not None else None,
            guidance=spec.guidance,
            seed=spec.seed,
            count=ask.batch or spec.batch,
            width=ask.width or spec.width,
            height=ask.height or spec.height,
            latents=None if ask.varied else self._inputs["latents"],
            aesthetic_score=spec.aesthetic_score,
            negative_aesthetic_score=spec.negative_aesthetic_score,
        )

        def draw() -> Done:
            pictures = [np.asarray(picture.image) for picture in pipeline.generate(request)]
            timings = {stage: sum(seconds) for stage, seconds in pipeline.run.timings.items()}
            return Done(np.stack(pictures), timings)

        return draw

    def _engine(self, component: str) -> Any:
        (engine,) = self._pipeline.pool.phase(component)
        return engine

    def _encode(self) -> Done:
        from sdxl_trt.runtime.text import encoder_inputs  # noqa: PLC0415

        outputs = []
        for number, encoder in enumerate(self._pipeline.manifest.base.text_encoders):
            engine = self._engine(encoder.component)
            # The outputs that a run uses: the penultimate hidden state, and the pooled vector if needed.
            states = [spec.name for spec in engine.component.outputs if spec.name.startswith("hidden_states.")]
            wanted = [states[-2], *(["text_embeds"] if encoder.pooled else [])]
            given = encoder_inputs(engine.component, self._inputs[f"ids/{number}"])
            outputs.append(engine.infer(given, wanted)[states[-2]])
        return Done(np.concatenate(outputs, axis=-1).astype(np.float32))

    def _step(self, stage: str) -> Task:
        """Return a step as a run performs it: inputs that stay constant during a run are bound beforehand."""
        engine = self._engine(getattr(self._pipeline.manifest, stage).unet)
        given = self._given(engine, stage)
        engine.bind({name: given.pop(name) for name in ("encoder_hidden_states", "text_embeds", "time_ids")})
        return lambda: Done(engine.infer(given)["out_sample"].astype(np.float32))

    def _given(self, engine: Any, stage: str) -> dict[str, Any]:
        from sdxl_trt.engines import numpy_dtype  # noqa: PLC0415

        return {
            spec.name: self._inputs[f"{stage}/{spec.name}"].astype(numpy_dtype(spec))
            for spec in engine.component.inputs
        }

    def _decode(self) -> Done:
        engine = self._engine(list(self._pipeline.manifest.stages().values())[-1].vae.decoder)
        given = self._given(engine, "decode")
        return Done(engine.infer(given)["sample"].astype(np.float32))

    def _handoff(self, residency: Any) -> Done:
        """Time the switch to the refiner after a base step, during which the pool prefetches the refiner."""
        pool, manifest = self._pipeline.pool, self._pipeline.manifest
        usual, pool.residency = pool.residency, residency
        try:
            if residency == "resident":
                pool.phase(manifest.refiner.unet)
            (base,) = pool.phase(manifest.base.unet, next_engines=(manifest.refiner.unet,))
            base.infer(self._given(base, "base"))
            started = time.perf_counter()
            (refiner,) = pool.phase(manifest.refiner.unet)
            seconds = time.perf_counter() - started
        finally:
            pool.residency = usual
        return Done(np.array([len(refiner.component.inputs)]), seconds=seconds)


def preset_settings(preset: str, steps: int) -> dict[str, Any]:
    """Return the fields of a request for `preset`, stated for 30 steps, where a full run takes `steps`.

    Its steps are scaled, to at least 1; `cache` is at most as many, since a request takes no more.
    """
    from sdxl_trt.runtime import PRESETS  # noqa: PLC0415 - the runtime's import is measured

    settings = dict(PRESETS[preset])
    settings["steps"] = max(1, round(settings["steps"] * steps / _PRESET_OF))
    return settings | {"cache": min(settings["cache"], settings["steps"])}


def _exported(spec: Spec) -> Path:
    """Return the bundle in 8 bits; a missing one is exported by a process of its own. Raises ValueError."""
    target = Path(spec.cache) / "bundle-int8"
    if _seconds(target).is_file():
        return target
    refiner = ["--refiner", spec.refiner] if spec.refiner else ["--no-refiner"]
    command = [sys.executable, "-m", "sdxl_trt.export.cli", "--base", spec.base, *refiner, *EIGHT_BITS]
    started = time.perf_counter()
    done = subprocess.run([*command, "--engine", "none", "--out", str(target)], capture_output=True, text=True, check=False)  # fmt: skip # noqa: S603, E501 - ours
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2].removeprefix("error: ")
        raise ValueError(f"export-engines {' '.join(EIGHT_BITS)}: {last or f'exit code {done.returncode}'}")
    _seconds(target).write_text(str(time.perf_counter() - started), encoding="utf-8")
    return target


def _seconds(bundle: Path) -> Path:
    """Return the file beside a bundle with the seconds of its export; it is there when the export is whole."""
    return bundle.with_name(f"{bundle.name}.seconds")


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of the `packages` that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
