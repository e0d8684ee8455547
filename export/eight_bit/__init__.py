"""An 8-bit graph from a float one: its layers, their ranges and weights, and the nodes that quantize."""

from sdxl_trt.export.eight_bit.cpu import quantize_for_cpu
from sdxl_trt.export.eight_bit.formats import FORMATS, Scheme, activation_scale, quantize_weight, unsigned_scale
from sdxl_trt.export.eight_bit.layers import Layer, attentions_with, find_layers, reason_to_exclude
from sdxl_trt.export.eight_bit.qdq import quantize_for_devices, refer_to
from sdxl_trt.export.eight_bit.ranges import INPUT, OUTPUT, RangeOutputs, Ranges, add_range_outputs
from sdxl_trt.export.eight_bit.ranges_json import read_ranges, write_ranges
from sdxl_trt.export.eight_bit.reading import Quantizer, StoredLayer, stored_layers
from sdxl_trt.export.eight_bit.sampling import LayerError, add_sample_outputs, layer_error, worst_first
from sdxl_trt.export.eight_bit.store import EightBitWeights, read_stored, write_eight_bit
from sdxl_trt.export.eight_bit.wide import compute_in_fp32

__all__ = [
    "FORMATS", "INPUT", "OUTPUT", "EightBitWeights", "Layer", "LayerError", "Quantizer", "RangeOutputs", "Ranges",
    "Scheme", "StoredLayer", "activation_scale", "add_range_outputs", "add_sample_outputs", "attentions_with",
    "compute_in_fp32", "find_layers", "layer_error", "quantize_for_cpu", "quantize_for_devices", "quantize_weight",
    "read_ranges", "read_stored", "reason_to_exclude", "refer_to", "stored_layers", "unsigned_scale", "worst_first",
    "write_eight_bit", "write_ranges",
]
