"""The bundle that made a picture: a digest that changes only with the weights, and a warning of one line."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.bundle.manifest import Manifest
from sdxl_trt.runtime.images.provenance import MOST, bundle_name, warn_of_another_bundle


@pytest.fixture(scope="module")
def manifest(pairs: Callable[[str], Any]) -> Manifest:
    return read_bundle(pairs("outline").bundle).manifest


def _changed(manifest: Manifest, component: str, **changes: Any) -> Manifest:
    components = dict(manifest.components)
    components[component] = msgspec.structs.replace(components[component], **changes)
    return msgspec.structs.replace(manifest, components=components)


def _with_weights(manifest: Manifest, component: str) -> Manifest:
    weights = msgspec.structs.replace(manifest.components[component].weights, sha256="0" * 64)
    return _changed(manifest, component, weights=weights)


def test_a_bundle_is_named_by_its_models_and_the_digest_of_its_weights(manifest: Manifest) -> None:
    name = bundle_name(manifest, refined=True)
    assert (name.base, name.refiner, len(name.digest)) == ("base", "refiner", 12)
    assert bundle_name(manifest, refined=False).refiner is None


@pytest.mark.parametrize(
    ("component", "base_alone", "both"),
    [("unet", False, False), ("text_encoder", False, False), ("vae_decoder", False, False),
     ("refiner_unet", True, False), ("vae_encoder", True, True)],
)  # fmt: skip
def test_the_digest_covers_the_weights_in_use(
    manifest: Manifest, component: str, *, base_alone: bool, both: bool
) -> None:
    other = _with_weights(manifest, component)
    for refined, same in ((False, base_alone), (True, both)):
        assert (bundle_name(other, refined=refined) == bundle_name(manifest, refined=refined)) is same


def test_other_graphs_and_plans_of_the_same_weights_are_the_same_bundle(manifest: Manifest) -> None:
    graph = msgspec.structs.replace(manifest.components["unet"].graph, sha256="0" * 64)
    other = msgspec.structs.replace(_changed(manifest, "unet", graph=graph, opset=99), onnx=False, generator="later")
    assert bundle_name(other, refined=True) == bundle_name(manifest, refined=True)


def test_a_long_name_is_cut(manifest: Manifest) -> None:
    source = msgspec.structs.replace(manifest.components["unet"].source, name="x" * 1000 + "/unet")
    assert bundle_name(_changed(manifest, "unet", source=source), refined=True).base == "x" * MOST


def test_another_bundle_gives_a_warning_of_one_line(manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    made = bundle_name(manifest, refined=True)
    warn_of_another_bundle(None, manifest)
    warn_of_another_bundle(made, manifest)
    warn_of_another_bundle(bundle_name(manifest, refined=False), _with_weights(manifest, "refiner_unet"))
    assert caplog.records == []
    warn_of_another_bundle(made, _with_weights(manifest, "refiner_unet"))
    assert f"another bundle, base + refiner ({made.digest}), and this one is base + refiner (" in caplog.text
    caplog.clear()
    warn_of_another_bundle(made, msgspec.structs.replace(manifest, refiner=None))
    assert "this one is base (" in caplog.text
