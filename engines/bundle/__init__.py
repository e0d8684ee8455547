"""A bundle on disk: its manifest, records and digests."""

from sdxl_trt.engines.bundle.bundle import MANIFEST, Bundle, read_bundle, write_manifest
from sdxl_trt.engines.bundle.digests import verify_file
from sdxl_trt.engines.bundle.manifest import (
    DEEP_FEATURE, EIGHT_BIT, FORMAT_NAME, FORMAT_VERSION, OF_LATENTS, Component, ControlNet, DType, Edm, Kind,
    LoraRecord, Manifest, Precision, Quantization, Scheduler, Source, Stage, TensorSpec, TextEncoder, Tokenizer, Vae,
)
from sdxl_trt.engines.bundle.phases import (
    USUAL_RUN, Workload, computes, computes_bf16, lacks_shallow, needed_capability, run_components, run_phases,
    stand_ins,
)
from sdxl_trt.engines.bundle.plan_record import (
    ANY, BuildFlags, Chunks, Environment, Flavour, PlanKey, PlanMemory, PlanRecord,
)
from sdxl_trt.engines.bundle.profile import (
    Axes, Profile, Range, Shape, axis_range, axis_root, axis_size, fixed, may_be_one,
)
from sdxl_trt.engines.bundle.records import FileRecord, Natural, Positive, Record, Sha256
from sdxl_trt.engines.bundle.tensor_table import (
    ADAPTERS_FILE, DOWN, UP, WEIGHT, AdapterTable, Slot, TensorRecord, is_slot_input, read_table, slot_dtype,
)

__all__ = [
    "ADAPTERS_FILE", "ANY", "DEEP_FEATURE", "DOWN", "EIGHT_BIT", "FORMAT_NAME", "FORMAT_VERSION", "MANIFEST",
    "OF_LATENTS", "UP", "USUAL_RUN", "WEIGHT", "AdapterTable", "Axes", "BuildFlags", "Bundle", "Chunks", "Component",
    "ControlNet", "DType", "Edm", "Environment", "FileRecord", "Flavour", "Kind", "LoraRecord", "Manifest", "Natural",
    "PlanKey", "PlanMemory", "PlanRecord", "Positive", "Precision", "Profile", "Quantization", "Range", "Record",
    "Scheduler", "Sha256", "Shape", "Slot", "Source", "Stage", "TensorRecord", "TensorSpec", "TextEncoder", "Tokenizer",
    "Vae", "Workload", "axis_range", "axis_root", "axis_size", "computes", "computes_bf16", "fixed", "is_slot_input",
    "lacks_shallow", "may_be_one", "needed_capability", "read_bundle", "read_table", "run_components", "run_phases",
    "slot_dtype", "stand_ins", "verify_file", "write_manifest",
]
