"""The files beside the graphs of an optimum folder: model_index.json, configs, scheduler and tokenizers."""

__all__ = ["component_config", "model_index", "roles", "scheduler_config", "tokenizer_files", "tokenizer_roles"]

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sdxl_trt.engines import CorruptError
from sdxl_trt.engines.bundle import Component, Manifest, Stage, TextEncoder, Tokenizer
from sdxl_trt.export.sources import BASE_CLASS, INPAINT_CLASS, REFINER_CLASS, PipelineSource, read_json

_LIBRARIES = {"text_encoder": "transformers", "text_encoder_2": "transformers", "unet": "diffusers"}


def roles(stage: Stage) -> dict[str, str]:
    """Return {folder: component} of the graphs of `stage`, under diffusers' names."""
    found = {f"text_encoder{suffix}": encoder.component for suffix, encoder in _encoders(stage)}
    found |= {"unet": stage.unet, "vae_decoder": stage.vae.decoder}
    return found if stage.vae.encoder is None else found | {"vae_encoder": stage.vae.encoder}


def tokenizer_roles(stage: Stage) -> dict[str, str]:
    """Return {folder: tokenizer} of `stage`, under diffusers' names."""
    return {f"tokenizer{suffix}": encoder.tokenizer for suffix, encoder in _encoders(stage)}


def _encoders(stage: Stage) -> list[tuple[str, TextEncoder]]:
    """Return (suffix of the folder's name, encoder); a single encoder is diffusers' second."""
    return list(zip(("", "_2")[-len(stage.text_encoders) :], stage.text_encoders, strict=True))


def component_config(role: str, component: Component, stage: Stage) -> dict[str, Any]:
    """Return the source's config; extra that optimum reads are set explicitly from the graph and the bundle."""
    if role == "unet":
        extra: dict[str, Any] = {"sample_size": stage.sample_size, "time_cond_proj_dim": None}
    elif role.startswith("vae_"):
        vae = stage.vae
        extra = {"scaling_factor": vae.scaling_factor, "latents_mean": vae.latents_mean, "latents_std": vae.latents_std}
        # fp16 was chosen because this autoencoder does not overflow; optimum's upcast to fp32 could only fail.
        extra |= {"force_upcast": False} if component.precision == "fp16" else {}
    else:
        outputs = {spec.name: spec for spec in component.outputs}
        extra = {"num_hidden_layers": sum(name.startswith("hidden_states.") for name in outputs) - 1}
        extra |= {"projection_dim": outputs["text_embeds"].shape[-1]} if "text_embeds" in outputs else {}
    return component.config | extra


def _pipeline_class(stage_name: str, unet: Component, stage: Stage) -> str:
    if unet.input("sample").shape[1] != stage.vae.latent_channels:
        return INPAINT_CLASS
    return BASE_CLASS if stage_name == "base" else REFINER_CLASS


def model_index(stage_name: str, manifest: Manifest, scheduler: dict[str, Any]) -> dict[str, Any]:
    """Return model_index.json of a stage ("base" or "refiner").

    The classes are the source's, which optimum maps to its own. Every setting is explicit, since optimum's defaults
    are the base's.
    """
    stage = manifest.stages()[stage_name]
    parts = roles(stage)
    classes = {role: manifest.components[name].source.class_name for role, name in parts.items()}
    index: dict[str, Any] = {
        "_class_name": _pipeline_class(stage_name, manifest.components[stage.unet], stage),
        "_diffusers_version": version("diffusers"),
        "force_zeros_for_empty_prompt": stage.force_zeros_for_empty_prompt,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        "vae": ["diffusers", classes["vae_decoder"]],
    }
    if stage_name == "refiner":
        index["requires_aesthetics_score"] = "aesthetic_score" in stage.time_ids
    index |= {role: [library, classes[role]] for role, library in _LIBRARIES.items() if role in parts}
    return index | {role: ["transformers", "CLIPTokenizer"] for role in tokenizer_roles(stage)}


def scheduler_config(source: PipelineSource) -> dict[str, Any]:
    """Return the source's whole scheduler config: optimum runs diffusers' class, which may read more than we do."""
    return source.scheduler_config | {"_class_name": source.scheduler.class_name}


def tokenizer_files(path: Path, record: Tokenizer) -> dict[str, str]:
    """Return {file: text} of the bundle's tokenizer at `path` in the form of published models.

    Every version of transformers reads vocabulary and merges; version 4 does not read a ``tokenizer.json`` alone,
    which is what version 5 writes.
    """
    content = read_json(path)
    try:
        model, added = content["model"], {token["content"]: token["id"] for token in content["added_tokens"]}
        vocabulary: dict[str, int] = model["vocab"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        token_of = {number: token for token, number in (vocabulary | added).items()}
        special = {
            "bos_token": token_of[record.bos_id],
            "eos_token": token_of[record.eos_id],
            "pad_token": token_of[record.pad_id],
            "unk_token": model["unk_token"],
        }
    except (KeyError, TypeError) as exc:
        raise CorruptError(f"{path}: not a CLIP tokenizer ({exc!r}); run export-engines again") from exc
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": record.max_length, "do_lower_case": True}
    extra = {token: number for token, number in added.items() if token not in vocabulary}
    files = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "special_tokens_map.json": json.dumps(special, indent=2),
        "tokenizer_config.json": json.dumps(settings | special, indent=2),
    }
    return files | ({"added_tokens.json": json.dumps(extra, indent=2)} if extra else {})
