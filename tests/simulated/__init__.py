"""A GPU that is not there: stand-ins for TensorRT and CUDA's runtime, held against the real bindings."""

__all__ = ["SimulatedDevice", "SimulationError"]

from simulated.device import SimulatedDevice
from simulated.errors import SimulationError
