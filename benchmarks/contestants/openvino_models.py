"""What OpenVINO runs for trt-bench: parts of diffusers' pipelines as its models, converted once, and quantized by NNCF.

Conversions are kept in the run's cache. NNCF calibrates on inputs that PyTorch's own pictures of the calibration
prompts gave the parts; its scope is its default for transformers, with or without the layers in SENSITIVE.
"""

__all__ = [
    "LEFT_OUT",
    "SENSITIVE",
    "Cache",
    "Model",
    "Parts",
    "converted",
    "eight_bit_layers",
    "example",
    "parts_of",
    "quantized",
    "recorded",
    "unet_feed",
]

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sdxl_trt.benchmarks.contestants.diffusers_runs import draw
from sdxl_trt.benchmarks.contestants.protocol import Array, Spec

SENSITIVE = ("conv_in", "conv_out", "conv_shortcut", "time_embedding", "add_embedding", "time_emb_proj")
"""The layers that our own 8-bit engines leave out, by the names of their modules."""
LEFT_OUT = rf".*\.({'|'.join(SENSITIVE)})[./].*"
"""What the names of their nodes match in OpenVINO's models."""
UNET_INPUTS = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")
STEPS = 10
SAMPLES = {"unet": 24, "decoder": 12}
"""On the embedded pair, a third of them costs up to 10 dB of the picture; more of them gain nothing."""
_MULTIPLYING = ("Convolution", "FullyConnected", "MatMul")
Model = Any
Feed = dict[str, Array]
Parts = dict[str, Any]
"""PyTorch modules by name: ``base unet``, ``refiner unet``, ``decoder``, and ``base encoder 0`` and so on."""


def parts_of(experts: Mapping[str, Any]) -> Parts:
    """Return the parts of the pipelines that a picture needs; each belongs to its pipeline."""
    found: Parts = {}
    for stage, pipeline in experts.items():
        encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
        found |= {f"{stage} encoder {number}": one for number, one in enumerate(encoders) if one is not None}
        found[f"{stage} unet"] = pipeline.unet
    return found | {"decoder": list(experts.values())[-1].vae}


def example(part: str, inputs: Mapping[str, Array], batch: int) -> Feed:
    """Return inputs of a part at the run's size; `inputs` are the contest's."""
    stage = part.split(maxsplit=1)[0]
    if part == "decoder":
        return {"latent_sample": np.repeat(inputs["decode/latent_sample"], batch, axis=0)}
    if part.endswith("unet"):
        return {name: inputs[f"{stage}/{name}"] for name in UNET_INPUTS}
    return {"input_ids": np.repeat(inputs["ids/0"][:1], batch, axis=0)}


def converted(openvino: Any, part: str, module: Any, feed: Feed) -> Model:
    """Return OpenVINO's model of a part, with the static shapes of `feed`."""
    import torch  # noqa: PLC0415 - not in every contestant's environment

    class Unet(torch.nn.Module):  # type: ignore[misc,unused-ignore]
        def forward(self, sample: Any, timestep: Any, states: Any, text_embeds: Any, time_ids: Any) -> Any:
            added = {"text_embeds": text_embeds, "time_ids": time_ids}
            return self.part(sample, timestep, states, added_cond_kwargs=added, return_dict=False)[0]

    class Decoder(torch.nn.Module):  # type: ignore[misc,unused-ignore]
        def forward(self, latents: Any) -> Any:
            return self.part.decode(latents, return_dict=False)[0]

    class Encoder(torch.nn.Module):  # type: ignore[misc,unused-ignore]
        def forward(self, ids: Any) -> Any:
            encoded = self.part(ids, output_hidden_states=True)
            return encoded[0], encoded.hidden_states[-2]

    flat: Any = {"unet": Unet, "decoder": Decoder}.get(part.rsplit(maxsplit=1)[-1], Encoder)()
    flat.part = module.eval()
    with torch.no_grad():
        model = openvino.convert_model(flat, example_input=tuple(torch.from_numpy(one) for one in feed.values()))
    model.reshape({port: list(array.shape) for port, array in zip(model.inputs, feed.values(), strict=True)})
    for port, name in zip(model.inputs, feed, strict=True):
        port.tensor.set_names({name})
    return model


