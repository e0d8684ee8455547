"""The queue and the worker: orders come in, tickets go out, and one thread draws."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.server.desk.desk import Desk, Readiness
    from sdxl_trt.server.desk.files import Files, Stored
    from sdxl_trt.server.desk.orders import (
        Api, Draining, Drawn, Ended, Event, Graph, NotReady, Order, Outcome, QueueFull, RefusedError,
        Stepped, TooLate, Waiting,
    )
    from sdxl_trt.server.desk.rates import Allowance, Rates, TooMany
    from sdxl_trt.server.desk.room import Runner
    from sdxl_trt.server.desk.ticket import Ticket
else:
    __getattr__ = lazy_names(__name__, {
        "desk": ("Desk", "Readiness"),
        "files": ("Files", "Stored"),
        "orders": (
            "Api", "Draining", "Drawn", "Ended", "Event", "Graph", "NotReady", "Order", "Outcome", "QueueFull",
            "RefusedError", "Stepped", "TooLate", "Waiting",
        ),
        "rates": ("Allowance", "Rates", "TooMany"),
        "room": ("Runner",),
        "ticket": ("Ticket",),
    })

__all__ = [
    "Allowance", "Api", "Desk", "Draining", "Drawn", "Ended", "Event", "Files", "Graph", "NotReady", "Order", "Outcome",
    "QueueFull", "Rates", "Readiness", "RefusedError", "Runner", "Stepped", "Stored", "Ticket", "TooLate", "TooMany",
    "Waiting",
]
