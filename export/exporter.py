"""Base and refiner in, bundle out: every component traced, streamed and recorded, the manifest last."""

__all__ = ["export_bundle"]

import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sdxl_trt.engines.bundle import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST,
    Bundle,
    Component,
    FileRecord,
    Manifest,
    Source,
    Stage,
    TensorSpec,
    TextEncoder,
    Tokenizer,
    Vae,
    read_bundle,
    write_manifest,
)
from sdxl_trt.engines.errors import UsageError, explain_os_error
from sdxl_trt.engines.files import sha256_file
from sdxl_trt.export.components import ComponentPlan, Options, StagePlan, plan_components, time_id_names
from sdxl_trt.export.graphs import make_graph, vae_factor
from sdxl_trt.export.models import MetaModel, published_name
from sdxl_trt.export.passes import simplify
from sdxl_trt.export.sources import BASE_CLASS, REFINER_CLASS, PipelineSource, open_pipeline
from sdxl_trt.export.tensors import digest_tensors
from sdxl_trt.export.to_onnx import trace
from sdxl_trt.export.tokenizers import LoadedTokenizer, load_tokenizer
from sdxl_trt.export.weights import WEIGHTS_FILE, write_weights

log = logging.getLogger("sdxl_trt.export")
GRAPH_FILE = "model.onnx"
MINI = "mini"
Progress = Callable[[str, str], None]
_DTYPES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.INT64: "int64"}


def export_bundle(
    base: Path | str = MINI,
    refiner: Path | str | None = MINI,
    out: Path | str = "sdxl-bundle",
    options: Options | None = None,
    *,
    progress: Progress | None = None,
) -> Bundle:
    """Export a base and, unless None, a refiner to the bundle folder `out`, and return it opened.

    `base` and `refiner` are diffusers folders, or ``"mini"`` for the embedded pair. `out` appears, or is replaced,
    only when everything has been written; a failure leaves it as it was. `progress` is told each component and
    what is being done to it. Raises SourceError, CorruptError, ResourceError.
    """
    options, progress = options or Options(), progress or _silent
    out = Path(out)
    _check_target(out)
    with contextlib.ExitStack() as stack:
        sources = _open_sources(base, refiner, stack)
        components, stages = plan_components(*sources, options, log.warning)
        staging = stack.enter_context(_staging(out))
        tokenizers, tokenizer_of = _write_tokenizers(stages, staging)
        manifest = Manifest(
            format=FORMAT_NAME,
            format_version=FORMAT_VERSION,
            generator=f"sdxl-trt {version('sdxl-trt')}",
            precision=options.precision,
            components={
                name: _export_component(name, plan, staging, options, progress) for name, plan in components.items()
            },
            tokenizers=tokenizers,
            base=_stage(stages["base"], tokenizer_of["base"]),
            refiner=_stage(stages["refiner"], tokenizer_of["refiner"]) if "refiner" in stages else None,
            note=_mini_note(base, refiner),
        )
        write_manifest(staging, manifest)
        read_bundle(staging)  # what cannot be opened does not replace what can
        _publish(staging, out)
    return read_bundle(out)


def _silent(component: str, stage: str) -> None:
    """Report nothing."""


def _open_sources(
    base: Path | str, refiner: Path | str | None, stack: contextlib.ExitStack
) -> tuple[PipelineSource, PipelineSource | None]:
    roots: dict[str, Path] = {}
    if MINI in (base, refiner):
        from sdxl_trt.mini.pair import materialize  # noqa: PLC0415 - only when the embedded pair is asked for

        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sdxl-trt-mini-")))
        materialize(folder)
        roots = {"base": folder / "base", "refiner": folder / "refiner"}
    base_root = roots["base"] if base == MINI else Path(base)
    opened = open_pipeline(base_root, BASE_CLASS)
    if refiner is None:
        return opened, None
    return opened, open_pipeline(roots["refiner"] if refiner == MINI else Path(refiner), REFINER_CLASS)


def _mini_note(base: Path | str, refiner: Path | str | None) -> str:
    if MINI not in (base, refiner):
        return ""
    from sdxl_trt.mini.embedded import NOTE  # noqa: PLC0415 - only when the embedded pair is asked for

    return NOTE


def _check_target(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"--out {out}: is not a folder; name a folder that does not exist yet, or a bundle to replace")
    if out.resolve() == Path.cwd() or out.is_mount():
        raise UsageError(f"--out {out}: cannot be replaced as a whole; name a folder inside it")
    if out.is_dir() and any(out.iterdir()) and not _is_bundle(out):
        raise UsageError(f"--out {out}: holds other files and is no bundle; name an empty or new folder")


def _is_bundle(folder: Path) -> bool:
    """Return whether `folder` is ours to replace: a manifest.json alone proves nothing, other programs write them."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT_NAME


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """Yield a hidden sibling of `out` that is gone at the end, unless it has become `out`."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as exc:
        raise explain_os_error(exc, f"writing to {out.parent}") from exc
    try:
        staging.chmod(0o755)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, out: Path) -> None:
    """Put `staging` in the place of `out`; what stood there is removed only once the new bundle stands."""
    retired = staging.with_suffix(".old")
    try:
        if out.exists():
            out.rename(retired)
        try:
            staging.rename(out)
        except OSError:
            if retired.exists():
                retired.rename(out)
            raise
    except OSError as exc:
        raise explain_os_error(exc, f"writing {out}") from exc
    shutil.rmtree(retired, ignore_errors=True)


