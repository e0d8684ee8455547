"""The ControlNets of a workflow: what its nodes apply to each side of a sampler, as uses of the bundle's."""

__all__ = ["control_uses"]

from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Literal

import numpy as np

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.bundle import ControlNet, Manifest
from sdxl_trt.runtime.comfyui.workflow import Conditioning, ControlHint, Loaded, Sampling, Scaled
from sdxl_trt.runtime.controls import ControlUse
from sdxl_trt.runtime.images import InputPicture, new_size, resize

Load = Callable[[Loaded], InputPicture]
_WHITE = 255


def control_uses(sampling: Sampling, manifest: Manifest, load: Load) -> tuple[ControlUse, ...]:
    """Return the ControlNets that a sampler of the base follows, in the order in which its nodes apply them.

    ControlNetApply counts for both sides where the negative has none of its own. `load` returns the picture of a
    LoadImage node. Raises UsageError that names the node, for a ControlNet that the bundle lacks, for one that is
    applied twice, and for a side whose conditionings have different ones.
    """
    positive, negative = _of_side(sampling.positive), _of_side(sampling.negative)
    if not negative and any(hint.both_sides for hint in positive):
        negative = positive
    both = [hint for hint in positive if hint in negative]
    uses: list[ControlUse] = []
    nets: list[str] = []
    for hint in (*positive, *(each for each in negative if each not in both)):
        net = _net(hint, manifest)
        if net.name in nets:
            raise UsageError(f"node {hint.node}: applies the ControlNet {net.name!r}, which another node applies too; a"
                             " sampler takes one picture for each")  # fmt: skip
        nets.append(net.name)
        side: Literal["both", "positive", "negative"] = "positive" if hint in positive else "negative"
        uses.append(ControlUse(_picture(hint, load), hint.strength, hint.start, hint.end, net.name,
                               "both" if hint in both else side))  # fmt: skip
    return tuple(uses)


def _of_side(side: Sequence[Conditioning]) -> tuple[ControlHint, ...]:
    first, *others = side
    for other in others:
        if other.controls != first.controls:
            raise UsageError(f"node {other.node}: is combined with a prompt that has other ControlNets, which is not"
                             " supported; apply them after the prompts are combined")  # fmt: skip
    return first.controls


def _net(hint: ControlHint, manifest: Manifest) -> ControlNet:
    """Return the bundle's ControlNet that a node names by its file."""
    nets = manifest.controlnets
    found = [net for net in nets if _stem(net.name) == _stem(hint.net)]
    if found:
        return found[0]
    if not nets:
        raise UsageError(f"node {hint.node}: the bundle has no ControlNet; export it again with one: export-engines"
                         " --base SRC --controlnet SRC")  # fmt: skip
    raise UsageError(f"node {hint.node}: the bundle has no ControlNet {hint.net[:80]!r}; it has"
                     f" {', '.join(net.name for net in nets)}: choose one, or export another")  # fmt: skip


def _picture(hint: ControlHint, load: Load) -> InputPicture:
    """Return the picture of a hint: a loaded file, and what ImageScale nodes make of it."""
    scaled: list[Scaled] = []
    image = hint.image
    while isinstance(image, Scaled):
        scaled.append(image)
        image = image.image
    if not isinstance(image, Loaded):
        raise UsageError(f"node {hint.node}: its image is made by another sampler, which is not supported; load it with"
                         " LoadImage")  # fmt: skip
    picture = load(image)
    if picture.pixels is None or not scaled:
        return picture
    values = picture.pixels.transpose(2, 0, 1)[np.newaxis].astype(np.float32) / np.float32(_WHITE)
    for each in reversed(scaled):
        height, width = new_size((values.shape[2], values.shape[3]), each.size, each.by, unit=1, least=1)
        if height * width > 1 << 28:
            raise UsageError(f"node {each.node}: scales a picture to {width}x{height}; choose a smaller size")
        values = resize(values, (height, width), each.method, centred=each.centred)
    # ControlNets read 8 bits here; ComfyUI keeps the fractions between them.
    pixels = np.rint(np.clip(values[0], 0, 1) * _WHITE).astype(np.uint8).transpose(1, 2, 0)
    return InputPicture(np.ascontiguousarray(pixels), picture.name, picture.sha256)


def _stem(name: str) -> str:
    """Return a file name for comparison: without its folder and extension, in lower case."""
    # ComfyUI gives paths relative to its models folder, with the separators of its operating system.
    return PurePosixPath(name.replace("\\", "/")).name.lower().removesuffix(".safetensors")
