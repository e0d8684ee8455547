"""trt-serve --ray: deploy on the cluster, and end with a signal."""

__all__ = ["serve_by_ray"]

import signal
import socket
import sys
import threading

from sdxl_trt.engines import SdxlTrtError, UsageError
from sdxl_trt.server.options import Options
from sdxl_trt.server.ray.cluster import Cluster, connected, planned
from sdxl_trt.server.ray.deployments import built
from sdxl_trt.server.ray.options import LOGGING, MARGIN, Parts

NAME = "sdxl-trt"


def serve_by_ray(options: Options, cluster: Cluster, parts: Parts) -> None:
    """Serve until a signal comes. A cluster that was there before keeps running. Raises SdxlTrtError."""
    from ray import serve  # noqa: PLC0415 - the extra [ray]
    from ray.exceptions import RayError  # noqa: PLC0415

    port = _port(options)
    stopped = threading.Event()
    with connected(cluster):
        for number in (signal.SIGINT, signal.SIGTERM):  # after Ray has set its own
            signal.signal(number, lambda *_: stopped.set())
        layout, deployed = planned(options, cluster)
        sys.stderr.write(f"{layout.line()}\n")
        http = {"host": options.host, "port": port, "request_timeout_s": options.deadline + MARGIN}
        try:
            serve.start(http_options=http, logging_config=LOGGING)
            serve.run(built(layout, deployed, parts), name=NAME, route_prefix="/", logging_config=LOGGING)
        except (RuntimeError, RayError) as exc:
            raise SdxlTrtError("the cluster could not start the server; the lines above say why") from exc
        host = f"[{options.host}]" if ":" in options.host else options.host
        sys.stdout.write(f"serving on http://{host}:{port}\n")
        sys.stdout.flush()
        stopped.wait()
        if cluster.address is None:
            serve.shutdown()
        else:
            serve.delete(NAME)


def _port(options: Options) -> int:
    """Return a port that is free now. Raises UsageError if the one that is asked for is not."""
    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((options.host, options.port), family=family) as probe:
            return int(probe.getsockname()[1])
    except OSError as exc:
        raise UsageError(
            f"--host {options.host} --port {options.port}: {exc.strerror or exc}; give another one"
        ) from exc
