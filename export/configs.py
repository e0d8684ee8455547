"""The JSON configs of a model source, read and never believed, and the noise schedule among them."""

__all__ = ["PUBLISHED", "read_json", "read_scheduler"]

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from sdxl_trt.engines.errors import CorruptError, SourceError, explain_os_error
from sdxl_trt.engines.manifest import Scheduler

log = logging.getLogger("sdxl_trt.export")
PUBLISHED = Path(__file__).with_name("published")
"""SDXL's own configs, `base/` and `refiner/`: what a single-file checkpoint needs and does not hold."""
# Settings that change the grid, and the values at which they do not: the rest is warned of where Scheduler has no
# field for it.
_USUAL = {
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False, "trained_betas": None,
    "rescale_betas_zero_snr": False, "interpolation_type": "linear", "final_sigmas_type": "zero",
    "timestep_type": "discrete", "use_flow_sigmas": False,
}  # fmt: skip
_WORDS = {
    "beta_schedule": ("scaled_linear", "linear"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
}
MAX_JSON_BYTES = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise SourceError where it is missing and CorruptError where it is broken."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CorruptError(f"{path}: larger than {MAX_JSON_BYTES >> 20} MiB, so not a config")
        value = json.loads(path.read_bytes())
    except FileNotFoundError as exc:
        raise SourceError(f"{path}: missing; download the whole model folder") from exc
    except OSError as exc:
        raise explain_os_error(exc, f"reading {path}") from exc
    except (ValueError, RecursionError) as exc:
        raise CorruptError(f"{path}: broken JSON ({exc}); download it again") from exc
    if not isinstance(value, dict):
        raise CorruptError(f"{path}: expected a JSON object, found {type(value).__name__}; download it again")
    return value


def read_scheduler(config: Mapping[str, Any], where: str) -> Scheduler:
    """Return the schedule of a scheduler `config`; warn of settings that it cannot hold.

    Raises CorruptError for values of a wrong type, SourceError for a schedule that the runtime lacks.
    """
    fields = Scheduler.__struct_fields__
    ignored = [name for name, usual in _USUAL.items() if name not in fields and config.get(name, usual) != usual]
    if ignored:
        log.warning("%s: %s is not followed yet; the grid is made without it", where, ", ".join(ignored))
    known = {name: config[name] for name in fields if config.get(name) is not None}
    known["class_name"] = str(config.get("_class_name", "EulerDiscreteScheduler"))
    try:
        scheduler = msgspec.convert(known, Scheduler)
    except msgspec.ValidationError as exc:
        raise CorruptError(f"{where}: {exc}; download it again") from exc
    for name, words in _WORDS.items():
        if getattr(scheduler, name) not in words:
            raise SourceError(f"{where}: {name} {known[name]!r} is not supported; {', '.join(words)} are")
    return scheduler
