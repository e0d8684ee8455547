"""A UNet as one function from noisy latents and sigma to clean latents.

Prediction type, input scaling and guidance hide behind ``denoised = denoise(x, sigma)``, as in k-diffusion's
``external.py``.
"""

__all__ = ["PREDICTIONS", "Denoiser", "Estimator", "in_float32", "read_only"]

import math

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import Array, CorruptError, Engine, UsageError, Value, numpy_dtype
from sdxl_trt.runtime.diffusion.conditioning import Conditions
from sdxl_trt.runtime.diffusion.controls import ControlNets
from sdxl_trt.runtime.diffusion.float16 import to_float32, write_float16
from sdxl_trt.runtime.diffusion.guidance import Guidance
from sdxl_trt.runtime.diffusion.schedules import Schedule
from sdxl_trt.runtime.diffusion.step_cache import StepCache

PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Estimator:
    """What makes UNet rows of noisy latents, and clean latents of the UNet's answer: everything but the call itself.

    The rows of its pictures are [positive…, negative…], a block of `pictures` rows for each conditioning; without
    guidance at a sigma, only the positive ones. `dtype` is that of the UNet's input. `schedule` gives the timestep of
    each sigma; without `guidance` every step has the scale of the `conditions`. `further` (n, channels, h, w) are what
    an inpainting UNet receives behind the latents, unscaled: mask and picture. Raises UsageError for an unknown
    prediction type.
    """

    def __init__(
        self,
        dtype: type[np.generic],
        schedule: Schedule,
        conditions: Conditions,
        prediction_type: str,
        guidance: Guidance | None = None,
        further: NDArray[np.float32] | None = None,
    ) -> None:
        if prediction_type not in PREDICTIONS:
            raise UsageError(f"prediction type {prediction_type!r} is unknown; choose one of: {', '.join(PREDICTIONS)}")
        if schedule.sigma_data is not None and prediction_type == "sample":
            raise UsageError("--prediction-type sample: a model with EDM's schedule predicts epsilon or v_prediction")
        self.conditions = conditions
        self._dtype = dtype
        self._schedule = schedule
        self._prediction_type = prediction_type
        self._guidance = guidance or Guidance(conditions.guidance_scale, comfyui_rule=conditions.comfyui_rule)
        self._guided = conditions.guided
        self._further = further

    def guided(self, sigma: float) -> bool:
        """Return whether a step at `sigma` has negative rows."""
        return self._guided and self._guidance.applies(sigma)

    def shape(self, x: NDArray[np.float32], *, guided: bool) -> tuple[int, ...]:
        """Return the shape of the UNet's input for `x`: one row per picture and conditioning."""
        blocks = self.conditions.positives + (self.conditions.negatives if guided else 0)
        channels = x.shape[1] + (0 if self._further is None else self._further.shape[1])
        return self._pictures(x) * blocks, channels, *x.shape[2:]

    def write(self, x: NDArray[np.float32], sigma: float, sample: Array, timestep: NDArray[np.float32]) -> None:
        """Write the scaled latents to `sample`, which has their `shape`, and its rows' timesteps to `timestep`.

        The last picture is repeated if the conditions are for more: a plan of a fixed batch size takes no fewer.
        """
        pictures = self._pictures(x)
        scale = np.float32(1.0 / math.sqrt(sigma**2 + (self._schedule.sigma_data or 1.0) ** 2))
        if self._further is not None:
            sample[: len(x)] = np.concatenate([x * scale, self._further], axis=1)
        elif self._dtype is np.float16:
            write_float16(x * scale, sample[: len(x)])
        else:
            np.multiply(x, scale, out=sample[: len(x)])
        if len(x) < pictures:
            sample[len(x) : pictures] = sample[len(x) - 1]
        for start in range(pictures, len(sample), pictures):
            sample[start : start + pictures] = sample[:pictures]
        timestep.fill(self._schedule.timestep(sigma))

    def clean(
        self, prediction: NDArray[np.float32], x: NDArray[np.float32], sigma: float, *, guided: bool
    ) -> NDArray[np.float32]:
        """Return the estimate of the clean latents in `x`; it overwrites `prediction`, the UNet's answer.

        Raises CorruptError if the answer has NaN or infinity.
        """
        factor, share = self._weights(sigma)
        with np.errstate(invalid="ignore", over="ignore"):  # reported below
            pictures = self._pictures(x)
            positives = self.conditions.positives * pictures
            positive, negatives = _mean(prediction[:positives], pictures), prediction[positives:]
            if guided:
                prediction = self._guidance.combine(positive, _mean(negatives, pictures), factor)
            else:
                prediction = positive
                prediction *= factor
        if not _all_finite(prediction):
            at = self._schedule.timestep(sigma)
            raise CorruptError(f"the UNet output NaN or infinity at timestep {at:g}; if the bundle is fp16, export it"
                               " with --fp32, otherwise its weights are damaged")  # fmt: skip
        denoised = prediction[: len(x)]
        if share:
            denoised += x if share == 1.0 else x * np.float32(share)
        return denoised

    def _pictures(self, x: NDArray[np.float32]) -> int:
        """Return the number of pictures that the rows are for: that of `x`, or that of the conditions if larger."""
        return max(len(x), self.conditions.pictures)

    def _weights(self, sigma: float) -> tuple[float, float]:
        """Return the weights of the prediction and of the noisy latents in the clean latents."""
        data = self._schedule.sigma_data
        if data is not None:  # c_out and c_skip of arXiv 2206.00364, as diffusers' EDM classes have them
            variance = sigma**2 + data**2
            c_out = sigma * data / math.sqrt(variance)
            return c_out if self._prediction_type == "epsilon" else -c_out, data**2 / variance
        if self._prediction_type == "epsilon":
            return -sigma, 1.0
        if self._prediction_type == "v_prediction":
            variance = sigma**2 + 1.0
            return -sigma / math.sqrt(variance), 1.0 / variance
        return 1.0, 0.0


