"""A UNet as one function from noisy latents and sigma to clean latents.

Prediction type, input scaling and guidance hide behind ``denoised = denoise(x, sigma)``, as in k-diffusion's
``external.py``.
"""

__all__ = ["Denoiser"]

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.base import Array, Engine, numpy_dtype
from sdxl_trt.engines.errors import CorruptError, UsageError
from sdxl_trt.runtime.conditioning import Conditions
from sdxl_trt.runtime.guidance import Guidance
from sdxl_trt.runtime.sigmas import Schedule

PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Denoiser:
    """Binds a UNet engine to the conditions of a phase; float32 latents (n, c, h, w) in and out.

    `schedule` gives the timestep of each sigma; without `guidance` every step has the scale of the `conditions`.
    Raises UsageError for an unknown prediction type, CorruptError where the UNet answers with NaN or infinity.
    """

    def __init__(
        self,
        engine: Engine,
        schedule: Schedule,
        conditions: Conditions,
        prediction_type: str,
        guidance: Guidance | None = None,
    ) -> None:
        if prediction_type not in PREDICTIONS:
            raise UsageError(f"prediction type {prediction_type!r} is unknown; {', '.join(PREDICTIONS)} are known")
        self._engine = engine
        self._schedule = schedule
        self._conditions = conditions
        self._prediction_type = prediction_type
        self._guidance = guidance or Guidance(conditions.guidance_scale, any_scale=conditions.any_scale)
        self._dtype = numpy_dtype(engine.component.input("sample"))
        engine.bind(conditions.inputs)

    def __call__(self, x: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
        """Return the estimate of the clean latents in `x`, which holds noise of standard deviation `sigma`."""
        guided = self._conditions.guided and self._guidance.applies(sigma)
        scaled = self._filled((x / np.float32(np.sqrt(sigma**2 + 1.0))).astype(self._dtype))
        sample = np.concatenate([scaled, scaled]) if guided else scaled
        timestep = np.full(len(sample), self._schedule.timestep(sigma), dtype=np.float32)
        outputs = self._engine.infer({"sample": sample, "timestep": timestep})
        prediction: NDArray[np.float32] = outputs["out_sample"].astype(np.float32)
        if not np.isfinite(prediction).all():
            raise CorruptError(
                f"the UNet answered with NaN or infinity at timestep {timestep[0]:g}; if the bundle is fp16, export it"
                " with --fp32, else its weights are damaged"
            )
        if guided:
            prediction = self._guidance.combine(*np.split(prediction, 2))
        return self._denoised(x, prediction[: len(x)], np.float32(sigma))

    def _filled(self, scaled: Array) -> Array:
        """Repeat the last picture where the conditions are for more: a plan of one batch size takes no fewer."""
        missing = self._conditions.pictures - len(scaled)
        return np.concatenate([scaled, *[scaled[-1:]] * missing]) if missing > 0 else scaled

    def _denoised(
        self, x: NDArray[np.float32], prediction: NDArray[np.float32], sigma: np.float32
    ) -> NDArray[np.float32]:
        if self._prediction_type == "epsilon":
            return x - sigma * prediction
        if self._prediction_type == "v_prediction":
            variance = sigma**2 + np.float32(1.0)
            clean: NDArray[np.float32] = x / variance - prediction * (sigma / np.sqrt(variance))
            return clean
        return prediction
