"""A workflow's `filename_prefix` as the name of a file here."""

__all__ = ["MAX_STEM_BYTES", "file_stem"]

import logging
import re
from datetime import datetime

from sdxl_trt.engines.host import refused_by_windows

log = logging.getLogger("sdxl_trt.runtime")
MAX_STEM_BYTES = 120
"""File systems take 255 bytes; numbers, an ending and the name of a temporary file come on top."""
# What ComfyUI's server puts in (folder_paths.get_save_image_path), the time as strftime writes it.
_TIMES = {"year": "%Y", "month": "%m", "day": "%d", "hour": "%H", "minute": "%M", "second": "%S"}
# What its page puts in before it asks the server: %date:yyyy-MM-dd%, letters as many as digits.
_DATE = re.compile(r"%date:([^%]*)%")
_LETTERS = re.compile(r"yyyy|yy|dd?|MM?|hh?|mm?|ss?")
_LEFT = re.compile(r"%[^%\s]+%")
# What Windows' file systems refuse besides control characters.
_REFUSED = re.compile(r'[<>:"|?*%]')


def file_stem(prefix: str, width: int, height: int, now: datetime | None = None) -> str | None:
    """Return a file name without ending for a `prefix` that nobody has vouched for, or None where nothing is left.

    ComfyUI's variables are filled in: ``%width%``, ``%height%``, ``%year%`` to ``%second%``, ``%date:FORMAT%``.
    One that only its page knows (``%Node.widget%``) is warned of, and the prefix is not used. Folders are left out: the
    pictures of a command are in one place. So are control characters, and dots and dashes at the front, which hide a
    file or make an option of its name. A device's name on Windows (``NUL``, ``com1.x``) gets an underline before it.
    """
    now = now or datetime.now().astimezone()
    filled = prefix.replace("%width%", str(width)).replace("%height%", str(height))
    for name, form in _TIMES.items():
        filled = filled.replace(f"%{name}%", now.strftime(form))
    filled = _DATE.sub(lambda found: _LETTERS.sub(lambda letters: _digits(letters[0], now), found[1]), filled)
    if left := _LEFT.search(filled):
        log.warning("filename_prefix: %s is known to ComfyUI's page alone, and the prefix is not used; give a name with"
                    " -o", left[0])  # fmt: skip
        return None
    name = re.split(r"[/\\]", filled)[-1]
    name = _REFUSED.sub("_", "".join(c for c in name if c.isprintable())).lstrip(".- ").rstrip(". ")
    name = f"_{name}" if refused_by_windows(f"{name}.png") else name
    return name.encode(errors="ignore")[:MAX_STEM_BYTES].decode(errors="ignore").strip() or None


def _digits(letters: str, now: datetime) -> str:
    """Return what ComfyUI's page writes for the letters of a date's form."""
    if letters[0] == "y":
        return f"{now.year:04}"[-len(letters) :]
    value = {"d": now.day, "M": now.month, "h": now.hour, "m": now.minute, "s": now.second}[letters[0]]
    return str(value).rjust(len(letters), "0")
