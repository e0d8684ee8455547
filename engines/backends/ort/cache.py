"""The cache folder for the engines that ONNX Runtime's TensorRT providers compile."""

__all__ = []

import hashlib
from pathlib import Path

import msgspec

from sdxl_trt.engines.bundle import Bundle, Profile
from sdxl_trt.engines.errors import UsageError, explain_os_error
from sdxl_trt.engines.host import cache_folder, owned_by_another, writable_by_others

_DIGITS = 16


def engine_cache(bundle: Bundle, name: str, provider: str, limits: Profile) -> Path:
    """Return the folder for the engines that `provider` compiles from component `name`; create it if necessary.

    ONNX Runtime names an engine only after the names in its graph: without a folder for each set of weights, a
    fine-tune would run with the weights of the first model. Engines are code that ONNX Runtime runs unchecked, so a
    folder that other users can write raises UsageError.
    """
    component = bundle.manifest.components[name]
    parts = [component.graph.sha256, component.weights.sha256, provider, msgspec.json.encode(limits).decode()]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:_DIGITS]
    try:
        own = cache_folder()
    except RuntimeError as exc:
        raise UsageError("compiled engines need a cache folder, and this user has no home: set XDG_CACHE_HOME") from exc
    folders = [own, own / "onnxruntime", own / "onnxruntime" / key]
    try:
        own.parent.mkdir(parents=True, exist_ok=True)
        for folder in folders:
            folder.mkdir(mode=0o700, exist_ok=True)
            _require_private(folder)
    except OSError as exc:
        raise explain_os_error(exc, f"making the engine cache {folders[-1]}") from exc
    return folders[-1]


def _require_private(folder: Path) -> None:
    status = folder.stat()
    if owned_by_another(status) or writable_by_others(status):
        raise UsageError(f"{folder}: other users can write it, and engines in it are code that would run here; chmod"
                         " go-w it, or set XDG_CACHE_HOME to a folder of your own")  # fmt: skip
