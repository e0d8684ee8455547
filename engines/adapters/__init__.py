"""LoRAs: what their files say, and how they reach the weights of a graph."""

from sdxl_trt.engines.adapters.slots import DOWN, RANK, UP, Slot, is_slot_input, read_slots, write_slots

__all__ = ["DOWN", "RANK", "UP", "Slot", "is_slot_input", "read_slots", "write_slots"]
