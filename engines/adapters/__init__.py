"""Adapters: LoRA files read with numpy, and what they change in a component."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.engines.adapters.factors import FUSE_OR_FP16, WITHOUT_SLOTS, Factors, SlotFactors, plan_factors
    from sdxl_trt.engines.adapters.file import Lora, open_lora
    from sdxl_trt.engines.adapters.first_bytes import PICKLED, check_first_bytes, explain_damage, is_safetensors
    from sdxl_trt.engines.adapters.kinds import Branch
    from sdxl_trt.engines.adapters.names import COMPONENTS, LoraComponent, component_role
    from sdxl_trt.engines.adapters.option import REFINER_NOTE, LoraOption, parse_lora_option, split_lora
    from sdxl_trt.engines.adapters.scaled import (
        Adapted, Changes, ScaledLora, Use, adapted, loras_of, name_of, narrowed, plan_changes, targets,
    )
    from sdxl_trt.engines.adapters.tensors import StoredTensor, TensorFile, open_tensors, read_tensor
    from sdxl_trt.engines.adapters.unet_names import unet_prefixes
else:
    __getattr__ = lazy_names(__name__, {
        "factors": ("FUSE_OR_FP16", "WITHOUT_SLOTS", "Factors", "SlotFactors", "plan_factors"),
        "file": ("Lora", "open_lora"), "kinds": ("Branch",),
        "first_bytes": ("PICKLED", "check_first_bytes", "explain_damage", "is_safetensors"),
        "names": ("COMPONENTS", "LoraComponent", "component_role"),
        "option": ("REFINER_NOTE", "LoraOption", "parse_lora_option", "split_lora"),
        "scaled": (
            "Adapted", "Changes", "ScaledLora", "Use", "adapted", "loras_of", "name_of", "narrowed", "plan_changes",
            "targets",
        ),
        "tensors": ("StoredTensor", "TensorFile", "open_tensors", "read_tensor"),
        "unet_names": ("unet_prefixes",),
    })

__all__ = [
    "COMPONENTS", "FUSE_OR_FP16", "PICKLED", "REFINER_NOTE", "WITHOUT_SLOTS", "Adapted", "Branch", "Changes", "Factors",
    "Lora", "LoraComponent", "LoraOption", "ScaledLora", "SlotFactors", "StoredTensor", "TensorFile", "Use", "adapted",
    "check_first_bytes", "component_role", "explain_damage", "is_safetensors", "loras_of", "name_of", "narrowed",
    "open_lora", "open_tensors", "parse_lora_option", "plan_changes", "plan_factors", "read_tensor", "split_lora",
    "targets", "unet_prefixes",
]
