"""A manifest is valid, or reading it raises one of three errors, whatever is wrong with it."""

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdxl_trt.engines.bundle import bundle as bundle_module
from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle, write_manifest
from sdxl_trt.engines.bundle.manifest import FORMAT_VERSION
from sdxl_trt.engines.errors import CorruptError, IncompatibleError, ResourceError, SdxlTrtError, SourceError

REFUSALS = (CorruptError, IncompatibleError, SourceError)
Json = Any


def _places(value: Json, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*at, key))


def _changed(manifest: Json, place: tuple[Any, ...], change: Callable[[Json, Any], None]) -> Json:
    result = copy.deepcopy(manifest)
    parent = result
    for key in place[:-1]:
        parent = parent[key]
    change(parent, place[-1])
    return result


def _refusal(read: Callable[[Json], Bundle], content: Json) -> SdxlTrtError | None:
    """Return the error of reading `content`, or None; any error other than REFUSALS fails the test."""
    try:
        read(content)
    except REFUSALS as exc:
        return exc
    return None


def test_a_written_manifest_is_read_back(valid: Json, read: Callable[[Json], Bundle], tmp_path: Path) -> None:
    manifest = read(valid).manifest
    assert list(manifest.stages()) == ["base", "refiner"]
    write_manifest(tmp_path, manifest)
    assert read_bundle(tmp_path).manifest == manifest
    assert manifest.components["unet"].input("sample").shape == ("rows", 4, "height", "width")
    del valid["refiner"]
    assert list(read(valid).manifest.stages()) == ["base"]


def test_a_text_encoder_has_both_inputs_for_embeddings_or_none(valid: Json, read: Callable[[Json], Bundle]) -> None:
    encoder = valid["components"]["text_encoder_2"]
    assert not read(valid).manifest.components["text_encoder_2"].takes_embeddings
    index = {"name": "embedding_index", "dtype": "int64", "shape": ["prompts", 77]}
    vectors = {"name": "embeddings", "dtype": "float16", "shape": ["vectors", 8]}
    plain = encoder["inputs"]
    for added, complete in (([index, vectors], True), ([index], False), ([vectors], False)):
        encoder["inputs"] = plain + added
        error = _refusal(read, valid)
        assert (error is None) == complete
    encoder["inputs"] = [*plain, index, vectors]
    assert read(valid).manifest.components["text_encoder_2"].takes_embeddings
    valid["components"]["unet"]["inputs"] += [index, vectors]
    assert "unet is not a unet" in str(_refusal(read, valid))


def test_fields_of_a_later_minor_version_are_ignored(valid: Json, read: Callable[[Json], Bundle]) -> None:
    valid["later"] = valid["base"]["later"] = {"a": 1}
    assert read(valid).manifest.base.unet == "unet"


def test_every_truncation_is_refused(valid: Json, read: Callable[[Json], Bundle]) -> None:
    raw = json.dumps(valid).encode()
    for length in [*range(0, len(raw), 11), len(raw) - 1]:
        assert isinstance(_refusal(read, raw[:length]), CorruptError), raw[:length][-40:]


def test_every_change_of_type_is_refused(valid: Json, read: Callable[[Json], Bundle]) -> None:
    swaps: dict[type, tuple[Json, ...]] = {
        str: (None, 7, 1.5, True, [], {}), int: ("7", None, 1.5, [], {}, True), float: ("1", None, [], {}, True),
        bool: ("true", None, 1, 0, []), list: ("x", None, 7, {}, [[]]), dict: ("x", None, 7, [], {}),
    }  # fmt: skip
    optional = {("refiner",), ("vae", "encoder"), ("vae", "latents_mean"), ("vae", "latents_std")}
    free = ("config", "scheduler")
    for place in _places(valid):
        if place[-1] in free or "config" in place:
            continue  # a config is any object; a scheduler has defaults
        old = _at(valid, place)
        for new in swaps[type(old)]:
            named_axis = "shape" in place and isinstance(new, str | int) and not isinstance(new, bool)
            if named_axis or (new is None and (place in optional or place[-2:] in optional)):
                continue
            changed = _changed(valid, place, lambda parent, key, new=new: parent.__setitem__(key, new))
            assert _refusal(read, changed) is not None, (place, new)


def _at(value: Json, place: tuple[Any, ...]) -> Json:
    for key in place:
        value = value[key]
    return value


