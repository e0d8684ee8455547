"""Settle a request's ControlNets before anything is loaded: which of the bundle's, with which picture and numbers."""

__all__ = [
    "MOST_CONTROLS",
    "Control",
    "ControlFact",
    "check_control_shapes",
    "control_components",
    "find_control",
    "settle_controls",
]

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import IncompatibleError, UsageError
from sdxl_trt.engines.bundle import ControlNet, Manifest
from sdxl_trt.engines.host import sha256_file
from sdxl_trt.runtime.controls.use import ControlUse
from sdxl_trt.runtime.images import InputPicture, fitted, read_input, resize

MOST_CONTROLS = 16
MOST_SCALE = 1e6
_WHITE = np.float32(255)
Size = tuple[int, int]
Fraction = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
Side = Literal["both", "positive", "negative"]


class ControlFact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a record says of a ControlNet's picture: its file's name and digest, the ControlNet, scale and steps."""

    name: Annotated[str, msgspec.Meta(max_length=255)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    net: Annotated[str, msgspec.Meta(max_length=255)]
    scale: Fraction = 1.0
    start: Fraction = 0.0
    end: Fraction = 1.0
    side: Side = "both"


@dataclass(frozen=True, eq=False)
class Control:
    """A ControlNet of a run: its component, its picture as the graph takes it, and the use that asked for it."""

    component: str
    name: str
    use: ControlUse
    picture: InputPicture

    def prepared(self, size: Size, *, comfyui: bool) -> NDArray[np.float32]:
        """Return the picture (3, height, width) from 0 to 1 in `size` (height, width).

        As in diffusers each side is scaled by Lanczos; in ComfyUI's way the centre of the new aspect ratio is scaled
        to the nearest values.
        """
        pixels = self.picture.pixels
        assert pixels is not None  # noqa: S101 - checked when it was settled
        if comfyui:
            values = (pixels.astype(np.float32) / _WHITE).transpose(2, 0, 1)[np.newaxis]
            scaled = values if pixels.shape[:2] == size else resize(values, size, "nearest-exact", centred=True)
            return np.ascontiguousarray(scaled[0])
        whole = fitted(pixels, size, "scale").astype(np.float32) / _WHITE
        return np.ascontiguousarray(whole.transpose(2, 0, 1))

    def fact(self) -> ControlFact:
        """Return what a record says of it."""
        use = self.use
        return ControlFact(name=self.picture.name, sha256=self.picture.sha256, net=self.name, scale=use.scale,
                           start=use.start, end=use.end, side=use.side)  # fmt: skip


def control_components(uses: Sequence[ControlUse], manifest: Manifest) -> tuple[str, ...]:
    """Return the components of the ControlNets that `uses` name, in their order.

    Raises IncompatibleError for a bundle without ControlNets, UsageError for unknown names, for more uses than
    ControlNets, and for two uses of one.
    """
    return tuple(net.component for net in _nets(uses, manifest))


def settle_controls(
    uses: Sequence[ControlUse], manifest: Manifest, *, remedy: str = "", comfyui: bool = False
) -> tuple[Control, ...]:
    """Return the ControlNets of a request, with their pictures read. Raises what `control_components` raises.

    Also raises UsageError for numbers that are out of range, and for files that are no pictures. With `remedy`, the
    refiner alone runs and follows no picture: a UsageError ends with what to do instead. ComfyUI's nodes allow a start
    that is also the end.
    """
    if not uses:
        return ()
    if remedy:
        raise UsageError(f"{uses[0].told}: a ControlNet belongs to the base, and the refiner alone runs; leave it out,"
                         f" or {remedy}")  # fmt: skip
    found = []
    for use, net in zip(uses, _nets(uses, manifest), strict=True):
        _check_numbers(use, comfyui=comfyui)
        picture = _read(use)
        if picture.pixels is None:
            raise UsageError(f"{use.told}: holds latents; a ControlNet follows a picture, so give one")
        found.append(Control(net.component, net.name, use, picture))
    return tuple(found)


def _read(use: ControlUse) -> InputPicture:
    if isinstance(use.picture, str | Path):
        return read_input(Path(use.picture), "--control")
    if isinstance(use.picture, InputPicture):
        return use.picture
    raise UsageError("controls: a picture is neither a path nor an InputPicture; make one of an array with as_input")


def check_control_shapes(controls: Sequence[Control], size: Size, multiple: int) -> None:
    """Raise UsageError for a picture of another shape than pictures of `size` (height, width), in steps of `multiple`.

    A picture may be larger or smaller, since it is scaled; the aspect ratios may differ by less than one step.
    """
    height, width = size
    for control in controls:
        high, wide = control.picture.size or size
        by_width, by_height = width * high / wide, height * wide / high
        apart = abs(by_width - height) if high <= wide else abs(by_height - width)  # of the shorter side
        if apart >= multiple:
            fitting = max(round(by_width / multiple), 1) * multiple
            raise UsageError(f"{control.use.told}: is {wide}x{high}, another shape than the run's {width}x{height};"
                             f" crop it, or give --width {width} --height {fitting}")  # fmt: skip


def find_control(fact: ControlFact, source: Path) -> Path:
    """Return the picture's file of a record, unchanged: beside the picture `source`, or in the current folder.

    Raises UsageError, which says to give it with --control, if there is none.
    """
    name = PurePath(fact.name).name
    for path in (source.parent / name, Path(name)) if name and name == fact.name else ():
        if _holds(path, fact.sha256):
            return path
    raise UsageError(f"--from {source}: was made with --control {fact.name[:80]!r}, which is not beside it as it was;"
                     " give it with --control FILE, or leave it out with --control none")  # fmt: skip


def _holds(path: Path, sha256: str) -> bool:
    try:
        return path.is_file() and sha256_file(path) == sha256
    except (OSError, ValueError):
        return False


def _nets(uses: Sequence[ControlUse], manifest: Manifest) -> list[ControlNet]:
    """Return the ControlNet of each use: the one that it names, or the bundle's at its own place."""
    nets = manifest.controlnets
    if uses and not nets:
        raise IncompatibleError(f"{uses[0].told}: the bundle has no ControlNet; export it again with one:"
                                " export-engines --base SRC --controlnet SRC")  # fmt: skip
    listed = ", ".join(net.name for net in nets)
    found: list[ControlNet] = []
    for place, use in enumerate(uses):
        named = [net for net in nets if net.name == use.net] if use.net else [*nets[place : place + 1]]
        if not named and use.net:
            raise UsageError(f"{use.told}: the bundle has no ControlNet {use.net[:80]!r}; it has {listed}")
        if not named:
            raise UsageError(f"{use.told}: is picture {place + 1}, but the bundle has {len(nets)} ControlNets, a"
                             f" picture each ({listed}); name one, as in {nets[0].name}=FILE")  # fmt: skip
        if named[0] in found:
            raise UsageError(f"{use.told}: is a second picture for the ControlNet {named[0].name!r}, which takes one;"
                             " leave one out")  # fmt: skip
        found += named
    return found


def _check_numbers(use: ControlUse, *, comfyui: bool) -> None:
    if not abs(use.scale) <= MOST_SCALE:  # also refuses nan
        raise UsageError(f"{use.told}: scale {use.scale:g}; give a number from {-MOST_SCALE:g} to {MOST_SCALE:g}")
    if not 0.0 <= use.start <= use.end <= 1.0 or (use.start == use.end and not comfyui):
        raise UsageError(f"{use.told}: works from {use.start:g} to {use.end:g} of the steps; give two fractions in"
                         " rising order, such as 0:0.5")  # fmt: skip
