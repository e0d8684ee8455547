"""Finished work is not repeated: unchanged components, interrupted exports, locks, and killed exports."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.errors import CorruptError, IncompatibleError, ResourceError, SdxlTrtError, UsageError
from sdxl_trt.export import Options, export_bundle, exporter
from sdxl_trt.export.exporter import plan_export
from sdxl_trt.export.output.staging import exclusive, partial_folder

ENCODERS = frozenset({"text_encoder", "text_encoder_2"})
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("converted_once")]


@pytest.fixture
def base(pairs: Callable[[str], Any]) -> Path:
    return Path(pairs("outline").base)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, converted_once: None) -> list[str]:
    """The names of the traced components; put "!name" in the list to interrupt that one."""
    calls: list[str] = []
    real = exporter.convert_component

    def convert(name: str, *rest: Any) -> Any:
        if f"!{name}" in calls:
            raise KeyboardInterrupt
        calls.append(name)
        return real(name, *rest)

    monkeypatch.setattr("sdxl_trt.export.exporter.convert_component", convert)
    return calls


def _export(base: Path, out: Path, **options: Any) -> Bundle:
    settings = {"precision": "fp32", "components": ENCODERS} | options
    return export_bundle(base, None, out, Options(**settings))


def _content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_unchanged_components_are_kept(base: Path, tmp_path: Path, traced: list[str]) -> None:
    out = tmp_path / "out"
    _export(base, out)
    assert sorted(traced) == sorted(ENCODERS)
    before = _content(out)
    (out / "plans").mkdir()  # files that others added to an unchanged bundle stay
    traced.clear()
    _export(base, out)
    assert traced == []
    assert (out / "plans").is_dir()
    (out / "plans").rmdir()
    assert _content(out) == before

    _export(base, out, force=True)
    assert sorted(traced) == sorted(ENCODERS)
    assert _content(out) == before
    traced.clear()

    weights = out / "text_encoder" / "weights.data"
    damaged = bytearray(weights.read_bytes())
    damaged[7] ^= 1
    weights.write_bytes(damaged)
    _export(base, out)
    assert traced == ["text_encoder"]
    assert _content(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_changed_tensors_and_options_are_exported_again(base: Path, tmp_path: Path, traced: list[str]) -> None:
    from safetensors.numpy import load_file, save_file

    out, changed = tmp_path / "out", tmp_path / "changed"
    _export(base, out)
    traced.clear()
    shutil.copytree(base, changed)
    file = changed / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("final_layer_norm.bias"))
    save_file(tensors | {name: tensors[name] + 1}, file, {"format": "pt"})
    _export(changed, out)
    assert traced == ["text_encoder"]
    traced.clear()
    _export(changed, out, opset=20, components=frozenset({"text_encoder"}))
    assert traced == ["text_encoder"]
    opsets = {name: component.opset for name, component in read_bundle(out, partial=True).manifest.components.items()}
    assert opsets == {"text_encoder": 20, "text_encoder_2": 23}  # components that were not requested are unchanged


def test_an_interrupted_export_resumes(base: Path, tmp_path: Path, traced: list[str]) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    _export(base, whole)
    traced[:] = ["!text_encoder_2"]
    with pytest.raises(KeyboardInterrupt):
        _export(base, out)
    assert not out.exists()
    assert [path.name for path in partial_folder(out).iterdir()] == ["text_encoder"]
    assert plan_export(base, None, out, Options("fp32", components=ENCODERS)).jobs["text_encoder"].action == "resume"
    traced.clear()
    _export(base, out)
    assert traced == ["text_encoder_2"]
    assert _content(out) == _content(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_damaged_finished_component_is_not_resumed(base: Path, tmp_path: Path, traced: list[str]) -> None:
    out = tmp_path / "out"
    traced.append("!text_encoder_2")
    with pytest.raises(KeyboardInterrupt):
        _export(base, out)
    weights = partial_folder(out) / "text_encoder" / "weights.data"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    traced.clear()
    _export(base, out)
    assert traced == ["text_encoder", "text_encoder_2"]


def test_an_error_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = exporter.convert_component

    def convert(name: str, *rest: Any) -> Any:
        if name == "text_encoder_2":
            raise CorruptError("planted")
        return real(name, *rest)

    monkeypatch.setattr("sdxl_trt.export.exporter.convert_component", convert)
    with pytest.raises(CorruptError, match="planted"):
        _export(base, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_remains_of_a_killed_export_are_repaired(base: Path, tmp_path: Path, traced: list[str]) -> None:
    out, precious = tmp_path / "out", tmp_path / "precious"
    _export(base, out)
    before = _content(out)
    out.rename(tmp_path / ".out.old")  # killed between the two renames
    precious.mkdir()
    (precious / "file").write_text("mine")
    partial = partial_folder(out)
    (partial / "unet").mkdir(parents=True)
    (partial / "unet" / "weights.data").write_bytes(b"half")
    (partial / "text_encoder").symlink_to(precious)
    (tmp_path / ".out.lock").touch()
    traced.clear()
    _export(base, out)
    assert traced == []
    assert _content(out) == before
    assert (precious / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "precious"]


def test_a_second_export_at_the_same_time_is_refused(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with exclusive(out), pytest.raises(UsageError, match="another export is writing it"):
        _export(base, out)
    assert list(tmp_path.iterdir()) == []


def test_disk_and_memory_are_checked_first(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    needs = plan_export(base, None, out, Options("fp32")).needs
    parts = plan_export(base, None, out, Options("fp32", components=ENCODERS)).needs
    assert 0 < parts.disk < needs.disk
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("sdxl_trt.export.components.budget._free", lambda out: needs.disk - 1)
    with pytest.raises(ResourceError, match="of disk") as caught:
        export_bundle(base, None, out, Options("fp32"))
    assert caught.value.exit_code == 5
    monkeypatch.setattr("sdxl_trt.export.components.budget._free", lambda out: None)
    monkeypatch.setattr("sdxl_trt.export.components.budget.available_host_memory", lambda: 1 << 20)
    with pytest.raises(ResourceError, match="of memory"):
        export_bundle(base, None, out, Options("fp32"))
    assert list(tmp_path.iterdir()) == []


def test_part_of_a_bundle_is_not_a_bundle(base: Path, tmp_path: Path) -> None:
    root = _export(base, tmp_path / "out", components=frozenset({"text_encoder"})).root
    with pytest.raises(SdxlTrtError, match="which the manifest does not list"):
        read_bundle(root)
    with pytest.raises(UsageError, match="--components tokenizer: choose from text_encoder"):
        Options(components=frozenset({"tokenizer"}))


def test_a_damaged_component_is_replaced_and_the_others_stay(base: Path, tmp_path: Path, traced: list[str]) -> None:
    out = tmp_path / "out"
    _export(base, out)
    before = _content(out)
    weights = out / "text_encoder" / "weights.data"
    weights.write_bytes(weights.read_bytes()[:-5])
    traced.clear()
    with pytest.raises(CorruptError, match="truncated or was changed"):
        _export(base, out, components=frozenset({"text_encoder_2"}))
    assert traced == []
    _export(base, out, components=frozenset({"text_encoder"}))
    assert traced == ["text_encoder"]
    assert _content(out) == before
    tokenizer = out / "tokenizer" / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes().replace(b"fox", b"dog"))
    _export(base, out)
    assert _content(out) == before


def test_a_newer_bundle_is_not_replaced(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text('{"format": "sdxl-trt-bundle", "format_version": 99}')
    before = _content(out)
    with pytest.raises(IncompatibleError, match="newer"):
        _export(base, out)
    assert _content(out) == before


def test_two_models_are_not_mixed(pairs: Callable[[str], Any], base: Path, tmp_path: Path, traced: list[str]) -> None:
    out = Path(shutil.copytree(pairs("outline").bundle, tmp_path / "out"))
    before = _content(out)
    traced.clear()
    chosen = Options("fp32", components=frozenset({"text_encoder"}))
    with pytest.raises(UsageError, match="also has refiner_unet"):
        export_bundle(base, None, out, chosen)
    other = pairs("apart")
    with pytest.raises(UsageError, match=r"comes from another model"):
        export_bundle(other.base, other.refiner, out, chosen)
    with pytest.raises(UsageError, match="refiner_vae_decoder: this model has no such component"):
        export_bundle(base, pairs("outline").refiner, out, Options(components=frozenset({"refiner_vae_decoder"})))
    assert (traced, _content(out)) == ([], before)


def test_components_of_another_export_are_not_published(base: Path, tmp_path: Path, traced: list[str]) -> None:
    out = tmp_path / "out"
    traced.append("!text_encoder_2")
    with pytest.raises(KeyboardInterrupt):
        _export(base, out)
    partial = partial_folder(out)
    shutil.copytree(partial / "text_encoder", partial / "refiner_unet")
    traced.clear()
    _export(base, out)
    assert {path.name for path in out.iterdir() if path.is_dir()} == {*ENCODERS, "tokenizer", "tokenizer_2"}


def test_an_interrupt_while_publishing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    _export(base, out)
    before = _content(out)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        _export(base, out, opset=20)
    assert _content(out) == before
    monkeypatch.undo()
    plan = plan_export(base, None, out, Options("fp32", components=ENCODERS, opset=20))
    assert {job.action for job in plan.jobs.values()} == {"resume"}  # every component was finished
