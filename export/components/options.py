"""What an export is asked for: precisions, models, LoRAs, components, and how 8-bit ranges are measured."""

__all__ = ["COMPONENTS", "CalibrationOptions", "Options", "VaePrecision"]

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sdxl_trt.engines import UsageError, explain_os_error
from sdxl_trt.engines.adapters import LoraOption
from sdxl_trt.engines.bundle import EIGHT_BIT
from sdxl_trt.engines.host import sha256_file

OPSETS = (20, 21, 22, 23)
ROLES = ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder", "vae_decoder_bf16", "vae_encoder_bf16")
TINY = "vae_tiny"
"""The tiny decoder's component, which both stages share."""
COMPONENTS = (*ROLES, TINY, *(f"refiner_{role}" for role in ROLES[1:]))
"""All names but those of ControlNets; a refiner's encoder or autoencoder exists only if it differs from the base's."""
_CONTROLNET = re.compile(r"controlnet(_[2-9]|_[1-9]\d)?")
VaePrecision = Literal["auto", "fp32", "bf16", "fp16", "mixed", "int8"]
Floats = Literal["fp32", "fp16", "bf16"]
_FLOATS: dict[str, Floats] = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "fp16", "fp8": "fp16"}
_MOST_STEPS = 1000
_LEAST_SIZE, _MOST_SIZE = 64, 4096
_MOST_PROMPTS = 1000
_RANGES = ".npz"


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """How the ranges of activations are measured, and what follows from them.

    `prompts` are drawn by the model itself, at `size` pixels, in `steps` of base and refiner; None stands for defaults
    that depend on the model. `file` has ranges that were saved before, so nothing is drawn. Layers that match `exclude`
    stay in floating point, and with `min_psnr`, in dB, as many more as it takes for a step to come that close to the
    float graph. `report` receives each layer's own error, `save` the ranges.
    """

    prompts: tuple[str, ...] | None = None
    file: Path | None = None
    size: int | None = None
    steps: tuple[int, int] | None = None
    exclude: tuple[str, ...] = ()
    min_psnr: float | None = None
    report: Path | None = None
    save: Path | None = None

    def __post_init__(self) -> None:
        if self.prompts is not None and not any(prompt.strip() for prompt in self.prompts):
            raise UsageError("--calibration: the list of prompts is empty; write one prompt per line")
        if self.prompts is not None and len(self.prompts) > _MOST_PROMPTS:
            raise UsageError(f"--calibration: {len(self.prompts)} prompts; give {_MOST_PROMPTS} at most, a dozen is"
                             " enough")  # fmt: skip
        if self.size is not None and not _LEAST_SIZE <= self.size <= _MOST_SIZE:
            raise UsageError(f"--calibration-size {self.size}: give {_LEAST_SIZE} to {_MOST_SIZE} pixels")
        if self.steps is not None and not all(1 <= count <= _MOST_STEPS for count in self.steps):
            raise UsageError(f"--calibration-steps {self.steps[0]}:{self.steps[1]}: give at least one step of the base"
                             f" and one of the refiner, {_MOST_STEPS} at most")  # fmt: skip
        if self.min_psnr is not None and not (math.isfinite(self.min_psnr) and self.min_psnr > 0):
            raise UsageError(f"--min-psnr {self.min_psnr:g}: give decibels above 0, for example 40")
        if self.save is not None and self.save.suffix != _RANGES:
            raise UsageError(f"--save-calibration {self.save}: the name of a file of ranges ends with {_RANGES}; write"
                             f" {self.save.with_suffix(_RANGES)}")  # fmt: skip
        if self.file is not None and self.save is not None:
            raise UsageError(f"--save-calibration {self.save}: nothing is measured, since --calibration {self.file} has"
                             " the ranges already; leave one of them out")  # fmt: skip
        if self.file is not None and (self.prompts or self.size or self.steps):
            raise UsageError(f"--calibration {self.file}: has ranges that were measured before, so prompts, size and"
                             " steps have no effect; leave them out")  # fmt: skip

    @property
    def draws(self) -> bool:
        """Return whether the model must draw: to measure ranges, or what errors cost."""
        return self.file is None or self.report is not None or self.min_psnr is not None

    @property
    def tells(self) -> bool:
        """Return whether a file is wanted of what was measured."""
        return self.report is not None or self.save is not None

    def settings(self) -> list[Any]:
        """Return all that determines the 8-bit files; the file of ranges by its digest."""
        try:
            content = None if self.file is None else sha256_file(self.file)
        except OSError as exc:
            raise explain_os_error(exc, f"reading --calibration {self.file}") from exc
        return [self.prompts, content, self.size, self.steps, self.exclude, self.min_psnr]


