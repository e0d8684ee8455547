"""From a PyTorch module to an ONNX graph with external weights."""

from sdxl_trt.export.graph.cpu_graph import attention_heads, for_cpu
from sdxl_trt.export.graph.models import MetaModel, build_model, published_name
from sdxl_trt.export.graph.passes import simplify
from sdxl_trt.export.graph.precision import convert_module
from sdxl_trt.export.graph.residuals import add_residuals
from sdxl_trt.export.graph.shallow import cut_shallow, mark_deep
from sdxl_trt.export.graph.signatures import Graph, context_width, make_graph, residual_shapes, vae_factor
from sdxl_trt.export.graph.slots import add_slots
from sdxl_trt.export.graph.trace import trace_graph
from sdxl_trt.export.graph.upsampling import merge_upsampling
from sdxl_trt.export.graph.weights import WEIGHTS_FILE, WeightsWriter, WrittenWeights, write_weights

__all__ = [
    "WEIGHTS_FILE", "Graph", "MetaModel", "WeightsWriter", "WrittenWeights", "add_residuals", "add_slots",
    "attention_heads", "build_model", "context_width", "convert_module", "cut_shallow", "for_cpu", "make_graph",
    "mark_deep", "merge_upsampling", "published_name", "residual_shapes", "simplify", "trace_graph", "vae_factor",
    "write_weights",
]
