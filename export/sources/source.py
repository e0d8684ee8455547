"""Where an SDXL model comes from: a diffusers folder, the hub, or a single file; its components and their configs.

Sources are not trusted: class names come from ``model_index.json`` but select only code in this project's own table,
pickled weights are refused, and no file of the source is executed.
"""

__all__ = [
    "BASE_CLASS",
    "HALF",
    "KINDS",
    "REFINER_CLASS",
    "ModelSource",
    "PipelineSource",
    "Role",
    "find_source",
    "folder_config",
    "open_checkpoint_file",
    "open_folder",
    "open_pipeline",
    "open_source",
    "open_tiny_vae",
    "open_vae",
    "outlined",
    "read_json",
    "warn_of_unused",
    "with_tiny_vae",
    "with_vae",
]

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sdxl_trt.engines import SourceError
from sdxl_trt.engines.adapters import PICKLED
from sdxl_trt.engines.bundle import Scheduler
from sdxl_trt.engines.host import known_as
from sdxl_trt.export.checkpoints import Checkpoint, open_checkpoint, read_quantization, unquantized
from sdxl_trt.export.sources.configs import PUBLISHED, read_json
from sdxl_trt.export.sources.hub import Snapshot, fetch_pipeline, fetch_vae, parse_hub_id
from sdxl_trt.export.sources.outlines import config_of
from sdxl_trt.export.sources.predictions import said_schedule
from sdxl_trt.export.sources.roles import BASE_CLASS, REFINER_CLASS, Role, check_class, check_role, needs_score
from sdxl_trt.export.sources.scheduler_config import read_scheduler
from sdxl_trt.export.sources.single_file import INPAINTING, SingleFile, open_single_file

log = logging.getLogger("sdxl_trt.export")
Open = Callable[[], Checkpoint]
Parts = tuple[Path, dict[str, Any], Open]
Fetch = Callable[..., Snapshot]
_CLASSES: dict[Role, str] = {"base": BASE_CLASS, "refiner": REFINER_CLASS}
_ROLES: dict[str, Role] = {BASE_CLASS: "base", REFINER_CLASS: "refiner"}
_VAE_CLASS, _TINY_CLASS = "AutoencoderKL", "AutoencoderTiny"
_STEMS = {"transformers": "model", "diffusers": "diffusion_pytorch_model"}
_NO_OTHERS: Mapping[str, str] = {}
_MODELS = ("text_encoder", "text_encoder_2", "unet", "vae")
_REQUIRED = ("text_encoder_2", "unet", "vae", "tokenizer_2", "scheduler")
HALF = ("fp16", "bf16")
KINDS = "give a diffusers folder, a .safetensors checkpoint or a hub id (owner/name)"


@dataclass(frozen=True)
class ModelSource:
    """One model of a source: class and config; `checkpoint` opens the weights.

    `where` is its location for messages, like a path; `name` is its name in a manifest, without paths of this machine
    ("sdxl-base/unet", "owner/name@commit/vae").
    """

    where: str
    name: str
    class_name: str
    config: dict[str, Any]
    open: Open

    def checkpoint(self) -> Checkpoint:
        """Open the model's safetensors. Raises SourceError if there are none, CorruptError for broken ones."""
        return self.open()


@dataclass(frozen=True)
class PipelineSource:
    """A base or refiner with its configs; `index` and `scheduler_config` are the raw JSON."""

    root: Path
    name: str
    models: dict[str, ModelSource]
    tokenizers: dict[str, Path]
    scheduler: Scheduler
    requires_aesthetics_score: bool
    force_zeros_for_empty_prompt: bool
    index: dict[str, Any]
    scheduler_config: dict[str, Any]


def open_source(spec: str | Path, role: Role, *, precision: str = "fp32", vae: bool = True) -> PipelineSource:
    """Open a base or refiner: a diffusers folder, a single-file checkpoint, or a hub id ``owner/name[@revision]``.

    A local file or folder is preferred to a hub id of the same name. For a half `precision` the hub's fp16 files are
    downloaded instead of the fp32 ones. Without `vae` the source's autoencoder, if any, is ignored: `with_vae` adds
    one. Raises SourceError and CorruptError.
    """
    found = find_source(f"--{role}", spec, fetch_pipeline, precision, f"{KINDS}, or 'mini'")
    if isinstance(found, Path):
        return open_checkpoint_file(found, role)
    return open_pipeline(found.folder, _CLASSES[role], name=found.name, variant=found.variant, vae=vae)


def find_source(option: str, spec: str | Path, fetch: Fetch, precision: str, expected: str = KINDS) -> Snapshot | Path:
    """Return the file or the model's folder that `option` names; `fetch` downloads that of a hub id.

    A local file or folder is preferred to a hub id of the same name. Raises SourceError, which ends with what was
    `expected`, if it is none of these, and what `fetch` raises.
    """
    path = Path(spec)
    if path.is_dir():
        return Snapshot(path, known_as(path.resolve()), "")
    if is_file(path):
        return path
    hub_id = parse_hub_id(str(spec))
    if hub_id is None:
        raise SourceError(f"{option} {spec}: no such folder or file; {expected}")
    return fetch(hub_id, half=precision in HALF)


