"""What runs next, for whom, and how long it takes: no threads, no engines, no clock."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.server.desk.plan.predict import Predictor, Work
    from sdxl_trt.server.desk.plan.scheduler import Scheduler
    from sdxl_trt.server.desk.plan.tasks import Action, Cost, Policy, Task, Times
else:
    __getattr__ = lazy_names(__name__, {
        "predict": ("Predictor", "Work"),
        "scheduler": ("Scheduler",),
        "tasks": ("Action", "Cost", "Policy", "Task", "Times"),
    })

__all__ = ["Action", "Cost", "Policy", "Predictor", "Scheduler", "Task", "Times", "Work"]
