"""Measure this CPU's peak GEMM rates: ``python -m sdxl_trt.benchmarks.roofline.gemm --threads N``.

No step is faster than its FLOPs at that rate: a measured step is compared with `floor_seconds` of its graph's FLOPs
(`flops.count_graph`). The rate is the best of several sizes and libraries, each in its own process because most
libraries fix their thread count at load time. Beside fp32, on which floors are based, PyTorch's bf16 products and ONNX
Runtime's of uint8 and int8 tell what a machine makes of fewer bits.
"""

__all__ = ["PRECISIONS", "GemmRate", "floor_seconds", "main", "measure_gemm", "peak_gemm_rate"]

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import msgspec
import numpy as np

from sdxl_trt.engines import EngineError, UsageError

COMMAND = "python -m sdxl_trt.benchmarks.roofline.gemm"
LIBRARIES = ("onnxruntime", "numpy", "torch")
PRECISIONS = ("fp32", "bf16", "int8")
SIZES = (512, 1024, 2048)
"""Sides of the square factors: from what fits one core's cache to what fills the last-level cache."""
_SECONDS = 0.5
_LIMIT = 120.0
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

Product = Callable[[], object]


class GemmRate(msgspec.Struct, frozen=True, kw_only=True):
    """The best rate of one library for one size and precision, in operations per second; a multiply-add is two."""

    library: str
    size: int
    threads: int
    rate: float
    precision: str = "fp32"


def floor_seconds(flops: float, rate: float) -> float:
    """Return the least seconds that `flops` operations take at `rate` operations per second."""
    return flops / rate


def peak_gemm_rate(threads: int | None = None) -> float:
    """Return the highest fp32 FLOP/s that any installed library reaches with `threads` (default: one per core).

    Takes a few seconds on an idle machine. Raises EngineError if no library could be measured.
    """
    return max(measured.rate for measured in measure_gemm(threads))


def measure_gemm(
    threads: int | None = None, sizes: Sequence[int] = SIZES, precisions: Sequence[str] = PRECISIONS[:1]
) -> list[GemmRate]:
    """Return the rate of every installed library for products of square matrices of each of `sizes`.

    Each library is measured in those of `precisions` that it has.

    Raises UsageError for fewer than one thread, EngineError if no library could be measured.
    """
    threads = (os.cpu_count() or 1) if threads is None else threads
    if threads < 1:
        raise UsageError(f"--threads {threads}: give at least one")
    found: list[GemmRate] = []
    failures = []
    for library in (name for name in LIBRARIES if find_spec(name)):
        command = [
            sys.executable,
            "-m",
            "sdxl_trt.benchmarks.roofline.gemm",
            "--library",
            library,
            "--threads",
            str(threads),
        ]
        command += ["--sizes", *map(str, sizes), "--precisions", *precisions]
        environment = os.environ | dict.fromkeys(_THREADS, str(threads))
        try:
            done = subprocess.run(command, capture_output=True, env=environment, timeout=_LIMIT, check=True)  # noqa: S603 - this module
            found += msgspec.json.decode(done.stdout, type=list[GemmRate])
        except (subprocess.SubprocessError, msgspec.DecodeError) as exc:
            failures.append(f"{library}: {exc}")
    if not found:
        raise EngineError(f"no library could be measured ({'; '.join(failures) or 'none installed'}); install numpy")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the rates of all libraries, or with --library those of one as JSON; return the exit code."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: one per core)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help="sides of the square factors")
    parser.add_argument("--precisions", choices=PRECISIONS, nargs="+", default=PRECISIONS, help="default: all")
    parser.add_argument("--library", choices=LIBRARIES, help="measure only this one, in this process; print JSON")
    arguments = parser.parse_args(argv)
    if arguments.library:
        threads = arguments.threads or os.cpu_count() or 1
        rates = _measure(arguments.library, threads, arguments.sizes, arguments.precisions)
        sys.stdout.write(msgspec.json.encode(rates).decode() + "\n")
        return 0
    try:
        rates = measure_gemm(arguments.threads, arguments.sizes, arguments.precisions)
    except (EngineError, UsageError) as exc:
        sys.stderr.write(f"error: {exc}\n")
        return exc.exit_code
    for each in rates:
        about = f"{each.library} {each.precision} {each.size}"
        sys.stdout.write(f"{about}: {each.rate / 1e9:.1f} GFLOP/s with {each.threads} threads\n")
    for precision in dict.fromkeys(each.precision for each in rates):
        peak = max(each.rate for each in rates if each.precision == precision)
        sys.stdout.write(f"peak, {precision}: {peak / 1e9:.1f} GFLOP/s\n")
    return 0


