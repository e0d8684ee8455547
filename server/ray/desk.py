"""The desk of an ingress: the same queue and the same answers, and pools that draw."""

__all__ = ["RayDesk", "open_ingress"]

from collections.abc import Callable

from sdxl_trt.engines import Engine, UsageError
from sdxl_trt.engines.adapters import Use
from sdxl_trt.engines.residency import EnginePool
from sdxl_trt.runtime import Pipeline
from sdxl_trt.runtime.pipeline import find_bundle
from sdxl_trt.server.desk import Desk, Room, Shift, Studio
from sdxl_trt.server.options import Options
from sdxl_trt.server.ray.dispatch import Dispatch
from sdxl_trt.server.ray.layout import Layout
from sdxl_trt.server.ray.room import FarRoom, Pools


class RayDesk(Desk):
    """A desk that has everything drawn by the pools that `make` makes."""

    def __init__(self, pipeline: Pipeline, options: Options, layout: Layout, make: Callable[[], Pools]) -> None:
        self._layout, self._make = layout, make
        super().__init__(pipeline, options, owned=True)

    def _make_room(self, pipeline: Pipeline, *, owned: bool) -> Room:
        shift = Shift(Studio(pipeline, self.predictor), Dispatch(self._layout), owned=owned)
        return FarRoom(shift, self.predictor, self._on_end, self._on_news, self._make)

    async def swap_pipeline(self, open_pipeline: Callable[[], Pipeline]) -> None:  # noqa: ARG002
        """Refuse: the pools have opened the bundle themselves."""
        raise UsageError("several machines serve this bundle; deploy the server again to serve another one")


def open_ingress(options: Options) -> Pipeline:
    """Return a pipeline that settles requests and draws nothing: an ingress has no device."""
    return Pipeline(_NoEngines(find_bundle(options.engines), _refuse, "swap", "none"))


class _NoEngines(EnginePool):
    """The engines of an ingress: none. What LoRAs need of an engine, the pools check."""

    def check(self, uses: object) -> None:
        """Do nothing."""


def _refuse(use: Use, *_: object) -> Engine:
    raise UsageError(f"{use}: an ingress loads no engine")
