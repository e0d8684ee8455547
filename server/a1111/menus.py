"""A1111's lists and options: what its menus offer here, and what its texts say of a picture."""

__all__ = ["Menus"]

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from sdxl_trt.engines import SdxlTrtError
from sdxl_trt.runtime.images import read_texts
from sdxl_trt.server.a1111.body import (
    SAMPLERS,
    SCHEDULERS,
    Models,
    Settings,
    changed,
    embeddings_told,
    invalid,
    loras_told,
    options_told,
)
from sdxl_trt.server.a1111.faults import as_api_error
from sdxl_trt.server.a1111.infotext import parse_infotext
from sdxl_trt.server.http import from_base64, read_json
from sdxl_trt.server.options import Options

Route = Callable[[HttpRequest], Any]
_UPSCALER = {"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 1.0}
_NOTHING: dict[str, Any] = {
    "sd-vae": [], "latent-upscale-modes": [], "scripts": {"txt2img": [], "img2img": []}, "script-info": [],
    "hypernetworks": [], "face-restorers": [], "realesrgan-models": [], "prompt-styles": [], "cmd-flags": {},
    "memory": {"ram": {}, "cuda": {}}, "upscalers": [_UPSCALER],
}  # fmt: skip
"""What clients ask for and this server has nothing of; the first upscaler is the one that does nothing."""
_PARAMETERS = "parameters"


class Menus:
    """The endpoints of lists and options. `settings` are the server's, which `--allow-options` lets clients change."""

    def __init__(self, options: Options) -> None:
        self._options, self.settings = options, Settings()

    def routes(self) -> Iterator[tuple[str, str, Route]]:
        """Yield method, path below /sdapi/v1 and endpoint."""
        for path, told in {**_NOTHING, "samplers": _samplers(), "schedulers": _schedulers()}.items():
            yield "GET", path, _saying(told)
        yield "GET", "options", self.get_options
        yield "POST", "options", self.set_options
        yield "GET", "sd-models", self.models
        yield "GET", "loras", self.loras
        yield "GET", "embeddings", self.embeddings
        yield "POST", "png-info", self.png_info

    async def get_options(self, request: HttpRequest) -> Response:
        """Say the options."""
        return JSONResponse(options_told(self.settings, _models(request)))

    async def set_options(self, request: HttpRequest) -> Response:
        """Take options, one or all of them; without `--allow-options` none is changed."""
        made, idle = changed(self.settings, await read_json(request), _models(request), "")
        warnings = request.state.caller.warnings
        warnings += idle
        if made != self.settings and not self._options.allow_options:
            warnings.append("options are the same for all, and are not changed; give override_settings in a request")
        elif made != self.settings:
            self.settings = made
        return JSONResponse(None)

    async def models(self, request: HttpRequest) -> Response:
        """List the bundle's base, then its refiner."""
        return JSONResponse(_models(request).told())

    async def loras(self, _: HttpRequest) -> Response:
        """List the LoRAs that prompts may name."""
        return JSONResponse(await asyncio.to_thread(loras_told, self._options.lora_dir))

    async def embeddings(self, _: HttpRequest) -> Response:
        """List the embeddings that prompts may name."""
        return JSONResponse(await asyncio.to_thread(embeddings_told, self._options.embedding_dir))

    async def png_info(self, request: HttpRequest) -> Response:
        """Say what a picture's file says of its settings."""
        image = (await read_json(request)).get("image")
        if not isinstance(image, str) or not image:
            raise invalid("image", "give a picture as base64")
        return JSONResponse(await asyncio.to_thread(self._texts, image))

    def _texts(self, image: str) -> dict[str, Any]:
        try:
            texts = read_texts(from_base64(image, self._options, "image"))
        except SdxlTrtError as exc:
            raise as_api_error(exc, self._options) from exc
        told = texts.get(_PARAMETERS, "")
        return {"info": told, "items": texts, "parameters": parse_infotext(told) if told else {}}


def _models(request: HttpRequest) -> Models:
    return Models.of(request.app.state.desk.pipeline.manifest)


def _saying(told: Any) -> Route:
    async def say(_: HttpRequest) -> Response:
        return JSONResponse(told)

    return say


def _samplers() -> list[dict[str, Any]]:
    return [{"name": each.label, "aliases": [*each.aliases], "options": each.told} for each in SAMPLERS]


def _schedulers() -> list[dict[str, Any]]:
    return [{"name": each.name, "label": each.label, "aliases": [*each.aliases], "default_rho": each.default_rho,
             "need_inner_model": each.need_inner_model} for each in SCHEDULERS]  # fmt: skip
