"""The text encoders of a stage: which one makes the pooled prompt, and how many tokens they read."""

__all__ = ["find_pooled", "open_tokenizers", "tokenizer_role", "without_idle_projection"]

from collections.abc import Callable, Mapping
from dataclasses import replace

from sdxl_trt.engines import SourceError
from sdxl_trt.export.graph import MetaModel, build_model
from sdxl_trt.export.sources import LoadedTokenizer, PipelineSource, load_tokenizer

Warn = Callable[[str], None]
FIRST, SECOND = "text_encoder", "text_encoder_2"


def tokenizer_role(encoder: str) -> str:
    """Return the role of the tokenizer for the encoder of this role."""
    return encoder.replace("text_encoder", "tokenizer")


def find_pooled(models: Mapping[str, MetaModel], pipeline: PipelineSource) -> str:
    """Return the role of the encoder whose text_embeds are the pooled prompt.

    diffusers uses the first encoder with a projection, but expects the width of text_encoder_2's, and fails if the two
    differ. In that case only text_encoder_2's width fits the UNet, so it is used. Raises SourceError if text_encoder_2
    has no projection.
    """
    first, second = models.get(FIRST), models[SECOND]
    if not _projects(second):
        reason = "is it swapped with text_encoder?" if first and _projects(first) else "not an SDXL model"
        raise SourceError(f"{pipeline.root}/text_encoder_2: not a CLIPTextModelWithProjection, so there is no pooled"
                          f" prompt; {reason}")  # fmt: skip
    both = first is not None and _projects(first)
    return FIRST if both and _width(models[FIRST]) == _width(second) else SECOND


def without_idle_projection(
    pipeline: PipelineSource, models: dict[str, MetaModel], pooled: str, warn: Warn
) -> PipelineSource:
    """Return `pipeline` with the first encoder as a CLIPTextModel if its projection is unused; update `models`."""
    if pooled == FIRST or FIRST not in models or not _projects(models[FIRST]):
        return pipeline
    source = pipeline.models[FIRST]
    warn(f"{source.where}: projects to {_width(models[FIRST])}, but the UNet takes text_encoder_2's pooled prompt of"
         f" {_width(models[SECOND])}; using the first encoder as a CLIPTextModel")  # fmt: skip
    plain = replace(source, class_name="CLIPTextModel")
    models[FIRST] = build_model(plain.class_name, plain.config, plain.where)
    return replace(pipeline, models=pipeline.models | {FIRST: plain})


def open_tokenizers(
    models: Mapping[str, MetaModel], pipeline: PipelineSource, warn: Warn
) -> dict[str, LoadedTokenizer]:
    """Return {role: tokenizer} for the encoders in `models`; warn if a tokenizer uses only part of the positions.

    A UNet takes the encoders' outputs concatenated token by token: raises SourceError if the tokenizers make prompts of
    different lengths.
    """
    loaded: dict[str, LoadedTokenizer] = {}
    for encoder in (name for name in (FIRST, SECOND) if name in models):
        role, where = tokenizer_role(encoder), pipeline.models[encoder].where
        positions = int(models[encoder].config["max_position_embeddings"])
        loaded[role] = load_tokenizer(pipeline.tokenizers[role], positions)
        if loaded[role].max_length < positions:
            warn(f"{where}: has {positions} positions, but its tokenizer cuts a prompt at {loaded[role].max_length}"
                 " ids, and so does the bundle, as in diffusers; for longer prompts set model_max_length in"
                 " tokenizer_config.json")  # fmt: skip
    lengths = {role: tokenizer.max_length for role, tokenizer in loaded.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{role} {length}" for role, length in lengths.items())
        raise SourceError(f"{pipeline.root}: the tokenizers make prompts of different lengths ({listed} ids), which"
                          " cannot be concatenated; give both the shorter model_max_length in"
                          " tokenizer_config.json")  # fmt: skip
    return loaded


def _projects(model: MetaModel) -> bool:
    return "text_projection.weight" in model.state


def _width(model: MetaModel) -> int:
    return int(model.config["projection_dim"])
