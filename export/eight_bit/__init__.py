"""An 8-bit graph from a float one: its layers, their ranges and weights, and the nodes that quantize."""

from sdxl_trt.export.eight_bit.cpu import quantize_for_cpu
from sdxl_trt.export.eight_bit.formats import Scheme
from sdxl_trt.export.eight_bit.layers import Layer, find_attentions, find_layers, reason_to_exclude
from sdxl_trt.export.eight_bit.qdq import quantize_for_devices, refer_to
from sdxl_trt.export.eight_bit.ranges import INPUT, RangeOutputs, Ranges, add_range_outputs
from sdxl_trt.export.eight_bit.sampling import LayerError, add_sample_outputs, layer_error, worst_first
from sdxl_trt.export.eight_bit.store import EightBitWeights, read_stored, write_eight_bit
from sdxl_trt.export.eight_bit.wide import compute_in_fp32

__all__ = [
    "INPUT", "EightBitWeights", "Layer", "LayerError", "RangeOutputs", "Ranges", "Scheme", "add_range_outputs",
    "add_sample_outputs", "compute_in_fp32", "find_attentions", "find_layers", "layer_error", "quantize_for_cpu",
    "quantize_for_devices", "read_stored", "reason_to_exclude", "refer_to", "worst_first", "write_eight_bit",
]
