"""The host side: files, locks, memory, the console and text tables."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.engines.host.children import NEW_GROUP, Family, interpreter
    from sdxl_trt.engines.host.console import Output, Parser, option_type, print_json, run
    from sdxl_trt.engines.host.files import NO_LOCKS, atomic_write, contained, exclusive, sha256_file, sibling
    from sdxl_trt.engines.host.memory import (
        available_host_memory, format_bytes, parse_bytes, process_memory, return_freed_memory,
    )
    from sdxl_trt.engines.host.paths import is_utf8, known_as, one_line, refused_by_windows, require_utf8, shell_word
    from sdxl_trt.engines.host.private import cache_folder, owned_by_another, read_private, writable_by_others
    from sdxl_trt.engines.host.progress import ProgressLine
    from sdxl_trt.engines.host.tables import mebibytes, paragraph, span, table
    from sdxl_trt.engines.host.text_inputs import STDIN, check_inputs, finite_number, read_capped
    from sdxl_trt.engines.host.version import __version__
    from sdxl_trt.engines.host.windows import add_dll_folders, total_memory
else:
    __getattr__ = lazy_names(__name__, {
        "children": ("NEW_GROUP", "Family", "interpreter"), "windows": ("add_dll_folders", "total_memory"),
        "console": ("Output", "Parser", "option_type", "print_json", "run"),
        "files": ("NO_LOCKS", "atomic_write", "contained", "exclusive", "sha256_file", "sibling"),
        "memory": ("available_host_memory", "format_bytes", "parse_bytes", "process_memory", "return_freed_memory"),
        "paths": ("is_utf8", "known_as", "one_line", "refused_by_windows", "require_utf8", "shell_word"),
        "private": ("cache_folder", "owned_by_another", "read_private", "writable_by_others"),
        "progress": ("ProgressLine",), "tables": ("mebibytes", "paragraph", "span", "table"),
        "text_inputs": ("STDIN", "check_inputs", "finite_number", "read_capped"), "version": ("__version__",),
    })

__all__ = [
    "NEW_GROUP", "NO_LOCKS", "STDIN", "Family", "Output", "Parser", "ProgressLine", "__version__", "add_dll_folders",
    "atomic_write", "available_host_memory", "cache_folder", "check_inputs", "contained", "exclusive", "finite_number",
    "format_bytes", "interpreter", "is_utf8", "known_as", "mebibytes", "one_line", "option_type", "owned_by_another",
    "paragraph", "parse_bytes", "print_json", "process_memory", "read_capped", "read_private", "refused_by_windows",
    "require_utf8", "return_freed_memory", "run", "sha256_file", "shell_word", "sibling", "span", "table",
    "total_memory", "writable_by_others",
]
