"""Image files: reading, writing, metadata and contact sheets."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.runtime.images.exif import EDITOR
    from sdxl_trt.runtime.images.files import FORMATS, SETTINGS, WORKFLOW, encode_image, read_texts, save_image
    from sdxl_trt.runtime.images.inputs import MAX_PIXELS, Fit, InputPicture, as_input, check_input, fitted, read_input
    from sdxl_trt.runtime.images.masks import (
        InputMask, Margins, Overlay, as_mask, outpainted, read_channel, read_mask,
    )
    from sdxl_trt.runtime.images.metadata import describe
    from sdxl_trt.runtime.images.picture import Picture
    from sdxl_trt.runtime.images.provenance import BundleName, bundle_name, warn_of_another_bundle
    from sdxl_trt.runtime.images.scaling import new_size, resize
    from sdxl_trt.runtime.images.sheet import Sheet, contact_sheet, draw_sheet
else:
    __getattr__ = lazy_names(__name__, {
        "exif": ("EDITOR",),
        "files": ("FORMATS", "SETTINGS", "WORKFLOW", "encode_image", "read_texts", "save_image"),
        "inputs": ("MAX_PIXELS", "Fit", "InputPicture", "as_input", "check_input", "fitted", "read_input"),
        "masks": ("InputMask", "Margins", "Overlay", "as_mask", "outpainted", "read_channel", "read_mask"),
        "metadata": ("describe",),
        "picture": ("Picture",),
        "provenance": ("BundleName", "bundle_name", "warn_of_another_bundle"),
        "scaling": ("new_size", "resize"),
        "sheet": ("Sheet", "contact_sheet", "draw_sheet"),
    })

__all__ = [
    "EDITOR", "FORMATS", "MAX_PIXELS", "SETTINGS", "WORKFLOW", "BundleName", "Fit", "InputMask", "InputPicture",
    "Margins", "Overlay", "Picture", "Sheet", "as_input", "as_mask", "bundle_name", "check_input", "contact_sheet",
    "describe", "draw_sheet", "encode_image", "fitted", "new_size", "outpainted", "read_channel", "read_input",
    "read_mask", "read_texts", "resize", "save_image", "warn_of_another_bundle",
]