def folder_config(
    folder: Path, where: str, class_name: str, takes: str, others: Mapping[str, str] = _NO_OTHERS
) -> dict[str, Any]:
    """Return the config of the model in `folder`, which must be a `class_name` if it states its class.

    Raises SourceError, which begins with `where`, for a folder without a config, and for another class: it names that
    as in `others`, and ends with what the option `takes`. Raises CorruptError for broken JSON.
    """
    if not (folder / "config.json").is_file():
        raise SourceError(f"{where}: has no config.json, so it is not a diffusers model; {KINDS}")
    config = read_json(folder / "config.json")
    found = config.get("_class_name", class_name)
    if found != class_name:
        raise SourceError(f"{where}: is {others.get(found, f'a {found}')}; {takes}")
    return config


def open_pipeline(
    root: Path, expected_class: str, *, name: str = "", variant: str = "", vae: bool = True
) -> PipelineSource:
    """Read the diffusers folder at `root`, which must hold a base (`expected_class` BASE_CLASS) or a refiner.

    Either may have been saved as a pipeline of the other's class: the UNet and the encoders decide. The manifest
    records it under `name`, by default the folder's; weights of `variant` ("fp16") are preferred. Without `vae` its
    autoencoder, if any, is ignored. Raises SourceError for a folder that is missing, incomplete, or of another class;
    CorruptError for broken JSON.
    """

    def model(component: str, stem: str, config: dict[str, Any]) -> Parts:
        folder = root / component
        return folder, unquantized(config), partial(open_folder, folder, stem, variant, config)

    return _read(root, expected_class, root, name or known_as(root.resolve()), model, {}, vae=vae)


def open_folder(folder: Path, stem: str, variant: str, config: dict[str, Any]) -> Checkpoint:
    """Open the weights of a model's folder, with the quantization that its `config` states; see open_checkpoint."""
    return open_checkpoint(folder, stem, variant, read_quantization(config, str(folder)))


def open_checkpoint_file(path: Path, role: Role, *, configs: Path | None = None) -> PipelineSource:
    """Read the single-file checkpoint at `path`, with SDXL's published configs and tokenizers.

    If given, the diffusers folder `configs` provides them instead. Raises SourceError for a file of another kind,
    CorruptError for a broken one.
    """
    file = open_single_file(path, role)
    warn_of_unused(file)

    def model(component: str, _: str, config: dict[str, Any]) -> Parts:
        if component == "unet":
            config = outlined(file, config)
        return path / component, config, partial(file.checkpoint, component, config)

    root = PUBLISHED / role if configs is None else configs
    schedule = said_schedule(file.tensors, file.metadata, str(path), log.warning)
    return _read(root, _CLASSES[role], path, known_as(path), model, schedule)


def warn_of_unused(file: SingleFile) -> None:
    """Warn of a file's tensors that belong to no component; raise SourceError for one that would change the model."""
    unused = file.unused()
    if unused:
        log.warning("%s: ignored %d tensors that belong to no component, for example %s", file.path, len(unused),
                    unused[0])  # fmt: skip


def outlined(file: SingleFile, config: dict[str, Any]) -> dict[str, Any]:
    """Return a UNet's `config` with the file's blocks and channels; warn of blocks that no published model has."""
    found, name = config_of(config, file.outline(), str(file.path))
    if name.startswith("a "):
        log.warning("%s: has %s, read from its tensors; is the checkpoint complete?", file.path, name)
    return found | {"in_channels": file.channels()} if file.channels() == INPAINTING else found


def open_vae(spec: str | Path, *, precision: str = "fp32", configs: Path | None = None) -> ModelSource:
    """Open an autoencoder to replace a pipeline's, from its own folder, a pipeline's, a hub id, or a single file.

    A single file has LDM names, with or without ``first_stage_model.``, or diffusers' names. Its config is the
    published one, or the folder `configs`' ``config.json``. Raises SourceError and CorruptError.
    """
    found = find_source("--vae", spec, fetch_vae, precision)
    if isinstance(found, Path):
        file = open_single_file(found, "vae")
        if file.kind == "vae":
            warn_of_unused(file)
        config = read_json((PUBLISHED / "base" / "vae" if configs is None else configs) / "config.json")
        return ModelSource(str(found), known_as(found), _VAE_CLASS, config, partial(file.checkpoint, "vae", config))
    return _vae_folder(found)


