"""Exports and builds of models at SDXL's real size."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.benchmarks.full_size.architectures import ROLES, architecture
    from sdxl_trt.benchmarks.full_size.checkpoints import checkpoint_pair, write_checkpoint
else:
    # Lazy, since some modules are commands: Python warns of a module that was imported before it runs as one.
    __getattr__ = lazy_names(__name__, {
        "architectures": ("ROLES", "architecture"),
        "checkpoints": ("checkpoint_pair", "write_checkpoint"),
    })

__all__ = ["ROLES", "architecture", "checkpoint_pair", "write_checkpoint"]
