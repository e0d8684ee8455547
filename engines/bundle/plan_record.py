"""The record of a plan in the manifest, and its key: everything that the plan depends on."""

__all__ = ["BuildFlags", "Chunks", "Environment", "Flavour", "PlanKey", "PlanMemory", "PlanRecord"]

import hashlib
from typing import Annotated, Literal

import msgspec

from sdxl_trt.engines.bundle.profile import Profile
from sdxl_trt.engines.bundle.records import FileRecord, Natural, Positive, Record, Sha256

Flavour = Literal["tensorrt", "tensorrt-rtx"]
ANY = "any"
"""The value of an Environment field that the plan does not depend on."""


class Environment(Record, frozen=True, kw_only=True):
    """The machine that built a plan, or that is to run it. For TensorRT for RTX the GPU fields are "any".

    `tensorrt` is the library's version with its build number, `driver` that of the NVIDIA driver, `platform` for
    example "linux-x86_64". No plan depends on the driver: it is "any" in the keys of new plans, and older keys that
    name one are compared without it.
    """

    flavour: Flavour
    tensorrt: str
    gpu: str
    compute_capability: str
    driver: str
    platform: str


class BuildFlags(Record, frozen=True, kw_only=True):
    """How a plan is built. `workspace` is a limit in bytes, 0 for no limit.

    `same_compute_capability` plans run on every GPU of the capability that they were built on, `hardware_compatible`
    ones on every GPU since Ampere; with both, the plan is `hardware_compatible`.
    """

    opt_level: Annotated[int, msgspec.Meta(ge=0, le=5)] = 3
    workspace: Natural = 0
    weight_streaming: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    same_compute_capability: bool = False


class PlanKey(Record, frozen=True, kw_only=True):
    """Everything that a plan depends on; in records of older versions also the driver, which does not count.

    A plan is used only if the rest is unchanged; hardware-compatible ones also run on other GPUs.
    """

    component: str
    graph: Sha256
    weights: Sha256
    environment: Environment
    profiles: tuple[Profile, ...]
    flags: BuildFlags
    lora_rank: Natural = 0
    """The largest rank of a request's LoRAs together; 0 for a plan without slots. Profiles leave the slots out."""

    def digest(self) -> str:
        """Return the sha256 of the key in its canonical form."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()


class PlanMemory(Record, frozen=True, kw_only=True):
    """Bytes on the device; `activations` is the builder's figure for the largest shapes of any profile."""

    weights: Natural
    activations: Natural
    streamable: Natural = 0
    """The part of the weights that weight streaming may leave in host memory."""
    profile_activations: tuple[Natural, ...] = ()
    """The figure for each profile, in the key's order; empty if the builder stated only the largest."""

    def activations_of(self, profile: int) -> int:
        """Return the bytes of activations of the profile with this index: the largest figure if it has none."""
        return self.profile_activations[profile] if self.profile_activations else self.activations


class Chunks(Record, frozen=True, kw_only=True):
    """The digests of a file by chunk: every chunk has `size` bytes, except the last, which may be shorter."""

    size: Positive
    sha256: tuple[Sha256, ...]

    def fit(self, nbytes: int) -> bool:
        """Return whether there is one digest for every chunk of a file of `nbytes` bytes."""
        return len(self.sha256) == -(-nbytes // self.size)


class PlanRecord(Record, frozen=True, kw_only=True):
    """A plan of the bundle: its file under ``plans/``, its key, its memory, and the build log beside it.

    `driver` is the version of the NVIDIA driver of the build, "" if unknown or without a GPU; `built_with` reads older
    records too.
    """

    key: PlanKey
    file: FileRecord
    memory: PlanMemory
    seconds: float
    log: str = ""
    """The path of the build log, relative to the bundle; it has no digest, because only people read it."""
    driver: str = ""
    chunks: Chunks | None = None
    """The digests that several threads check while they read; without them the whole file is one chunk."""

    @property
    def for_loras(self) -> bool:
        """Whether the plan takes LoRAs as inputs: only requests with LoRAs run it."""
        return self.key.lora_rank > 0

    @property
    def built_with(self) -> str:
        """The version of the NVIDIA driver of the build, or "" if unknown."""
        driver = self.driver or self.key.environment.driver
        return "" if driver == ANY else driver

    @property
    def environment(self) -> Environment:
        """The machine of the build, with its driver if known."""
        return msgspec.structs.replace(self.key.environment, driver=self.built_with or ANY)
