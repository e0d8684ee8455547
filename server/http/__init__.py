"""What every API shares: bodies, keys, origins, request ids, and errors in each API's shape."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.server.http.bodies import Part, read_form, read_json
    from sdxl_trt.server.http.caller import Caller, current_caller
    from sdxl_trt.server.http.connections import Connection, Socket
    from sdxl_trt.server.http.errors import ApiError
    from sdxl_trt.server.http.gate import Finished, Gate
    from sdxl_trt.server.http.keys import key_id
    from sdxl_trt.server.http.pictures import from_base64, read_picture
    from sdxl_trt.server.http.shapes import add_handlers
    from sdxl_trt.server.http.values import kind_of, number_of, told_of, whole_of
else:
    __getattr__ = lazy_names(__name__, {
        "bodies": ("Part", "read_form", "read_json"),
        "caller": ("Caller", "current_caller"),
        "connections": ("Connection", "Socket"),
        "errors": ("ApiError",),
        "gate": ("Finished", "Gate"),
        "keys": ("key_id",),
        "pictures": ("from_base64", "read_picture"),
        "shapes": ("add_handlers",),
        "values": ("kind_of", "number_of", "told_of", "whole_of"),
    })

__all__ = [
    "ApiError", "Caller", "Connection", "Finished", "Gate", "Part", "Socket", "add_handlers",
    "current_caller", "from_base64", "key_id", "kind_of", "number_of", "read_form", "read_json", "read_picture",
    "told_of", "whole_of",
]
