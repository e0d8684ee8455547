"""The tiling benchmark: pictures of the stated sizes, a table, and exit code 1 if diffusers' tiles are nearer."""

from pathlib import Path

import numpy as np
import pytest

from sdxl_trt.benchmarks.quality import tiling
from sdxl_trt.benchmarks.quality.tiling import Row, main, table

ROW = Row(kind="one scene", pictures=4, side=512, tile=256, tiles=9, ours=53.04, theirs=51.32)


def test_the_table_names_its_command_and_rounds_to_tenths() -> None:
    text = table([ROW])
    assert "`python -m sdxl_trt.benchmarks.quality.tiling`" in text
    assert "| 4 of one scene | 512² | 256² | 9 | 53.0 dB | 51.3 dB |" in text


@pytest.mark.parametrize(("theirs", "code"), [(53.0, 0), (53.1, 1)])
def test_being_farther_than_diffusers_is_a_failure(
    theirs: float, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn = []

    def measure(_: object, kind: str, pictures: list[np.ndarray], tile: int) -> Row:
        drawn.append((kind, tile, {picture.shape for picture in pictures}, len({p.tobytes() for p in pictures})))
        return Row(kind=kind, pictures=4, side=512, tile=tile, tiles=9, ours=53.04, theirs=theirs)

    monkeypatch.setattr(tiling, "_autoencoder", lambda: None)
    monkeypatch.setattr(tiling, "measure", measure)
    assert main(["--results", str(tmp_path / "tiling.md")]) == code
    assert (tmp_path / "tiling.md").read_text(encoding="utf-8").count("of one scene") == 2
    assert drawn == [
        (kind, tile, {(side, side, 3)}, 4)
        for side, tile in ((512, 256), (1024, 512))
        for kind in ("many scenes", "one scene")
    ]
