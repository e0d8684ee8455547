"""Readers of an order: clients that wait within a deadline, leave, and ask for the same again."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.server.readers.once import Asking, Once, Reader
    from sdxl_trt.server.readers.waiting import deadline_of, ended_or_left, gone
else:
    __getattr__ = lazy_names(__name__, {
        "once": ("Asking", "Once", "Reader"),
        "waiting": ("deadline_of", "ended_or_left", "gone"),
    })

__all__ = ["Asking", "Once", "Reader", "deadline_of", "ended_or_left", "gone"]
