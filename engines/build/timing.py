"""The timing cache: kernel times that TensorRT measured in earlier builds on the same GPU, with the same version.

Without a file of the user's choice, every GPU and version has one in the cache folder, and all builds share it.
"""

__all__ = ["TimingCache", "cache_file"]

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdxl_trt.engines.build.network import BuildLog
from sdxl_trt.engines.bundle import ANY, Environment
from sdxl_trt.engines.errors import SdxlTrtError, explain_os_error
from sdxl_trt.engines.host import atomic_write, cache_folder, is_utf8, read_private

FOLDER = "timing"
MOST = 1 << 30
"""The largest file that is read as a timing cache, in bytes."""
_PATIENCE = 30.0
"""Seconds to wait for another build that is writing the same file; it takes milliseconds."""


def cache_file(environment: Environment) -> Path | None:
    """Return the file of the timing cache for the GPU and TensorRT of `environment`, which may not exist yet.

    None where there is nothing to keep, since TensorRT for RTX times no kernels when it builds, and nowhere to keep it:
    a user without a home folder has no cache folder, and TensorRT takes only paths in UTF-8.
    """
    if environment.flavour == "tensorrt-rtx" or environment.gpu == ANY:
        return None
    words = (environment.gpu, environment.compute_capability, environment.tensorrt)
    name = "-".join(re.sub(r"[^A-Za-z0-9.]+", "-", word) for word in words)
    try:
        path = cache_folder() / FOLDER / f"{name}.cache"
    except RuntimeError:
        return None
    return path if is_utf8(path) else None


class TimingCache:
    """The timing cache of a build: set in the builder's `config` from the file at `path`, and saved there afterwards.

    Keep the object until the plan is built: TensorRT uses the cache that it holds. A missing file is an empty cache; so
    is one that is damaged, or of another device or version, and so is a `shared` one that other users could have
    written. `log` gets a line that says which. Raises an SdxlTrtError if a file cannot be read, unless it is `shared`.
    """

    def __init__(self, config: Any, path: Path, log: BuildLog, *, shared: bool = False) -> None:
        self._config = config
        self._path = path
        self._log = log
        self._shared = shared
        content = self._read()
        self._cache = config.create_timing_cache(content) if content else None
        fits = self._cache is not None and bool(config.set_timing_cache(self._cache, ignore_mismatch=False))
        if not fits:
            self._cache = config.create_timing_cache(b"")
            config.set_timing_cache(self._cache, ignore_mismatch=False)
        self._note(self._said(content, fits=fits))

    def save(self) -> None:
        """Write the cache to its file, together with what other builds have written there since it was read.

        Raises an SdxlTrtError if the file cannot be written; if it is shared, the log gets a warning instead.
        """
        cache = self._config.get_timing_cache()
        if cache is None:
            self._note("this TensorRT keeps none")
            return
        try:
            with self._alone():
                size = self._write(cache)
        except (OSError, SdxlTrtError, RuntimeError, TypeError):  # the last two: the binding could not serialize it
            if not self._shared:
                raise
            self._log.note("WARNING", f"timing cache: {self._path.name} cannot be written; the plan is not affected")
            return
        self._note(f"{size} bytes saved to {self._path.name}")

    def _write(self, cache: Any) -> int:
        """Replace the file by `cache` and the entries that it has by now; return its size in bytes."""
        there = self._read()
        other = self._config.create_timing_cache(there) if there else None
        if other is not None:
            cache.combine(other, ignore_mismatch=False)
        content = memoryview(cache.serialize()).cast("B")
        with atomic_write(self._path) as file:
            file.write(content)
        if self._shared:
            self._path.chmod(0o600)  # whatever the umask: a file that others can write is not read
        return len(content)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other builds from writing a shared file meanwhile."""
        with contextlib.ExitStack() as stack:
            if self._shared:
                from filelock import FileLock  # noqa: PLC0415 - only builds need it

                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                # Without the lock, the file still is one of the two caches, whole: entries of the other are lost.
                with contextlib.suppress(OSError):
                    stack.enter_context(FileLock(self._path.with_suffix(".lock"), timeout=_PATIENCE))
            yield

    def _read(self) -> bytes:
        if self._shared:
            return read_private(self._path, MOST)
        try:
            return self._path.read_bytes() if self._path.exists() else b""
        except OSError as exc:
            raise explain_os_error(exc, f"reading {self._path}") from exc

    def _said(self, content: bytes, *, fits: bool) -> str:
        name = self._path.name
        if fits:
            return f"{len(content)} bytes read from {name}"
        if content:
            return f"{name} is damaged, or of another GPU or version; starting with an empty one"
        if self._shared and self._path.exists():
            return f"{name} is not used: other users can write it, or it cannot be read; starting with an empty one"
        return f"{name} does not exist yet or is empty; starting with an empty one"

    def _note(self, said: str) -> None:
        # By its bare name: the log stays in the bundle and must not contain this machine's folders.
        self._log.note("INFO", f"timing cache: {said}")
