"""The commands' contract: one line on stderr, the exit code of the error, JSON alone on stdout."""

import argparse
import errno
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator

import pytest

from sdxl_trt.engines.errors import (
    CorruptError,
    EngineError,
    IncompatibleError,
    ResourceError,
    SizeError,
    SourceError,
    UsageError,
)
from sdxl_trt.engines.host.console import Parser, print_json, run


@pytest.fixture
def parser() -> Parser:
    parser = Parser(prog="trt-test")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--debug", action="store_true")
    return parser


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    """Leave the package's logger as it was: `run` gives it a handler on stderr."""
    logger = logging.getLogger("sdxl_trt")
    before, propagate = logger.handlers[:], logger.propagate
    logger.handlers.clear()
    yield
    logger.handlers[:], logger.propagate = before, propagate


def _raise(error: BaseException) -> Callable[[argparse.Namespace], None]:
    def work(_: argparse.Namespace) -> None:
        raise error

    return work


def test_success_is_zero_and_silent(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    assert run(parser, lambda arguments: seen.append(arguments.steps), ["--steps", "7"]) == 0
    assert seen == [7]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("odd"), 1),
        (EngineError("e"), 1),
        (UsageError("e"), 2),
        (SizeError("e"), 2),
        (SourceError("e"), 2),
        (IncompatibleError("e"), 3),
        (CorruptError("e"), 4),
        (ResourceError("e"), 5),
        (MemoryError(), 5),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_error_is_one_line_and_its_code(
    parser: Parser, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    assert run(parser, _raise(error), []) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_an_unexpected_error_is_called_a_defect(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    run(parser, _raise(KeyError("rows")), [])
    assert "KeyError: 'rows'; this is a defect: please report" in capsys.readouterr().err


def test_debug_adds_the_traceback_and_its_cause(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    error = CorruptError("broken")
    error.__cause__ = OSError("why")
    assert run(parser, _raise(error), ["--debug"]) == 4
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "OSError: why" in err
    assert err.endswith("error: broken\n")


def test_quoted_text_cannot_control_the_terminal(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    run(parser, _raise(CorruptError("bad\x1b[2J name\r\n\x00\x9bK\u202ered")), [])
    err = capsys.readouterr().err
    assert err.removesuffix("\n").isprintable()
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--step", "3"], "unrecognized arguments: --step"),  # no abbreviations
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--steps"], "argument --steps: expected one argument"),
        (["stray"], "unrecognized arguments: stray"),
        (["stray\nline\x1b[2J"], "unrecognized arguments: stray"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_two(
    parser: Parser, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(parser, _raise(AssertionError("must not run")), argv)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {words}")
    assert err.endswith("see trt-test --help\n")
    assert err.removesuffix("\n").isprintable()


def test_a_list_that_begins_with_a_negative_number_is_a_value() -> None:
    parser = Parser(prog="tool")
    parser.add_argument("--sides")
    for text in ("-8,0,0,0", "-.5:1"):
        assert parser.parse_args(["--sides", text]).sides == text


def test_json_is_one_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"images": [{"path": "ä.png", "seed": 2**64 - 1}], "sigma": 0.5154, "none": None}
    print_json(value)
    out, err = capsys.readouterr()
    assert json.loads(out) == value
    assert (out.count("\n"), err) == (1, "")


def test_warnings_go_to_stderr_once(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    def work(_: argparse.Namespace) -> None:
        logging.getLogger("sdxl_trt.runtime").warning("the prompt is %s", "long")

    assert run(parser, work, []) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("", "warning: the prompt is long\n")


def test_a_reader_that_is_gone_on_windows_gets_no_message(
    parser: Parser, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows reports a closed pipe as an invalid argument; a file with a name that is invalid is another matter."""
    closed = _raise(OSError(errno.EINVAL, "Invalid argument"))
    assert run(parser, closed, []) == 1
    assert "error: using the output: Invalid argument" in capfd.readouterr().err
    pointed: list[int] = []
    monkeypatch.setattr("os.dup2", lambda _, target: pointed.append(target))
    monkeypatch.setattr(sys, "platform", "win32")
    assert run(parser, closed, []) == 1
    assert capfd.readouterr().err == ""
    assert pointed == [sys.stdout.fileno()]
    assert run(parser, _raise(OSError(errno.EINVAL, "Invalid argument", "a?b")), []) == 1
    assert "using a?b: Invalid argument" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGBREAK"])
def test_a_signal_to_end_unwinds_and_the_handler_before_comes_back(
    parser: Parser, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGBREAK exists on Windows alone: SIGUSR1 stands in for it."""
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    number = getattr(signal, name)
    before, cleaned = signal.getsignal(number), []

    def work(_: argparse.Namespace) -> None:
        try:
            signal.raise_signal(number)
        finally:
            cleaned.append(True)

    with pytest.raises(SystemExit) as caught:
        run(parser, work, [])
    assert caught.value.code == 128 + number
    assert cleaned == [True]
    assert signal.getsignal(number) == before
