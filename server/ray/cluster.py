"""The cluster: started here or found, its devices, and the layout that fits them."""

__all__ = ["Cluster", "connected", "planned"]

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sdxl_trt.engines import UsageError
from sdxl_trt.server.options import Options
from sdxl_trt.server.ray.desk import open_ingress
from sdxl_trt.server.ray.layout import ASSUMED, Layout, LayoutName, choose_layout, parse_seconds
from sdxl_trt.server.ray.options import BATCH, Deployed


@dataclass(frozen=True)
class Cluster:
    """What is asked of a cluster: the layout, how many devices (None: all GPUs, or one CPU), where it is (None: here).

    `seconds` is BASE,REFINER,DECODE,SWAP; None if nothing was measured.
    """

    layout: LayoutName = "auto"
    devices: int | None = None
    address: str | None = None
    seconds: str | None = None


def planned(options: Options, cluster: Cluster, batch: int = BATCH) -> tuple[Layout, Deployed]:
    """Return the layout for the cluster that is connected, and what deployments are made with. Raises UsageError."""
    import ray  # noqa: PLC0415 - the extra [ray]

    found = int(ray.cluster_resources().get("GPU", 0))
    gpus = found > 0 and options.provider not in ("ort-cpu", "openvino")
    devices = cluster.devices or (found if gpus else 1)
    if gpus and devices > found:
        raise UsageError(f"--ray-devices {devices}: the cluster has {found} GPUs; give at most that many")
    seconds = ASSUMED if cluster.seconds is None else parse_seconds(cluster.seconds)
    refined = open_ingress(options).manifest.refiner is not None
    layout = choose_layout(cluster.layout, devices, seconds, batch, refined=refined, assumed=cluster.seconds is None)
    return layout, Deployed(options, gpus)


@contextmanager
def connected(cluster: Cluster) -> Iterator[None]:
    """Connect to the cluster, or start one here that ends with this process."""
    import ray  # noqa: PLC0415

    if cluster.address is not None:
        ray.init(address=cluster.address, logging_level=logging.WARNING)
    else:
        # Its CPUs are places: the ingress and every device take one, and Ray Data keeps some for its own tasks.
        places = max(os.cpu_count() or 1, 2 * (cluster.devices or 1) + 3)
        # Ray lowers the priority of its workers, which here do all the work.
        os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init(address="local", num_cpus=places, include_dashboard=False, logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()