class Denoiser:
    """Binds a UNet engine to the conditions of a phase; float32 latents (n, c, h, w) in and out.

    The estimate overwrites the engine's output, and each call's inputs overwrite those of the call before: at a few
    hundred kilobytes, allocating memory costs more than the arithmetic.

    The arguments are those of `Estimator`, `controls`, the ControlNets that the UNet follows, and `cache`, which
    answers some calls with less than the whole of `engine`. Raises UsageError for an unknown prediction type,
    CorruptError if the UNet outputs NaN or infinity.
    """

    def __init__(
        self,
        engine: Engine,
        schedule: Schedule,
        conditions: Conditions,
        prediction_type: str,
        guidance: Guidance | None = None,
        further: NDArray[np.float32] | None = None,
        controls: ControlNets | None = None,
        cache: StepCache | None = None,
    ) -> None:
        self._engine = engine
        self._cache = cache
        self._dtype = numpy_dtype(engine.component.input("sample"))
        self._estimator = Estimator(self._dtype, schedule, conditions, prediction_type, guidance, further)
        self._controls = controls
        self._sample: Array = np.empty(0, self._dtype)
        self._timestep = np.empty(0, np.float32)
        self.latest: NDArray[np.float32] | None = None
        """The latest estimate, for previews: read-only, since the sampler continues from the same memory."""
        self._steps = 0
        (engine if cache is None else cache).bind(conditions.inputs)

    def __call__(self, x: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
        """Return the estimate of the clean latents in `x`, which holds noise of standard deviation `sigma`."""
        guided = self._estimator.guided(sigma)
        shape = self._estimator.shape(x, guided=guided)
        if self._sample.shape != shape:
            self._sample, self._timestep = np.empty(shape, self._dtype), np.empty(shape[0], np.float32)
        self._estimator.write(x, sigma, self._sample, self._timestep)
        given: dict[str, Value] = {"sample": self._sample, "timestep": self._timestep}
        working: tuple[bool, ...] = ()
        if self._controls is not None:
            working = self._controls.working(sigma, guided=guided)
            given |= self._controls.residuals(sigma, self._sample, self._timestep, guided=guided)
        if self._cache is None:
            answer = self._engine.infer(given)["out_sample"]
        else:
            answer = self._cache.infer(given, sigma, (shape, working))
        denoised = self._estimator.clean(in_float32(answer), x, sigma, guided=guided)
        self.latest = read_only(denoised)
        return denoised

    def end_step(self) -> int:
        """Go on to the next step, which a `cache` has to know; return how many steps so far ran the full UNet."""
        self._steps += 1
        return self._steps if self._cache is None else self._cache.end_step()


def in_float32(answer: Array) -> NDArray[np.float32]:
    """Return a UNet's answer in float32; one that is float32 already is the same array."""
    prediction: NDArray[np.float32] = to_float32(answer) if answer.dtype == np.float16 else answer
    return prediction


def read_only(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a read-only view of `array`."""
    view = array.view()
    view.flags.writeable = False
    return view


def _all_finite(array: NDArray[np.float32]) -> bool:
    """Return whether `array` has neither NaN nor infinity.

    A sum of squares has them too, and BLAS takes a third of the time of `isfinite`; one that overflows says nothing.
    """
    flat = array.reshape(-1)
    return math.isfinite(np.dot(flat, flat)) or bool(np.isfinite(array).all())


def _mean(predictions: NDArray[np.float32], pictures: int) -> NDArray[np.float32]:
    """Return the mean of the predictions (blocks · pictures, …) for several conditionings, as ComfyUI combines them."""
    if len(predictions) == pictures:
        return predictions
    mean: NDArray[np.float32] = predictions.reshape(-1, pictures, *predictions.shape[1:]).mean(axis=0)
    return mean
