"""The queue and the worker: orders come in, tickets go out, and one thread draws."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.server.desk.desk import Desk
    from sdxl_trt.server.desk.orders import (
        Api, Draining, Drawn, Ended, Event, Graph, NotReady, Order, Outcome, QueueFull, RefusedError,
        Stepped, TooLate, Waiting,
    )
    from sdxl_trt.server.desk.ticket import Ticket
else:
    __getattr__ = lazy_names(__name__, {
        "desk": ("Desk",),
        "orders": (
            "Api", "Draining", "Drawn", "Ended", "Event", "Graph", "NotReady", "Order", "Outcome", "QueueFull",
            "RefusedError", "Stepped", "TooLate", "Waiting",
        ),
        "ticket": ("Ticket",),
    })

__all__ = [
    "Api", "Desk", "Draining", "Drawn", "Ended", "Event", "Graph", "NotReady", "Order", "Outcome", "QueueFull",
    "RefusedError", "Stepped", "Ticket", "TooLate", "Waiting",
]
