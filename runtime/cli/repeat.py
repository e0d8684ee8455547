"""`--from`: the settings of an earlier picture, for the options that the command line leaves out."""

__all__ = ["check_embeddings", "check_repeated", "repeated"]

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.host import sha256_file, shell_word
from sdxl_trt.runtime.adapters import EmbeddingFact, LoraUse, find_named, find_recorded
from sdxl_trt.runtime.cli.options import make_parser
from sdxl_trt.runtime.controls import ControlUse, find_control
from sdxl_trt.runtime.images import read_input
from sdxl_trt.runtime.pipeline import Batch, Chain, ImageSettings, read_settings
from sdxl_trt.runtime.request import Request, settings_of

_SETTINGS = settings_of(Request)
_PROMPTS = [name for name in _SETTINGS if name.removesuffix("_2") in ("prompt", "negative")]
_LOADED = {"loras": "LoRAs", "refiner_loras": "LoRAs", "controls": "ControlNet pictures", "embeddings": "embeddings",
           "files": "pictures or masks"}  # fmt: skip
"""What a workflow loads, by the fields of a record that state it."""


def repeated(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options in `argv`, completed by those of the picture that `--from` names.

    A workflow's picture is repeated by the graph it carries, a contact sheet by its sweep. A handoff keeps its fraction
    of the steps if another number of steps is given. `made_with` is the bundle that the picture names.
    Raises UsageError for a picture that cannot be repeated.
    """
    parser = make_parser()
    stated = parser.parse_args(argv)
    source = stated.source
    settings = read_settings(source)
    if stated.workflow is not None:
        raise UsageError("--from and --workflow both state a picture to be made; give one of them")
    if settings.workflow:
        parser.set_defaults(
            workflow=source,
            **{
                name: getattr(settings, name)
                for name, each in _SETTINGS.items()
                if each.workflow == "beside" and each.is_repeated
            },
        )
    else:
        parser.set_defaults(**_defaults(settings))
    arguments = parser.parse_args(argv)
    arguments.sweep = stated.sweep or list(settings.sweep)
    arguments.made_with, arguments.recorded = settings.bundle, settings
    if settings.injected_latents and arguments.latents is None:
        raise UsageError(f"--from {source}: was made from noise of its own; give that with --latents FILE.npy")
    _take_embeddings(arguments, settings, source)
    if not settings.workflow:
        _take_handoff(arguments, settings)
        _take_image(arguments, settings, source)
        _take_mask(arguments, settings, source)
        _take_controls(arguments, settings, source)
        # Guess mode is about ControlNets: without them only an option that is given now is a mistake.
        arguments.control_guess &= stated.control_guess or any(arguments.controls or ())
    _take_loras(arguments, settings, source)
    return arguments


def check_repeated(arguments: argparse.Namespace, work: Batch | Chain) -> None:
    """Raise UsageError unless the workflow of a picture loads the files that the picture's record states.

    The workflow names files, and says nothing of their contents. `work` draws it again.
    """
    recorded: ImageSettings = arguments.recorded
    image = work.runs[0].request.image
    wrong = ["pictures"] if recorded.image and (image is None or image.sha256 != recorded.image_sha256) else []
    made = work.facts()
    for name, what in _LOADED.items():
        told, now = getattr(recorded, name), made[name]
        # Older records lack the files of several runs, and a sweep may leave the refiner out.
        unknown = not told if name == "files" else bool(arguments.sweep) and not now
        if tuple(told) != tuple(now) and not unknown:
            wrong.append(what)
    if wrong:
        raise UsageError(f"--from {arguments.source}: was made with other {wrong[0]} than its workflow finds now; put"
                         f" those back, or draw it with the new ones: --workflow {shell_word(str(arguments.source))}"
                         )  # fmt: skip


def check_embeddings(arguments: argparse.Namespace, batch: Batch) -> None:
    """Raise UsageError if a prompt that is repeated finds another embedding, of the file name that the record states.

    A prompt may name a file in one of several folders, and a record has no folders.
    """
    recorded: ImageSettings = arguments.recorded
    kept = {getattr(arguments, name) for name in _PROMPTS if getattr(arguments, name) == getattr(recorded, name)}
    texts = [text for text in kept if text]
    now = batch.facts()["embeddings"]
    names = {fact.name for fact in now}
    for fact in recorded.embeddings:
        if fact not in now and fact.name in names and any(map(_naming(fact), texts)):
            raise UsageError(f"--from {arguments.source}: its prompt now finds another embedding {fact.name[:100]!r}"
                             " than the one it was made with; put that one back, or give another prompt")  # fmt: skip


def _defaults(settings: ImageSettings) -> dict[str, Any]:
    """Return the options that make the picture again, without the handoff; None leaves the default."""
    found = {}
    for name, each in _SETTINGS.items():
        if each.is_repeated:
            value = getattr(settings, name)
            # A value that only repeats another setting follows that if it is replaced. A sheet states what follows.
            stated = not each.follows or (settings.sweep and each.stage == "refiner")
            found[name] = value if stated or value != getattr(settings, each.follows) else None
    if settings.negative_aesthetic_score == _SETTINGS["negative_aesthetic_score"].default and not settings.sweep:
        # Probably not given: so it changes with the other score in a sweep of that.
        del found["negative_aesthetic_score"]
    if settings.fit in ("scale", "crop"):
        # The image gives the size.
        del found["width"], found["height"]
    return {name: value for name, value in found.items() if value is not None}


def _take_image(arguments: argparse.Namespace, settings: ImageSettings, source: Path) -> None:
    """Find the image that a run started from, unchanged, beside the picture or in the current folder."""
    if settings.image is None or arguments.image is not None or arguments.refine is not None:
        return
    path = _found(settings.image, settings.image_sha256, source)
    if path is None:
        option = "--refine" if settings.refine else "--image"
        raise UsageError(f"--from {source}: was made from {settings.image[:100]!r}, which is not beside it as it was;"
                         f" give it with {option} FILE")  # fmt: skip
    latents = read_input(path).latents
    if latents is not None and len(latents) > 1:
        raise UsageError(f"--from {source}: was made from one of {len(latents)} latents in {settings.image[:100]!r},"
                         " and does not say from which; repeat the command that made it")  # fmt: skip
    arguments.image, arguments.refine = (None, path) if settings.refine else (path, None)


def _take_mask(arguments: argparse.Namespace, settings: ImageSettings, source: Path) -> None:
    """Find the mask of a run, unchanged, beside the picture or in the current folder."""
    if settings.mask is None or arguments.mask is not None:
        return
    arguments.mask = _found(settings.mask, settings.mask_sha256, source)
    if arguments.mask is None:
        raise UsageError(f"--from {source}: was made with the mask {settings.mask[:100]!r}, which is not beside it as"
                         " it was; give it with --mask FILE")  # fmt: skip


def _found(name: str, sha256: str | None, source: Path) -> Path | None:
    """Return the file `name` beside `source` or in the current folder, if its content has this digest."""
    plain = PurePath(name).name
    places = (source.parent / plain, Path(plain)) if plain == name and plain else ()
    return next((path for path in places if _holds(path, sha256)), None)


def _take_controls(arguments: argparse.Namespace, settings: ImageSettings, source: Path) -> None:
    """Find the pictures of a picture's ControlNets, unchanged, beside it or in the current folder."""
    if arguments.controls is None and settings.controls:
        arguments.controls = [
            ControlUse(str(find_control(fact, source)), fact.scale, fact.start, fact.end, fact.net, fact.side)
            for fact in settings.controls
        ]


def _take_loras(arguments: argparse.Namespace, settings: ImageSettings, source: Path) -> None:
    """Find the LoRAs of a picture, unchanged: in --lora-dir, beside the picture or in the current folder.

    Options replace those of their stage. A workflow states its LoRAs itself: their files are `lora_files`, by name, one
    for each content.
    """
    files: dict[str, dict[str, Path]] = {}
    for name in ("loras", "refiner_loras"):
        facts = getattr(settings, name)
        if getattr(arguments, name) is not None or not facts:
            continue
        # A workflow's LoRAs are part of its graph, so no option leaves them out.
        hint = "" if settings.workflow else f", or leave it out with {_SETTINGS[name].word} none"
        paths = [find_recorded(fact, arguments.lora_dir, source, hint) for fact in facts]
        for fact, path in zip(facts, paths, strict=True):
            files.setdefault(fact.name, {})[fact.sha256] = path
        if not settings.workflow:
            scales = [(fact.scale, fact.text_scale) for fact in facts]
            setattr(arguments, name, [LoraUse(str(path), *own) for path, own in zip(paths, scales, strict=True)])
    arguments.lora_files = {name: tuple(paths.values()) for name, paths in files.items()}


def _take_embeddings(arguments: argparse.Namespace, settings: ImageSettings, source: Path) -> None:
    """Find the embeddings of the prompts that are repeated, unchanged, and the folder that they lie in.

    That is `--embedding-dir`, or without it the picture's folder or the current one.
    """
    texts = [getattr(arguments, name) or "" for name in _PROMPTS]
    wanted = [fact for fact in settings.embeddings if settings.workflow or any(map(_naming(fact), texts))]
    if not wanted:
        return
    given = arguments.embedding_dir is not None
    folders = [arguments.embedding_dir] if given else [source.parent, Path()]
    for folder in folders:
        if all(_holds_embedding(folder, fact, given=given) for fact in wanted):
            arguments.embedding_dir = folder
            return
    first = next(fact for fact in wanted if not _holds_embedding(folders[0], fact, given=given))
    place = f"in {folders[0]}" if given else "beside it"
    raise UsageError(f"--from {source}: was made with the embedding {first.name[:100]!r}, which is not {place} as it"
                     " was; give the folder that has it with --embedding-dir DIR")  # fmt: skip


def _naming(fact: EmbeddingFact) -> Callable[[str], bool]:
    """Return whether a prompt names an embedding of this file name."""
    stem = PurePath(fact.name).stem
    # In a prompt a folder of an embedding may be followed by either slash.
    return lambda text: f"embedding:{stem}" in text or f"/{stem}" in text.replace("\\", "/")


def _holds_embedding(folder: Path, fact: EmbeddingFact, *, given: bool) -> bool:
    """Return whether `folder` has the file of a record, unchanged; another of its name is refused with the prompts.

    Raises UsageError for a folder that cannot be searched if it was `given`; another one does not have the file.
    """
    if PurePath(fact.name).name != fact.name:
        return False
    try:
        found = find_named(folder, fact.name, f"--from: embedding {fact.name[:100]!r}")
    except UsageError:
        if given:
            raise
        return False
    return any(_holds(path, fact.sha256) for path in found)


def _holds(path: Path, sha256: str | None) -> bool:
    try:
        return path.is_file() and sha256_file(path) == sha256
    except (OSError, ValueError):
        return False


def _take_handoff(arguments: argparse.Namespace, settings: ImageSettings) -> None:
    stated = arguments.handoff != "auto" or arguments.no_refiner or settings.refine
    ends = (arguments.handoff_step, arguments.handoff_sigma, arguments.base_end_step, arguments.refiner_start_step)
    if stated or any(end is not None for end in ends):
        return
    if settings.sweep and settings.handoff_step is None:
        arguments.handoff, arguments.handoff_sigma = settings.handoff, settings.handoff_sigma
    elif settings.handoff_step is None:
        arguments.no_refiner = True
    elif arguments.steps == settings.steps:
        arguments.handoff_step = settings.handoff_step
    else:
        share = round(settings.handoff_step * arguments.steps / settings.steps)
        arguments.handoff_step = min(max(share, 1), max(arguments.steps - 1, 1))
