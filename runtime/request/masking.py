"""The mask of a request with its defaults settled: its size, the strength it means, and what is pasted at the end."""

__all__ = ["DEFAULT_BLUR", "Masking", "canvas_margins", "check_masking", "masking_of", "settle_masking", "takes_mask"]

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.bundle import Manifest, Stage
from sdxl_trt.runtime.images import (
    Fit,
    InputMask,
    InputPicture,
    Margins,
    Overlay,
    as_mask,
    fitted,
    outpainted,
    resize,
)
from sdxl_trt.runtime.request.request import Request

DEFAULT_BLUR = 4
"""Pixels, as in diffusers' and A1111's own defaults."""
_HALF = 128
"""A grey of this, 0.502, or more is white to diffusers."""


@dataclass(frozen=True, eq=False)
class Masking:
    """Which part of a picture changes: `pixels`, uint8 (height, width) of the run, 255 where it does.

    `source` is the mask that was given, None if only the margins of an outpainting change.
    """

    pixels: NDArray[np.uint8]
    source: InputMask | None
    blur: int
    paste: bool

    def of_latents(self, factor: int, *, soft: bool) -> NDArray[np.float32]:
        """Return (1, 1, height / factor, width / factor), 1 where the latents change.

        diffusers takes every `factor`-th pixel as 0 or 1; `soft` is ComfyUI's bilinear scaling of the greys.
        """
        if not soft:
            return self.whites[None, None, ::factor, ::factor].astype(np.float32)
        greys = self.pixels[None, None].astype(np.float32) / np.float32(255.0)
        return resize(greys, (greys.shape[2] // factor, greys.shape[3] // factor), "bilinear")

    @property
    def whites(self) -> NDArray[np.bool_]:
        """Return (height, width): whether each pixel changes."""
        return self.pixels >= _HALF

    def overlay(self, picture: InputPicture, way: Fit) -> Overlay | None:
        """Return what pastes the original over a decoded picture; None if it is left as it is."""
        if not self.paste or picture.pixels is None:
            return None
        return Overlay(fitted(picture.pixels, self.pixels.shape, way), self.pixels, self.blur)


def takes_mask(stage: Stage, manifest: Manifest) -> bool:
    """Return whether a stage's UNet receives the mask and the masked picture behind the latents, as SDXL-inpainting's.

    Then it has 2 · latent_channels + 1 input channels.
    """
    component = manifest.components.get(stage.unet)
    return component is not None and component.input("sample").shape[1] == 2 * stage.vae.latent_channels + 1


def check_masking(request: Request, manifest: Manifest) -> None:
    """Raise UsageError for a mask without a picture, for options that need a mask, and for a model that needs one."""
    masked, started = request.mask is not None or any(request.outpaint), request.image is not None
    if masked and not started:
        option = "--mask" if request.mask is not None else "--outpaint"
        raise UsageError(f"{option} is about a picture; give that with --image or --refine")
    stated = {"--mask-blur": request.mask_blur, "--no-paste": request.paste}
    alone = [option for option, value in stated.items() if value is not None]
    if alone and not masked:
        raise UsageError(f"{alone[0]} is about a mask; give one with --mask, or leave {alone[0]} out")
    if request.paste is False and request.mask_blur is not None:
        raise UsageError("--mask-blur softens the edge of the paste that --no-paste leaves out; give one of them")
    if takes_mask(manifest.base, manifest) and not masked and not request.refine:
        raise UsageError("the bundle's base is an inpainting model, which always changes a part of a picture; give"
                         " --image FILE --mask FILE")  # fmt: skip


def settle_masking(
    request: Request, picture: InputPicture | None
) -> tuple[InputPicture | None, InputMask | None, NDArray[np.uint8] | None]:
    """Return the picture, or the canvas of an outpainting, with the mask that was given and the mask of that size.

    Raises UsageError for a mask of another size than the picture's, or a black one.
    """
    mask = None if request.mask is None else as_mask(request.mask)
    if picture is None or (mask is None and not any(request.outpaint)):
        return picture, None, None
    if mask is not None and picture.size is not None and mask.size != picture.size:
        raise UsageError(f"--mask: {_told(mask.size)} pixels given, but the picture has {_told(picture.size)}; make"
                         " the mask of the picture's size")  # fmt: skip
    if mask is not None and not any(request.outpaint):
        return picture, mask, mask.array
    canvas, pixels = outpainted(picture, mask, request.outpaint)
    return canvas, mask, pixels


def masking_of(
    request: Request, picture: InputPicture, source: InputMask | None, pixels: NDArray[np.uint8], size: tuple[int, int],
    way: Fit, manifest: Manifest,
) -> Masking:  # fmt: skip
    """Return the masking of a run of `size` (height, width), whose picture is fitted `way`.

    Raises UsageError for a mask that changes nothing, and for latents whose pixels cannot be pasted back or shown to
    an inpainting model.
    """
    factor = manifest.base.vae.factor
    blur = DEFAULT_BLUR if request.mask_blur is None else request.mask_blur
    # ComfyUI pastes nothing by itself; a stated blur asks for it.
    usual = not request.comfyui or request.mask_blur is not None
    paste = usual if request.paste is None else request.paste
    if picture.pixels is None:
        _check_latents(pixels, size, paste=paste)
        # A workflow's sampler is shown what the workflow encodes.
        if takes_mask(manifest.base, manifest) and not request.refine and not request.graph:
            raise UsageError("--image: latents given, but the bundle's base is an inpainting model, which sees the"
                             " picture without its masked part; give the picture itself")  # fmt: skip
    masking = Masking(fitted(pixels, size, way), source, blur, paste)
    if not masking.of_latents(factor, soft=request.comfyui).any():
        lost = f"has no white that is left at the latents' size, every {factor} pixels"
        why = lost if masking.pixels.any() else "is black everywhere"
        raise UsageError(f"--mask: {why}, so nothing would change; paint white what is to change")
    return masking


def _check_latents(pixels: NDArray[np.uint8], size: tuple[int, int], *, paste: bool) -> None:
    if pixels.shape != size:
        raise UsageError(f"--mask: {_told(pixels.shape)} pixels given, but the latents are those of {_told(size)}; make"
                         " the mask of that size")  # fmt: skip
    if paste:
        raise UsageError("--mask: the latents to start from have no pixels to paste back; give --no-paste, or a"
                         " picture with --image")  # fmt: skip


def canvas_margins(size: tuple[int, int], margins: Margins, multiple: int) -> str:
    """Return the margins, as --outpaint takes them, that make a canvas of `size` (height, width) fit `multiple`."""
    left, top, right, bottom = margins
    down, across = (-side % multiple for side in size)
    right, left = (right, left + across) if left and not right else (right + across, left)
    bottom, top = (bottom, top + down) if top and not bottom else (bottom + down, top)
    return f"{left},{top},{right},{bottom}"


def _told(size: tuple[int, ...]) -> str:
    return f"{size[1]}x{size[0]}"
