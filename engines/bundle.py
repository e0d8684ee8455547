"""The manifest: what a bundle holds. Read, write, validate.

A bundle is an exported folder that can be moved to a machine without torch: ``manifest.json``, one folder a
graph (``model.onnx`` and one file of weights) and tokenizers. Everything the runtime knows of a model, it knows
from the manifest; nothing is loaded that the manifest does not vouch for.
"""

__all__ = [
    "FORMAT_VERSION",
    "Bundle",
    "Component",
    "FileRecord",
    "LoraRecord",
    "Manifest",
    "Scheduler",
    "Source",
    "Stage",
    "TensorSpec",
    "TextEncoder",
    "Tokenizer",
    "Vae",
    "read_bundle",
    "write_manifest",
]

import stat
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from sdxl_trt.engines.errors import CorruptError, IncompatibleError, SourceError, explain_os_error
from sdxl_trt.engines.files import atomic_write, contained

FORMAT_NAME = "sdxl-trt-bundle"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20

Kind = Literal["text_encoder", "unet", "vae_decoder", "vae_encoder"]
DType = Literal["float32", "float16", "int64"]
Precision = Literal["fp32", "fp16", "bf16", "mixed"]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Natural = Annotated[int, msgspec.Meta(ge=0)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


# What a graph of each kind is fed and asked for; outputs may hold more.
_SIGNATURES: dict[Kind, tuple[set[str], set[str]]] = {
    "text_encoder": ({"input_ids"}, {"hidden_states.0", "hidden_states.1"}),
    "unet": ({"sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"}, {"out_sample"}),
    "vae_decoder": ({"latent_sample"}, {"sample"}),
    "vae_encoder": ({"sample"}, {"latent_parameters"}),
}


class _Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Frozen, keyword-only; unknown fields are ignored so that a later minor writer stays readable."""


class FileRecord(_Record, frozen=True, kw_only=True):
    """A file of the bundle: `file` is relative to the bundle, with forward slashes."""

    file: str
    size: Natural
    sha256: Sha256


class TensorSpec(_Record, frozen=True, kw_only=True):
    """One graph input or output. A dimension is a number, or the name of an axis that may vary."""

    name: str
    dtype: DType
    shape: tuple[Positive | str, ...]


class Source(_Record, frozen=True, kw_only=True):
    """Where a component came from: a name (never a host path), its class, a digest of the tensors it used."""

    name: str
    class_name: str
    sha256: Sha256


class Component(_Record, frozen=True, kw_only=True):
    """One graph with its weights."""

    kind: Kind
    precision: Precision
    opset: Positive
    graph: FileRecord
    weights: FileRecord
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    source: Source
    config: dict[str, Any]
    parameters: Natural = 0
    key: str = ""
    """A digest of everything that decides the files: an export that comes to the same one leaves them as they are."""

    def input(self, name: str) -> TensorSpec:
        """Return the spec of the input called `name`."""
        for spec in self.inputs:
            if spec.name == name:
                return spec
        raise CorruptError(f"the manifest's {self.kind} has no input {name!r}; run export-engines again")


class Tokenizer(_Record, frozen=True, kw_only=True):
    """A CLIP tokenizer: a ``tokenizer.json`` without padding or truncation, and the ids that frame a prompt."""

    file: FileRecord
    max_length: Positive
    bos_id: Natural
    eos_id: Natural
    pad_id: Natural


class TextEncoder(_Record, frozen=True, kw_only=True):
    """A text encoder of a stage: the graph, its tokenizer, and whether its text_embeds are the pooled prompt."""

    component: str
    tokenizer: str
    pooled: bool


class Scheduler(_Record, frozen=True, kw_only=True):
    """The noise schedule as the source's scheduler config states it; the class it names is only recorded."""

    class_name: str = "EulerDiscreteScheduler"
    num_train_timesteps: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str = "linspace"
    steps_offset: int = 0


class Vae(_Record, frozen=True, kw_only=True):
    """What the host must know of an autoencoder: latents = encoded · scaling_factor, pixels / factor = latents."""

    decoder: str
    encoder: str | None
    scaling_factor: float
    latent_channels: Positive
    factor: Positive
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None


class Stage(_Record, frozen=True, kw_only=True):
    """One expert of the ensemble: the roles of base or refiner mapped to components."""

    unet: str
    text_encoders: tuple[TextEncoder, ...]
    vae: Vae
    scheduler: Scheduler
    time_ids: tuple[str, ...]
    force_zeros_for_empty_prompt: bool
    sample_size: Positive
    """Latent pixels of the picture size the model was trained for."""
    size_multiple: Positive
    """Picture sides must be multiples of this many pixels."""


class LoraRecord(_Record, frozen=True, kw_only=True):
    """A LoRA that was fused into the base: its file name, its digest, and the scale."""

    name: str
    sha256: Sha256
    scale: float


class Manifest(_Record, frozen=True, kw_only=True):
    """The whole of ``manifest.json``."""

    format: str
    format_version: Positive
    generator: str
    precision: Precision
    components: dict[str, Component]
    tokenizers: dict[str, Tokenizer]
    base: Stage
    refiner: Stage | None = None
    loras: tuple[LoraRecord, ...] = ()
    note: str = ""
    """A sentence that whoever uses the bundle should read, printed by the commands."""

    def stages(self) -> dict[str, Stage]:
        """Return the stages that exist, in the order in which they run."""
        return {"base": self.base} if self.refiner is None else {"base": self.base, "refiner": self.refiner}


class Bundle(msgspec.Struct, frozen=True):
    """An opened bundle: its folder and its validated manifest. Nothing else has been read yet."""

    root: Path
    manifest: Manifest

    def path(self, record: FileRecord) -> Path:
        """Return the path of a recorded file, or raise CorruptError where it would lie outside the bundle."""
        return contained(self.root, record.file)


class _Envelope(msgspec.Struct):
    format: str
    format_version: int


def read_bundle(root: Path | str, *, partial: bool = False, files: bool = True) -> Bundle:
    """Read and validate the manifest of the bundle at `root`; a `partial` one may lack components.

    The sizes of the files are compared unless `files` is false, for who means to mend them.

    Raises SourceError where there is no bundle, IncompatibleError for a newer format, CorruptError for a manifest
    that is broken, inconsistent, or names files that are missing or have another size.
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
    if not partial:
        _check_stages(bundle)
    if files:
        _check_files(bundle)
    return bundle


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` into `root`, atomically. It is written last: its presence says the bundle is whole."""
    encoded = msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=1)
    with atomic_write(root / MANIFEST) as file:
        file.write(encoded + b"\n")


