"""The end of the server: no new work, and a while for the work that runs."""

__all__ = ["drained"]

import asyncio

from sdxl_trt.server.desk import Desk


async def drained(desk: Desk, grace: float) -> None:
    """Have `desk` take no more orders, and return when those that are alive have ended, or after `grace` seconds."""
    drain = getattr(desk, "drain", None)
    if drain is not None:
        await drain(grace)
        return
    desk.draining = True
    changed = asyncio.Event()
    desk.on_change.append(changed.set)
    for ticket in list(desk.tickets.values()):
        if ticket.started is None:
            ticket.cancel()
    try:
        async with asyncio.timeout(grace):
            while desk.tickets:
                changed.clear()
                await changed.wait()
    except TimeoutError:
        return
    finally:
        desk.on_change.remove(changed.set)
