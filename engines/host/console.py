"""Shared code of the commands: one-line errors and exit codes, warnings on stderr, JSON on stdout."""

__all__ = ["Output", "Parser", "option_type", "print_json", "run"]

import argparse
import errno
import functools
import io
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

from sdxl_trt.engines.errors import ResourceError, SdxlTrtError, UsageError, explain_os_error
from sdxl_trt.engines.host.paths import OUTPUT_ERRORS, one_line

Parsed = TypeVar("Parsed")
INTERRUPTED = 130
USAGE = 2


class Output(NamedTuple):
    """The output of a command in two forms: lines for people, an object for programs."""

    lines: list[str]
    json: dict[str, Any]


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors, and without abbreviations, which a later flag would break."""

    def __init__(self, **settings: Any) -> None:
        form = functools.partial(settings.pop("formatter_class", argparse.HelpFormatter), width=_columns() - 2)
        super().__init__(allow_abbrev=False, formatter_class=form, **settings)
        # argparse takes "-8,0" for an option; it is a value, which the option that it is given to refuses or takes.
        self._negative_number_matcher = re.compile(r"-\.?\d")
        self.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")

    def error(self, message: str) -> NoReturn:
        """Print one line and exit 2."""
        self.exit(USAGE, f"error: {one_line(message)}; see {self.prog} --help\n")


def _columns() -> int:
    """Return the width of the terminal as shutil does, whose import would take longer than the rest of ``--help``."""
    try:
        return int(os.environ.get("COLUMNS", "0")) or os.get_terminal_size(1).columns or 80
    except (OSError, ValueError):
        return 80


def option_type(parse: Callable[[str], Parsed]) -> Callable[[str], Parsed]:
    """Return `parse` as the `type` of an option: argparse names the option before the text of its UsageError."""

    def convert(text: str) -> Parsed:
        try:
            return parse(text)
        except UsageError as exc:
            raise argparse.ArgumentTypeError(str(exc)) from exc

    return convert


class _Version(argparse.Action):
    """Like argparse's own "version", but reads the version only when the option is given."""

    def __init__(self, option_strings: list[str], **settings: Any) -> None:
        super().__init__(option_strings, **{**settings, "dest": argparse.SUPPRESS})

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from sdxl_trt.engines.host.version import __version__  # noqa: PLC0415 - reads the installed metadata

        sys.stdout.write(f"{parser.prog} {__version__}\n")
        parser.exit()


def run(parser: Parser, work: Callable[[argparse.Namespace], None], argv: list[str] | None) -> int:
    """Parse `argv`, call `work`, return the exit code; `--debug` adds the traceback to the one-line error."""
    _take_any_path(sys.stdout)
    arguments = parser.parse_args(argv)
    try:
        from sdxl_trt.engines.host.running import logging_to_stderr, unwinding_on_sigterm  # noqa: PLC0415 - not for --help

        with logging_to_stderr(), unwinding_on_sigterm():
            work(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left half-written", INTERRUPTED)
    except Exception as exc:  # noqa: BLE001 - the boundary: the user gets one line for any error
        if _reader_is_gone(exc):
            # There is nobody to read a message; the interpreter would print one at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        if arguments.debug:
            import traceback  # noqa: PLC0415

            traceback.print_exc()
        return _fail(*_explain(exc))
    return 0


def _reader_is_gone(exc: Exception) -> bool:
    """Return whether the reader of our output has closed it, which Windows reports as an invalid argument."""
    invalid = isinstance(exc, OSError) and exc.errno == errno.EINVAL and exc.filename is None
    return isinstance(exc, BrokenPipeError) or (invalid and sys.platform == "win32")


def _take_any_path(stream: Any) -> None:
    """Let `stream` write paths of any bytes unchanged, so that its readers can open the files."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=OUTPUT_ERRORS)


def _explain(exc: Exception) -> tuple[str, int]:
    if isinstance(exc, SdxlTrtError):
        return str(exc), exc.exit_code
    if isinstance(exc, MemoryError):
        remedy = "try a smaller size, fewer pictures, or --residency swap"
        return f"out of memory; {remedy}", ResourceError.exit_code
    if isinstance(exc, OSError):
        known = explain_os_error(exc, f"using {exc.filename or 'the output'}")
        return str(known), known.exit_code
    return f"{type(exc).__name__}: {exc}; this is a defect: please report it with the output of --debug", 1


def print_json(value: Any) -> None:
    """Print one JSON object on stdout.

    A byte of a path that is not UTF-8 becomes the escape of its lone surrogate (``\\udce9``): after `json.loads`,
    `os.fsencode` restores the path.
    """
    import msgspec  # noqa: PLC0415 - slow to import, and --help does without

    try:
        text = msgspec.json.encode(value).decode()
    except UnicodeEncodeError:
        import json  # noqa: PLC0415

        text = json.dumps(msgspec.to_builtins(value))
    sys.stdout.write(text + "\n")


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"error: {one_line(message)}\n")
    return code
