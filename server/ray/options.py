"""The options of every deployment, none left to Ray's defaults."""

__all__ = ["BATCH", "LOGGING", "MARGIN", "Deployed", "Parts", "ingress_options", "pool_options"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sdxl_trt.runtime import Pipeline
from sdxl_trt.server.desk import Desk, Runner
from sdxl_trt.server.options import Options

BATCH = 4
"""Pictures that share a call of a UNet."""
MARGIN = 5.0
"""Seconds that the proxy waits beyond a request's deadline, so that the answer is ours."""
RETRY_AFTER = 5
LOGGING = {"log_level": "WARNING", "enable_access_log": False}
"""Ray's own lines; a line a request is the ingress's."""
OptionsOfRay = dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """What deployments are made of that lies above this wing: functions that every machine imports by their names."""

    create_app: Callable[[Options, Callable[[Options], Pipeline], Callable[[Pipeline, Options], Desk]], Any]
    open_engines: Callable[[Options], Pipeline]
    run_graph: Runner


@dataclass(frozen=True)
class Deployed:
    """What deployments are made with: `gpus` says whether each device is a GPU, `batch` how many share a call."""

    options: Options
    gpus: bool
    batch: int = BATCH


def ingress_options(deployed: Deployed) -> OptionsOfRay:
    """Return the options of the ingress. It is one: it holds the queue, jobs, histories and websockets."""
    return {
        "num_replicas": 1,
        "ray_actor_options": {"num_cpus": 1, "num_gpus": 0},
        "max_ongoing_requests": 512,
        "max_queued_requests": 64,
        **_all(deployed),
    }


def pool_options(deployed: Deployed, devices: int) -> OptionsOfRay:
    """Return the options of a pool of at most so many `devices`."""
    batch = deployed.batch
    return {
        "ray_actor_options": {"num_cpus": 1, "num_gpus": 1 if deployed.gpus else 0},
        "max_ongoing_requests": 2 * batch,
        "max_queued_requests": 2 * batch,
        "autoscaling_config": {
            "min_replicas": 1,
            "max_replicas": devices,
            "target_ongoing_requests": batch,
            "upscale_delay_s": 30.0,
            "downscale_delay_s": 600.0,
        },
        "health_check_period_s": 10.0,
        "health_check_timeout_s": 30.0,
        **_all(deployed),
    }


def _all(deployed: Deployed) -> OptionsOfRay:
    return {
        "graceful_shutdown_timeout_s": deployed.options.grace + 10.0,
        "graceful_shutdown_wait_loop_s": 2.0,
        "backpressure_config": {"status_code": 429, "retry_after_s": RETRY_AFTER},
    }
