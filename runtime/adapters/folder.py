"""Find the file of an adapter by its name in the folder that a user gives for such files.

Names come from prompts, workflows and records, and are not trusted: only what lies in the folder is found, symbolic
links are neither followed nor read, and nothing is opened here.
"""

__all__ = ["find_named"]

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from time import time_ns

from sdxl_trt.engines import UsageError, explain_os_error

ENDING = ".safetensors"
MOST_FILES = 100_000
_SHOWN = 80
_SETTLED = 2_000_000_000
"""Nanoseconds, of which FAT counts two seconds."""
Times = tuple[tuple[str, int], ...]


def find_named(folder: Path, name: str, where: str, *, exact: bool = False) -> list[Path]:
    """Return the files called `name` in `folder` and its sub-folders; none if there is no such file.

    `name` may begin with sub-folders, separated as on any system, and leave ".safetensors" out. With `exact` it is a
    path from the folder, as in ComfyUI, and one file at most is found. `where` begins an error's message. Raises
    UsageError for a name that is not a plain path inside the folder, for a symbolic link, and if the folder is missing
    or holds too many files.
    """
    parts = _parts(name, where)
    wanted = parts[-1] if parts[-1].lower().endswith(ENDING) else parts[-1] + ENDING
    tail = (*parts[:-1], wanted)
    found = [path for path in _listed(folder, where) if path.parts[-len(tail) :] == tail]
    if exact or len(tail) > 1:
        own = [path for path in found if path.parts == tail]
        found = own or ([] if exact else found)
    paths = [folder / path for path in found]
    for path in paths:
        if path.is_symlink():
            raise UsageError(f"{where}: {path} is a symbolic link, which is not followed; copy the file itself there")
    return paths


def _parts(name: str, where: str) -> tuple[str, ...]:
    plain = PurePosixPath(name.replace("\\", "/"))
    if not plain.parts or plain.is_absolute() or ".." in plain.parts or "\0" in name or ":" in name:
        raise UsageError(f"{where}: {name[:_SHOWN]!r} is not the name of a file in a folder; give its plain name")
    return plain.parts


def _listed(folder: Path, where: str) -> tuple[PurePosixPath, ...]:
    """Return the paths of the folder's files; those of a folder that has not changed are read once."""
    try:
        times, files = _listing(os.fspath(folder))
        newest = max(time for _, time in times)
        # A folder that changes again within a tick of its file system's clock looks unchanged.
        if newest > time_ns() - _SETTLED or any(_changed(inner) != time for inner, time in times):
            _listing.cache_clear()
            _, files = _listing(os.fspath(folder))
        return files
    except OSError as exc:
        raise explain_os_error(exc, f"{where}: reading {folder}") from exc
    except _TooManyError as exc:
        raise UsageError(f"{where}: {folder} holds more than {MOST_FILES} files; give the folder of the LoRAs") from exc


class _TooManyError(Exception):
    """A folder that is no folder of adapters: a whole disk, say."""


@lru_cache(maxsize=4)
def _listing(folder: str) -> tuple[Times, tuple[PurePosixPath, ...]]:
    """Return when each folder in `folder` changed last, and the paths of its files from `folder`."""
    times: list[tuple[str, int]] = []
    files: list[PurePosixPath] = []
    waiting = [PurePosixPath()]
    while waiting:
        inner = waiting.pop()
        whole = os.path.join(folder, inner)
        times.append((whole, _changed(whole)))
        for entry, is_folder in _entries(whole):
            (waiting if is_folder else files).append(inner / entry)
        if len(files) + len(waiting) + len(times) > MOST_FILES:
            raise _TooManyError
    return tuple(times), tuple(sorted(files))


def _entries(folder: str) -> Iterator[tuple[str, bool]]:
    """Yield the names of the folders in `folder` and of its .safetensors files, and whether each is a folder."""
    with os.scandir(folder) as entries:
        for entry in entries:
            # A link to a folder leads out of this one.
            is_folder = entry.is_dir(follow_symlinks=False)
            if is_folder or entry.name.lower().endswith(ENDING):
                yield entry.name, is_folder


def _changed(folder: str) -> int:
    return os.stat(folder).st_mtime_ns
