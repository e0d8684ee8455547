"""Models from the Hugging Face hub or its cache; only the files that an export reads are downloaded."""

__all__ = ["HubId", "Snapshot", "fetch_controlnet", "fetch_pipeline", "fetch_unet", "fetch_vae", "parse_hub_id"]

import contextlib
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sdxl_trt.engines import SdxlTrtError, SourceError, UsageError, explain_os_error
from sdxl_trt.engines.host import NO_LOCKS
from sdxl_trt.export.checkpoints import find_weights, shard_names

log = logging.getLogger("sdxl_trt.export")
_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?")
_STEMS = {
    "text_encoder": "model", "text_encoder_2": "model", "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}  # fmt: skip
_CONFIGS = re.compile(
    r"model_index\.json|scheduler/scheduler_config\.json|(unet|vae|text_encoder|text_encoder_2)/config\.json"
    r"|tokenizer(_2)?/(added_tokens|special_tokens_map|tokenizer|tokenizer_config|vocab)\.json"
    r"|tokenizer(_2)?/merges\.txt"
)
Choose = Callable[[list[str]], tuple[list[str], str]]


@dataclass(frozen=True)
class HubId:
    """A model on the hub: ``owner/name`` and a branch, tag or commit."""

    repo: str
    revision: str = "main"

    def __str__(self) -> str:
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"


@dataclass(frozen=True)
class Snapshot:
    """A model in the cache: its folder, its name with the commit, and the variant of weights to read ("": plain)."""

    folder: Path
    name: str
    variant: str


def parse_hub_id(spec: str) -> HubId | None:
    """Return `spec` as a hub id, or None if it cannot be one: a path of another depth, a file name, a bare name."""
    match = _ID.fullmatch(spec)
    if match is None or spec.startswith((".", "/")) or spec.endswith((".safetensors", ".ckpt")):
        return None
    return HubId(match["repo"], match["revision"] or "main")


def fetch_pipeline(hub_id: HubId, *, half: bool) -> Snapshot:
    """Return the pipeline `hub_id` in the cache, after downloading missing files.

    With `half` the fp16 files are used if every component has them. Raises SourceError, with the remedy, for a model
    that is not available; HF_HOME, HF_HUB_OFFLINE and the login of huggingface_hub are respected.
    """
    return _fetch(hub_id, _choose_pipeline, half=half)


def fetch_vae(hub_id: HubId, *, half: bool) -> Snapshot:
    """Return the autoencoder `hub_id` in the cache: its own repository or a pipeline's ``vae/``; see fetch_pipeline."""
    return _fetch(hub_id, _choose_vae, half=half)


def fetch_unet(hub_id: HubId, *, half: bool) -> Snapshot:
    """Return the UNet `hub_id` in the cache: its own repository or a pipeline's ``unet/``; see fetch_pipeline."""
    return _fetch(hub_id, _choose_unet, half=half)


def fetch_controlnet(hub_id: HubId, *, half: bool) -> Snapshot:
    """Return the ControlNet `hub_id`, a repository of its own, in the cache; see fetch_pipeline."""
    return _fetch(hub_id, _choose_model, half=half)


def _choose_pipeline(names: list[str]) -> tuple[list[str], str]:
    return [name for name in names if _CONFIGS.fullmatch(name)], "model_index.json"


def _choose_vae(names: list[str]) -> tuple[list[str], str]:
    if "model_index.json" in names:
        return [name for name in names if name in ("model_index.json", "vae/config.json")], "vae/config.json"
    return [name for name in names if name == "config.json"], "config.json"


def _choose_unet(names: list[str]) -> tuple[list[str], str]:
    if "model_index.json" in names:
        wanted = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
        return [name for name in names if name in wanted], "unet/config.json"
    return [name for name in names if name == "config.json"], "config.json"


def _choose_model(names: list[str]) -> tuple[list[str], str]:
    return [name for name in names if name == "config.json"], "config.json"


def _fetch(hub_id: HubId, choose: Choose, *, half: bool) -> Snapshot:
    try:
        return _download(hub_id, choose, half=half)
    except SdxlTrtError:
        raise
    except Exception as exc:  # errors of httpx, the system and the hub library have no common base
        error = _explain(hub_id, exc)
        folder = _cached(hub_id) if isinstance(error, SourceError) else None
        if folder is None:
            raise error from exc
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        try:
            _, variant = _wanted(hub_id, names, choose, half=half)
        except SourceError as incomplete:
            raise SourceError(f"{incomplete} ({error})") from exc
        log.info("%s; using the copy in the cache", error)
    return Snapshot(folder, f"{hub_id.repo}@{folder.name}", variant)


def _download(hub_id: HubId, choose: Choose, *, half: bool) -> Snapshot:
    import huggingface_hub  # noqa: PLC0415 - only for a hub id

    info = huggingface_hub.HfApi().model_info(hub_id.repo, revision=hub_id.revision)
    names = [sibling.rfilename for sibling in info.siblings or ()]
    files, variant = _wanted(hub_id, names, choose, half=half)
    with _bars_on_terminals_only():
        # By name, not commit, so that the cache can resolve the name offline later.
        folder = Path(huggingface_hub.snapshot_download(hub_id.repo, revision=hub_id.revision, allow_patterns=files))
    return Snapshot(folder, f"{hub_id.repo}@{folder.name}", variant)


def _wanted(hub_id: HubId, names: list[str], choose: Choose, *, half: bool) -> tuple[list[str], str]:
    """Return the files to download, and the variant of the weights among them."""
    configs, entry = choose(names)
    if entry not in names:
        single = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
        remedy = f"download its {single[0]} and give the file" if single else "check the name"
        raise SourceError(f"{hub_id}: has no {entry}, so it is not a diffusers model; {remedy}")
    models = {
        name.rpartition("/")[0]: name for name in configs if name.endswith("/config.json") or name == "config.json"
    }
    inside = {folder: _inside(names, folder) for folder in models}
    whole = half and all(_has_half(inside[folder], _stem(folder)) for folder in models)
    files = list(configs)
    for folder in models:
        where, stem = f"{hub_id}/{folder}".rstrip("/"), _stem(folder)
        weights = find_weights(inside[folder], stem, where, "fp16" if whole else "")
        shards = shard_names(inside[folder], stem, weights)
        files += [f"{folder}/{name}".lstrip("/") for name in (weights, *shards)]
    return files, "fp16" if whole else ""


def _stem(folder: str) -> str:
    return _STEMS[folder or "vae"]


def _inside(names: Iterable[str], folder: str) -> list[str]:
    return [name.rpartition("/")[2] for name in names if name.rpartition("/")[0] == folder]


def _has_half(names: list[str], stem: str) -> bool:
    try:
        return "fp16" in find_weights(names, stem, "", "fp16").removeprefix(stem)
    except SourceError:
        return False


def _cached(hub_id: HubId) -> Path | None:
    """Return the folder of `hub_id` in the cache, or None."""
    from huggingface_hub import errors, try_to_load_from_cache  # noqa: PLC0415

    try:
        entries = [
            try_to_load_from_cache(hub_id.repo, entry, revision=hub_id.revision)
            for entry in ("model_index.json", "config.json")
        ]
    except errors.HFValidationError:
        return None
    return next((Path(entry).parent for entry in entries if isinstance(entry, str)), None)


@contextlib.contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    from huggingface_hub.utils.tqdm import (  # noqa: PLC0415
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _explain(hub_id: HubId, exc: Exception) -> SdxlTrtError:
    """Return this project's error for a hub error, with the remedy."""
    from huggingface_hub import constants, errors  # noqa: PLC0415

    # Order matters: GatedRepoError is a subclass of RepositoryNotFoundError, and every HTTP error is an OSError.
    known: dict[type[Exception], str] = {
        errors.OfflineModeIsEnabled: f"is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; unset"
        " it once, or give a local folder",
        errors.GatedRepoError: f"is gated; accept its licence at {constants.ENDPOINT}/{hub_id.repo} and log in with"
        " 'hf auth login'",
        errors.RepositoryNotFoundError: "is neither a local folder nor a model on the hub that you can read; check the"
        " name, or log in with 'hf auth login'",
        errors.RevisionNotFoundError: f"has no revision {hub_id.revision}; check the part after @",
        errors.HFValidationError: "is neither a local folder nor a valid hub name; check the name",
        errors.EntryNotFoundError: "lost a file during the download; try again",
    }
    for kind, meaning in known.items():
        if isinstance(exc, kind):
            return SourceError(f"{hub_id}: {meaning}")
    if isinstance(exc, OSError):
        if exc.errno in NO_LOCKS:
            return UsageError(f"downloading {hub_id}: the file system of {constants.HF_HUB_CACHE} does not support"
                              f" locks ({exc.strerror}); set HF_HOME to a folder on a local disk")  # fmt: skip
        explained = explain_os_error(exc, f"downloading {hub_id}")
        if type(explained) is not SdxlTrtError:  # an error of the disk, not of the network
            return explained
    reason = next(iter(str(exc).splitlines()), "") or type(exc).__name__
    return SourceError(f"{hub_id}: the hub cannot be reached ({reason}); check the network, or give a local folder")