def _measure(
    library: str, threads: int, sizes: Sequence[int], precisions: Sequence[str] = PRECISIONS[:1]
) -> list[GemmRate]:
    makers: dict[tuple[str, str], Callable[[int, int], Product]] = {
        ("onnxruntime", "fp32"): _onnxruntime, ("onnxruntime", "int8"): _onnxruntime_int8, ("numpy", "fp32"): _numpy,
        ("torch", "fp32"): _torch, ("torch", "bf16"): _torch_bf16,
    }  # fmt: skip
    return [
        GemmRate(library=library, size=size, threads=threads, precision=precision,
                 rate=2 * size**3 / _fastest(makers[library, precision](size, threads)))
        for precision in precisions if (library, precision) in makers
        for size in sizes
    ]  # fmt: skip


def _fastest(product: Product) -> float:
    """Return the seconds of the fastest call out of half a second of calls, at least three."""
    product()
    fastest, spent, calls = math.inf, 0.0, 0
    while calls < 3 or spent < _SECONDS:
        started = time.perf_counter()
        product()
        taken = time.perf_counter() - started
        fastest, spent, calls = min(fastest, taken), spent + taken, calls + 1
    return fastest


def _factors(size: int) -> tuple[np.ndarray, np.ndarray]:
    drawn = np.random.default_rng(0).standard_normal((2, size, size), np.float32)
    return drawn[0], drawn[1]


def _numpy(size: int, _: int) -> Product:
    left, right = _factors(size)
    out = np.empty_like(left)
    return lambda: np.matmul(left, right, out=out)


def _torch(size: int, threads: int) -> Product:
    import torch  # noqa: PLC0415 - seconds to import

    return _torch_product(size, threads, torch.float32)


def _torch_bf16(size: int, threads: int) -> Product:
    import torch  # noqa: PLC0415

    return _torch_product(size, threads, torch.bfloat16)


def _torch_product(size: int, threads: int, dtype: object) -> Product:
    import torch  # noqa: PLC0415

    torch.set_num_threads(threads)
    left, right = (torch.from_numpy(one).to(dtype) for one in _factors(size))
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out)


def _onnxruntime(size: int, threads: int) -> Product:
    """Return ONNX Runtime's product with a constant second factor, which it prepacks like weights."""
    left, right = _factors(size)
    return _onnxruntime_product("MatMul", left, {"w": right}, np.float32, threads)


def _onnxruntime_int8(size: int, threads: int) -> Product:
    """Return the same of uint8 and int8, as activations and weights are in our 8-bit graphs, summed in int32."""
    left, right = _eight_bits(size)
    return _onnxruntime_product("MatMulInteger", left, {"w": right, "zero": np.uint8(128)}, np.int32, threads)


def _eight_bits(size: int) -> tuple[np.ndarray, np.ndarray]:
    left, right = (np.clip(np.rint(one * 32), -127, 127) for one in _factors(size))
    return (left + 128).astype(np.uint8), right.astype(np.int8)


def _onnxruntime_product(
    operator: str, left: np.ndarray, constants: dict[str, Any], dtype: type[np.generic], threads: int
) -> Product:
    import onnx  # noqa: PLC0415
    import onnxruntime as ort  # noqa: PLC0415

    kinds = {"x": left.dtype, "y": np.dtype(dtype)}
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(kind), left.shape)
        for name, kind in kinds.items()
    ]
    node = onnx.helper.make_node(operator, ["x", *constants], ["y"])
    weights = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = onnx.helper.make_graph([node], "gemm", ends[:1], ends[1:], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", left)
    binding.bind_output("y", "cpu")

    def product() -> object:
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0]

    return product


if __name__ == "__main__":
    sys.exit(main())
