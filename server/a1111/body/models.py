"""The names of models, LoRAs and embeddings that A1111's menus list, and what they mean."""

__all__ = ["ENDING", "Model", "Models", "embeddings_told", "loras_told", "names_in"]

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sdxl_trt.engines import SdxlTrtError
from sdxl_trt.engines.bundle import Manifest, Stage
from sdxl_trt.runtime.adapters import Embeddings
from sdxl_trt.server.http import ApiError

ENDING = ".safetensors"
MOST_FILES = 10_000
_DIGITS = 10
"""A1111's short hash has so many."""


@dataclass(frozen=True)
class Model:
    """An expert of the bundle, under the names of a checkpoint of A1111; `sha256` is that of its UNet's weights."""

    model_name: str
    sha256: str

    @classmethod
    def of(cls, stage: Stage, manifest: Manifest) -> "Model":
        """Return the names of a stage; none of them is a path."""
        component = manifest.components[stage.unet]
        name = PurePosixPath(component.source.name.removesuffix("/unet").replace("\\", "/")).name
        return cls(name.removesuffix(ENDING) or "model", component.weights.sha256)

    @property
    def hash(self) -> str:
        """Return the short hash."""
        return self.sha256[:_DIGITS]

    @property
    def filename(self) -> str:
        """Return what its file would be called."""
        return f"{self.model_name}{ENDING}"

    @property
    def title(self) -> str:
        """Return the text of A1111's menu."""
        return f"{self.filename} [{self.hash}]"

    def is_called(self, name: str) -> bool:
        """Return whether `name` is one of its names."""
        names = (self.title, self.filename, self.model_name, f"{self.model_name} [{self.hash}]", self.hash, self.sha256)
        return name.strip().lower() in (each.lower() for each in names)

    def told(self) -> dict[str, Any]:
        """Return its entry in /sd-models."""
        return {"title": self.title, "model_name": self.model_name, "hash": self.hash, "sha256": self.sha256,
                "filename": self.filename, "config": None}  # fmt: skip


@dataclass(frozen=True)
class Models:
    """The bundle's base, and its refiner if it has one."""

    base: Model
    refiner: Model | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> "Models":
        """Return the names of a bundle's models."""
        refiner = None if manifest.refiner is None else Model.of(manifest.refiner, manifest)
        return cls(Model.of(manifest.base, manifest), refiner)

    def check_base(self, field: str, name: str) -> None:
        """Raise ApiError (404) unless `name` is the base's."""
        if not self.base.is_called(name):
            raise ApiError(404, f"{field}: there is no checkpoint of this name here; this server draws with"
                                f" {self.base.title!r}", "not_found", param=field)  # fmt: skip

    def refines(self, name: str) -> bool:
        """Return whether `name` is the refiner's; "None" and "" are no refiner. Raises ApiError (404) for others."""
        if name.strip().lower() in ("", "none"):
            return False
        if self.refiner is not None and self.refiner.is_called(name):
            return True
        there = "has no refiner" if self.refiner is None else f"has {self.refiner.title!r}"
        raise ApiError(404, f"refiner_checkpoint: there is no refiner of this name here; this server {there}",
                       "not_found", param="refiner_checkpoint")  # fmt: skip

    def told(self) -> list[dict[str, Any]]:
        """Return /sd-models, the base first."""
        return [each.told() for each in (self.base, self.refiner) if each is not None]


def names_in(folder: Path | None) -> list[str]:
    """Return the names of the adapters in a folder and below, as A1111 has them: without folders and endings.

    Links are not followed. A name that several files have is left out: nobody could tell which is meant.
    """
    counted: dict[str, int] = {}
    for path in _files(folder):
        counted[path.stem] = counted.get(path.stem, 0) + 1
    return sorted(name for name, count in counted.items() if count == 1)


def _files(folder: Path | None) -> Iterator[PurePosixPath]:
    found = 0
    for root, _, files in os.walk(folder) if folder is not None else ():
        for name in files:
            if name.lower().endswith(ENDING) and not Path(root, name).is_symlink():
                found += 1
                yield PurePosixPath(name)
        if found >= MOST_FILES:
            return


def loras_told(folder: Path | None) -> list[dict[str, Any]]:
    """Return /loras."""
    return [{"name": name, "alias": name, "path": f"{name}{ENDING}", "metadata": {}} for name in names_in(folder)]


def embeddings_told(folder: Path | None) -> dict[str, dict[str, Any]]:
    """Return /embeddings; a file that is no embedding is among the skipped."""
    told: dict[str, dict[str, Any]] = {"loaded": {}, "skipped": {}}
    embeddings = Embeddings(folder)
    for name in names_in(folder):
        try:
            found = embeddings.find(name)
        except SdxlTrtError:
            found = None
        shapes: Sequence[tuple[int, ...]] = [] if found is None else [each.shape for each in found.tensors.values()]
        about = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None,
                 "shape": sum(shape[1] for shape in shapes), "vectors": shapes[0][0] if shapes else 0}  # fmt: skip
        told["loaded" if found is not None else "skipped"][name] = about
    return told
