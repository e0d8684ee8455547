"""Compare the activation memory that the memory plan estimates with what the real builder reports.

``python -m sdxl_trt.benchmarks.full_size.activations [BUNDLE ...]`` builds plans of every UNet and decoder of the
bundles (by default the embedded one), for exact and for wide profiles, on a CPU (`tensorrt_on_cpu`), and writes
``benchmarks/results/activations.md``. Bundles may be partial; plans are deleted. No figure depends on the weights,
which may be random. SDXL's widths with one transformer block per level build in 6 GB of memory.
"""

__all__ = ["Row", "main", "table"]

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from sdxl_trt.benchmarks.full_size.tensorrt_on_cpu import assemble, child_environment
from sdxl_trt.benchmarks.measure import RESULTS_FOLDER
from sdxl_trt.engines.build import BuildJob, build_plan
from sdxl_trt.engines.bundle import Bundle, Component, Profile, Range, fixed, read_bundle
from sdxl_trt.engines.host import atomic_write
from sdxl_trt.engines.plans import Sizes, axes_of, component_profiles
from sdxl_trt.engines.residency import estimate_activations, estimate_error, exact_sizes
from sdxl_trt.mini import bundle_path

RESULTS = RESULTS_FOLDER / "activations.md"
COMMAND = "python -m sdxl_trt.benchmarks.full_size.activations"
_SIDES = Range(min=512, opt=1024, max=1280)
_TOKENS = Range(min=77, opt=77, max=231)
SIZES = {
    "768², 1 picture": exact_sizes(768, 768),
    "1024², 1 picture": exact_sizes(1024, 1024),
    "512² to 1280², 1 picture": Sizes(height=_SIDES, width=_SIDES, batch=fixed(1), tokens=_TOKENS),
    "512² to 1280², 1 to 4 pictures": Sizes(
        height=_SIDES, width=_SIDES, batch=Range(min=1, opt=1, max=4), tokens=_TOKENS
    ),
}
_FACTOR = 8


class Row(msgspec.Struct, frozen=True):
    """One plan: bytes of activations as estimated and as built, and the estimate's allowed relative error."""

    graph: str
    sizes: str
    estimated: int
    built: int
    promised: float

    @property
    def off(self) -> float:
        """The estimate's error relative to the built plan."""
        return self.estimated / self.built - 1


def compare(name: str, component: Component, graph: Path, sizes: str) -> Row:
    """Build a plan of `graph` for the SIZES called `sizes` and compare; raises as `build_plan`."""
    profiles = _profiles(component, sizes)
    with tempfile.TemporaryDirectory() as folder:
        plan, log = Path(folder) / "plan", Path(folder) / "log"
        built = build_plan(
            BuildJob(component=name, graph=graph, profiles=profiles, flavour="tensorrt-rtx", plan=plan, log=log)
        )
    estimated = estimate_activations(component, profiles)
    return Row(name, sizes, estimated, built.activations, estimate_error(component))


def table(rows: Sequence[Row], command: str = COMMAND) -> str:
    """Return the rows as a Markdown table below a paragraph that explains them."""
    worst = max(rows, key=lambda row: abs(row.off))
    near, fair = (sum(abs(row.off) <= share for row in rows) for share in (0.05, 0.1))
    lines = [
        f"Activation memory of plans: estimated before the build, and as the real builder states it (`{command}`).",
        f"TensorRT for RTX, built on a CPU. Of {len(rows)} plans {near} are within 5 %, {fair} within 10 %; the worst",
        f"is off by {worst.off:+.0%}. Workspace that kernels ask for is beyond a model of what is alive. The factors",
        "of the estimate were fitted to plans of these graphs, but to none of those for 1 to 4 pictures.",
        "",
        "| graph | sizes | estimated | built | off |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        figures = f"{row.estimated / 1e6:.1f} MB | {row.built / 1e6:.1f} MB"
        lines.append(f"| {row.graph} | {row.sizes} | {figures} | {row.off:+.1%} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the bundles named on the command line; return 1 if an estimate exceeds its allowed error."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("bundles", nargs="*", type=Path, metavar="BUNDLE", help="exported folders (default: embedded)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the Markdown file to write")
    arguments = parser.parse_args(argv)
    os.environ.update(child_environment(assemble()))
    rows = []
    for root in arguments.bundles or [bundle_path()]:
        for row in _rows(read_bundle(root, partial=True)):
            rows.append(row)
            print(f"{row.graph}, {row.sizes}: {row.off:+.1%}", file=sys.stderr)
    names = " ".join(root.name for root in arguments.bundles)
    with atomic_write(arguments.results) as file:
        file.write(table(rows, f"{COMMAND} {names}".rstrip()).encode())
    return int(any(abs(row.off) > row.promised for row in rows))


def _rows(bundle: Bundle) -> Iterator[Row]:
    for name, component in bundle.manifest.components.items():
        if component.kind not in ("unet", "vae_decoder"):
            continue
        seen: set[str] = set()
        for sizes in SIZES:
            profiles = _profiles(component, sizes)
            if repr(profiles) not in seen:  # a decoder takes one picture at a time, wide ones in tiles
                seen.add(repr(profiles))
                yield compare(_label(name, component), component, bundle.path(component.graph), sizes)


def _label(name: str, component: Component) -> str:
    config = component.config
    channels = config["block_out_channels" if "block_out_channels" in config else "decoder_block_out_channels"]
    widths = "-".join(map(str, channels))
    return f"{name} {widths} {component.precision}"


def _profiles(component: Component, sizes: str) -> tuple[Profile, ...]:
    axes = axes_of(component.kind, component.float_precision, SIZES[sizes], _FACTOR)
    if component.kind == "unet" and not SIZES[sizes].static:
        axes = axes[-1:]  # the range alone: it decides the largest figure, and each profile lengthens the build
    return component_profiles({spec.name: spec.shape for spec in component.inputs}, axes)


if __name__ == "__main__":
    sys.exit(main())
