"""Types of the arrays that pass between the wings of the runtime."""

__all__ = ["Latents"]


import numpy as np
from numpy.typing import NDArray

Latents = NDArray[np.float32]
