"""Read, validate and write the manifest of a bundle.

A bundle is an exported folder that can be moved to a machine without torch: ``manifest.json``, tokenizers, and one
folder per graph (``model.onnx``, one file of weights, and ``cpu.onnx`` over the same weights if that is faster). The
manifest is the runtime's only source of facts about a model; only files with the manifest's digests are loaded.
"""

__all__ = ["MANIFEST", "Bundle", "read_bundle", "write_manifest"]

import stat
from pathlib import Path

import msgspec

from sdxl_trt.engines.bundle.manifest import DEEP_FEATURE, FORMAT_NAME, FORMAT_VERSION, Kind, Manifest, Stage
from sdxl_trt.engines.bundle.records import FileRecord
from sdxl_trt.engines.errors import CorruptError, IncompatibleError, SourceError, explain_os_error
from sdxl_trt.engines.host import atomic_write, contained, shell_word

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20

# Required inputs and outputs of each kind of graph; a graph may have more outputs, and optional inputs.
_SIGNATURES: dict[Kind, tuple[set[str], set[str]]] = {
    "text_encoder": ({"input_ids"}, {"hidden_states.0", "hidden_states.1"}),
    "unet": ({"sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"}, {"out_sample"}),
    "shallow_unet": (
        {"sample", "timestep", "text_embeds", "time_ids", "deep_new", "deep_old", "deep_factor"},
        {"out_sample"},
    ),
    "controlnet": (
        {"sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids", "controlnet_cond", "scales"},
        {"down_residual.0", "mid_residual"},
    ),
    "vae_decoder": ({"latent_sample"}, {"sample"}),
    "vae_encoder": ({"sample"}, {"latent_parameters"}),
}
# Text encoders of older bundles lack these, and take no textual inversion embeddings.
_EMBEDDINGS = {"embedding_index", "embeddings"}


class Bundle(msgspec.Struct, frozen=True):
    """An opened bundle: its folder and its validated manifest. No other file has been read."""

    root: Path
    manifest: Manifest

    def path(self, record: FileRecord) -> Path:
        """Return the path of a recorded file; raise CorruptError if it would be outside the bundle."""
        return contained(self.root, record.file)


class _Envelope(msgspec.Struct):
    format: str
    format_version: int