def open_tiny_vae(spec: str | Path, *, precision: str = "fp32") -> ModelSource:
    """Open a tiny autoencoder, diffusers' AutoencoderTiny, from its folder or a hub id. Raises SourceError.

    Its latents must be those of the pipeline's autoencoder; `plan_components` checks their number and size.
    """
    found = find_source("--tiny-vae", spec, fetch_vae, precision, "give a diffusers folder or a hub id (owner/name)")
    takes = f"--tiny-vae takes an {_TINY_CLASS} of SDXL, such as madebyollin/taesdxl"
    if isinstance(found, Path):
        raise SourceError(f"--tiny-vae {spec}: is a single file; give the folder or the hub id of an {_TINY_CLASS}")
    config = folder_config(found.folder, f"--tiny-vae {found.folder}", _TINY_CLASS, takes)
    opened = partial(open_folder, found.folder, _STEMS["diffusers"], found.variant, config)
    return ModelSource(str(found.folder), found.name, _TINY_CLASS, unquantized(config), opened)


def with_tiny_vae(pipeline: PipelineSource, tiny: ModelSource) -> PipelineSource:
    """Return `pipeline` with a tiny autoencoder beside its own."""
    return replace(pipeline, models=pipeline.models | {"vae_tiny": tiny})


def with_vae(pipeline: PipelineSource, vae: ModelSource) -> PipelineSource:
    """Return `pipeline` with another autoencoder; `plan_components` checks that it fits."""
    return replace(pipeline, models=pipeline.models | {"vae": vae})


def _vae_folder(found: Snapshot) -> ModelSource:
    inner = (found.folder / "vae" / "config.json").is_file()
    folder, name = (found.folder / "vae", f"{found.name}/vae") if inner else (found.folder, found.name)
    config = folder_config(folder, f"--vae {found.folder}", _VAE_CLASS, f"--vae takes an {_VAE_CLASS}")
    opened = partial(open_folder, folder, _STEMS["diffusers"], found.variant, config)
    return ModelSource(str(folder), name, _VAE_CLASS, unquantized(config), opened)


def is_file(path: Path) -> bool:
    """Return whether a source means a file: it exists as one, or has a weight file's suffix."""
    return path.is_file() or path.suffix in (".safetensors", *PICKLED)


def _read(
    configs: Path,
    expected_class: str,
    root: Path,
    name: str,
    model: Callable[[str, str, dict[str, Any]], Parts],
    schedule: dict[str, Any],
    *,
    vae: bool = True,
) -> PipelineSource:
    """Read the configs of a pipeline; `model` maps (component, stem, config) to its (location, config, opener)."""
    index = _read_index(configs, expected_class)
    parts = {part: value for part, value in index.items() if isinstance(value, list) and value and value[0]}
    if not vae:
        parts.pop("vae", None)
    # The first encoder is optional, as in diffusers, but it comes with its tokenizer.
    pair = [part for part in ("text_encoder", "tokenizer") if "text_encoder" in parts or "tokenizer" in parts]
    required = [part for part in (*_REQUIRED, *pair) if vae or part != "vae"]
    missing = [part for part in required if part not in parts or not (configs / part).is_dir()]
    if missing:
        remedy = "give an autoencoder with --vae, or " if missing == ["vae"] else ""
        raise SourceError(f"{configs}: has no {', '.join(missing)}; {remedy}download the whole model folder")
    models: dict[str, ModelSource] = {}
    for component in (part for part in _MODELS if part in parts):
        library, class_name = _class(parts[component], configs / component)
        config = read_json(configs / component / "config.json")
        place, config, opener = model(component, _STEMS[library], config)
        models[component] = ModelSource(str(place), f"{name}/{component}", class_name, config, opener)
    found = {component: source.config for component, source in models.items()}
    check_role(_ROLES[expected_class], index, found, configs)
    scheduler_file = configs / "scheduler" / "scheduler_config.json"
    scheduler_config = read_json(scheduler_file) | schedule
    scheduler_class = _class(parts["scheduler"], configs / "scheduler", ("diffusers",))[1]
    return PipelineSource(
        root=root,
        name=name,
        models=models,
        tokenizers={part: configs / part for part in ("tokenizer", "tokenizer_2") if part in parts},
        scheduler=read_scheduler(scheduler_config, str(scheduler_file if configs == root else root), scheduler_class),
        requires_aesthetics_score=needs_score(_ROLES[expected_class], index, found),
        force_zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", True)),
        index=index,
        scheduler_config=scheduler_config,
    )


def _read_index(root: Path, expected_class: str) -> dict[str, Any]:
    option = f"--{_ROLES[expected_class]}"
    if not root.is_dir():
        raise SourceError(f"{option} {root}: no such folder; give the folder of a diffusers model, or 'mini'")
    if not (root / "model_index.json").is_file():
        raise SourceError(f"{option} {root}: has no model_index.json, so it is not a diffusers pipeline folder;"
                          " give a folder that save_pretrained wrote")  # fmt: skip
    index = read_json(root / "model_index.json")
    check_class(index.get("_class_name"), f"{option} {root}")
    return index


def _class(entry: list[Any], where: Path, libraries: Collection[str] = tuple(_STEMS)) -> tuple[str, str]:
    """Return (library, class) of an entry of the index."""
    library, class_name = [str(part) for part in entry[:2]] if len(entry) >= 2 else ("", "")
    if library not in libraries:
        raise SourceError(f"{where}: model_index.json names {library}.{class_name}; custom code is never loaded")
    return library, class_name
