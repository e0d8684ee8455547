"""What engines that give a library a graph and a map of its weights have in common."""

__all__ = ["MappedEngine"]

import contextlib
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

from sdxl_trt.engines.adapters import ScaledLora
from sdxl_trt.engines.backends.mapped.patch import Patch, plan_patch
from sdxl_trt.engines.bundle import Bundle, Component, FileRecord, verify_file
from sdxl_trt.engines.errors import (
    EngineError,
    IncompatibleError,
    ResourceError,
    SdxlTrtError,
    explain_os_error,
)

_OUT_OF_MEMORY = ("bad_alloc", "Failed to allocate", "bad allocation", "out of memory")


class MappedEngine(ABC):
    """The files, LoRAs and errors of one component, for an engine of the library named `library`.

    `prefetch` reads the graph and maps the one weights file, both with the manifest's digests, so that the library
    opens no file itself. With LoRAs, the map is a private copy of the pages that they change; an 8-bit component takes
    none. Subclasses load and run; they forget the map when the library needs it no longer, or if `load` fails: half of
    the LoRAs may be in it then.
    """

    library: ClassVar[str]
    _without_loras: ClassVar[str]
    """What to do where LoRAs cannot change 8-bit weights, besides fusing them at export."""

    def __init__(self, bundle: Bundle, name: str, graph: FileRecord | None = None) -> None:
        """Take component `name`, to run `graph` or its own. Raises IncompatibleError for a bundle without graphs."""
        self.name = name
        self.component: Component = bundle.manifest.components[name]
        if not bundle.manifest.onnx:
            raise IncompatibleError(f"{bundle.root}: contains only plans, and {self.library} runs graphs; export the"
                                    " bundle again without --plans-only, or use --provider tensorrt")  # fmt: skip
        self._bundle = bundle
        self._graph_record = graph or self.component.graph
        self._graph_path = bundle.path(self._graph_record)
        self._weights_path = bundle.path(self.component.weights)
        self._loras: tuple[ScaledLora, ...] = ()
        self._patch: Patch | None = None
        self._graph: bytes | None = None
        self._weights: mmap.mmap | None = None

    @property
    @abstractmethod
    def _loaded(self) -> bool:
        """Whether the engine can infer."""

    @abstractmethod
    def unload(self) -> None:
        """Free the engine; see Engine.unload."""

    def adapt(self, loras: Sequence[ScaledLora]) -> None:
        """Set the LoRAs of the next `load`; see Engine.adapt. Other ones than before unload the engine."""
        wanted = tuple(loras)
        if wanted == self._loras:
            return
        if wanted:
            self._check_takes_loras()
        patch = plan_patch(self._bundle, self.name, wanted) if wanted else None
        self.unload()
        self._loras, self._patch = wanted, patch

    def _check_takes_loras(self) -> None:
        if self.component.eight_bit:
            raise IncompatibleError(
                f"{self.name} is {self.component.precision}, and LoRAs cannot change 8-bit weights on {self.library};"
                f" fuse them at export (export-engines --lora FILE --{self.component.precision}), {self._without_loras}"
            )

    def prefetch(self) -> None:
        """Map the files and check their digests; see Engine.prefetch."""
        if self._graph is not None or self._loaded:
            return
        verify_file(self._graph_path, self._graph_record)
        verify_file(self._weights_path, self.component.weights)
        try:
            graph = self._graph_path.read_bytes()
            with self._weights_path.open("rb") as file:
                access = mmap.ACCESS_READ if self._patch is None else mmap.ACCESS_COPY
                self._weights = mmap.mmap(file.fileno(), 0, access=access)
        except (OSError, ValueError) as exc:
            reason = exc if isinstance(exc, OSError) else OSError(str(exc))
            raise explain_os_error(reason, f"reading component {self.name}") from exc
        self._graph = graph

    def _put_loras(self) -> None:
        """Change the mapped weights by the LoRAs; to be called once a map."""
        if self._patch is not None and self._weights is not None:
            self._patch.apply(self._weights)

    def _forget_files(self) -> None:
        self._graph = None
        weights, self._weights = self._weights, None
        if weights is not None:
            with contextlib.suppress(BufferError):  # an error on its way still refers to views, which free it with them
                weights.close()

    @contextlib.contextmanager
    def _explained(self, verb: str) -> Iterator[None]:
        """Raise the library's errors as ours; `verb` is what it does to the component."""
        doing = f"{verb} {self.name}"
        try:
            yield
        except SdxlTrtError:
            raise
        except Exception as exc:
            text = " ".join(str(exc).split())
            if isinstance(exc, MemoryError) or any(sign in text for sign in _OUT_OF_MEMORY):
                raise ResourceError(f"{doing}: out of memory; try --residency swap, a smaller size, or fewer pictures"
                                    " at once") from exc  # fmt: skip
            raise self._explain(doing, text) from exc

    def _explain(self, doing: str, text: str) -> SdxlTrtError:
        """Return the error for a message of the library: its exceptions have no common base class."""
        return EngineError(f"{doing}: {self.library} failed: {text[:300]}; rerun with --debug for the full message")
