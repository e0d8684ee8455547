"""What the simulator raises where a real device would be corrupted, or where a mistake would only show by chance."""

__all__ = ["SimulationError", "violations"]

violations: list["SimulationError"] = []
"""Every SimulationError since the list was last cleared: one that the code under test swallowed still counts."""


class SimulationError(AssertionError):
    """The code under test did what a real device forgives, or punishes, without a word.

    It is no error of CUDA's or TensorRT's, so nothing that handles those can take it for one.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        violations.append(self)
