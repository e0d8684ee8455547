"""Read the pair's tensors out of the embedded bundle: the pair is stored once, as the weights of its graphs.

The bundle's `adapters.json` of a component says where each published tensor lies in its weights file. Needs only numpy,
and does not import the package's other parts: the exporter starts here.
"""

__all__ = ["Tensors", "component_names", "read_tensors", "scaling_factor"]

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Tensors = dict[str, npt.NDArray[Any]]

TABLE_VERSION = 1
REMEDY = "restore mini/bundle with git, or reinstall sdxl-trt"


def read_tensors(bundle: Path, *components: str) -> Tensors:
    """Return the tensors of a model whose graphs are `components`, by published name and in published shape.

    An autoencoder has two, each with its half of the tensors. Raises `FileNotFoundError` for a missing file, and
    `ValueError` for one that its manifest does not describe, or that this version cannot read.
    """
    manifest = _manifest(bundle)
    found: Tensors = {}
    for name in components:
        found |= _component(bundle, name, manifest["components"][name])
    return found


def component_names(bundle: Path) -> tuple[str, ...]:
    """Return the names of a bundle's components. Raises `FileNotFoundError` without a manifest."""
    return tuple(_manifest(bundle)["components"])


def scaling_factor(bundle: Path) -> float:
    """Return the autoencoder's scaling factor, 1 / standard deviation of the trained latents."""
    return float(_manifest(bundle)["base"]["vae"]["scaling_factor"])


def _manifest(bundle: Path) -> Any:
    return json.loads(_read(bundle / "manifest.json"))


def _component(bundle: Path, name: str, record: Mapping[str, Any]) -> Tensors:
    if record.get("adapters") is None:
        raise ValueError(f"{bundle}: {name} has no adapters.json, without which its tensors have no names; {REMEDY}")
    table = json.loads(_checked(bundle, record["adapters"]))
    if table.get("version", 1) != TABLE_VERSION:
        raise ValueError(f"{bundle}: {name} has an adapters.json of version {table['version']}, expected"
                         f" {TABLE_VERSION}; {REMEDY}")  # fmt: skip
    weights = _checked(bundle, record["weights"])
    # The autoencoder's encoder has no offset for a tensor of its decoder, and the other way round.
    return {one["name"]: _tensor(weights, one) for one in table["tensors"] if one.get("offset") is not None}


def _tensor(weights: bytes, record: Mapping[str, Any]) -> npt.NDArray[Any]:
    """Return one tensor, a contiguous copy; `permutation` is the order in which its published axes are stored."""
    shape = tuple(record["shape"])
    order = record.get("permutation") or range(len(shape))
    stored = np.frombuffer(weights, np.dtype(record["dtype"]), math.prod(shape), record["offset"])
    return np.array(stored.reshape([shape[axis] for axis in order]).transpose(np.argsort(order)), order="C")


def _checked(bundle: Path, record: Mapping[str, Any]) -> bytes:
    """Return a file's bytes. A bundle that is being replaced must not be read as half the old and half the new one."""
    content = _read(bundle / record["file"])
    if hashlib.sha256(content).hexdigest() != record["sha256"]:
        raise ValueError(f"{bundle / record['file']}: differs from its digest in manifest.json; {REMEDY}")
    return content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as exc:
        raise FileNotFoundError(f"{path}: missing from the embedded pair; {REMEDY}") from exc
