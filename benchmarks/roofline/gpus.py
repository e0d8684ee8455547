"""Published figures of GPUs: peak rates of dense tensor products, memory, and the link to the host.

Vendors quote rates for 2:4 sparse weights first, which are twice the dense ones; these are the dense rates.
"""

__all__ = ["GPUS", "Gpu", "find_gpu"]

import msgspec

from sdxl_trt.engines import UsageError

# PCI Express, 16 lanes, one direction: transfers per second × 16 lanes × 128/130 encoding / 8 bits.
_PCIE = {"3.0": 15.75e9, "4.0": 31.5e9, "5.0": 63.0e9}
_AMPERE = "https://images.nvidia.com/aem-dam/en-zz/Solutions/geforce/ampere/pdf/NVIDIA-ampere-GA102-GPU-Architecture-Whitepaper-V1.pdf"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU as specified by its vendor: operations and bytes per second, bytes.

    `fp16` is the fastest rate of fp16 products with any accumulator; `fp32_sums` that of fp16 and bf16 products
    accumulated in fp32, half as fast on GeForce; `tf32` that of fp32 tensors on tensor cores, TensorRT's default;
    `eight_bit` the faster of int8 and fp8. `capability` is the compute capability: fp8 needs 8.9.
    """

    name: str
    fp16: float
    fp32_sums: float
    tf32: float
    eight_bit: float
    capability: str
    bandwidth: float
    memory: float
    pcie: str
    source: str

    @property
    def link(self) -> float:
        """The peak bytes per second from the host to the GPU over PCI Express."""
        return _PCIE[self.pcie]


def _gpu(
    name: str,
    capability: str,
    tera: tuple[float, float, float, float],
    bandwidth: float,
    memory: int,
    pcie: str,
    source: str,
) -> Gpu:
    """Return a GPU from (fp16, fp32 sums, tf32, eight bits) in 10^12 operations/s, GB/s and GB."""
    fp16, fp32_sums, tf32, eight_bit = (rate * 1e12 for rate in tera)
    return Gpu(
        name=name,
        fp16=fp16,
        fp32_sums=fp32_sums,
        tf32=tf32,
        eight_bit=eight_bit,
        capability=capability,
        bandwidth=bandwidth * 1e9,
        memory=memory * 1e9,
        pcie=pcie,
        source=source,
    )


GPUS: dict[str, Gpu] = {
    "h100": _gpu("NVIDIA H100 SXM 80 GB", "9.0", (989.4, 989.4, 494.7, 1978.9), 3350, 80, "5.0",
                 "https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper"),
    "h200": _gpu("NVIDIA H200 SXM 141 GB", "9.0", (989.4, 989.4, 494.7, 1978.9), 4800, 141, "5.0",
                 "https://www.nvidia.com/en-us/data-center/h200/"),
    "b200": _gpu("NVIDIA B200 SXM 180 GB", "10.0", (2250, 2250, 1125, 4500), 7700, 180, "5.0",
                 "https://www.nvidia.com/en-us/data-center/hgx/"),
    "a100": _gpu("NVIDIA A100 SXM 80 GB", "8.0", (312, 312, 156, 624), 2039, 80, "4.0",
                 "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"),
    "pro6000": _gpu("NVIDIA RTX PRO 6000 Blackwell Server 96 GB", "12.0", (500, 500, 250, 1000), 1597, 96, "5.0",
                    "https://www.nvidia.com/en-us/data-center/rtx-pro-6000-blackwell-server-edition/"),
    "4090": _gpu("NVIDIA GeForce RTX 4090 24 GB", "8.9", (330.3, 165.2, 82.6, 660.6), 1008, 24, "4.0", _ADA),
    "3090": _gpu("NVIDIA GeForce RTX 3090 24 GB", "8.6", (142, 71, 35.6, 284), 936, 24, "4.0", _AMPERE),
    "l40s": _gpu("NVIDIA L40S 48 GB", "8.9", (362.05, 362.05, 183, 733), 864, 48, "4.0",
                 "https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413"),
    "l4": _gpu("NVIDIA L4 24 GB", "8.9", (121, 121, 60, 242), 300, 24, "4.0",
               "https://www.nvidia.com/en-us/data-center/l4/"),
    "a10": _gpu("NVIDIA A10 24 GB", "8.6", (125, 125, 62.5, 250), 600, 24, "4.0",
                "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a10/pdf/a10-datasheet.pdf"),
    "a10g": _gpu("NVIDIA A10G 24 GB", "8.6", (70, 70, 35, 140), 600, 24, "4.0",
                 "https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf"),
}  # fmt: skip


def find_gpu(name: str) -> Gpu:
    """Return the GPU called `name`, in any case and with or without "rtx". Raises UsageError if it is not in GPUS."""
    key = name.lower().replace(" ", "").replace("-", "").replace("nvidia", "").replace("geforce", "").replace("rtx", "")
    if key not in GPUS:
        raise UsageError(f"--estimate {name}: choose from {', '.join(GPUS)}")
    return GPUS[key]
