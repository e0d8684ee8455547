"""The LoRAs of a workflow: those that the bundle has fused, and those that are files, applied to each request."""

__all__ = ["NO_FILES", "LoraFiles", "check_loras", "side_loras", "stage_loras"]

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.bundle import LoraRecord, Manifest
from sdxl_trt.engines.host import shell_word
from sdxl_trt.runtime.adapters import LoraUse, find_lora, find_named, lora_digest
from sdxl_trt.runtime.comfyui.workflow import Clip, Conditioning, LoraNode, Loras, Sampling, prompts_of
from sdxl_trt.runtime.request import StageName

log = logging.getLogger("sdxl_trt.runtime")
_SHOWN = 80


@dataclass(frozen=True)
class LoraFiles:
    """Where the LoRAs of a workflow are found: `known` files by name, then those in `folder`, by ComfyUI's paths.

    `known` has a file for each content that a record states of a name; if there are several, `folder` says which a path
    means. `fused` are the names of those that the base's weights contain, with their digests.
    """

    folder: Path | None = None
    known: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    fused: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def beside(self, manifest: Manifest) -> "LoraFiles":
        """Return these files for a bundle, which may have fused LoRAs."""
        names = {record.name for record in manifest.loras}
        return replace(self, fused={name: frozenset(record.sha256 for record in manifest.loras if record.name == name)
                                    for name in names})  # fmt: skip

    def of(self, stage: StageName) -> "LoraFiles":
        """Return these files for a stage: LoRAs are fused into the base alone."""
        return self if stage == "base" else replace(self, fused={})

    def uses(self, loras: Loras) -> list[LoraUse]:
        """Return the LoRAs of a chain that have an effect, each as its file and its strength there, in order.

        Raises UsageError that names the node whose file is missing.
        """
        return [LoraUse(str(self._find(each)), each.strength) for each in loras
                if each.strength and not self.has_fused(each)]  # fmt: skip

    def has_fused(self, lora: LoraNode) -> bool:
        """Return whether a node means a fused LoRA: one of its name, unless `folder` has another file at its path.

        Raises what `lora_digest` raises for that file.
        """
        digests = self.fused.get(_file(lora.name))
        if digests is None:
            return False
        own = [] if self.folder is None else find_named(self.folder, lora.name, _place(lora), exact=True)
        return not own or lora_digest(own[0]) in digests

    def _find(self, lora: LoraNode) -> Path:
        file, where = _file(lora.name), _place(lora)
        known = self.known.get(file, ())
        if len(known) == 1:
            return known[0]
        path = None if self.folder is None else find_lora(lora.name, self.folder, where, exact=True)
        if known and (path is None or lora_digest(path) not in map(lora_digest, known)):
            raise UsageError(f"{where}: the picture was made with {len(known)} files called {file[:_SHOWN]!r}; give the"
                             " folder that has each at the path in the workflow with --lora-dir DIR")  # fmt: skip
        if path is None:
            option = shell_word(f"{file[:_SHOWN]}:{lora.strength:g}")
            raise UsageError(f"{where}: LoRA {file[:_SHOWN]} at strength {lora.strength:g} is not in the bundle; give"
                             " the folder that holds it with --lora-dir DIR, or export a bundle with it: export-engines"
                             f" --lora {option}")  # fmt: skip
        return path


NO_FILES = LoraFiles()


def stage_loras(sampling: Sampling, files: LoraFiles) -> tuple[LoraUse, ...]:
    """Return the LoRAs of a sampler's model and of its first positive prompt's encoders, as those of a request.

    If the two chains name the same files in order, each file has both strengths; otherwise every entry changes only the
    UNet or only the encoders.
    """
    unet, text = files.uses(sampling.model.loras), _text_uses(sampling.positive[0].clip, files)
    if text is None:
        return tuple(unet)
    if [use.path for use in unet] == [use.path for use in text]:
        scales = [None if other.scale == use.scale else other.scale for use, other in zip(unet, text, strict=True)]
        return tuple(use._replace(text_scale=scale) for use, scale in zip(unet, scales, strict=True))
    return (*(use._replace(text_scale=0.0) for use in unet),
            *(use._replace(scale=0.0, text_scale=use.scale) for use in text))  # fmt: skip


