"""The queue and the worker: orders come in, tickets go out, and one thread draws."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.server.desk.desk import Desk, Readiness
    from sdxl_trt.server.desk.files import Files, Stored
    from sdxl_trt.server.desk.orders import (
        Api, Drawn, Ended, Event, Graph, Order, Outcome, Stepped, Waiting,
    )
    from sdxl_trt.server.desk.pieces import Piece
    from sdxl_trt.server.desk.rates import Allowance, Rates
    from sdxl_trt.server.desk.room import Room, Runner
    from sdxl_trt.server.desk.shift import Shift
    from sdxl_trt.server.desk.studio import Studio
    from sdxl_trt.server.desk.ticket import Ticket
else:
    __getattr__ = lazy_names(__name__, {
        "desk": ("Desk", "Readiness"),
        "files": ("Files", "Stored"),
        "orders": ("Api", "Drawn", "Ended", "Event", "Graph", "Order", "Outcome", "Stepped", "Waiting"),
        "pieces": ("Piece",),
        "rates": ("Allowance", "Rates"),
        "room": ("Room", "Runner"),
        "shift": ("Shift",),
        "studio": ("Studio",),
        "ticket": ("Ticket",),
    })

__all__ = [
    "Allowance", "Api", "Desk", "Drawn", "Ended", "Event", "Files", "Graph", "Order", "Outcome", "Piece", "Rates",
    "Readiness", "Room", "Runner", "Shift", "Stepped", "Stored", "Studio", "Ticket", "Waiting",
]
