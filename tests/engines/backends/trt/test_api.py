"""TensorRT's module: present, missing, broken or too old; and its log messages."""

import sys
import threading
import types
from typing import Any

import pytest

from sdxl_trt.engines.backends.trt import api
from sdxl_trt.engines.backends.trt.api import Messages, library_version, make_logger, tensorrt_module
from sdxl_trt.engines.errors import IncompatibleError


def _module(name: str, version: str | None, bindings: str = "") -> types.ModuleType:
    """Return a module like `tensorrt`; its classes and its version may come from another package."""
    module = types.ModuleType(name)
    runtime = type("Runtime", (), {"__module__": f"{bindings or name}.{bindings or name}"})
    module.Runtime = runtime  # type: ignore[attr-defined]
    if version is not None:
        module.__version__ = version  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    ("flavour", "name", "version"),
    [
        ("tensorrt", "tensorrt", "11.0.0.114"),
        ("tensorrt", "tensorrt", "11.4.0.106"),
        ("tensorrt-rtx", "tensorrt_rtx", "1.0.0"),
    ],
)
def test_a_recent_module_is_returned(flavour: Any, name: str, version: str, monkeypatch) -> None:
    module = _module(name, version)
    monkeypatch.setitem(sys.modules, name, module)
    assert tensorrt_module(flavour) is module
    assert library_version(module) == version


@pytest.mark.parametrize(
    ("flavour", "name", "version"),
    [
        ("tensorrt", "tensorrt", "10.16.1.11"),
        ("tensorrt", "tensorrt", "8.6.1"),
        ("tensorrt-rtx", "tensorrt_rtx", "0.9.0"),
    ],
)
def test_an_old_module_is_refused_with_the_pip_command(flavour, name, version, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, name, _module(name, version))
    with pytest.raises(IncompatibleError, match=rf"{name} {version} is too old, (11|1)\.0 or later.*pip install"):
        tensorrt_module(flavour)


@pytest.mark.parametrize(("flavour", "name"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")])
def test_a_missing_module_names_the_command(flavour: Any, name: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(IncompatibleError, match=f"provider {flavour} needs {name} .*; pip install") as caught:
        tensorrt_module(flavour)
    assert "\n" not in str(caught.value)


def test_the_version_may_be_that_of_the_bindings(monkeypatch) -> None:
    """`tensorrt` re-exports the names of `tensorrt_bindings`; if it has no version, theirs counts."""
    monkeypatch.setitem(sys.modules, "tensorrt_bindings", _module("tensorrt_bindings", "11.4.0.106"))
    module = _module("tensorrt", None, bindings="tensorrt_bindings")
    assert library_version(module) == "11.4.0.106"
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    assert tensorrt_module("tensorrt") is module


def test_a_module_without_a_version_is_too_old(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", _module("tensorrt", None))
    with pytest.raises(IncompatibleError, match="too old"):
        tensorrt_module("tensorrt")


class _ILogger:
    """TensorRT's base class: its own constructor must be called, and its severities are enum members."""

    Severity = types.SimpleNamespace(
        **{name: types.SimpleNamespace(name=name) for name in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")}
    )

    def __init__(self) -> None:
        self.constructed = True


TRT = types.SimpleNamespace(ILogger=_ILogger)


def _log(logger: Any, severity: str, message: str) -> None:
    logger.log(getattr(_ILogger.Severity, severity), message)


def test_a_logger_passes_everything_to_its_sink_and_prints_nothing(capfd) -> None:
    heard: list[tuple[str, str]] = []
    logger = make_logger(TRT, lambda severity, text: heard.append((severity, text)))
    assert isinstance(logger, _ILogger)
    assert logger.constructed
    for severity in ("VERBOSE", "INFO", "WARNING", "ERROR", "INTERNAL_ERROR"):
        _log(logger, severity, f"of {severity}")
    assert heard[0] == ("VERBOSE", "of VERBOSE")
    assert [severity for severity, _ in heard] == ["VERBOSE", "INFO", "WARNING", "ERROR", "INTERNAL_ERROR"]
    assert capfd.readouterr() == ("", "")


def test_a_sink_that_fails_does_not_reach_the_library() -> None:
    def fail(severity: str, text: str) -> None:
        raise OSError("disk full")

    _log(make_logger(TRT, fail), "ERROR", "anything")


def test_the_first_error_is_the_reason_in_one_line() -> None:
    messages = Messages()
    logger = make_logger(TRT, messages)
    assert messages.reason() == "it gave no reason"
    assert messages.reason("a reason\nof ours") == "a reason of ours"
    _log(logger, "WARNING", "slow")
    _log(logger, "INFO", "hello")
    _log(logger, "ERROR", "Error Code 2:\n  OutOfMemory")
    _log(logger, "INTERNAL_ERROR", "its echo")
    assert messages.errors() == ["Error Code 2: OutOfMemory", "its echo"]
    assert messages.reason("a reason of ours") == "Error Code 2: OutOfMemory"
    messages.forget()
    assert messages.errors() == []


def test_a_thread_sees_only_its_own_errors() -> None:
    messages = Messages()
    messages("ERROR", "mine")
    heard: list[list[str]] = []

    def work() -> None:
        messages("ERROR", "the other's")
        heard.append(messages.errors())
        messages.forget()
        heard.append(messages.errors())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert heard == [["the other's"], []]
    assert messages.errors() == ["mine"]


def test_old_messages_are_dropped() -> None:
    messages = Messages()
    for i in range(1000):
        messages("ERROR", str(i))
    assert len(messages.errors()) < 100
    assert messages.errors()[-1] == "999"


def test_folders_of_dlls_are_added_before_the_module_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    monkeypatch.setattr(api, "add_dll_folders", lambda: steps.append("folders"))
    monkeypatch.setattr(api.importlib, "import_module", lambda name: steps.append(name) or _module(name, "11.0"))
    tensorrt_module("tensorrt")
    assert steps == ["folders", "tensorrt"]
