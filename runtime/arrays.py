"""Array types shared by the packages of the runtime."""

__all__ = ["Latents"]

import numpy as np
from numpy.typing import NDArray

Latents = NDArray[np.float32]
