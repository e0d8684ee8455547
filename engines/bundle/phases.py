"""What a run asks of a bundle, the components that each of its phases uses, and the bf16 twins that replace them."""

__all__ = [
    "USUAL_RUN", "Workload", "computes", "computes_bf16", "lacks_shallow", "needed_capability", "run_components",
    "run_phases", "stand_ins",
]  # fmt: skip

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sdxl_trt.engines.bundle.manifest import Manifest, Precision
from sdxl_trt.engines.bundle.plan_record import ANY
from sdxl_trt.engines.errors import IncompatibleError

# NVIDIA's support matrices of TensorRT: int8 since Turing, bf16 since Ampere, fp8 since Ada and Hopper.
_SINCE: Mapping[Precision, str] = {"int8": "7.5", "bf16": "8.0", "fp8": "8.9"}


@dataclass(frozen=True)
class Workload:
    """What runs use of a bundle's components beside those that every run uses.

    Runs `from_image` encode pictures. `controls` are the components of the ControlNets that the base uses, in order;
    `cached` the stages, of "base" and "refiner", with a step cache, which also use their shallow UNets, a stage that
    the bundle lacks having no effect; `adapted` the components that LoRAs change. With `tiny` the tiny decoder decodes.
    """

    from_image: bool = False
    controls: tuple[str, ...] = ()
    cached: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    tiny: bool = False


USUAL_RUN = Workload()
"""What every run asks: text encoders, UNets, a decoder."""


def needed_capability(precision: Precision) -> str:
    """Return the lowest compute capability with TensorRT's kernels for `precision`; "" if every GPU has them."""
    return _SINCE.get(precision, "")


def computes(precision: Precision, capability: str | None) -> bool:
    """Return whether TensorRT has kernels of `precision` for a GPU of compute capability `capability`, such as "8.9".

    True for "any" and None, an unknown GPU.
    """
    if capability is None or capability == ANY:
        return True
    return _version(capability) >= _version(needed_capability(precision))


def computes_bf16(capability: str | None) -> bool:
    """Return whether TensorRT has bf16 kernels for a GPU of this compute `capability`; Turing (7.5) has none."""
    return computes("bf16", capability)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def stand_ins(manifest: Manifest, provider: str, capability: str | None = None) -> dict[str, str]:
    """Return {component: the one that `provider` runs instead}: TensorRT runs the bf16 twin of an autoencoder.

    On a GPU whose compute `capability` has no bf16, it runs the original, in tiles.
    """
    if not provider.startswith("tensorrt") or not computes_bf16(capability):
        return {}
    vaes = [stage.vae for stage in manifest.stages().values()]
    twins = {vae.decoder: vae.decoder_bf16 for vae in vaes if vae.decoder_bf16}
    return twins | {vae.encoder: vae.encoder_bf16 for vae in vaes if vae.encoder and vae.encoder_bf16}


def run_phases(
    manifest: Manifest, provider: str, workload: Workload = USUAL_RUN, *, capability: str | None = None
) -> dict[str, tuple[str, ...]]:
    """Return the components of each phase of a run with all stages: encode, base, refiner, decode.

    A `workload` from an image has a phase "picture" first, which encodes it with the autoencoders of all stages. The
    base's ControlNets are in its phase, as is a shallow UNet in that of its stage. `capability` is the GPU's, see
    `stand_ins`. Raises IncompatibleError if a cached stage has no shallow UNet, UsageError without a tiny decoder.
    """
    stages = manifest.stages()
    if lacking := lacks_shallow(manifest, workload.cached):
        raise IncompatibleError(lacking)
    encoders = [encoder.component for stage in stages.values() for encoder in stage.text_encoders]
    vae = list(stages.values())[-1].vae
    decoder = (vae.with_tiny_decoder() if workload.tiny else vae).decoder
    replaced = stand_ins(manifest, provider, capability)
    pictures = [each.vae.encoder for each in stages.values() if workload.from_image and each.vae.encoder is not None]
    phases = {"picture": tuple(dict.fromkeys(replaced.get(name, name) for name in pictures))} if pictures else {}
    phases["encode"] = tuple(dict.fromkeys(encoders))
    for name, stage in stages.items():
        shallow = (stage.shallow,) if name in workload.cached and stage.shallow is not None else ()
        phases[name] = (stage.unet, *shallow, *(workload.controls if name == "base" else ()))
    return phases | {"decode": (replaced.get(decoder, decoder),)}


def run_components(
    manifest: Manifest, provider: str, workload: Workload = USUAL_RUN, *, capability: str | None = None
) -> tuple[str, ...]:
    """Return the components of a run with all stages, each once, in order of use; see `run_phases`."""
    phases = run_phases(manifest, provider, workload, capability=capability)
    return tuple(dict.fromkeys(name for used in phases.values() for name in used))


def lacks_shallow(manifest: Manifest, cached: Collection[str]) -> str:
    """Return why the stages `cached` cannot have a step cache, and what to do; "" if they can."""
    stages = manifest.stages()
    bare = {name: stage.unet for name, stage in stages.items() if name in cached and stage.shallow is None}
    if not bare:
        return ""
    if len(bare) < len(stages):
        ((name, unet),) = bare.items()
        option = "--cache" if name == "base" else "--refiner-cache"
        return (f"the {name}'s UNet ({unet}) was exported without a shallow one, which cached steps need; {option} 1"
                f" leaves the {name} out of the cache, or export the bundle again")  # fmt: skip
    them = f"{', '.join(bare.values())} {'has' if len(bare) == 1 else 'have'} none"
    return (f"the bundle was exported without shallow UNets ({them}), which cached steps need; export it again, or"
            " leave --cache out")  # fmt: skip