def quantized(model: Model, feeds: Sequence[Feed], *, sensitive: bool) -> Model:
    """Return `model` in 8 bits, calibrated by NNCF on `feeds`; without `sensitive`, the layers in SENSITIVE stay."""
    import nncf  # type: ignore[import-not-found,import-untyped,unused-ignore] # noqa: PLC0415

    # A decoder has no embeddings of timesteps: not every name matches.
    scope = nncf.IgnoredScope(patterns=[] if sensitive else [LEFT_OUT], validate=False)
    return nncf.quantize(model, nncf.Dataset(list(feeds)), subset_size=len(feeds), ignored_scope=scope,
                         model_type=nncf.ModelType.TRANSFORMER)  # fmt: skip


def recorded(experts: Mapping[str, Any], spec: Spec, shape: tuple[int, ...]) -> dict[str, list[Feed]]:
    """Return inputs that the UNets and the decoder get while PyTorch draws the calibration prompts.

    `shape` is that of the noise. Each prompt is drawn in STEPS steps; kept are the SAMPLES of each part, spread evenly
    over prompts and steps.
    """
    calls: dict[str, list[Feed]] = {}
    base, refiner = experts["base"], experts.get("refiner")
    with _listening(experts, calls):
        for number, prompt in enumerate(spec.calibration):
            noise = np.random.default_rng(number).standard_normal(shape, np.float32)
            drawn = msgspec.structs.replace(spec, prompt=prompt, steps=STEPS)
            draw(base, refiner, drawn, noise, dict.fromkeys(("encode", "base", "refiner", "decode"), 0.0))
    return {part: _spread(found, SAMPLES[part.split()[-1]]) for part, found in calls.items()}


@contextmanager
def _listening(experts: Mapping[str, Any], calls: dict[str, list[Feed]]) -> Iterator[None]:
    """Append the inputs of every call of a UNet or the decoder to `calls` by part."""
    vae = list(experts.values())[-1].vae
    decode, hooks = vae.decode, []

    def heard(latents: Any, *arguments: Any, **named: Any) -> Any:
        calls.setdefault("decoder", []).append({"latent_sample": latents.numpy()})
        return decode(latents, *arguments, **named)

    def hook(part: str) -> Callable[..., None]:
        def hear(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            calls.setdefault(part, []).append(unet_feed(*arguments, **named))

        return hear

    for stage, pipeline in experts.items():
        hooks.append(pipeline.unet.register_forward_pre_hook(hook(f"{stage} unet"), with_kwargs=True))
    vae.decode = heard
    try:
        yield
    finally:
        vae.decode = decode
        for one in hooks:
            one.remove()


def unet_feed(
    sample: Any, timestep: Any, encoder_hidden_states: Any, *, added_cond_kwargs: dict[str, Any], **_: Any
) -> Feed:
    """Return a diffusers pipeline's call of a UNet as inputs of its model."""
    return {
        "sample": sample.numpy(),
        "timestep": np.full(len(sample), float(timestep), np.float32),
        "encoder_hidden_states": encoder_hidden_states.numpy(),
        "text_embeds": added_cond_kwargs["text_embeds"].numpy(),
        "time_ids": added_cond_kwargs["time_ids"].numpy(),
    }


def _spread(found: list[Feed], count: int) -> list[Feed]:
    places = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
    return [found[place] for place in places]


def eight_bit_layers(compiled: Any) -> tuple[int, int]:
    """Return how many of a compiled model's convolutions and matrix products run in 8 bits, and how many it has."""
    types = []
    for layer in compiled.get_runtime_model().get_ordered_ops():
        facts = layer.get_rt_info()
        if facts["layerType"].astype(str) in _MULTIPLYING:
            types.append(facts["runtimePrecision"].astype(str))
    return sum(one in ("i8", "u8") for one in types), len(types)


class Cache:
    """A folder of models by part, with the seconds that making them took; it appears when it is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def made(self, make: Callable[[], Mapping[str, Model]], save: Callable[..., None]) -> float:
        """Make and save the models unless they are there; return the seconds that making them took."""
        if not self.folder.is_dir():
            partial = self.folder.with_name(f".{self.folder.name}.partial")
            partial.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            for part, model in make().items():
                save(model, partial / f"{part}.xml", compress_to_fp16=False)
            (partial / "seconds.json").write_text(json.dumps(time.perf_counter() - started), encoding="utf-8")
            partial.rename(self.folder)
        return float(json.loads((self.folder / "seconds.json").read_text(encoding="utf-8")))

    def path(self, part: str) -> Path | None:
        """Return the file of a part's model, or None if this folder has none."""
        path = self.folder / f"{part}.xml"
        return path if path.is_file() else None
