"""The cost of SDXL's published graphs at any size, without a bundle, weights, onnx or torch.

Every count is an exact polynomial in the size of the work: convolutions and projections grow with the latent pixels,
self-attention with their square, cross-attention with pixels times tokens, the rest only with rows.
``counts/sdxl.json`` holds the coefficients; `roofline.count_sdxl` derives them from traced graphs.
"""

__all__ = ["TERMS", "GraphCounts", "SdxlCounts", "read_counts", "term_values"]

from pathlib import Path

import msgspec

from sdxl_trt.benchmarks.roofline.flops import Counts
from sdxl_trt.engines import CorruptError, SizeError

PATH = Path(__file__).with_name("counts") / "sdxl.json"
FACTOR = 8
TERMS = ("1", "tokens", "pixels", "pixels*tokens", "pixels^2")
"""The terms of a row's cost; pixels are latent pixels."""

Polynomial = dict[str, int]


def term_values(pixels: int, tokens: int) -> dict[str, int]:
    """Return the value of each of the TERMS for this many latent pixels and prompt tokens."""
    return dict(zip(TERMS, (1, tokens, pixels, pixels * tokens, pixels * pixels), strict=True))


class GraphCounts(msgspec.Struct, frozen=True, kw_only=True):
    """The cost of one graph: coefficients by term, multiplied by rows; weights are read once for all rows.

    `precision` is that of the counted graph; sides in latent pixels must be multiples of `multiple`.
    """

    precision: str
    multiple: int
    flops: dict[str, Polynomial]
    weight_bytes: int
    fixed_bytes: int
    """The part of the least bytes that does not grow with the rows: weights without embedding tables."""
    row_bytes: Polynomial
    activation_bytes: Polynomial

    def at(self, *, rows: int, height: int, width: int, tokens: int = 77) -> Counts:
        """Return the cost of a call for pictures of `height` × `width` pixels; see `flops.count_component` for rows.

        Raises SizeError for sides that the graph does not take.
        """
        step = FACTOR * self.multiple
        if height % step or width % step:
            raise SizeError(f"{width}x{height}: the graph takes multiples of {step} pixels")
        terms = term_values((height // FACTOR) * (width // FACTOR), tokens)
        by_operator = {operator: rows * _value(each, terms) for operator, each in self.flops.items()}
        return Counts(
            flops=sum(by_operator.values()),
            by_operator=by_operator,
            weight_bytes=self.weight_bytes,
            least_bytes=self.fixed_bytes + rows * _value(self.row_bytes, terms),
            activation_bytes=rows * _value(self.activation_bytes, terms),
        )


class SdxlCounts(msgspec.Struct, frozen=True, kw_only=True):
    """The content of ``counts/sdxl.json``: the command that wrote it, library versions, and graphs by component."""

    command: str
    versions: dict[str, str]
    graphs: dict[str, GraphCounts]


def read_counts(path: Path = PATH) -> SdxlCounts:
    """Return the checked-in counts. Raises CorruptError if the file is missing or broken."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=SdxlCounts)
    except (OSError, msgspec.DecodeError) as exc:
        raise CorruptError(
            f"{path}: cannot read the counts ({exc}); run: python -m sdxl_trt.benchmarks.roofline.count_sdxl"
        ) from exc


def _value(polynomial: Polynomial, terms: dict[str, int]) -> int:
    return sum(coefficient * terms[term] for term, coefficient in polynomial.items())
