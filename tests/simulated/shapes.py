"""The stand-in for TensorRT's Dims."""

__all__ = ["Dims"]

from typing import Any

from simulated.binding import Bound


class Dims(Bound, original="Dims"):
    """A shape; it compares equal to tuples and lists."""

    def __init__(self, shape: Any = ()) -> None:
        object.__setattr__(self, "_sizes", [int(size) for size in shape])

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, arg0: Any) -> Any:
        return tuple(self._sizes[arg0]) if isinstance(arg0, slice) else self._sizes[arg0]

    def __setitem__(self, arg0: Any, arg1: Any) -> None:
        self._sizes[arg0] = arg1

    def __eq__(self, arg0: object) -> Any:
        return list(self._sizes) == list(arg0)  # type: ignore[call-overload]

    __hash__ = None  # type: ignore[assignment] # as the original

    def __str__(self) -> str:
        return str(tuple(self._sizes))

    def __repr__(self) -> str:
        return str(self)
