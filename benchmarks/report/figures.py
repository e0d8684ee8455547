"""Matplotlib for the charts of a page: one style, colours as CSS variables, SVG that fits inside HTML."""

__all__ = ["SAID", "axes_of", "coloured", "drawn", "require_matplotlib", "styled"]

import io
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from sdxl_trt.benchmarks.report.quantities import plain
from sdxl_trt.benchmarks.report.style import LIGHT
from sdxl_trt.engines import SdxlTrtError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAID = "said: "
"""The prefix of a mark's gid; what follows it becomes the mark's title."""
WIDTH = 380.0
_VARIABLES = {colour: f"var(--{name})" for name, colour in LIGHT.items()}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "sdxl-trt", "text.parse_math": False, "figure.frameon": False,
    "axes.autolimit_mode": "round_numbers", "axes.xmargin": 0, "axes.ymargin": 0, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": LIGHT["rule"], "xtick.bottom": False, "xtick.color": LIGHT["soft"],
    "ytick.left": False, "ytick.color": LIGHT["soft"], "axes.labelcolor": LIGHT["soft"], "text.color": LIGHT["text"],
    "font.size": 11, "lines.solid_capstyle": "round",
}  # fmt: skip


def require_matplotlib() -> None:
    """Raise SdxlTrtError unless matplotlib is installed, without importing it."""
    if find_spec("matplotlib") is None:
        raise SdxlTrtError("the charts of a page need matplotlib, which is missing; pip install 'sdxl-trt[bench]'")


@contextmanager
def styled() -> Iterator[None]:
    """Apply the style of the charts, whatever a user's matplotlibrc sets."""
    require_matplotlib()
    # Otherwise it warns that its font cache is temporary if HOME is read-only.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib as mpl  # noqa: PLC0415 - only a page needs it

    with mpl.rc_context(), warnings.catch_warnings():
        # Its font only measures the text; a browser shows it, in fonts with more letters.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def axes_of(height: float, *, left: float, right: float, bottom: float, top: float) -> "Axes":
    """Return the axes of a new figure; height and margins are in points, the units of its SVG."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    box = (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (bottom + top) / height)
    axes = Figure((WIDTH / 72, height / 72)).add_axes(box, frameon=False)
    axes.locator_params(nbins=5)
    return axes


def coloured(kinds: Iterable[str]) -> dict[str, str]:
    """Return {kind: colour}; kinds after the eighth share a colour."""
    return {kind: LIGHT[f"c{min(number, 8)}"] for number, kind in enumerate(dict.fromkeys(kinds))}


def drawn(title: str, legend: Mapping[str, str], axes: "Axes") -> str:
    """Return `axes` as a <figure> with its title and legend {label: colour}; its SVG has no ids, which could clash."""
    svg, figure = io.StringIO(), ET.Element("figure")
    caption = ET.SubElement(figure, "figcaption")
    ET.SubElement(caption, "strong").text = plain(title)
    for label, colour in legend.items():
        chip = ET.SubElement(caption, "span", {"class": "chip", "style": f"--chip: {_VARIABLES[colour]}"})
        chip.text = plain(label)
    axes.figure.canvas.print_figure(svg, format="svg", metadata={"Date": None})
    root = ET.fromstring(plain(svg.getvalue()))  # noqa: S314 - matplotlib wrote it
    for each in list(root.iter()):
        for child in [one for one in each if one.tag.endswith(("}defs", "}metadata"))]:
            each.remove(child)
        each.tag, each.text, each.tail = each.tag.rpartition("}")[2], (each.text or "").strip(), None
        each.attrib.pop("clip-path", None)
        style, said = each.attrib.pop("style", ""), each.attrib.pop("id", "")
        if style:
            style = re.sub("font-family: [^;]*;? ?", "", style)
            each.set("style", re.sub("#[0-9a-f]{6}", lambda colour: _VARIABLES[colour[0]], style))
        if said.startswith(SAID):
            each.insert(0, ET.Element("title"))
            each[0].text = said.removeprefix(SAID).strip()
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": plain(title)}
    figure.append(root)
    return ET.tostring(figure, encoding="unicode", short_empty_elements=False)
