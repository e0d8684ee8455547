"""Find the file of an adapter by its name in the folder that a user gives for such files.

Names come from prompts, workflows and records, and are not trusted: only what lies in the folder is found, symbolic
links are neither followed nor read, and nothing is opened here.
"""

__all__ = ["find_named", "names_in"]

import os
from functools import lru_cache
from pathlib import Path, PurePosixPath
from time import time_ns

from sdxl_trt.engines import UsageError, explain_os_error

ENDING = ".safetensors"
MOST_FILES = 100_000
_SHOWN = 80
_SETTLED = 2_000_000_000
"""Nanoseconds, of which FAT counts two seconds."""
Times = tuple[tuple[Path, int], ...]


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


def names_in(folder: Path, where: str) -> list[str]:
    """Return the names by which `find_named` finds the files of `folder` and its sub-folders, in order.

    They are paths from the folder, separated by "/", without ".safetensors". Symbolic links are left out. Raises
    UsageError, whose message begins with `where`, if the folder is missing or holds too many files.
    """
    return sorted(path.as_posix()[: -len(ENDING)] for path in _listed(folder, where)
                  if not (folder / path).is_symlink())  # fmt: skip


def _parts(name: str, where: str) -> tuple[str, ...]:
    plain = PurePosixPath(name.replace("\\", "/"))
    if not plain.parts or plain.is_absolute() or ".." in plain.parts or "\0" in name or ":" in name:
        raise UsageError(f"{where}: {name[:_SHOWN]!r} is not the name of a file in a folder; give its plain name")
    return plain.parts


def _listed(folder: Path, where: str) -> tuple[PurePosixPath, ...]:
    """Return the paths of the folder's files; those of a folder that has not changed are read once."""
    try:
        if not _is_fresh(_listing(folder)[0]):
            _listing.cache_clear()
        return _listing(folder)[1]
    except OSError as exc:
        raise explain_os_error(exc, f"{where}: reading {folder}") from exc
    except _TooManyError as exc:
        raise UsageError(f"{where}: {folder} holds more than {MOST_FILES} files; give the folder of the LoRAs") from exc


def _is_fresh(times: Times) -> bool:
    # A folder that changes again within a tick of its file system's clock looks unchanged.
    settled = max(time for _, time in times) < time_ns() - _SETTLED
    return settled and all(folder.stat().st_mtime_ns == time for folder, time in times)


class _TooManyError(Exception):
    """A folder that is no folder of adapters: a whole disk, say."""


@lru_cache(maxsize=4)
def _listing(folder: Path) -> tuple[Times, tuple[PurePosixPath, ...]]:
    """Return when each folder in `folder` changed last, and the paths of its .safetensors files from `folder`."""
    times: list[tuple[Path, int]] = []
    files: list[PurePosixPath] = []
    waiting = [PurePosixPath()]
    while waiting:
        inner = waiting.pop()
        times.append((folder / inner, (folder / inner).stat().st_mtime_ns))
        with os.scandir(folder / inner) as entries:
            for entry in entries:
                # A link to a folder leads out of this one.
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(inner / entry.name)
                elif entry.name.lower().endswith(ENDING):
                    files.append(inner / entry.name)
        if len(files) + len(waiting) + len(times) > MOST_FILES:
            raise _TooManyError
    return tuple(times), tuple(sorted(files))
