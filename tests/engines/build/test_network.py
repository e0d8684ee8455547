"""TensorRT's messages: errors, figures, and the error that each failure raises."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdxl_trt.engines.build.network import BuildLog, Parsed, allow_decomposition, new_network, parse_error
from sdxl_trt.engines.errors import CorruptError, EngineError, ResourceError

ACTIVATIONS = "Total Activation Memory: {} bytes"


def test_every_profile_has_its_figure() -> None:
    log = BuildLog()
    assert (log.activations, log.weights) == ([], None)
    for line in (ACTIVATIONS.format(300), ACTIVATIONS.format(500), ACTIVATIONS.format(400)):
        log.note("INFO", line)
    log.note("VERBOSE", "Total Weights Memory: 70 bytes")
    assert (log.activations, log.weights) == ([300, 500, 400], 70)


def test_zero_activations_are_a_figure() -> None:
    log = BuildLog()
    log.note("INFO", ACTIVATIONS.format(0))
    assert log.activations == [0]


def test_the_file_gets_all_lines_except_verbose_ones() -> None:
    file = io.StringIO()
    log = BuildLog(file)
    for severity in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"):
        log.note(severity, f"a {severity}")
    assert file.getvalue() == "[E] a INTERNAL_ERROR\n[E] a ERROR\n[W] a WARNING\n[I] a INFO\n"
    assert log.errors == ["a INTERNAL_ERROR", "a ERROR"]


def test_the_file_gets_the_list_of_layers_on_demand() -> None:
    """TensorRT logs it as a verbose message of many lines."""
    for wanted in (True, False):
        file = io.StringIO()
        log = BuildLog(file, layers=wanted)
        log.note("VERBOSE", "Registering layer: x")
        log.note("VERBOSE", "Layers:\nName: x, LayerType: gemm")
        assert file.getvalue() == ("[V] Layers:\nName: x, LayerType: gemm\n" if wanted else "")


@pytest.mark.parametrize(
    "message",
    [
        "Error Code 2: OutOfMemory (Requested size was 123 bytes.)",
        "Error Code 1: Cuda Runtime (out of memory)",
        "std::bad_alloc",
        "cudaErrorMemoryAllocation in resize",
        "Cannot allocate memory",
    ],
)
def test_out_of_memory_is_recognized(message: str) -> None:
    log = BuildLog()
    log.note("ERROR", "something before")
    log.note("ERROR", message)
    with pytest.raises(ResourceError, match="building unet: out of memory"):
        raise log.failure("building unet", "the log is here")


def test_the_first_error_is_the_cause() -> None:
    log = BuildLog()
    log.note("ERROR", "the cause")
    log.note("ERROR", "an echo of it")
    with pytest.raises(EngineError, match="building unet: the cause; the log is here"):
        raise log.failure("building unet", "the log is here")
    with pytest.raises(EngineError, match="TensorRT did not say why"):
        raise BuildLog().failure("building unet", "the log is here")


TYPED = SimpleNamespace(create_network=lambda flags: flags)


@pytest.mark.parametrize(("members", "flags"), [({"STRONGLY_TYPED": 0}, 1), ({"STRONGLY_TYPED": 1}, 2), ({}, 0)])
def test_the_flag_is_the_module_s_own(members: dict[str, int], flags: int) -> None:
    """It was renumbered between versions, and is absent where strong typing is the only mode."""
    trt = SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace(**members))
    assert new_network(trt, TYPED) == flags


def _parsed(*errors: tuple[str, str, str], accepted: bool = False, outputs: int = 1) -> Parsed:
    def get_error(index: int) -> Any:
        code, node, description = errors[index]
        return SimpleNamespace(
            code=lambda: code, node_operator=lambda: node, node_name=lambda: "", desc=lambda: description
        )

    parser = SimpleNamespace(num_errors=len(errors), get_error=get_error)
    return Parsed(accepted, SimpleNamespace(num_outputs=outputs), parser, 0.1)


TRT = SimpleNamespace(ErrorCode=SimpleNamespace(MODEL_DESERIALIZE_FAILED="garbage"))


@pytest.mark.parametrize(
    ("parsed", "logged", "kind", "said"),
    [
        (_parsed(("garbage", "", "broken")), "", CorruptError, r"is not an ONNX graph \(broken\)"),
        (_parsed(("other", "NoSuchOp", "no\nplugin")), "", EngineError, "rejected it: NoSuchOp : no plugin; run"),
        (
            _parsed(("other", "", "an initializer")), "Weights.cpp:7: Failed to open file: w", EngineError,
            "rejected it: Failed to open file: w;",
        ),
        (_parsed(("other", "", "an initializer")), "Importer.cpp:7: chatter", EngineError, "rejected it: an init"),
        (_parsed(accepted=True, outputs=0), "", CorruptError, "has no outputs"),
    ],
)  # fmt: skip
def test_the_parser_s_reason_is_in_the_error(parsed: Parsed, logged: str, kind: type[Exception], said: str) -> None:
    log = BuildLog()
    if logged:
        log.note("ERROR", logged)
    error = parse_error(TRT, parsed, log, Path("model.onnx"))
    assert type(error) is kind
    with pytest.raises(kind, match=said):
        raise error


def test_warnings_for_a_parsed_graph_are_no_error() -> None:
    assert parse_error(TRT, _parsed(("other", "", "a warning"), accepted=True), BuildLog(), Path("m")) is None


class _Layer:
    def __init__(self, kind: str) -> None:
        self.type = kind
        self.attention = SimpleNamespace(decomposable=False)


class _Attention(_Layer):
    """A substitute for IAttentionInputLayer."""


def test_attention_and_nothing_else_may_be_decomposed() -> None:
    layers = [_Layer(kind) for kind in ("conv", "attention", "conv", "attention")]
    network = SimpleNamespace(num_layers=4, get_layer=layers.__getitem__)
    trt = SimpleNamespace(LayerType=SimpleNamespace(ATTENTION_INPUT="attention"), IAttentionInputLayer=_Attention)
    allow_decomposition(trt, network)
    assert [layer.attention.decomposable for layer in layers] == [False, True, False, True]
    assert [type(layer) for layer in layers] == [_Layer, _Attention, _Layer, _Attention]


def test_a_library_without_attention_layers_is_supported() -> None:
    network = SimpleNamespace(num_layers=1, get_layer=None)
    allow_decomposition(SimpleNamespace(LayerType=SimpleNamespace()), network)