def test_every_missing_field_is_refused_or_has_a_default(valid: Json, read: Callable[[Json], Bundle]) -> None:
    defaults = {"note", "refiner", "parameters", "latents_mean", "latents_std", *valid["base"]["scheduler"]}
    for place in _places(valid):
        if isinstance(place[-1], int) or "config" in place[:-1] or "vae_encoder" in place or place[-1] in defaults:
            continue
        assert _refusal(read, _changed(valid, place, lambda parent, key: parent.__delitem__(key))), place


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(data=st.data())
def test_any_damage_raises_one_of_our_errors(valid: Json, read: Callable[[Json], Bundle], data: st.DataObject) -> None:
    raw = bytearray(json.dumps(valid).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(raw) - 1))
        raw[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    _refusal(read, bytes(raw))


@pytest.mark.parametrize(
    "raw", [b"", b"null", b"[]", b"\xff\xfe", b"{}", b"[" * 200_000, b'{"format":"\\ud800xxxxxx","format_version":1}',
            b'{"format":"other","format_version":1}', b'{"format":"sdxl-trt-bundle","format_version":0}'],
)  # fmt: skip
def test_a_file_that_is_not_a_manifest_is_corrupt(valid: Json, read: Callable[[Json], Bundle], raw: bytes) -> None:
    with pytest.raises(CorruptError, match="run export-engines again"):
        read(raw)


def test_a_deep_config_is_read_or_refused(valid: Json, read: Callable[[Json], Bundle]) -> None:
    raw = json.dumps(valid).replace('{"a": [1]}', '{"a": ' + "[" * 50_000 + "]" * 50_000 + "}")
    assert isinstance(_refusal(read, raw.encode()), CorruptError)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 999, 2**40])
def test_a_newer_format_is_incompatible_whatever_it_contains(read: Callable[[Json], Bundle], version: int) -> None:
    with pytest.raises(IncompatibleError, match=f"{version} is newer.*upgrade sdxl-trt") as caught:
        read({"format": "sdxl-trt-bundle", "format_version": version, "components": "of another shape"})
    assert caught.value.exit_code == 3


def test_an_oversized_manifest_is_not_read(
    valid: Json, read: Callable[[Json], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_module, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(CorruptError, match="larger than"):
        read(valid)


@pytest.mark.parametrize("make", [lambda _: None, Path.touch, Path.mkdir])
def test_without_a_bundle_the_error_names_the_export_command(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "b")
    with pytest.raises(SourceError, match="export-engines --base SRC") as caught:
        read_bundle(tmp_path / "b")
    assert caught.value.exit_code == 2


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(
    valid: Json, read: Callable[[Json], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read(valid).manifest

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError):
        write_manifest(tmp_path, manifest)
    assert read_bundle(tmp_path).manifest == manifest


@pytest.mark.parametrize(("count", "fits"), [(3, True), (2, False), (4, False), (0, False)])
def test_a_plan_has_a_digest_for_every_chunk(
    valid: Json, read: Callable[[Json], Bundle], count: int, fits: bool
) -> None:
    environment = dict.fromkeys(("tensorrt", "gpu", "compute_capability", "driver", "platform"), "any")
    key = {
        "component": "text_encoder_2", "graph": "0" * 64, "weights": "0" * 64, "flags": {},
        "environment": {"flavour": "tensorrt", **environment},
        "profiles": [{"shapes": {"input_ids": [[1, 77]] * 3}}],
    }  # fmt: skip
    plan = {
        "key": key, "file": {"file": "plans/a.plan", "size": 21, "sha256": "0" * 64}, "seconds": 1.0,
        "memory": {"weights": 1, "activations": 1}, "chunks": {"size": 10, "sha256": ["0" * 64] * count},
    }  # fmt: skip
    if fits:
        (record,) = read(valid | {"plans": [plan]}).manifest.plans
        assert record.chunks is not None
        return
    with pytest.raises(CorruptError, match=rf"plans/a\.plan has {count} digests, but 21 bytes in chunks of 10"):
        read(valid | {"plans": [plan]})
    del plan["chunks"]
    assert read(valid | {"plans": [plan]}).manifest.plans[0].chunks is None, "an older record"


def test_a_controlnet_must_exist_and_fit_the_unet(controlled: Path, read: Callable[[Json], Bundle]) -> None:
    manifest = json.loads((controlled / "manifest.json").read_text())
    assert [net.name for net in read_bundle(controlled).manifest.controlnets] == ["edges", "poses"]
    for place, value, message in (
        (("controlnets", 0, "component"), "unet", "has no controlnet called 'unet'"),
        (("controlnets", 0, "component"), "gone", "has no controlnet called 'gone'"),
        (
            ("components", "controlnet", "outputs", 0, "dtype"),
            "float32",
            "whose residuals the base's UNet does not take",
        ),
        (
            ("components", "controlnet", "outputs", 0, "shape"),
            ["rows"],
            "whose residuals the base's UNet does not take",
        ),
        (("components", "unet", "inputs", 5, "shape"), ["height/0|1"], "must take"),
    ):
        error = _refusal(read, _changed(manifest, place, lambda parent, key, value=value: parent.update({key: value})
                                        if isinstance(parent, dict) else parent.__setitem__(key, value)))  # fmt: skip
        assert message in str(error)