@dataclass(frozen=True)
class Options:
    """How to export.

    With `precision` int8 or fp8 the UNets compute in 8 bits, as `calibration` says, and the text encoders in fp16.
    `vae_precision` "auto" is fp32 if the autoencoder's config sets `force_upcast`, else `precision`; with `twins` such
    an autoencoder is exported in bf16 as well, for TensorRT, unless `precision` is fp32; "mixed" keeps the end of the
    decoder, and the whole encoder, in fp32; with "int8" the decoder computes in 8 bits. `unet` is another UNet for the
    base, `vae` another autoencoder for both stages, `tiny_vae` one whose decoder can take its place, `controlnets` are
    ControlNets for the base. `loras` are (file, scale) or (file, UNet's scale, text encoders' scale), fused into the
    base and stored as LoraOption. `components` limits the export to these; the target bundle's others stay as they are.
    `verify` compares the result with PyTorch, `force` exports unchanged components too. Without `lock`, for file
    systems without locks, nothing prevents two exports from writing to one folder.
    """

    precision: Literal["fp32", "fp16", "bf16", "int8", "fp8"] = "fp16"
    vae_precision: VaePrecision = "auto"
    calibration: CalibrationOptions | None = None
    twins: bool = False
    opset: int = 23
    unet: str | Path | None = None
    vae: str | Path | None = None
    tiny_vae: str | Path | None = None
    loras: tuple[tuple[Path, float] | tuple[Path, float, float | None], ...] = ()
    controlnets: tuple[str | Path, ...] = ()
    components: frozenset[str] | None = None
    verify: bool = False
    force: bool = False
    lock: bool = True

    @property
    def floats(self) -> Floats:
        """Return the precision of all that is not in 8 bits."""
        return _FLOATS[self.precision]

    @property
    def eight_bit(self) -> bool:
        """Return whether any component is to compute in 8 bits."""
        return self.precision in EIGHT_BIT or self.vae_precision in EIGHT_BIT

    def __post_init__(self) -> None:
        object.__setattr__(self, "loras", tuple(LoraOption(*lora) for lora in self.loras))
        if self.opset not in OPSETS:
            raise UsageError(f"--opset {self.opset}: choose from {OPSETS[0]} to {OPSETS[-1]}")
        if self.vae_precision not in get_args(VaePrecision):
            raise UsageError(f"--vae-precision {self.vae_precision}: choose from {', '.join(get_args(VaePrecision))}")
        given = self.components or frozenset()
        unknown = sorted(name for name in given - set(COMPONENTS) if not _CONTROLNET.fullmatch(name))
        if unknown or (self.components is not None and not self.components):
            raise UsageError(f"--components {','.join(unknown)}: choose from {', '.join(COMPONENTS)}, controlnet")
        if self.eight_bit and self.controlnets:
            given_as = f"--{self.precision}" if self.precision in EIGHT_BIT else "--vae-precision int8"
            raise UsageError(f"{given_as} with --controlnet: the ranges are measured without a ControlNet; export with"
                             " --fp16")  # fmt: skip
        if self.eight_bit and self.floats == "bf16":
            raise UsageError("--bf16 with --vae-precision int8: ranges are measured on ONNX Runtime's CPU provider,"
                             " which has no bf16; export with --fp16")  # fmt: skip
        if self.calibration is not None and not self.eight_bit:
            raise UsageError("--calibration and the options beside it apply to 8 bits; add --int8, --fp8 or"
                             " --vae-precision int8")  # fmt: skip
