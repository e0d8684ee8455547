"""The simulator's error for mistakes that corrupt a real device, or that show there only by chance."""

__all__ = ["SimulationError", "violations"]

violations: list["SimulationError"] = []
"""Every SimulationError since the list was last cleared, including those that the code under test swallowed."""


class SimulationError(AssertionError):
    """The code under test made a mistake that a real device does not report.

    It is not an error of CUDA or TensorRT, so code that handles those does not catch it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        violations.append(self)
