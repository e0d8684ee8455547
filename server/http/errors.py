"""An answer that is not a success, before it has an API's shape."""

__all__ = ["ApiError"]

from collections.abc import Mapping


class ApiError(Exception):
    """A request that is refused: `status` is HTTP's, `code` a short name such as "invalid_value".

    `param` names the field that is wrong, "" if none is. The error handlers write it in the shape of the API that was
    called; `headers` are sent with it.
    """

    def __init__(
        self, status: int, message: str, code: str, *, param: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})
