"""What the runtime needs of a pipeline: stages, tokenizers and schedules as the manifest records them."""

__all__ = ["stage_record", "write_tokenizers"]

from collections.abc import Container
from pathlib import Path
from typing import Any

from sdxl_trt.engines import explain_os_error
from sdxl_trt.engines.bundle import Stage, TextEncoder, Tokenizer, Vae
from sdxl_trt.export.components.components import StagePlan, time_id_names
from sdxl_trt.export.components.files import file_record
from sdxl_trt.export.components.options import TINY
from sdxl_trt.export.components.shallow import SHALLOW
from sdxl_trt.export.graph import MetaModel, vae_factor
from sdxl_trt.export.sources import LoadedTokenizer


def write_tokenizers(
    stages: dict[str, StagePlan], root: Path
) -> tuple[dict[str, Tokenizer], dict[str, dict[str, str]]]:
    """Write each distinct tokenizer once; return {name: record} of them, and {stage: {role: name}}."""
    records: dict[str, Tokenizer] = {}
    seen: dict[LoadedTokenizer, str] = {}
    names: dict[str, dict[str, str]] = {}
    for stage_name, stage in stages.items():
        names[stage_name] = {}
        for role, loaded in stage.tokenizers.items():
            if loaded not in seen:
                seen[loaded] = role if stage_name == "base" else f"refiner_{role}"
                records[seen[loaded]] = _write_tokenizer(loaded, seen[loaded], root)
            names[stage_name][role] = seen[loaded]
    return records, names


def _write_tokenizer(loaded: LoadedTokenizer, name: str, root: Path) -> Tokenizer:
    path = root / name / "tokenizer.json"
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(loaded.json)
        record = file_record(root, path)
    except OSError as exc:
        raise explain_os_error(exc, f"writing {path}") from exc
    return Tokenizer(
        file=record,
        max_length=loaded.max_length,
        bos_id=loaded.bos_id,
        eos_id=loaded.eos_id,
        pad_id=loaded.pad_id,
    )


def stage_record(stage: StagePlan, tokenizers: dict[str, str], components: Container[str]) -> Stage:
    """Return the manifest's record of a stage; `tokenizers` maps its roles to the names of the written tokenizers.

    `components` are the names of the bundle's components, among which its UNet's shallow one may be.
    """
    unet = stage.models["unet"]
    levels = 2 ** int(unet.module.num_upsamplers)
    factor = vae_factor(stage.models["vae"].config)
    encoders = [role for role in ("text_encoder", "text_encoder_2") if role in stage.roles]
    shallow = stage.roles["unet"] + SHALLOW
    return Stage(
        unet=stage.roles["unet"],
        shallow=shallow if shallow in components else None,
        text_encoders=tuple(
            TextEncoder(
                component=stage.roles[role],
                tokenizer=tokenizers[role.replace("text_encoder", "tokenizer")],
                pooled=role == stage.pooled_role,
            )
            for role in encoders
        ),
        vae=_vae(stage, stage.models["vae"], factor),
        scheduler=stage.pipeline.scheduler,
        time_ids=time_id_names(stage.pipeline),
        force_zeros_for_empty_prompt=stage.pipeline.force_zeros_for_empty_prompt,
        sample_size=_sample_size(unet),
        size_multiple=levels * factor,
    )


def _sample_size(unet: MetaModel) -> int:
    size: Any = unet.config["sample_size"]
    return int(size if isinstance(size, int) else size[0]) if size else 128


def _vae(stage: StagePlan, model: MetaModel, factor: int) -> Vae:
    config = model.config
    return Vae(
        decoder=stage.roles["vae_decoder"],
        encoder=stage.roles["vae_encoder"],
        decoder_bf16=stage.roles.get("vae_decoder_bf16"),
        encoder_bf16=stage.roles.get("vae_encoder_bf16"),
        tiny=stage.roles.get(TINY),
        tiny_scaling_factor=float(stage.models[TINY].config["scaling_factor"]) if TINY in stage.roles else 1.0,
        scaling_factor=float(config["scaling_factor"]),
        latent_channels=int(config["latent_channels"]),
        factor=factor,
        latents_mean=tuple(config["latents_mean"]) if config.get("latents_mean") else None,
        latents_std=tuple(config["latents_std"]) if config.get("latents_std") else None,
    )
