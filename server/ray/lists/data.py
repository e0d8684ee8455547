"""A list of requests through Ray Data: base, refiner and decoding as actors of their own, or all in one."""

__all__ = ["drawn"]

import logging
import pickle
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from sdxl_trt.runtime import Pipeline, Request
from sdxl_trt.server.options import Options
from sdxl_trt.server.ray import Cluster, Deployed, Layout, connected, planned
from sdxl_trt.server.ray.lists.stages import Base, Failed, Files, Refiner, Whole

BATCH = 16
"""Requests that an actor takes together: one change of UNets where it holds both."""
TASKS = 2
"""Batches that are on their way to each actor, so that none waits for its next."""


def drawn(
    requests: Mapping[int, Request], options: Options, cluster: Cluster, opener: Callable[[Options], Pipeline]
) -> Iterator[tuple[int, Files | Failed]]:
    """Yield the results of `requests` with their numbers, in the order in which they are finished."""
    import ray.data  # noqa: PLC0415 - it takes seconds

    with connected(cluster):
        layout, deployed = planned(options, cluster, BATCH)
        logging.getLogger("sdxl_trt.server").warning("%s", layout.line())
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        rows = [{"number": number, "value": pickle.dumps(request)} for number, request in requests.items()]
        data = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // BATCH))
        for row in _mapped(data, layout, deployed, opener).iter_rows():
            yield int(row["number"]), pickle.loads(row["value"])  # noqa: S301 - our own actors made it


def _mapped(data: Any, layout: Layout, deployed: Deployed, opener: Callable[[Options], Pipeline]) -> Any:
    import ray.data  # noqa: PLC0415

    parts: list[tuple[type, int]] = [(Base, layout.base), (Refiner, layout.refiner)]
    for kind, devices in parts if layout.split else [(Whole, layout.together)]:
        data = data.map_batches(
            _Mapped,
            fn_constructor_kwargs={"make": partial(kind, deployed.options, opener)},
            compute=ray.data.ActorPoolStrategy(size=devices, max_tasks_in_flight_per_actor=TASKS),
            batch_size=BATCH,
            batch_format="pyarrow",
            num_gpus=1 if deployed.gpus else 0,
            num_cpus=1,
        )
    return data


class _Mapped:
    """One of the actors as Ray Data calls it: tables in, tables out."""

    def __init__(self, make: Any) -> None:
        self._actor = make()

    def __call__(self, table: Any) -> Any:
        import pyarrow as pa  # noqa: PLC0415

        values = self._actor(table["value"].to_pylist())
        return pa.table({"number": table["number"], "value": pa.array(values, pa.large_binary())})
