"""Find the embeddings that prompts name (`embedding:name`) in the folder that a request gives for them."""

__all__ = ["NO_EMBEDDINGS", "EmbeddingFact", "Embeddings"]

from pathlib import Path, PurePosixPath
from typing import Annotated

import msgspec

from sdxl_trt.engines import SourceError, UsageError, explain_os_error
from sdxl_trt.engines.adapters import PICKLED
from sdxl_trt.runtime.adapters.embedding_file import Embedding, read_embedding
from sdxl_trt.runtime.adapters.folder import find_named

_SHOWN = 80
_LONGEST = 255


class EmbeddingFact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a record says of an embedding: its file's name without a folder, and the digest of its content."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=_LONGEST)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Embeddings:
    """The embeddings in `folder` and its sub-folders by name, each read when a prompt first names it.

    Without a folder there are none. A request keeps one of these, so that it uses the contents that were checked.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._found: dict[str, Embedding | None] = {}

    def find(self, name: str) -> Embedding | None:
        """Return the embedding called `name`, with or without ".safetensors" and sub-folders; None if there is none.

        Raises UsageError if several files have the name, and what `read_embedding` raises.
        """
        if self.folder is None:
            return None
        if name not in self._found:
            self._found[name] = self._read(name)
        return self._found[name]

    @property
    def used(self) -> tuple[Embedding, ...]:
        """Return the different embeddings that were found so far, in the order of their names."""
        found = {each for each in self._found.values() if each is not None}
        return tuple(sorted(found, key=lambda each: (each.name, each.sha256)))

    def refuse_pickled(self, name: str) -> None:
        """Raise SourceError if the folder has a pickled file of this name, which `find` does not return."""
        if self.folder is None or not _is_name(name):
            return
        stem = PurePosixPath(name).name
        wanted = {stem + ending for ending in PICKLED} | ({stem} if stem.endswith(PICKLED) else set())
        try:
            found = next((path for path in self.folder.rglob("*") if path.name in wanted), None)
        except OSError as exc:
            raise explain_os_error(exc, f"reading {self.folder}") from exc
        if found is not None:
            raise SourceError(f"embedding:{name[:_SHOWN]}: {found} is pickled, which can run code when loaded; get the"
                              " embedding as .safetensors")  # fmt: skip

    def _read(self, name: str) -> Embedding | None:
        if self.folder is None or not _is_name(name):
            return None
        where = f"embedding:{name[:_SHOWN]}"
        paths = find_named(self.folder, name, where)
        if len(paths) > 1:
            raise UsageError(f"{where}: is the name of {paths[0]} and of {paths[1]}; write the folder's name and /"
                             " before it")  # fmt: skip
        return read_embedding(paths[0]) if paths else None


NO_EMBEDDINGS = Embeddings()
"""For prompts of a request without a folder."""


def _is_name(name: str) -> bool:
    """Return whether `name` can be that of a file inside a folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    plain = path.parts and not path.is_absolute() and ".." not in path.parts
    return bool(plain) and len(name) <= _LONGEST and not any(c in name for c in "\0:")
