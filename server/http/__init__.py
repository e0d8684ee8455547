"""What every API shares: bodies, keys, origins, request ids, and errors in each API's shape."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.server.http.caller import Caller
    from sdxl_trt.server.http.errors import ApiError
else:
    __getattr__ = lazy_names(__name__, {"caller": ("Caller",), "errors": ("ApiError",)})

__all__ = ["ApiError", "Caller"]
