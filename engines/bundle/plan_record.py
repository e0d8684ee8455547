"""What a manifest says of a plan, and everything that can make one wrong: its key."""

__all__ = ["BuildFlags", "Environment", "Flavour", "PlanKey", "PlanMemory", "PlanRecord"]

import hashlib
from typing import Annotated, Literal

import msgspec

from sdxl_trt.engines.bundle.profile import Profile
from sdxl_trt.engines.bundle.records import FileRecord, Natural, Record, Sha256

Flavour = Literal["tensorrt", "tensorrt-rtx"]
ANY = "any"
"""Stands in an Environment for what does not bind the plan."""


class Environment(Record, frozen=True, kw_only=True):
    """Where a plan was built, or is to run. TensorRT for RTX builds ahead of time: its GPU fields say "any".

    `tensorrt` is the library's version with its build number, `driver` the NVIDIA driver's, `platform` such as
    "linux-x86_64".
    """

    flavour: Flavour
    tensorrt: str
    gpu: str
    compute_capability: str
    driver: str
    platform: str


class BuildFlags(Record, frozen=True, kw_only=True):
    """How a plan is built. `workspace` is a limit in bytes, 0 for none."""

    opt_level: Annotated[int, msgspec.Meta(ge=0, le=5)] = 3
    workspace: Natural = 0
    weight_streaming: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False


class PlanKey(Record, frozen=True, kw_only=True):
    """Everything that decides a plan: a plan is used only where all of it is what it was."""

    component: str
    graph: Sha256
    weights: Sha256
    environment: Environment
    profiles: tuple[Profile, ...]
    flags: BuildFlags

    def digest(self) -> str:
        """Return the sha256 of the key in its canonical form."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()


class PlanMemory(Record, frozen=True, kw_only=True):
    """Bytes on the device: `activations` as the builder states them, for the largest shapes of any profile."""

    weights: Natural
    activations: Natural
    streamable: Natural = 0
    """Of the weights, what weight streaming may leave in host memory."""


class PlanRecord(Record, frozen=True, kw_only=True):
    """A plan of the bundle: its file under ``plans/``, its key, what it needs, and the build log beside it."""

    key: PlanKey
    file: FileRecord
    memory: PlanMemory
    seconds: float
    log: str = ""
    """The build log's file, relative to the bundle; not vouched for, it is only read by people."""
