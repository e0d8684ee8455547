"""Two complete folders or nothing: what is copied, what is moved, and what a failure leaves."""

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest

from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.errors import CorruptError, IncompatibleError, ResourceError, SdxlTrtError, UsageError
from sdxl_trt.export.optimum.layout import write_optimum
from sdxl_trt.export.sources.source import BASE_CLASS, REFINER_CLASS, PipelineSource, open_pipeline

MODELS = {"unet", "vae_decoder", "vae_encoder", "text_encoder_2"}
COPY = os.copy_file_range


@dataclass(frozen=True)
class Case:
    """A private bundle, to be damaged or consumed, and its sources."""

    bundle: Bundle
    base: PipelineSource
    refiner: PipelineSource
    out: Path

    def write(self, **options: Any) -> dict[str, bytes]:
        """Write the layout and return every file of it."""
        write_optimum(self.bundle, self.base, self.refiner, self.out, **options)
        return _files(self.out)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def case(pairs: Callable[[str], Any], tmp_path: Path) -> Case:
    pair = pairs("outline")
    bundle = read_bundle(shutil.copytree(pair.bundle, tmp_path / "bundle"))
    base, refiner = open_pipeline(pair.base, BASE_CLASS), open_pipeline(pair.refiner, REFINER_CLASS)
    return Case(bundle, base, refiner, tmp_path / "out")


def test_each_folder_is_complete(case: Case) -> None:
    files = case.write()
    parts = {name: {path.split("/")[1] for path in files if path.startswith(name)} for name in ("base", "refiner")}
    assert parts["base"] == MODELS | {"text_encoder", "tokenizer", "tokenizer_2", "scheduler", "model_index.json"}
    assert parts["refiner"] == MODELS | {"tokenizer_2", "scheduler", "model_index.json"}
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in case.out.rglob("*") if path.is_file())
    for stage, component in (("base", "unet"), ("refiner", "refiner_unet")):
        record = case.bundle.manifest.components[component].weights
        assert files[f"{stage}/unet/weights.data"] == case.bundle.path(record).read_bytes()
        onnx.checker.check_model(case.out / stage / "unet" / "model.onnx", full_check=True)


def test_a_bundle_without_a_refiner_gives_one_folder(case: Case) -> None:
    alone = msgspec.structs.replace(case.bundle.manifest, refiner=None)
    write_optimum(Bundle(case.bundle.root, alone), case.base, None, case.out)
    assert sorted(path.name for path in case.out.iterdir()) == ["base", "manifest.json"]


def test_consumed_weights_are_moved_with_the_same_result(case: Case, tmp_path: Path) -> None:
    copied = case.write()
    unet = case.bundle.path(case.bundle.manifest.components["unet"].weights)
    inode = unet.stat().st_ino
    calls: list[tuple[str, str]] = []
    assert case.write(consume=True, progress=lambda *what: calls.append(what)) == copied
    assert (case.out / "base" / "unet" / "weights.data").stat().st_ino == inode
    assert list(case.bundle.root.rglob("weights.data")) == []
    assert ("text_encoder_2", "writing refiner/text_encoder_2") in calls


def test_the_bundle_is_unchanged_without_consume(case: Case) -> None:
    before = _files(case.bundle.root)
    case.write()
    assert _files(case.bundle.root) == before


def _refuse(*arguments: Any) -> int:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


class _Interrupted:
    """Copies ten bytes of each file, then does what `after` does."""

    def __init__(self, after: int) -> None:
        self.after, self.begun = after, set[int]()

    def __call__(self, source: int, target: int, count: int) -> int:
        if os.fstat(target).st_size == 0:
            return COPY(source, target, 10)
        if self.after:
            raise OSError(self.after, os.strerror(self.after))
        return 0


@pytest.mark.parametrize("copy", [_refuse, _Interrupted(errno.EINVAL), _Interrupted(0)])
def test_files_are_copied_if_the_kernel_cannot(case: Case, copy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = case.write()
    monkeypatch.setattr(os, "copy_file_range", copy)
    assert case.write() == expected


def test_files_are_copied_without_copy_file_range(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = case.write()
    monkeypatch.delattr(os, "copy_file_range")
    assert case.write() == expected


def _fails(case: Case, error: type[SdxlTrtError], match: str, **options: Any) -> None:
    """Check that writing fails and leaves the old folder, and nothing beside it."""
    before = _files(case.out) if case.out.exists() else None
    with pytest.raises(error, match=match):
        case.write(**options)
    assert (_files(case.out) if case.out.exists() else None) == before
    assert {path.name for path in case.out.parent.iterdir()} <= {"bundle", "out"}


def test_a_full_disk_leaves_the_old_folder(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.write()
    monkeypatch.setattr(os, "copy_file_range", _Interrupted(errno.ENOSPC))
    _fails(case, ResourceError, "No space left on device; free some space")


def test_a_damaged_graph(case: Case) -> None:
    case.bundle.path(case.bundle.manifest.components["refiner_unet"].graph).write_bytes(b"\xff" * 64)
    _fails(case, CorruptError, "refiner_unet/model.onnx: not an ONNX graph")


@pytest.mark.parametrize("location", ["other.data", "../text_encoder/weights.data", "/etc/passwd"])
def test_a_graph_with_weights_elsewhere(case: Case, location: str) -> None:
    path = case.bundle.path(case.bundle.manifest.components["unet"].graph)
    model = onnx.load(path, load_external_data=False)
    entry = next(tensor for tensor in model.graph.initializer if tensor.external_data).external_data[0]
    assert entry.key == "location"
    entry.value = location
    path.write_bytes(model.SerializeToString())
    _fails(case, CorruptError, f"has weights in '{location}', expected weights.data")


def test_the_error_for_bf16_names_a_precision_that_works(case: Case) -> None:
    manifest = case.bundle.manifest
    half = msgspec.structs.replace(manifest.components["unet"], precision="bf16")
    changed = msgspec.structs.replace(manifest, components=manifest.components | {"unet": half})
    with pytest.raises(IncompatibleError, match=r"unet is bf16.*--fp16"):
        write_optimum(Bundle(case.bundle.root, changed), case.base, case.refiner, case.out)
    assert not case.out.exists()


def test_other_folders_are_not_replaced(case: Case) -> None:
    case.out.mkdir()
    (case.out / "model_index.json").write_text("{}")
    _fails(case, UsageError, "holds other files")