def read_bundle(root: Path | str, *, partial: bool = False, files: bool = True) -> Bundle:
    """Read and validate the manifest of the bundle at `root`; a `partial` one may lack components.

    With `files`, checks that every file exists and has its recorded size; False is for callers that repair files.

    Raises SourceError if there is no bundle, IncompatibleError for a newer format, CorruptError for a manifest that is
    broken, inconsistent, or names files that are missing or have another size.
    """
    root = Path(root)
    raw = _read_manifest(root)
    where = root / MANIFEST
    try:
        envelope = msgspec.json.decode(raw, type=_Envelope)
        if envelope.format != FORMAT_NAME:
            raise CorruptError(f"{where}: format is {envelope.format!r}, not {FORMAT_NAME!r}; run export-engines again")
        if envelope.format_version > FORMAT_VERSION:
            raise IncompatibleError(
                f"{where}: bundle format {envelope.format_version} is newer than this sdxl-trt reads"
                f" ({FORMAT_VERSION}); upgrade sdxl-trt, or export the bundle again with this version"
            )
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise CorruptError(f"{where}: broken manifest ({exc}); run export-engines again") from exc
    bundle = Bundle(root, manifest)
    _check_graphs(bundle)
    _check_plans(bundle)
    if not partial:
        _check_stages(bundle)
    if files:
        _check_files(bundle)
    return bundle


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` into `root` atomically. It is written last: if it is there, the bundle is complete."""
    encoded = msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=1)
    with atomic_write(root / MANIFEST) as file:
        file.write(encoded + b"\n")


def _read_manifest(root: Path) -> bytes:
    where = root / MANIFEST
    hint = "make one with: export-engines --base SRC --refiner SRC --out " + shell_word(root)
    if not root.exists():
        raise SourceError(f"{root}: no such folder; {hint}")
    if not root.is_dir():
        raise SourceError(f"{root}: is a file, not a bundle folder; {hint}")
    try:
        if where.stat().st_size > MAX_MANIFEST_BYTES:
            raise CorruptError(f"{where}: larger than {MAX_MANIFEST_BYTES >> 20} MiB, so not a manifest")
        return where.read_bytes()
    except FileNotFoundError as exc:
        raise SourceError(f"{root}: has no {MANIFEST}, so it is not a bundle; {hint}") from exc
    except OSError as exc:
        raise explain_os_error(exc, f"reading {where}") from exc


def _check_graphs(bundle: Bundle) -> None:
    manifest = bundle.manifest
    for name, component in manifest.components.items():
        inputs, outputs = _SIGNATURES[component.kind]
        given = {spec.name for spec in component.outputs}
        required = {spec.name for spec in component.inputs if not spec.optional}
        if component.takes_embeddings:
            inputs = inputs | _EMBEDDINGS
        if component.kind == "shallow_unet":  # its outermost level may attend to the prompt
            inputs = inputs | (required & {"encoder_hidden_states"})
        if required != inputs or not outputs <= given:
            raise CorruptError(
                f"{bundle.root / MANIFEST}: {name} is not a {component.kind}: it must take {sorted(inputs)} and return"
                f" {sorted(outputs)}; run export-engines again"
            )


def _check_plans(bundle: Bundle) -> None:
    """Raise CorruptError for a plan of an unknown component, with profiles for other inputs, or with too few figures.

    Files are not read.
    """
    for record in bundle.manifest.plans:
        name = record.key.component
        component = bundle.manifest.components.get(name)
        ranks = {spec.name: len(spec.shape) for spec in component.inputs} if component else {}
        profiles = [{i: len(low) for i, (low, _, _) in p.shapes.items()} for p in record.key.profiles]
        stated = len(record.memory.profile_activations)
        if not ranks or not profiles or any(each != ranks for each in profiles) or stated not in (0, len(profiles)):
            raise CorruptError(f"{bundle.root / MANIFEST}: a plan of {name!r} does not fit that component; run"
                               " export-engines again")  # fmt: skip
        if record.chunks is not None and not record.chunks.fit(record.file.size):
            raise CorruptError(f"{bundle.root / MANIFEST}: {record.file.file} has {len(record.chunks.sha256)} digests,"
                               f" but {record.file.size} bytes in chunks of {record.chunks.size} need another number;"
                               " run export-engines again")  # fmt: skip
        bundle.path(record.file)


def _check_stages(bundle: Bundle) -> None:
    manifest = bundle.manifest
    for stage_name, stage in manifest.stages().items():
        problem = _stage_problem(stage, manifest)
        if problem:
            raise CorruptError(f"{bundle.root / MANIFEST}: {stage_name} {problem}; run export-engines again")
    problem = _shallow_problem(manifest) or _controlnet_problem(manifest)
    if problem:
        raise CorruptError(f"{bundle.root / MANIFEST}: {problem}; run export-engines again")


def _shallow_problem(manifest: Manifest) -> str:
    """Return what is wrong with the shallow UNets that the manifest lists, or ""."""
    for name, stage in manifest.stages().items():
        if stage.shallow is None:
            continue
        full, found = manifest.components[stage.unet], manifest.components.get(stage.shallow)
        if found is None or found.kind != "shallow_unet":
            return f"{name} needs a shallow_unet called {stage.shallow!r}, which the manifest does not list"
        deep = [(spec.dtype, spec.shape) for spec in full.outputs if spec.name == DEEP_FEATURE]
        taken = [(spec.dtype, spec.shape) for spec in found.inputs if spec.name in ("deep_new", "deep_old")]
        if taken != 2 * deep or found.weights != full.weights:
            return f"{name} has a shallow UNet {stage.shallow!r} that does not continue {stage.unet!r}"
        others = {spec.name: spec for spec in full.inputs}
        differ = [spec.name for spec in found.inputs if spec.name in others and spec != others[spec.name]]
        # The residuals of ControlNets for the outermost level are as large as the latents.
        residuals = {spec.name for spec in full.inputs if spec.optional and spec.shape[2] == "height|1"}
        if differ or {spec.name for spec in found.inputs if spec.optional} != residuals:
            return f"{name} has a shallow UNet {stage.shallow!r} with other inputs than {stage.unet!r}"
    return ""


def _controlnet_problem(manifest: Manifest) -> str:
    """Return what is wrong with the ControlNets that the manifest lists, or ""."""
    taken = {spec.name: (spec.dtype, spec.shape[1:2]) for spec in manifest.components[manifest.base.unet].inputs
             if spec.optional}  # fmt: skip
    for each in manifest.controlnets:
        found = manifest.components.get(each.component)
        if found is None or found.kind != "controlnet":
            return f"lists a ControlNet {each.name!r}, but has no controlnet called {each.component!r}"
        if {spec.name: (spec.dtype, spec.shape[1:2]) for spec in found.outputs} != taken:
            return f"lists a ControlNet {each.name!r}, whose residuals the base's UNet does not take"
    return ""


def _stage_problem(stage: Stage, manifest: Manifest) -> str:
    """Return what is wrong with the components that `stage` names, or ""."""
    wanted = [(stage.unet, "unet"), (stage.vae.decoder, "vae_decoder")]
    wanted += [(encoder.component, "text_encoder") for encoder in stage.text_encoders]
    optional = ((stage.vae.encoder, "vae_encoder"), (stage.vae.encoder_bf16, "vae_encoder"),
                (stage.vae.decoder_bf16, "vae_decoder"), (stage.vae.tiny, "vae_decoder"))  # fmt: skip
    wanted += [(name, kind) for name, kind in optional if name is not None]
    for name, kind in wanted:
        found = manifest.components.get(name)
        if found is None or found.kind != kind:
            return f"needs a {kind} called {name!r}, which the manifest does not list"
    for encoder in stage.text_encoders:
        tokenizer, component = manifest.tokenizers.get(encoder.tokenizer), manifest.components[encoder.component]
        if tokenizer is None:
            return f"needs a tokenizer called {encoder.tokenizer!r}, which the manifest does not list"
        if component.input("input_ids").shape[1:] != (tokenizer.max_length,):
            return f"pairs {encoder.component!r} with a tokenizer of {tokenizer.max_length} ids, which do not fit"
        if encoder.pooled and "text_embeds" not in {spec.name for spec in component.outputs}:
            return f"takes the pooled prompt from {encoder.component!r}, which returns no text_embeds"
    pooled = sum(encoder.pooled for encoder in stage.text_encoders)
    return "" if pooled == 1 else f"has {pooled} pooled text encoders instead of one"


def _check_files(bundle: Bundle) -> None:
    records = [tokenizer.file for tokenizer in bundle.manifest.tokenizers.values()]
    for component in bundle.manifest.components.values():
        # A bundle of plans only has kept the tables of tensors.
        records += [file for file in component.files if bundle.manifest.onnx or file == component.adapters]
    for record in records:
        path = bundle.path(record)
        try:
            status = path.stat()
        except (OSError, ValueError) as exc:
            raise CorruptError(
                f"{path}: named by the manifest but not readable ({exc}); run export-engines again"
            ) from exc
        if not stat.S_ISREG(status.st_mode):
            raise CorruptError(f"{path}: named by the manifest but not a regular file; run export-engines again")
        if status.st_size != record.size:
            raise CorruptError(
                f"{path}: {status.st_size} bytes, but the manifest says {record.size}; the file is truncated or was"
                " changed: run export-engines again"
            )
