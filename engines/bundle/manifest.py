"""The records of ``manifest.json``: the runtime's only source of facts about a model."""

__all__ = [
    "DEEP_FEATURE",
    "EIGHT_BIT",
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "OF_LATENTS",
    "Component",
    "ControlNet",
    "DType",
    "Edm",
    "Kind",
    "LoraRecord",
    "Manifest",
    "Precision",
    "Quantization",
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
from sdxl_trt.engines.bundle.profile import may_be_one
from sdxl_trt.engines.bundle.records import FileRecord, Natural, Positive, Record, Sha256
from sdxl_trt.engines.errors import CorruptError, UsageError

FORMAT_NAME = "sdxl-trt-bundle"
FORMAT_VERSION = 1

Kind = Literal["text_encoder", "unet", "shallow_unet", "controlnet", "vae_decoder", "vae_encoder"]
DType = Literal["float32", "float16", "int64"]
Precision = Literal["fp32", "fp16", "bf16", "mixed", "int8", "fp8"]
OF_LATENTS: tuple[Kind, ...] = ("unet", "shallow_unet", "controlnet")
"""The kinds of graphs that run in the steps of a run, on rows of latents."""
EIGHT_BIT = ("int8", "fp8")
"""The precisions of graphs with a `quantization`."""
DEEP_FEATURE = "deep_feature"
"""The output of a UNet that its shallow UNet takes: the hidden state that enters the last up block."""
PositiveFloat = Annotated[float, msgspec.Meta(gt=0.0)]


class TensorSpec(Record, frozen=True, kw_only=True):
    """One graph input or output. A dimension is a number, or an axis that may vary: see `axis_size`."""

    name: str
    dtype: DType
    shape: tuple[Positive | str, ...]

    @property
    def optional(self) -> bool:
        """Return whether the input may be left out, which means zeros: several of its axes may be 1, and broadcast."""
        return any(map(may_be_one, self.shape))


class Source(Record, frozen=True, kw_only=True):
    """The origin of a component: a name (never a host path), its class, a digest of the tensors that were used."""

    name: str
    class_name: str
    sha256: Sha256


class Quantization(Record, frozen=True, kw_only=True):
    """Which layers of an 8-bit graph compute in 8 bits, and what the ranges of their inputs were measured on.

    `calibration` says it in words, `ranges` is the digest of the measured ranges. `excluded` has a reason for every
    layer that stayed in the graph's floating-point precision, by the name of its module.
    """

    calibration: str
    ranges: Sha256
    linears: Natural
    convolutions: Natural
    attentions: Natural = 0
    excluded: dict[str, str]


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
    """A digest of everything that determines the files: an export with the same key leaves them unchanged."""
    cpu_graph: FileRecord | None = None
    """A variant over the same weights that is faster on ONNX Runtime's CPU provider and runs nowhere else."""
    slot_graph: FileRecord | None = None
    """A variant over the same weights that takes LoRAs as inputs: plans with a LoRA rank are built of it."""
    adapters: FileRecord | None = None
    """The table of its tensors, which LoRAs need (`read_table`); None in bundles of older versions."""
    quantization: Quantization | None = None
    """What computes in 8 bits; None unless `precision` is int8 or fp8."""
    ranges: FileRecord | None = None
    """The ranges that the scales of an 8-bit component were made of, with which ``--verify`` checks them."""

    @property
    def eight_bit(self) -> bool:
        """Return whether its linear layers and convolutions compute in 8 bits."""
        return self.precision in EIGHT_BIT

    @property
    def float_precision(self) -> Precision:
        """Return the precision of all that does not compute in 8 bits: that of its outputs, fp16 or fp32."""
        if not self.eight_bit:
            return self.precision
        return "fp16" if self.outputs[0].dtype == "float16" else "fp32"

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Return the records of all its files."""
        own = (self.graph, self.cpu_graph, self.slot_graph, self.weights, self.adapters, self.ranges)
        return tuple(record for record in own if record is not None)

    @property
    def used_bytes(self) -> int:
        """Return the bytes of the weights that its graph uses; of a shallow UNet, a small part of the file, about."""
        if self.kind != "shallow_unet":
            return self.weights.size
        item = {"fp32": 4, "mixed": 4, "int8": 1, "fp8": 1}.get(self.precision, 2)
        return min(self.parameters * item, self.weights.size)

    @property
    def results(self) -> tuple[str, ...]:
        """Return the names of the outputs that a run reads: all but the one which only another engine takes."""
        return tuple(spec.name for spec in self.outputs if spec.name != DEEP_FEATURE)

    def planned_graph(self, lora_rank: int) -> FileRecord | None:
        """Return the graph that plans of `lora_rank` are built of; None if an older version exported no slot graph."""
        return self.slot_graph if lora_rank else self.graph

    @property
    def takes_embeddings(self) -> bool:
        """Return whether it is a text encoder that takes textual inversion embeddings; those of older bundles do not.

        Its inputs are then also `embedding_index` (prompts, tokens) int64, where i > 0 puts row i - 1 of `embeddings`
        (vectors, width) in place of a token's own vector.
        """
        return self.kind == "text_encoder" and any(spec.name == "embeddings" for spec in self.inputs)

    def input(self, name: str) -> TensorSpec:
        """Return the spec of the input called `name`."""
        for spec in self.inputs:
            if spec.name == name:
                return spec
        raise CorruptError(f"the manifest's {self.kind} has no input {name!r}; run export-engines again")


class Tokenizer(Record, frozen=True, kw_only=True):
    """A CLIP tokenizer: a ``tokenizer.json`` without padding or truncation, and its special token ids."""

    file: FileRecord
    max_length: Positive
    bos_id: Natural
    eos_id: Natural
    pad_id: Natural


class TextEncoder(Record, frozen=True, kw_only=True):
    """A text encoder of a stage: its graph, its tokenizer, and whether its text_embeds are the pooled prompt."""

    component: str
    tokenizer: str
    pooled: bool


class Edm(Record, frozen=True, kw_only=True):
    """The schedule of arXiv 2206.00364, which has no training timesteps: the model receives log(sigma) / 4."""

    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0
    sigma_data: PositiveFloat = 0.5
    """The standard deviation of clean latents, which scales the model's input and output."""
    sigma_schedule: Literal["karras", "exponential"] = "karras"
    rho: PositiveFloat = 7.0


class Scheduler(Record, frozen=True, kw_only=True):
    """The noise schedule as the source's scheduler config states it; `class_name` is only recorded."""

    class_name: str = "EulerDiscreteScheduler"
    sampler: str = "euler"
    """The sampler equivalent to the class: the default of a run."""
    num_train_timesteps: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    """One beta per training timestep; replaces `beta_schedule`."""
    prediction_type: str = "epsilon"
    timestep_spacing: str = "linspace"
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    """"continuous": a v-prediction model receives log(sigma) / 4 instead of the training timestep."""
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_lu_lambdas: bool = False
    sigma_min: PositiveFloat | None = None
    """The last sigma of a transformed schedule; None: that of the untransformed one. `sigma_max` is the first."""
    sigma_max: PositiveFloat | None = None
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    """The last sigma of Euler's schedule: 0, or the lowest of training."""
    set_alpha_to_one: bool = False
    """Whether DDIM's schedule ends at 0; else, as in SDXL's own config, at the lowest sigma of training."""
    original_inference_steps: Positive = 50
    """The number of solver steps that a latent consistency model was distilled from."""
    edm: Edm | None = None
    """The schedule of a model trained without discrete timesteps; the fields for those are then unused."""

    @property
    def transforms(self) -> tuple[str, ...]:
        """Return the sigma transforms that the config selects, in order: karras, lu, exponential, beta."""
        chosen = {"karras": self.use_karras_sigmas, "lu": self.use_lu_lambdas,
                  "exponential": self.use_exponential_sigmas, "beta": self.use_beta_sigmas}  # fmt: skip
        return tuple(name for name, used in chosen.items() if used)

    @property
    def transform(self) -> str:
        """Return the transform that takes precedence, or "" if there is none."""
        return next(iter(self.transforms), "")

    @property
    def told_log_sigma(self) -> bool:
        """Return whether the model receives log(sigma) / 4 instead of a timestep."""
        return self.edm is not None or (self.timestep_type == "continuous" and self.prediction_type == "v_prediction")


class Vae(Record, frozen=True, kw_only=True):
    """An autoencoder as the host uses it: latents = encoded · scaling_factor, latent side = pixels / factor."""

    decoder: str
    encoder: str | None
    scaling_factor: float
    latent_channels: Positive
    factor: Positive
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    decoder_bf16: str | None = None
    """The bf16 twin for TensorRT of a decoder that is fp32 because it overflows fp16."""
    encoder_bf16: str | None = None
    tiny: str | None = None
    """A small decoder of the same latents, which draws nearly the same picture in a fraction of the time."""
    tiny_scaling_factor: float = 1.0

    def with_tiny_decoder(self) -> "Vae":
        """Return the autoencoder with its tiny decoder in place of the other.

        As in diffusers, that one takes the latents as they are, divided by a scaling factor of its own. Raises
        UsageError without one.
        """
        if self.tiny is None:
            raise UsageError("the bundle has no tiny decoder; export it with --tiny-vae, for SDXL's latents that of"
                             " madebyollin/taesdxl, or decode with --vae full")  # fmt: skip
        return msgspec.structs.replace(
            self, decoder=self.tiny, decoder_bf16=None, scaling_factor=self.tiny_scaling_factor, latents_mean=None,
            latents_std=None,
        )  # fmt: skip


class Stage(Record, frozen=True, kw_only=True):
    """One expert of the ensemble, base or refiner: its roles mapped to components."""

    unet: str
    text_encoders: tuple[TextEncoder, ...]
    vae: Vae
    scheduler: Scheduler
    time_ids: tuple[str, ...]
    force_zeros_for_empty_prompt: bool
    sample_size: Positive
    """The side of the training picture size, in latents."""
    size_multiple: Positive
    """Picture sides must be multiples of this many pixels."""
    shallow: str | None = None
    """The UNet's outermost level, for runs that cache steps; None in bundles of older versions and for other UNets."""


class LoraRecord(Record, frozen=True, kw_only=True):
    """A LoRA that was fused into the base: file name, digest, scale on the UNet and on the text encoders.

    `tensors_sha256` is the digest of the file without its header, None in bundles of older versions.
    """

    name: str
    sha256: Sha256
    scale: float
    text_scale: float | None = None
    """None if it equals the UNet's scale."""
    tensors_sha256: Sha256 | None = None

    @classmethod
    def of(
        cls, name: str, sha256: str, scale: float, text_scale: float | None, tensors_sha256: str | None = None
    ) -> "LoraRecord":
        """Return the record of a LoRA; the second scale is left out if it equals the first."""
        return cls(
            name=name,
            sha256=sha256,
            scale=scale,
            text_scale=None if text_scale == scale else text_scale,
            tensors_sha256=tensors_sha256,
        )

    @property
    def encoder_scale(self) -> float:
        """Return the scale on the text encoders."""
        return self.scale if self.text_scale is None else self.text_scale

    @property
    def told(self) -> str:
        """Return the scale as text for a message, with that on the text encoders if it differs."""
        both = "" if self.encoder_scale == self.scale else f" ({self.encoder_scale:g} on the text encoders)"
        return f"{self.scale:g}{both}"


class ControlNet(Record, frozen=True, kw_only=True):
    """A ControlNet of the base: its component, and the name that a run calls it by."""

    component: str
    name: str


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
    controlnets: tuple[ControlNet, ...] = ()
    plans: tuple[PlanRecord, ...] = ()
    onnx: bool = True
    """Whether the bundle contains the graphs and their weights, or only plans."""
    note: str = ""
    """A sentence for users of the bundle, printed by the commands."""

    def own_files(self, name: str) -> tuple[FileRecord, ...]:
        """Return the files of component `name` that are not another's: a shallow UNet has its UNet's weights."""
        component = self.components[name]
        if component.kind != "shallow_unet":
            return component.files
        return tuple(record for record in component.files if record != component.weights)

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Return the files of all components, each once."""
        return tuple(dict.fromkeys(record for component in self.components.values() for record in component.files))

    def prompt_lengths(self) -> set[int]:
        """Return the tokens per chunk of all text encoders; base and refiner may differ."""
        encoders = [encoder for stage in self.stages().values() for encoder in stage.text_encoders]
        return {self.tokenizers[encoder.tokenizer].max_length for encoder in encoders}

    def stages(self) -> dict[str, Stage]:
        """Return the stages of the bundle in the order in which they run."""
        return {"base": self.base} if self.refiner is None else {"base": self.base, "refiner": self.refiner}