def _export_component(name: str, plan: ComponentPlan, staging: Path, options: Options, progress: Progress) -> Component:
    folder = staging / name
    folder.mkdir()
    where = str(plan.source.folder)
    progress(name, "tracing")
    graph = make_graph(plan.kind, plan.model, time_ids=plan.time_ids, pooled=plan.pooled, where=where)
    model = trace(graph, plan.precision, options.opset)
    published = _name_initializers(model, graph.prefix, plan)
    permutations = simplify(model)
    progress(name, "writing weights")
    names = {
        initializer: published[initializer] for initializer in published if initializer in model.graph.initializers
    }
    written = write_weights(model, plan.checkpoint, names, permutations, folder)
    progress(name, "writing graph")
    _save_graph(model, folder / GRAPH_FILE)
    return Component(
        kind=plan.kind,
        precision=plan.precision,
        opset=options.opset,
        graph=_record(staging, folder / GRAPH_FILE),
        weights=FileRecord(file=f"{name}/{WEIGHTS_FILE}", size=written.size, sha256=written.sha256),
        inputs=tuple(_spec(value) for value in model.graph.inputs),
        outputs=tuple(_spec(value) for value in model.graph.outputs),
        source=Source(
            name=f"{plan.origin}/{plan.source.folder.name}",
            class_name=plan.source.class_name,
            sha256=digest_tensors(plan.checkpoint, plan.tensor_names()),
        ),
        config={key: value for key, value in plan.source.config.items() if key not in ("_name_or_path",)},
        parameters=written.parameters,
    )


def _name_initializers(model: ir.Model, prefix: str, plan: ComponentPlan) -> dict[str, str]:
    """Give weights their published names, fill the buffers that the model computed; return {name: name} of weights."""
    published: dict[str, str] = {}
    for value in list(model.graph.initializers.values()):
        inner = str(value.name).removeprefix(prefix)
        if inner in plan.model.buffers:
            value.const_value = ir.tensor(plan.model.buffers[inner].numpy(), name=str(value.name))
            continue
        name = published_name(inner, plan.source.class_name)
        if name in plan.model.state:
            value.name = name
            published[name] = name
    return published


def _save_graph(model: ir.Model, path: Path) -> None:
    model.producer_name, model.producer_version = "sdxl-trt", version("sdxl-trt")
    ir.save(model, path)


def _record(root: Path, path: Path) -> FileRecord:
    return FileRecord(file=path.relative_to(root).as_posix(), size=path.stat().st_size, sha256=sha256_file(path))


def _spec(value: ir.Value) -> TensorSpec:
    if value.shape is None or value.dtype is None:
        raise UsageError(f"{value.name}: the traced graph gives no shape")
    shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return TensorSpec(name=str(value.name), dtype=_DTYPES[value.dtype], shape=shape)  # type: ignore[arg-type]


def _write_tokenizers(
    stages: dict[str, StagePlan], staging: Path
) -> tuple[dict[str, Tokenizer], dict[str, dict[str, str]]]:
    """Write each distinct tokenizer once; return the manifest's tokenizers, and their names by stage and role."""
    records: dict[str, Tokenizer] = {}
    seen: dict[LoadedTokenizer, str] = {}
    names: dict[str, dict[str, str]] = {}
    for stage_name, stage in stages.items():
        names[stage_name] = {}
        for role, folder in stage.pipeline.tokenizers.items():
            loaded = load_tokenizer(folder)
            if loaded not in seen:
                seen[loaded] = role if stage_name == "base" else f"refiner_{role}"
                records[seen[loaded]] = _write_tokenizer(loaded, seen[loaded], staging)
            names[stage_name][role] = seen[loaded]
    return records, names


def _write_tokenizer(loaded: LoadedTokenizer, name: str, staging: Path) -> Tokenizer:
    path = staging / name / "tokenizer.json"
    try:
        path.parent.mkdir()
        path.write_bytes(loaded.json)
    except OSError as exc:
        raise explain_os_error(exc, f"writing {path}") from exc
    return Tokenizer(
        file=_record(staging, path),
        max_length=loaded.max_length,
        bos_id=loaded.bos_id,
        eos_id=loaded.eos_id,
        pad_id=loaded.pad_id,
    )


def _stage(stage: StagePlan, tokenizers: dict[str, str]) -> Stage:
    unet = stage.models["unet"]
    levels = 2 ** int(unet.module.num_upsamplers)
    factor = vae_factor(stage.models["vae"].config)
    encoders = [role for role in ("text_encoder", "text_encoder_2") if role in stage.roles]
    return Stage(
        unet=stage.roles["unet"],
        text_encoders=tuple(
            TextEncoder(
                component=stage.roles[role],
                tokenizer=tokenizers[role.replace("text_encoder", "tokenizer")],
                pooled=role == "text_encoder_2",
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
        scaling_factor=float(config["scaling_factor"]),
        latent_channels=int(config["latent_channels"]),
        factor=factor,
        latents_mean=tuple(config["latents_mean"]) if config.get("latents_mean") else None,
        latents_std=tuple(config["latents_std"]) if config.get("latents_std") else None,
    )
