"""A list of prompts: what it asks for, and which of its pictures are there already.

A line that begins with { is JSON with a request's settings, by the names that `trt-generate --schema` lists; any other
line is a prompt. A picture is there if its file is whole and holds the record that would be written now.
"""

__all__ = ["Entry", "draw_list", "entries_of", "missing"]

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_trt.engines import SdxlTrtError, UsageError
from sdxl_trt.engines.host import atomic_write
from sdxl_trt.runtime import Pipeline, Request
from sdxl_trt.runtime.images import SETTINGS, read_texts
from sdxl_trt.runtime.pipeline import finish
from sdxl_trt.runtime.request import record_fields, settings_of
from sdxl_trt.runtime.text import read_prompts
from sdxl_trt.server.options import Options
from sdxl_trt.server.ray import Cluster, open_ingress
from sdxl_trt.server.ray.lists.data import drawn
from sdxl_trt.server.ray.lists.stages import Failed, Files

MOST = 100_000
SEED_BITS = 32


@dataclass(frozen=True)
class Entry:
    """A request of the list, and its number: 1 is the first."""

    number: int
    request: Request

    def paths(self, folder: Path, pictures: int) -> list[Path]:
        """Return the files of its pictures."""
        stem = f"{self.number:06}"
        names = [stem] if pictures == 1 else [f"{stem}-{index}" for index in range(pictures)]
        return [folder / f"{name}.png" for name in names]


def entries_of(path: Path, options: Options) -> list[Entry]:
    """Return what a file asks for. Raises UsageError, which names the first line that is wrong.

    A line without a seed gets one that its text decides, so that another run asks for the same pictures; a text that
    occurs again gets another one.
    """
    entries, seen = [], Counter[str]()
    for number, line in enumerate(read_prompts(path, MOST), start=1):
        try:
            stated = _stated(line)
        except UsageError as exc:
            raise UsageError(f"--prompts {path}: prompt {number}: {exc}") from exc
        if stated.get("seed") is None:
            stated["seed"] = _seed(line, seen[line])
        seen[line] += 1
        request = Request(**stated, lora_dir=options.lora_dir, embedding_dir=options.embedding_dir)
        entries.append(Entry(number, request))
    return entries


def _stated(line: str) -> dict[str, Any]:
    """Return the settings that a line states."""
    if not line.startswith("{"):
        return {"prompt": line}
    import msgspec  # noqa: PLC0415

    chosen = [each for name, each in settings_of(Request).items() if name == "prompt" or each.group]
    kind = msgspec.defstruct("Request", record_fields(chosen), kw_only=True, forbid_unknown_fields=True)
    try:
        value = msgspec.json.decode(line.encode(), type=kind)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise UsageError(f"{exc}; trt-generate --schema lists the settings") from exc
    return {name: getattr(value, name) for name in kind.__struct_fields__}


def _seed(line: str, occurrence: int) -> int:
    digest = hashlib.sha256(f"{occurrence}:{line}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[: SEED_BITS // 8], "big")


def missing(entries: Sequence[Entry], folder: Path, pipeline: Pipeline) -> list[Entry]:
    """Return the entries whose pictures are not all there. Raises UsageError for one that cannot be drawn."""
    left = []
    for entry in entries:
        try:
            job = pipeline.start(entry.request)
        except SdxlTrtError as exc:
            raise type(exc)(f"--prompts: prompt {entry.number}: {exc}") from exc
        blank = np.zeros((1, 1, 3), np.uint8)
        paths = entry.paths(folder, len(job.run.request.seeds))
        if not all(_holds(path, finish(job.run, index, blank).metadata) for index, path in enumerate(paths)):
            left.append(entry)
    return left


def _holds(path: Path, record: Mapping[str, Any]) -> bool:
    """Return whether a file is a whole picture with this record."""
    from PIL import Image  # noqa: PLC0415

    if not path.is_file():
        return False
    with suppress(UsageError, OSError, ValueError, SyntaxError):
        told, drawn = json.loads(read_texts(path).get(SETTINGS, "null")), {"full_steps": None}  # known once it is drawn
        if not isinstance(told, dict) or told | drawn != json.loads(json.dumps(record)) | drawn:
            return False
        with Image.open(path) as image:
            image.load()
        return True
    return False


def draw_list(
    options: Options, cluster: Cluster, prompts: Path, folder: Path, opener: Callable[[Options], Pipeline]
) -> None:
    """Draw what a list asks for into `folder`; what is there already stays. `opener` opens
    the bundle on each device. Prints each file, and a summary.

    Raises UsageError before anything is drawn, and in the end the first error of those that could not be drawn.
    """
    entries = entries_of(prompts, options)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise UsageError(f"--out {folder}: {exc.strerror or exc}; give a folder that can be written") from exc
    left = missing(entries, folder, open_ingress(options))
    failed: list[tuple[int, Exception]] = []
    if left:
        results = drawn({entry.number: entry.request for entry in left}, options, cluster, opener)
        failed = _write(results, {entry.number: entry for entry in left}, folder)
    drew, kept = len(left) - len(failed), len(entries) - len(left)
    sys.stdout.write(f"{len(entries)} prompts: {drew} drawn, {kept} were there, {len(failed)} failed\n")
    if failed:
        number, error = min(failed, key=lambda each: each[0])
        kind = type(error) if isinstance(error, SdxlTrtError) else SdxlTrtError
        raise kind(f"prompt {number} and {len(failed) - 1} others failed: {error}; the same command draws them again")


def _write(
    results: Iterator[tuple[int, Files | Failed]], entries: dict[int, Entry], folder: Path
) -> list[tuple[int, Exception]]:
    """Write the files as they come; return what failed."""
    failed = []
    for number, result in results:
        if isinstance(result, Failed):
            failed.append((number, result.error))
            continue
        paths = entries[number].paths(folder, len(result.pictures))
        for path, data in zip(paths, result.pictures, strict=True):
            with atomic_write(path) as file:
                file.write(data)
            sys.stdout.write(f"{path}\n")
            sys.stdout.flush()
    return failed
