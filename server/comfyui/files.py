"""The pictures of clients: uploads and outputs, in a private folder under names that nobody knows.

A client's names are keys of a table of its own: nothing that a client says becomes a part of a path, and no client
sees another one's files.
"""

__all__ = ["Files", "Stored", "digest", "paths_of"]

import hashlib
import secrets
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sdxl_trt.server.comfyui.names import FileKey, numbered
from sdxl_trt.server.http import ApiError

MIB = 1 << 20
MOST_UPLOADS = 256
MOST_UPLOADED = 64 * MIB
"""The uploads that one client may have: their number and bytes; the oldest make room."""
MOST_OUTPUT = 256 * MIB
"""The bytes of one client's outputs; the oldest make room."""
MOST_IN_ALL = 2048 * MIB


@dataclass(eq=False)
class Stored:
    """A picture in the private folder. Its file is removed once nothing refers to this object any more.

    `sha256` is the digest of what was uploaded, "" for an output.
    """

    key: FileKey
    path: Path
    size: int
    sha256: str = ""

    def __post_init__(self) -> None:
        weakref.finalize(self, self.path.unlink, missing_ok=True)

    def told(self) -> dict[str, str]:
        """Return the names with which a client finds it."""
        return {"filename": self.key.name, "subfolder": self.key.subfolder, "type": self.key.kind}


@dataclass
class _Shelf:
    """The pictures of one client, the oldest first, and how many of each prefix it has had."""

    files: dict[FileKey, Stored] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def bytes_of(self, kinds: Iterable[str]) -> int:
        return sum(each.size for key, each in self.files.items() if key.kind in kinds)


class Files:
    """The pictures of all clients, each by who it is. Used on one event loop; `written` may run in any thread."""

    def __init__(self) -> None:
        self._shelves: dict[str, _Shelf] = {}
        self._folder: Path | None = None

    @property
    def folder(self) -> Path:
        """Return the private folder; it is made when it is first needed, and removed with this object."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="trt-serve-"))
            weakref.finalize(self, _remove, self._folder, _broom(self._folder))
        return self._folder

    def written(self, data: bytes) -> Path:
        """Write a file under a name that says nothing, and return its path."""
        path = self.folder / secrets.token_hex(16)
        with path.open("xb") as file:
            file.write(data)
        return path

    def find(self, who: str, key: FileKey) -> Stored | None:
        """Return a client's picture."""
        shelf = self._shelves.get(who)
        return None if shelf is None else shelf.files.get(key)

    def uploads(self, who: str) -> list[str]:
        """Return what a LoadImage may name."""
        shelf = self._shelves.get(who, _Shelf())
        return sorted("/".join(filter(None, key[1:])) for key in shelf.files if key.kind == "input")

    def count(self, who: str, prefix: str) -> int:
        """Return the next number of a client's outputs with `prefix`."""
        counts = self._shelves.setdefault(who, _Shelf()).counts
        if len(counts) >= 1000:
            counts.clear()
        counts[prefix] = counts.get(prefix, 0) + 1
        return counts[prefix]

    def keep(self, who: str, key: FileKey, path: Path, size: int) -> Stored:
        """Take an output into a client's table; older ones make room for it."""
        shelf = self._shelves.setdefault(who, _Shelf())
        stored = shelf.files[key] = Stored(key, path, size)
        self._make_room(shelf, ("output", "temp"), MOST_OUTPUT, 1 << 30)
        self._make_room_in_all()
        return stored

    def same_upload(self, who: str, key: FileKey, sha256: str, *, overwrite: bool) -> FileKey | Stored:
        """Return the name of an upload, or the picture that is there already with the same content.

        With `overwrite` a picture of that name is replaced, else the name gets a number.
        """
        shelf, number, wanted = self._shelves.get(who, _Shelf()), 0, key
        while (found := shelf.files.get(wanted)) is not None and not overwrite:
            if found.sha256 == sha256:
                return found
            number += 1
            wanted = numbered(key, number)
        return wanted

    def upload(self, who: str, key: FileKey, path: Path, sha256: str) -> Stored:
        """Take an upload into a client's table. Raises ApiError (413) if it is larger than all that a client may have.

        A job that uses a picture of the same name keeps that one.
        """
        size = path.stat().st_size
        if size > MOST_UPLOADED:
            path.unlink()
            raise ApiError(413, f"image: takes {size} bytes as PNG; {MOST_UPLOADED} are kept for a client",
                           "body_too_large", param="image")  # fmt: skip
        shelf = self._shelves.setdefault(who, _Shelf())
        shelf.files.pop(key, None)
        stored = shelf.files[key] = Stored(key, path, size, sha256)
        self._make_room(shelf, ("input",), MOST_UPLOADED, MOST_UPLOADS)
        self._make_room_in_all()
        return stored

    def drop(self, who: str, keys: Iterable[FileKey]) -> None:
        """Forget outputs of a client."""
        shelf = self._shelves.get(who)
        for key in keys:
            if shelf is not None:
                shelf.files.pop(key, None)

    def _make_room(self, shelf: _Shelf, kinds: tuple[str, ...], most_bytes: int, most_files: int) -> None:
        own = [key for key in shelf.files if key.kind in kinds]
        while len(own) > 1 and (len(own) > most_files or shelf.bytes_of(kinds) > most_bytes):
            del shelf.files[own.pop(0)]

    def _make_room_in_all(self) -> None:
        """Let the client that has most lose its oldest, while all together have too much."""
        while True:
            sizes = {who: shelf.bytes_of(("input", "output", "temp")) for who, shelf in self._shelves.items()}
            if sum(sizes.values()) <= MOST_IN_ALL:
                return
            largest = self._shelves[max(sizes, key=lambda who: sizes[who])]
            del largest.files[next(iter(largest.files))]


def _broom(folder: Path) -> "subprocess.Popen[bytes]":
    """Start a process that removes `folder` when this one has ended, even if it was killed: pictures are private."""
    code = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"
    command = [sys.executable, "-I", "-S", "-c", code, str(folder)]
    return subprocess.Popen(  # noqa: S603 - our own words
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def _remove(folder: Path, broom: "subprocess.Popen[bytes]") -> None:
    shutil.rmtree(folder, ignore_errors=True)
    assert broom.stdin is not None  # noqa: S101 - it is a pipe
    broom.stdin.close()
    broom.wait()


def digest(data: bytes) -> str:
    """Return the SHA-256 of an upload."""
    return hashlib.sha256(data).hexdigest()


def paths_of(pictures: Mapping[str, Stored]) -> dict[str, Path]:
    """Return the files of pictures by their names in a graph."""
    return {name: stored.path for name, stored in pictures.items()}
