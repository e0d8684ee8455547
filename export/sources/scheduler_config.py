"""The scheduler of a model source: its config, checked against diffusers' class, and the resulting schedule.

A missing setting has the default in the class's signature in the installed diffusers.
"""

__all__ = ["read_scheduler"]

import inspect
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from sdxl_trt.engines import CorruptError, SourceError
from sdxl_trt.engines.bundle import Edm, Scheduler
from sdxl_trt.export.sources.scheduler_classes import CLASSES, FLOW, SchedulerClass, why_refused

log = logging.getLogger("sdxl_trt.export")
USUAL_CLASS = "EulerDiscreteScheduler"
_WORDS = {
    "beta_schedule": ("scaled_linear", "linear"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
}
_EXCLUSIVE = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
# Settings that count only for classes that have them; never recorded for another sampler.
_OWN = frozenset({"rescale_betas_zero_snr", "timestep_type"})
SPARSE_SOLVER = 5
"""The solver's timestep distance above which LCM's share of noisy latents, (0.05 / t)^2, is below 2e-4."""
_REMEDY = "name the scheduler that the model was trained for in model_index.json and scheduler_config.json"


def read_scheduler(config: Mapping[str, Any], where: str, class_name: str = "") -> Scheduler:
    """Return the schedule of a scheduler `config`; log a warning for every setting whose value is not followed.

    `class_name` is the class that ``model_index.json`` names, which overrides the config's, as in diffusers. Raises
    CorruptError for values of a wrong type, SourceError for a class or a schedule that the runtime lacks.
    """
    stated = str(config.get("_class_name") or "")
    name = class_name or stated or USUAL_CLASS
    known = _class(name, where)
    if stated and stated != name:
        _class(stated, where)
        log.warning("%s: names %s, but model_index.json names %s, which is used, as in diffusers; make the two agree",
                    where, stated, name)  # fmt: skip
    defaults = _defaults(name)
    config = _without_defaults(config)
    values = {field: _value(config, field, default) for field, default in defaults.items()}
    scheduler = _convert(_known_fields(name, known, values, config), where)
    _check(scheduler, values, where)
    _warn(name, known, values, defaults, config, where)
    return scheduler


def _class(name: str, where: str) -> SchedulerClass:
    if name not in CLASSES:
        raise SourceError(f"{where}: {name} {why_refused(name)}; {_REMEDY}, for example EulerDiscreteScheduler")
    return CLASSES[name]


def _defaults(class_name: str) -> dict[str, Any]:
    """Return {setting: default} of a scheduler class."""
    import diffusers  # noqa: PLC0415 - imports torch, which opening a source must not wait for

    signature = inspect.signature(getattr(diffusers, class_name).__init__)
    return {name: each.default for name, each in signature.parameters.items() if name != "self"}


def _without_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the settings in its `_use_default_values`, which diffusers treats as absent."""
    listed = config.get("_use_default_values")
    used = set(map(str, listed)) if isinstance(listed, list) else set()
    return {name: value for name, value in config.items() if name not in used}


def _value(config: Mapping[str, Any], field: str, default: Any) -> Any:
    """Return a setting: null means false for a flag, and the default for any other setting without a null default."""
    value = config.get(field, default)
    if value is None and default is not None:
        return False if isinstance(default, bool) else default
    return value


def _known_fields(
    name: str, known: SchedulerClass, values: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fields of the record: the class's settings, and other classes' settings that the config states.

    The latter do not affect this class; another class made from the same config reads them.
    """
    record = {"class_name": name, "sampler": known.sampler_for(values)}
    if "sigma_data" in values:
        edm = {field: values[field] for field in Edm.__struct_fields__}
        kept = {field: values[field] for field in ("prediction_type", "num_train_timesteps", "final_sigmas_type")}
        return record | kept | {"edm": edm}
    fields = [field for field in Scheduler.__struct_fields__ if field not in ("class_name", "sampler", "edm")]
    stated = {field: config[field] for field in fields if field in config and field not in _OWN}
    found = stated | {field: values[field] for field in fields if field in values} | dict(known.forced)
    return {field: value for field, value in found.items() if value is not None} | record


def _convert(record: Mapping[str, Any], where: str) -> Scheduler:
    try:
        return msgspec.convert(record, Scheduler)
    except msgspec.ValidationError as exc:
        raise CorruptError(f"{where}: {exc}; download it again") from exc


def _check(scheduler: Scheduler, values: Mapping[str, Any], where: str) -> None:
    """Raise SourceError for settings that diffusers refuses too, and for schedules that the runtime lacks."""
    for name, words in _WORDS.items():
        if getattr(scheduler, name) not in words:
            raise SourceError(f"{where}: {name} {getattr(scheduler, name)!r} is not supported, only {', '.join(words)}")
    if values.get(FLOW):
        raise SourceError(f"{where}: {FLOW} {why_refused('FlowMatch')}; {_REMEDY}")
    if scheduler.edm is not None and scheduler.prediction_type == "sample":
        raise SourceError(
            f"{where}: prediction_type 'sample' is not supported on EDM's schedule, only epsilon and v_prediction"
        )
    chosen = [name for name in _EXCLUSIVE if values.get(name)]
    if len(chosen) > 1:
        raise SourceError(f"{where}: {' and '.join(chosen)} exclude each other, in diffusers too; keep only one")
    if scheduler.original_inference_steps > scheduler.num_train_timesteps and "original_inference_steps" in values:
        raise SourceError(f"{where}: original_inference_steps {scheduler.original_inference_steps} exceeds the"
                          f" {scheduler.num_train_timesteps} training timesteps; diffusers refuses it too")  # fmt: skip
    betas = scheduler.trained_betas
    if betas is not None and len(betas) != scheduler.num_train_timesteps:
        raise SourceError(f"{where}: {len(betas)} trained_betas for {scheduler.num_train_timesteps} training timesteps;"
                          " give one for each")  # fmt: skip


def _warn(
    name: str,
    known: SchedulerClass,
    values: Mapping[str, Any],
    defaults: Mapping[str, Any],
    config: Mapping[str, Any],
    where: str,
) -> None:
    sampler = known.sampler_for(values)
    if known.instead:
        log.warning("%s: no sampler is equivalent to %s (%s); %s is the nearest, and its pictures differ",
                    where, name, known.instead, sampler)  # fmt: skip
    solver, total = (values.get(field) or 0 for field in ("original_inference_steps", "num_train_timesteps"))
    if sampler == "lcm" and solver * SPARSE_SOLVER > total:
        log.warning("%s: %s with original_inference_steps %s of %s training timesteps leaves noise in the latents,"
                    " the sampler does not: pictures differ a little", where, name, solver, total)  # fmt: skip
    for field, value, done in _not_followed(known, values, defaults):
        origin = "" if field in config else ", its default,"
        log.warning("%s: %s's %s %r%s is %s", where, name, field, value, origin, done)


def _not_followed(
    known: SchedulerClass, values: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Iterator[tuple[str, Any, str]]:
    """Yield (setting, value, what is done instead) for the settings that are not followed exactly."""
    for field, value in values.items():
        if field in known.followed or field in known.inert:
            continue
        accepted = known.fixed.get(field, (defaults[field],))
        if value not in accepted:
            unlike = f"not followed: pictures are made with {accepted[0]!r}, and differ"
            yield field, value, "followed only nearly: pictures differ a little" if field in known.nearly else unlike
