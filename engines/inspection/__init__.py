"""The reports of trt-inspect."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.engines.inspection.compare import compare_engines
    from sdxl_trt.engines.inspection.doctor import examine_machine, relevant_packages
    from sdxl_trt.engines.inspection.report import inspect_bundle
else:
    __getattr__ = lazy_names(__name__, {
        "compare": ("compare_engines",),
        "doctor": ("examine_machine", "relevant_packages"),
        "report": ("inspect_bundle",),
    })

__all__ = ["compare_engines", "examine_machine", "inspect_bundle", "relevant_packages"]
