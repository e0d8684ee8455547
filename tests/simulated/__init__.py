"""A simulated GPU: stand-ins for TensorRT and CUDA's runtime, checked against the real bindings."""

__all__ = ["SimulatedDevice", "SimulationError"]

from simulated.device import SimulatedDevice
from simulated.errors import SimulationError
