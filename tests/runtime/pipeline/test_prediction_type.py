"""--prediction-type: against diffusers' scheduler in the pipeline, overriding the bundle, and in the metadata."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.bundle.manifest import Component
from sdxl_trt.engines.engine import Array
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.engines.residency.pool import EnginePool
from sdxl_trt.mini.embedded import bundle_path
from sdxl_trt.runtime import Request, open_bundle
from sdxl_trt.runtime.cli.options import make_parser
from sdxl_trt.runtime.cli.repeat import repeated
from sdxl_trt.runtime.diffusion.denoiser import PREDICTIONS
from sdxl_trt.runtime.pipeline.pipeline import Pipeline
from sdxl_trt.runtime.text.encoder import PromptEmbeds

# diffusers' own warning: it passes torch tensors to np.array.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS, GUIDANCE = 6, 4.0
BUNDLE = read_bundle(bundle_path())
EMBEDS = PromptEmbeds(np.zeros((77, 112), np.float32), np.zeros(64, np.float32))


class RowsEngine:
    """Returns a function of each row, its index and the timestep; takes float32."""

    def __init__(self, component: Component) -> None:
        inputs = tuple(msgspec.structs.replace(spec, dtype="float32") for spec in component.inputs)
        self.component = msgspec.structs.replace(component, inputs=inputs)

    def load(self) -> None: ...

    def adapt(self, loras: object) -> None: ...

    def unload(self) -> None: ...

    def bind(self, constants: Mapping[str, Array]) -> None: ...

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        return {"out_sample": predict(inputs["sample"], float(inputs["timestep"][0]))}


def predict(sample: Array, timestep: float) -> Array:
    rows = np.linspace(0.3, -0.2, len(sample), dtype=np.float32).reshape(-1, 1, 1, 1)
    answer: Array = 0.6 * sample + 0.2 * sample[..., ::-1] + rows + np.float32(0.1 * np.sin(timestep / 77))
    return answer


def _trail(asked: str, stated: str) -> list[Array]:
    """Return the latents before the first step and after each, of a bundle with `stated` in its manifest."""
    manifest = BUNDLE.manifest
    scheduler = msgspec.structs.replace(manifest.base.scheduler, prediction_type=stated)
    base = msgspec.structs.replace(manifest.base, scheduler=scheduler)
    opened = msgspec.structs.replace(BUNDLE, manifest=msgspec.structs.replace(manifest, base=base))
    engine = RowsEngine(manifest.components[manifest.base.unet])
    pipeline = Pipeline(EnginePool(opened, lambda _: engine, "resident", "none"))
    request = Request(
        "", prediction_type=asked, steps=STEPS, guidance=GUIDANCE, seed=3, handoff=None, width=64, height=64
    )
    job = pipeline.start(request)
    job.embeds = {"base": ((EMBEDS,), (EMBEDS,))}
    steps = pipeline.base(job, next_engine=manifest.base.unet)
    return [job.latents.copy(), *[step.latents for step in steps if step.latents is not None]]


def _diffusers(prediction_type: str, noise: Array) -> Iterator[Array]:
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1,
        prediction_type=prediction_type,
    )  # fmt: skip
    scheduler.set_timesteps(STEPS)
    x = torch.from_numpy(noise)
    yield x.numpy()
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(torch.cat([x] * 2), t).numpy()
        positive, negative = (torch.from_numpy(part) for part in np.split(predict(scaled, float(t)), 2))
        x = scheduler.step(negative + GUIDANCE * (positive - negative), t, x, return_dict=False)[0]
        yield x.numpy()


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_every_step_is_diffusers_whatever_the_bundle_states(prediction_type: str) -> None:
    for stated in PREDICTIONS:
        trail = _trail(prediction_type, stated)
        for step, (x, expected) in enumerate(zip(trail, _diffusers(prediction_type, trail[0]), strict=True)):
            np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-4, err_msg=f"{stated}, after step {step}")


def test_auto_is_the_bundles_prediction_type() -> None:
    trails = {stated: _trail("auto", stated)[-1] for stated in PREDICTIONS}
    for stated, last in trails.items():
        np.testing.assert_array_equal(last, _trail(stated, "epsilon")[-1])
    assert np.abs(trails["epsilon"] - trails["v_prediction"]).max() > 0.1


def test_an_unknown_prediction_type_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="--prediction-type 'flow' is unknown; choose one of: auto, epsilon"):
        _trail("flow", "epsilon")
    with pytest.raises(SystemExit) as caught:
        make_parser().parse_args(["a fox", "--prediction-type", "flow"])
    assert caught.value.code == 2
    assert "--prediction-type" in capsys.readouterr().err


def test_a_picture_records_the_requested_prediction_type(tmp_path: Path) -> None:
    with open_bundle() as pipeline:
        pictures = [
            picture
            for kind in ("auto", "sample")
            for picture in pipeline.generate(Request("", prediction_type=kind, steps=1, seed=1, width=64, height=64))
        ]
    assert [picture.metadata.get("prediction_type") for picture in pictures] == [None, "sample"]
    assert np.abs(pictures[0].latents - pictures[1].latents).max() > 1e-3
    pictures[1].save(tmp_path / "fox.png")
    assert repeated(["--from", str(tmp_path / "fox.png")]).prediction_type == "sample"
    assert repeated(["--from", str(tmp_path / "fox.png"), "--prediction-type", "auto"]).prediction_type == "auto"
