"""The full-size pair: what is exported, and that it is made once. The exports themselves are tested in tests/export."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdxl_trt.benchmarks.gpu_check import pair
from sdxl_trt.benchmarks.gpu_check.pair import EIGHT_BIT, PAIR, SECOND, main, make_command, make_pair
from sdxl_trt.engines.errors import ResourceError, SdxlTrtError

Exports = list[tuple[str, str | None, str, Any]]


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> Exports:
    """Return a list of exports, which grows by one per export; none needs torch, and weights are not drawn."""
    from sdxl_trt import export
    from sdxl_trt.benchmarks import full_size
    from sdxl_trt.mini import bundle_path

    done: Exports = []

    def write(size: str, role: str, out: Path) -> None:
        assert size == "tiny"
        (out / role).mkdir(parents=True)

    def export_bundle(base: Path, refiner: Path | None, out: Path, options: Any) -> None:
        assert base.is_dir()
        assert refiner is None or refiner.is_dir()
        done.append((base.name, refiner and refiner.name, out.name, options))
        out.mkdir()
        (out / "manifest.json").write_bytes((bundle_path() / "manifest.json").read_bytes())

    monkeypatch.setattr(full_size, "write_checkpoint", write)
    monkeypatch.setattr(export, "export_bundle", export_bundle)
    monkeypatch.setattr(pair, "read_bundle", lambda path: (path / "manifest.json").read_bytes())
    return done


def test_both_exports_are_made_once(exports: Exports, tmp_path: Path) -> None:
    said: list[str] = []
    for _ in range(2):
        assert make_pair(tmp_path, size="tiny", say=said.append) == tmp_path / PAIR
    assert [each[:3] for each in exports] == [("base", "refiner", PAIR), ("base", None, SECOND)]
    first, second = (each[3] for each in exports)
    assert (first.precision, first.twins, first.opset, first.components) == ("fp16", True, 23, None)
    assert (second.precision, second.twins, second.opset) == ("fp16", True, 20)
    assert second.components == {"unet", "vae_decoder_bf16"}
    assert said[-1] == f"{tmp_path / PAIR}: already made"
    assert sorted(path.name for path in tmp_path.iterdir()) == [SECOND, PAIR, "pair.json"], "no checkpoint stays"


def test_both_unets_are_exported_in_8_bits_on_request(exports: Exports, tmp_path: Path) -> None:
    for _ in range(2):
        make_pair(tmp_path, size="tiny", eight_bit=True)
    assert [each[:3] for each in exports] == [
        ("base", "refiner", PAIR), ("base", "refiner", EIGHT_BIT), ("base", None, SECOND)]  # fmt: skip
    options = exports[1][3]
    assert (options.precision, options.components) == ("int8", None)
    (tmp_path / EIGHT_BIT / "manifest.json").unlink()
    make_pair(tmp_path, size="tiny")
    assert len(exports) == 3, "who does not ask for it needs none"


@pytest.mark.parametrize("change", [
    lambda folder, patch: (folder / "pair.json").write_text("{}"),
    lambda folder, patch: (folder / SECOND / "manifest.json").unlink(),
    lambda folder, patch: patch.setattr("sdxl_trt.export.components.REVISION", 99),
])  # fmt: skip
def test_another_recipe_or_a_damaged_pair_is_made_again(
    change: Callable[[Path, pytest.MonkeyPatch], None],
    exports: Exports,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_pair(tmp_path, size="tiny")
    change(tmp_path, monkeypatch)
    with pytest.raises(FileExistsError):  # the stand-in for the exporter does not replace
        make_pair(tmp_path, size="tiny")


def test_an_interrupted_run_is_not_taken_for_a_whole_one(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make_pair(tmp_path, size="tiny")
    assert (tmp_path / PAIR).is_dir()
    assert not (tmp_path / "pair.json").exists()


def test_the_full_size_needs_its_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pair.shutil, "disk_usage", lambda path: SimpleNamespace(free=26 * 10**9))
    with pytest.raises(ResourceError, match="needs 27 GB of disk, about 36 GB with plans, 26 GB is free"):
        make_pair(tmp_path)


def test_the_command_prints_where_the_pair_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(pair, "make_pair", lambda out, eight_bit, say: out / PAIR)
    assert main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / PAIR}\n"
    assert make_command(pair.OUT) == "python -m sdxl_trt.benchmarks.gpu_check.pair"
    assert make_command(Path("a b")) == "python -m sdxl_trt.benchmarks.gpu_check.pair --out 'a b'"

    def fail(out: Path, eight_bit: bool, say: Any) -> None:
        raise SdxlTrtError("one line")

    monkeypatch.setattr(pair, "make_pair", fail)
    assert main([]) == 1
    assert capsys.readouterr().err == "error: one line\n"
