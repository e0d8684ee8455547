"""The records of ``manifest.json``: everything that the runtime knows of a model, it knows from them."""

__all__ = [
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "Component",
    "DType",
    "Edm",
    "Kind",
    "LoraRecord",
    "Manifest",
    "Precision",
    "Scheduler",
    "Source",
    "Stage",
    "TensorSpec",
    "TextEncoder",
    "Tokenizer",
    "Vae",
]

from typing import Annotated, Any, Literal

import msgspec

from sdxl_trt.engines.bundle.plan_record import PlanRecord
from sdxl_trt.engines.bundle.records import FileRecord, Natural, Positive, Record, Sha256
from sdxl_trt.engines.errors import CorruptError

FORMAT_NAME = "sdxl-trt-bundle"
FORMAT_VERSION = 1

Kind = Literal["text_encoder", "unet", "vae_decoder", "vae_encoder"]
DType = Literal["float32", "float16", "int64"]
Precision = Literal["fp32", "fp16", "bf16", "mixed"]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0.0)]


class TensorSpec(Record, frozen=True, kw_only=True):
    """One graph input or output. A dimension is a number, or the name of an axis that may vary."""

    name: str
    dtype: DType
    shape: tuple[Positive | str, ...]


class Source(Record, frozen=True, kw_only=True):
    """Where a component came from: a name (never a host path), its class, a digest of the tensors it used."""

    name: str
    class_name: str
    sha256: Sha256


class Component(Record, frozen=True, kw_only=True):
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
    cpu_graph: FileRecord | None = None
    """The same graph over the same weights as ONNX Runtime's CPU provider runs it faster, and nothing else can."""

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Return the records of all its files."""
        graphs = (self.graph,) if self.cpu_graph is None else (self.graph, self.cpu_graph)
        return (*graphs, self.weights)

    def input(self, name: str) -> TensorSpec:
        """Return the spec of the input called `name`."""
        for spec in self.inputs:
            if spec.name == name:
                return spec
        raise CorruptError(f"the manifest's {self.kind} has no input {name!r}; run export-engines again")


class Tokenizer(Record, frozen=True, kw_only=True):
    """A CLIP tokenizer: a ``tokenizer.json`` without padding or truncation, and the ids that frame a prompt."""

    file: FileRecord
    max_length: Positive
    bos_id: Natural
    eos_id: Natural
    pad_id: Natural


class TextEncoder(Record, frozen=True, kw_only=True):
    """A text encoder of a stage: the graph, its tokenizer, and whether its text_embeds are the pooled prompt."""

    component: str
    tokenizer: str
    pooled: bool


class Edm(Record, frozen=True, kw_only=True):
    """The schedule of arXiv 2206.00364, which has no training timesteps: the model is told log(sigma) / 4."""

    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0
    sigma_data: PositiveFloat = 0.5
    """The standard deviation of clean latents, which scales what the model is given and what it answers."""
    sigma_schedule: Literal["karras", "exponential"] = "karras"
    rho: PositiveFloat = 7.0


class Scheduler(Record, frozen=True, kw_only=True):
    """The noise schedule as the source's scheduler config states it; `class_name` is only recorded."""

    class_name: str = "EulerDiscreteScheduler"
    sampler: str = "euler"
    """The sampler that does what the class does: a run's, where none is asked for."""
    num_train_timesteps: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    """A beta for every training timestep, in the place of a schedule of them."""
    prediction_type: str = "epsilon"
    timestep_spacing: str = "linspace"
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    """"continuous": a model that predicts v is told log(sigma) / 4 in the place of its training timestep."""
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_lu_lambdas: bool = False
    sigma_min: PositiveFloat | None = None
    """Where transformed sigmas end, in the place of the spaced ones' end."""
    sigma_max: PositiveFloat | None = None
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    """Where Euler's grid ends: at 0, or at the training's lowest sigma."""
    set_alpha_to_one: bool = False
    """Whether DDIM's grid ends at 0; else, as SDXL's own config has it, at the training's lowest sigma."""
    original_inference_steps: Positive = 50
    """The steps of the solver that a latent consistency model is distilled from."""
    edm: Edm | None = None
    """The schedule of a model that was not trained on discrete timesteps; what belongs to those is then unused."""

    @property
    def transforms(self) -> tuple[str, ...]:
        """Return what the config makes of the spaced sigmas, karras, lu, exponential, beta, the first one first."""
        chosen = {"karras": self.use_karras_sigmas, "lu": self.use_lu_lambdas,
                  "exponential": self.use_exponential_sigmas, "beta": self.use_beta_sigmas}  # fmt: skip
        return tuple(name for name, used in chosen.items() if used)

    @property
    def transform(self) -> str:
        """Return the transform that goes before the others, or "" for none."""
        return next(iter(self.transforms), "")

    @property
    def told_log_sigma(self) -> bool:
        """Return whether the model is told log(sigma) / 4 in the place of a timestep."""
        return self.edm is not None or (self.timestep_type == "continuous" and self.prediction_type == "v_prediction")


class Vae(Record, frozen=True, kw_only=True):
    """What the host must know of an autoencoder: latents = encoded · scaling_factor, pixels / factor = latents."""

    decoder: str
    encoder: str | None
    scaling_factor: float
    latent_channels: Positive
    factor: Positive
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    decoder_bf16: str | None = None
    """The decoder's twin for TensorRT, where the decoder itself is fp32 because it overflows fp16."""
    encoder_bf16: str | None = None


class Stage(Record, frozen=True, kw_only=True):
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


class LoraRecord(Record, frozen=True, kw_only=True):
    """A LoRA that was fused into the base: its file name, its digest, its scale on the UNet and on the encoders."""

    name: str
    sha256: Sha256
    scale: float
    text_scale: float | None = None
    """None where the text encoders have the UNet's scale."""

    @property
    def encoder_scale(self) -> float:
        """Return the scale on the text encoders."""
        return self.scale if self.text_scale is None else self.text_scale

    @property
    def told(self) -> str:
        """Return the scale for a message, and that on the text encoders where it is another."""
        both = "" if self.encoder_scale == self.scale else f" ({self.encoder_scale:g} on the text encoders)"
        return f"{self.scale:g}{both}"


class Manifest(Record, frozen=True, kw_only=True):
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
    plans: tuple[PlanRecord, ...] = ()
    onnx: bool = True
    """Whether the graphs and their weights are in the bundle; without them it holds plans alone."""
    note: str = ""
    """A sentence that whoever uses the bundle should read, printed by the commands."""

    def prompt_lengths(self) -> set[int]:
        """Return how many tokens the encoders of a stage read at once; base and refiner may differ."""
        encoders = [encoder for stage in self.stages().values() for encoder in stage.text_encoders]
        return {self.tokenizers[encoder.tokenizer].max_length for encoder in encoders}

    def stages(self) -> dict[str, Stage]:
        """Return the stages that exist, in the order in which they run."""
        return {"base": self.base} if self.refiner is None else {"base": self.base, "refiner": self.refiner}
