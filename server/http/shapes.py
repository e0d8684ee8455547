"""Errors in the shape of the API that owns the path."""

__all__ = ["Owner", "add_handlers", "as_api_error", "error_response", "owner_of", "without_folders"]

from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from sdxl_trt.engines import ResourceError, SdxlTrtError, UsageError
from sdxl_trt.server.http.errors import ApiError
from sdxl_trt.server.options import Options
from sdxl_trt.server.refusals import Draining, NotReady, QueueFull, RefusedError

Owner = Literal["openai", "a1111", "comfyui", "page", "ops"]
_FIRST: dict[str, Owner] = {
    "v1": "openai", "sdapi": "a1111", "internal": "a1111", "": "page", "page": "page", "favicon.ico": "page",
    "health": "ops", "healthz": "ops", "v2": "ops", "metrics": "ops", "admin": "ops", "docs": "page",
    "openapi.json": "page",
}  # fmt: skip
_CODES = {401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed", 408: "too_slow",
          413: "body_too_large", 415: "unsupported_media", 429: "rate_limit_exceeded"}  # fmt: skip
_TYPES = {401: "authentication_error", 403: "authentication_error", 429: "rate_limit_error"}
_NOT_AGAIN = (500, 504)
"""After these, OpenAI's clients would have the same slow picture drawn three times."""
_UNREAD = (408, 413)
"""After these, a body is not read to its end: the connection must be closed."""


def owner_of(path: str) -> Owner:
    """Return which API answers under `path`."""
    return _FIRST.get(path.split("/", 2)[1] if path.startswith("/") else path, "comfyui")


def error_response(error: ApiError, path: str) -> JSONResponse:
    """Return the answer to a request for `path` that is refused."""
    headers = dict(error.headers)
    if error.status in _NOT_AGAIN:
        headers.setdefault("x-should-retry", "false")
    if error.status in _UNREAD:
        headers["Connection"] = "close"
    return JSONResponse(_body(error, owner_of(path)), error.status, headers)


def _body(error: ApiError, owner: Owner) -> dict[str, Any]:
    if owner == "a1111":
        return {"error": "HTTPException", "detail": error.message, "body": "", "errors": ""}
    if owner == "comfyui":
        facts = {"type": error.code, "message": error.message, "details": error.param, "extra_info": {}}
        return {"error": facts, "node_errors": {}}
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param or None, "code": error.code}}


def add_handlers(app: FastAPI, options: Options) -> None:
    """Have `app` answer every error in the shape of the API that was called, without paths of this machine."""

    async def answer(request: Request, exc: Exception) -> JSONResponse:
        return error_response(as_api_error(exc, options), request.url.path)

    async def invalid(request: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, RequestValidationError)  # noqa: S101 - it is registered for no other
        if owner_of(request.url.path) == "a1111":
            found = [{name: each[name] for name in ("type", "loc", "msg")} for each in exc.errors()]
            return JSONResponse({"detail": found}, 422)
        names = sorted({str(each["loc"][-1])[:40] for each in exc.errors() if each["loc"]})
        error = ApiError(
            400, f"{', '.join(names)}: not a valid value", "invalid_value", param=names[0] if names else ""
        )
        return error_response(error, request.url.path)

    for kind in (ApiError, SdxlTrtError, RefusedError, HTTPException):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(RequestValidationError, invalid)


def as_api_error(exc: Exception, options: Options) -> ApiError:
    """Return the answer to any error: only what a client can change is told to it."""
    if isinstance(exc, ApiError):
        return exc
    if isinstance(exc, RefusedError):
        return _refused(exc)
    if isinstance(exc, HTTPException):
        code = _CODES.get(exc.status_code, "invalid_value")
        return ApiError(exc.status_code, str(exc.detail), code, headers=exc.headers)
    return _of_the_runtime(exc, options)


def _of_the_runtime(exc: Exception, options: Options) -> ApiError:
    if isinstance(exc, UsageError):
        return ApiError(400, without_folders(str(exc), options), "invalid_value")
    if isinstance(exc, ResourceError):
        message = "the machine has too little memory for this request; ask for fewer or smaller pictures"
        return ApiError(500, message, "out_of_memory")
    if isinstance(exc, SdxlTrtError):
        return ApiError(500, "the picture could not be drawn; the log of the server says why", "engine_error")
    return ApiError(500, "the request failed; the log of the server says where", "internal_error")


def _refused(exc: RefusedError) -> ApiError:
    headers = {"Retry-After": str(exc.retry_after)}
    if isinstance(exc, (Draining, NotReady)):
        return ApiError(503, str(exc), "not_ready", headers=headers)
    return ApiError(429, str(exc), "queue_full" if isinstance(exc, QueueFull) else "rate_limit_exceeded",
                    headers=headers)  # fmt: skip


def without_folders(message: str, options: Options) -> str:
    """Return a message of the runtime without the folders of this machine that `options` name."""
    for given in (options.lora_dir, options.embedding_dir, options.engines):
        for folder in () if given is None else (given.resolve(), given):
            message = message.replace(f"{folder}/", "").replace(str(folder), "the server's folder")
    return message