def side_loras(prompt: Conditioning, sampling: Sampling, files: LoraFiles) -> tuple[LoraUse, ...] | None:
    """Return the LoRAs of a prompt's encoders; None if they are those of the sampler's first positive prompt."""
    uses = _text_uses(prompt.clip, files)
    return None if uses is None or uses == _text_uses(sampling.positive[0].clip, files) else tuple(uses)


def _text_uses(clip: Clip, files: LoraFiles) -> list[LoraUse] | None:
    """Return the LoRAs of text encoders; None for those of a Conditioning built in code, which follow the UNet."""
    return files.uses(clip.loras) if clip.checkpoint else None


def check_loras(
    samplings: Iterable[Sampling], found: Mapping[str, StageName], manifest: Manifest, files: LoraFiles
) -> None:
    """Raise UsageError for a LoRA whose file is missing, and for a fused one at another strength.

    Warns of LoRAs that only the bundle has.
    """
    fused = _fused(manifest.loras)
    unnamed = set(fused)
    for sampling in samplings:
        stage = found[sampling.model.checkpoint]
        own = files.beside(manifest).of(stage)
        own.uses(sampling.model.loras)
        for prompt in prompts_of((*sampling.positive, *sampling.negative)):
            own.uses(prompt.clip.loras)
            if stage == "base":
                unnamed -= _check_fused(sampling, prompt, fused, own)
    for file in sorted(unnamed):
        log.warning("the bundle has LoRA %s at strength %s, which the workflow does not name", file,
                    _text_of(*fused[file]))  # fmt: skip


def _check_fused(
    sampling: Sampling, prompt: Conditioning, fused: Mapping[str, tuple[float, float]], files: LoraFiles
) -> set[str]:
    """Return the fused LoRAs that a sampler names with a prompt; raise UsageError for one at another strength."""
    unet = _strengths(sampling.model.loras, files)
    # A Conditioning built in code may name no checkpoint for its encoders.
    text = _strengths(prompt.clip.loras, files) if prompt.clip.checkpoint else unet
    named = fused.keys() & {*unet, *text}
    for file in sorted(named):
        asked, has = (unet.get(file, 0.0), text.get(file, 0.0)), fused[file]
        if not all(math.isclose(one, other, abs_tol=1e-9) for one, other in zip(asked, has, strict=True)):
            raise _other_strength(sampling, prompt, file, asked, has)
    return named


def _other_strength(
    sampling: Sampling, prompt: Conditioning, file: str, asked: tuple[float, float], has: tuple[float, float]
) -> UsageError:
    option = f"{file}:{asked[0]:g}" + ("" if asked[0] == asked[1] else f":{asked[1]:g}")
    return UsageError(f"node {sampling.node} with the prompt of node {prompt.node}: LoRA {file} at strength"
                      f" {_text_of(*asked)} is not in the bundle (the bundle has it at {_text_of(*has)}, fused into its"
                      " weights); export one without it, or with it at this strength: export-engines --lora"
                      f" {shell_word(option)}")  # fmt: skip


def _text_of(unet: float, text: float) -> str:
    return f"{unet:g}" if unet == text else f"{unet:g}, {text:g} on the text encoders,"


def _fused(records: Iterable[LoraRecord]) -> dict[str, tuple[float, float]]:
    fused: dict[str, tuple[float, float]] = {}
    for record in records:
        before = fused.get(record.name, (0.0, 0.0))
        fused[record.name] = before[0] + record.scale, before[1] + record.encoder_scale
    return fused


def _strengths(loras: Sequence[LoraNode], files: LoraFiles) -> dict[str, float]:
    """Return the strength of each fused LoRA; the strengths of a repeated one add up."""
    found: dict[str, float] = {}
    for each in filter(files.has_fused, loras):
        file = _file(each.name)
        found[file] = found.get(file, 0.0) + each.strength
    return found


def _place(lora: LoraNode) -> str:
    return f"node {lora.node[:20]} (LoraLoader)"


def _file(name: str) -> str:
    """Return the file's name of a path in a workflow, with the separators of any operating system."""
    return PurePosixPath(name.replace("\\", "/")).name
