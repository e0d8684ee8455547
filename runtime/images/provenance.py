"""The bundle that made a picture: a short digest of its weights, and the names of its models."""

__all__ = ["BundleName", "bundle_name", "warn_of_another_bundle"]

import hashlib
import logging
from typing import Annotated

import msgspec

from sdxl_trt.engines.bundle import Manifest

log = logging.getLogger("sdxl_trt.runtime")
MOST = 100
"""The most characters of a model's name."""
_DIGITS = 12

_Name = Annotated[str, msgspec.Meta(max_length=MOST)]


class BundleName(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The models that made a picture: the `digest` of their weights, and the names of `base` and `refiner`.

    `refiner` is None if it did not run. Names come from the manifest, which contains no local paths.
    """

    digest: _Name
    base: _Name
    refiner: _Name | None = None


def bundle_name(manifest: Manifest, *, refined: bool) -> BundleName:
    """Return the name of the models that a bundle runs, with its refiner or the base alone.

    The digest covers the weights: another precision or another LoRA gives another digest; moving a bundle, adding plans
    to it, or exporting it again from the same weights does not.
    """
    stages = [*manifest.stages().values()][: 1 + refined]
    used = {stages[-1].vae.decoder}
    for stage in stages:
        used |= {stage.unet, *(encoder.component for encoder in stage.text_encoders)}
    weights = "".join(f"{name} {manifest.components[name].weights.sha256}\n" for name in sorted(used))
    # A component's source is named after its model and its folder in it.
    models = [manifest.components[stage.unet].source.name.removesuffix("/unet")[:MOST] for stage in stages]
    return BundleName(hashlib.sha256(weights.encode()).hexdigest()[:_DIGITS], *models)


def warn_of_another_bundle(
    made_with: BundleName | None, manifest: Manifest, computed: str | None = None, computes: str | None = None
) -> None:
    """Warn if a picture was made with other weights than those of `manifest`; None if the picture does not say.

    Also if one of `computed`, of the picture, and `computes`, of this run, is bf16, in which OpenVINO computes.
    """
    if (computed == "bf16") != (computes == "bf16"):
        log.warning("the picture was computed in %s and this run computes in %s: it will differ; give"
                    " --provider openvino --compute-precision bf16, or neither, as then", computed or "full precision",
                    computes or "full precision")  # fmt: skip
    if made_with is None:
        return
    refined = made_with.refiner is not None and manifest.refiner is not None
    here = bundle_name(manifest, refined=refined)
    if here.digest != made_with.digest:
        log.warning("the picture was made with another bundle, %s, and this one is %s: it will differ",
                    _text_of(made_with), _text_of(here))  # fmt: skip


def _text_of(bundle: BundleName) -> str:
    models = bundle.base if bundle.refiner is None else f"{bundle.base} + {bundle.refiner}"
    return f"{models} ({bundle.digest})"
