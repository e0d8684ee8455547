"""The components that each phase of a run uses, and the bf16 twins that replace them."""

__all__ = ["computes", "computes_bf16", "needed_capability", "run_components", "run_phases", "stand_ins"]

import re
from collections.abc import Mapping, Sequence

from sdxl_trt.engines.bundle.manifest import Manifest, Precision, Stage
from sdxl_trt.engines.bundle.plan_record import ANY
from sdxl_trt.engines.errors import IncompatibleError

# NVIDIA's support matrices of TensorRT: int8 since Turing, bf16 since Ampere, fp8 since Ada and Hopper.
_SINCE: Mapping[Precision, str] = {"int8": "7.5", "bf16": "8.0", "fp8": "8.9"}


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
    manifest: Manifest,
    provider: str,
    *,
    from_image: bool = False,
    capability: str | None = None,
    controls: Sequence[str] = (),
    cached: bool = False,
    tiny: bool = False,
) -> dict[str, tuple[str, ...]]:
    """Return the components of each phase of a run with all stages: encode, base, refiner, decode.

    A run `from_image` has a phase "picture" first, which encodes the image with the autoencoders of all stages.
    `controls` are the components of the ControlNets that the base uses, in the same phase. In a `cached` run every
    stage also uses its shallow UNet; raises IncompatibleError if one has none. `capability` is the GPU's, see
    `stand_ins`. With `tiny` the tiny decoder decodes; UsageError is raised without one.
    """
    stages = manifest.stages()
    if cached:
        _require_shallow(stages)
    encoders = [encoder.component for stage in stages.values() for encoder in stage.text_encoders]
    vae = list(stages.values())[-1].vae
    decoder = (vae.with_tiny_decoder() if tiny else vae).decoder
    replaced = stand_ins(manifest, provider, capability)
    pictures = [stage.vae.encoder for stage in stages.values() if from_image and stage.vae.encoder is not None]
    phases = {"picture": tuple(dict.fromkeys(replaced.get(name, name) for name in pictures))} if pictures else {}
    phases["encode"] = tuple(dict.fromkeys(encoders))
    for name, stage in stages.items():
        shallow = (stage.shallow,) if cached and stage.shallow is not None else ()
        phases[name] = (stage.unet, *shallow, *(controls if name == "base" else ()))
    return phases | {"decode": (replaced.get(decoder, decoder),)}


def run_components(
    manifest: Manifest,
    provider: str,
    *,
    from_image: bool = False,
    capability: str | None = None,
    controls: Sequence[str] = (),
    cached: bool = False,
    tiny: bool = False,
) -> tuple[str, ...]:
    """Return the components of a run with all stages, each once, in order of use; see `run_phases`."""
    phases = run_phases(
        manifest, provider, from_image=from_image, capability=capability, controls=controls, cached=cached, tiny=tiny
    )
    return tuple(dict.fromkeys(name for used in phases.values() for name in used))


def _require_shallow(stages: Mapping[str, Stage]) -> None:
    bare = [stage.unet for stage in stages.values() if stage.shallow is None]
    if bare:
        raise IncompatibleError(f"the bundle was exported without shallow UNets ({', '.join(bare)} has none), which"
                                " cached steps need; export it again, or run without --cache")  # fmt: skip
