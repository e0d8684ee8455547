"""Times that others published for SDXL on a GPU, each with the stated work and its source.

The times are quoted as published; none was measured by this project.
"""

__all__ = ["PUBLISHED", "Published"]

from typing import Literal

import msgspec

_CARD = "https://huggingface.co/stabilityai/stable-diffusion-xl-1.0-tensorrt"
_ORT = "https://github.com/microsoft/onnxruntime/pull/17748"
_FAST = "https://pytorch.org/blog/accelerating-generative-ai-3/"
_MODELOPT = (
    "https://github.com/NVIDIA/TensorRT-Model-Optimizer/blob/06a155388edd4a240051176a67a11886b15db082/benchmark.md"
)
_MLPERF = "https://mlcommons.org/benchmarks/inference-datacenter/"

Rate = Literal["fp16", "fp32_sums", "tf32", "eight_bit"]


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """A published time on one GPU for one batch of pictures of 1024² pixels, or for a part of it.

    `rows` are a UNet's rows per picture, 2 with guidance; `unet` and `vae` name the peak rate of each one's type.
    `part` is what was timed: "unet" all UNet steps, "vae" the decoder.
    """

    gpu: str
    what: str
    seconds: float
    base_steps: int
    refiner_steps: int = 0
    rows: int = 2
    unet: Rate = "fp16"
    vae: Rate = "tf32"
    part: Literal["picture", "unet", "vae"] = "picture"
    source: str
    note: str = ""


def _card(gpu: str, seconds: float) -> Published:
    return Published(
        gpu=gpu,
        what="TensorRT fp16, SDXL base",
        seconds=seconds,
        base_steps=30,
        source=_CARD,
        note="the card lists two models; the time fits only the base",
    )


def _lcm(gpu: str, part: Literal["unet", "vae"], seconds: float) -> Published:
    return Published(
        gpu=gpu,
        what=f"TensorRT fp16, LCM, {'4 UNet steps without guidance' if part == 'unet' else 'VAE decoder (fp32)'}",
        seconds=seconds,
        base_steps=4,
        rows=1,
        part=part,
        source=_CARD,
    )


def _modelopt(gpu: str, precision: str, seconds: float, unet: Rate = "eight_bit") -> Published:
    return Published(
        gpu=gpu,
        what=f"TensorRT 9.3 {precision}, SDXL base",
        seconds=seconds,
        base_steps=30,
        unet=unet,
        source=_MODELOPT,
        note="from the speedup of int8 that is stated" if unet == "fp16" else "",
    )


def _mlperf(gpu: str, pictures: float, note: str = "") -> Published:
    """Return a GPU's share of a submission to the closed division that draws `pictures` a second on each GPU."""
    return Published(
        gpu=gpu,
        what=f"MLPerf Inference v5.1 offline, {pictures:g} pictures/s a GPU, SDXL base",
        seconds=1 / pictures,
        base_steps=20,
        unet="eight_bit",
        vae="fp16",
        source=_MLPERF,
        note=f"8-bit UNet{note}; batched",
    )


PUBLISHED: tuple[Published, ...] = (
    _card("h100", 1.471),
    _card("a100", 2.742),
    _card("a10", 8.160),
    _lcm("h100", "unet", 0.1028),
    _lcm("h100", "vae", 0.12695),
    _lcm("a100", "unet", 0.19202),
    _lcm("a100", "vae", 0.22834),
    Published(gpu="a100", what="TensorRT fp16, SDXL base", seconds=2.714, base_steps=30, source=_ORT),
    Published(gpu="a100", what="ONNX Runtime's TensorRT provider, SDXL base", seconds=2.679, base_steps=30,
              source=_ORT),
    Published(gpu="a100", what="TensorRT fp16, SDXL base and refiner", seconds=3.593, base_steps=30, refiner_steps=9,
              source=_ORT, note="stated as 30 refiner steps, of which the demo's strength of 0.3 runs 9"),
    Published(gpu="a100", what="PyTorch bf16, torch.compile max-autotune, SDXL base", seconds=2.52, base_steps=30,
              unet="fp32_sums", vae="fp32_sums", source=_FAST),
    _modelopt("4090", "int8", 2.05811),
    _modelopt("4090", "fp8", 2.16138),
    _modelopt("l40s", "int8", 2.33888),
    _modelopt("l40s", "fp8", 2.16782),
    _modelopt("4090", "fp16", 1.20 * 2.05811, "fp16"),
    _modelopt("l40s", "fp16", 1.25 * 2.33888, "fp16"),
    _mlperf("b200", 4.07),
    _mlperf("h200", 2.40),
    _mlperf("h100", 2.26, ", FP8 chosen for each layer (TheStage AI)"),
    _mlperf("pro6000", 1.385),
    _mlperf("l40s", 0.74),
    _mlperf("l4", 0.25),
    Published(gpu="h200", what="MLPerf Inference offline, 8 GPUs at 17.4 pictures/s, SDXL base", seconds=8 / 17.4,
              base_steps=20, unet="eight_bit", vae="fp16", source=_MLPERF, note="8-bit UNet; batched, a GPU's share"),
    Published(gpu="h200", what="MLPerf Inference offline, 8 GPUs at 19.1 pictures/s, SDXL base", seconds=8 / 19.1,
              base_steps=20, unet="eight_bit", vae="fp16", source=_MLPERF, note="8-bit UNet; batched, a GPU's share"),
)  # fmt: skip
