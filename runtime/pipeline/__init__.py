"""The stages of a run, from prompts to pictures."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.runtime.pipeline.batch import Batch
    from sdxl_trt.runtime.pipeline.chain import Chain, check_chain
    from sdxl_trt.runtime.pipeline.pipeline import Pipeline, find_bundle, open_bundle
    from sdxl_trt.runtime.pipeline.record import ImageSettings, finish, read_settings
    from sdxl_trt.runtime.pipeline.run import Job, Run, Step, timed
    from sdxl_trt.runtime.pipeline.shared import Shared
    from sdxl_trt.runtime.pipeline.sharing import share_key
    from sdxl_trt.runtime.pipeline.sweep import Sweep, parse_axis
else:
    __getattr__ = lazy_names(__name__, {
        "batch": ("Batch",),
        "chain": ("Chain", "check_chain"),
        "pipeline": ("Pipeline", "find_bundle", "open_bundle"),
        "record": ("ImageSettings", "finish", "read_settings"),
        "run": ("Job", "Run", "Step", "timed"),
        "shared": ("Shared",),
        "sharing": ("share_key",),
        "sweep": ("Sweep", "parse_axis"),
    })

__all__ = [
    "Batch", "Chain", "ImageSettings", "Job", "Pipeline", "Run", "Shared", "Step", "Sweep", "check_chain",
    "find_bundle", "finish", "open_bundle", "parse_axis", "read_settings", "share_key", "timed",
]