def _read_manifest(root: Path) -> bytes:
    where = root / MANIFEST
    hint = "make one with: export-engines --base SRC --refiner SRC --out " + str(root)
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
        if {spec.name for spec in component.inputs} != inputs or not outputs <= given:
            raise CorruptError(
                f"{bundle.root / MANIFEST}: {name} is no {component.kind}: it must take {sorted(inputs)} and give"
                f" {sorted(outputs)}; run export-engines again"
            )


def _check_stages(bundle: Bundle) -> None:
    manifest = bundle.manifest
    for stage_name, stage in manifest.stages().items():
        problem = _stage_problem(stage, manifest)
        if problem:
            raise CorruptError(f"{bundle.root / MANIFEST}: {stage_name} {problem}; run export-engines again")


def _stage_problem(stage: Stage, manifest: Manifest) -> str:
    """Return what is wrong with the components that `stage` names, or ""."""
    wanted = [(stage.unet, "unet"), (stage.vae.decoder, "vae_decoder")]
    wanted += [(encoder.component, "text_encoder") for encoder in stage.text_encoders]
    wanted += [(stage.vae.encoder, "vae_encoder")] if stage.vae.encoder is not None else []
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
            return f"takes the pooled prompt from {encoder.component!r}, which gives no text_embeds"
    pooled = sum(encoder.pooled for encoder in stage.text_encoders)
    return "" if pooled == 1 else f"has {pooled} pooled text encoders instead of one"


def _check_files(bundle: Bundle) -> None:
    records = [tokenizer.file for tokenizer in bundle.manifest.tokenizers.values()]
    for component in bundle.manifest.components.values():
        records += [component.graph, component.weights]
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
