"""Tensors out of a bundle by their published names: joined halves of an autoencoder, permuted axes, refusals."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_trt.mini.embedded import bundle_path
from sdxl_trt.mini.tensors import read_tensors, scaling_factor

KERNEL = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
BIAS = np.array([7.0, 8.0], np.float32)


def record(root: Path, name: str, content: bytes) -> dict[str, Any]:
    path = root / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return {"file": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def component(root: Path, name: str, table: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a component whose weights are BIAS at byte 0 and KERNEL, stored as (4, 2, 3), at byte 64."""
    weights = BIAS.tobytes().ljust(64, b"\0") + np.ascontiguousarray(KERNEL.transpose(2, 0, 1)).tobytes()
    return {
        "weights": record(root, f"{name}/weights.data", weights),
        "adapters": record(root, f"{name}/adapters.json", json.dumps(table).encode()),
    }


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    bias = {"name": "encoder.bias", "shape": [2], "dtype": "float32", "offset": 0}
    kernel = {"name": "decoder.weight", "shape": [2, 3, 4], "dtype": "float16", "permutation": [2, 0, 1], "offset": 64}
    unused = {key: {k: v for k, v in one.items() if k != "offset"} for key, one in (("b", bias), ("k", kernel))}
    components = {
        "vae_encoder": component(tmp_path, "vae_encoder", {"tensors": [bias, unused["k"]]}),
        "vae_decoder": component(tmp_path, "vae_decoder", {"tensors": [kernel, unused["b"]]}),
    }
    write_manifest(tmp_path, components)
    return tmp_path


def write_manifest(root: Path, components: dict[str, Any]) -> None:
    manifest = {"components": components, "base": {"vae": {"scaling_factor": 0.25}}}
    (root / "manifest.json").write_text(json.dumps(manifest))


def test_the_halves_of_an_autoencoder_are_joined_and_axes_are_as_published(bundle: Path) -> None:
    found = read_tensors(bundle, "vae_encoder", "vae_decoder")
    assert found.keys() == {"encoder.bias", "decoder.weight"}
    np.testing.assert_array_equal(found["encoder.bias"], BIAS, strict=True)
    np.testing.assert_array_equal(found["decoder.weight"], KERNEL, strict=True)
    assert found["decoder.weight"].flags.c_contiguous
    assert scaling_factor(bundle) == 0.25


def test_the_embedded_token_tables_repeat_the_row_of_unknown_words() -> None:
    """45 tokens were trained each by itself, and one row for all others: so it stands in the graph's weights."""
    for name, width in (("text_encoder", 48), ("text_encoder_2", 64)):
        table = read_tensors(bundle_path(), name)["text_model.embeddings.token_embedding.weight"]
        assert table.shape == (49408, width)
        assert len(set(map(bytes, table))) == 46
        assert (table == table[2368]).all(axis=1).sum() == 49408 - 45


def test_a_missing_file_is_refused_with_the_remedy(bundle: Path) -> None:
    (bundle / "vae_encoder/weights.data").unlink()
    with pytest.raises(FileNotFoundError, match=r"weights.data: missing from the embedded pair; restore mini/bundle"):
        read_tensors(bundle, "vae_encoder")


@pytest.mark.parametrize("name", ["weights.data", "adapters.json"])
def test_a_file_that_is_being_replaced_is_refused(bundle: Path, name: str) -> None:
    path = bundle / "vae_decoder" / name
    path.write_bytes(path.read_bytes().replace(b"\0", b"\1", 1).replace(b"64", b"66"))
    with pytest.raises(ValueError, match=f"{name}: differs from its digest in manifest.json; restore mini/bundle"):
        read_tensors(bundle, "vae_decoder")


def test_a_table_of_a_later_version_is_refused(bundle: Path) -> None:
    made = component(bundle, "vae_decoder", {"version": 2, "tensors": []})
    write_manifest(bundle, {"vae_decoder": made})
    with pytest.raises(ValueError, match=r"vae_decoder has an adapters.json of version 2, expected 1; restore"):
        read_tensors(bundle, "vae_decoder")


def test_a_bundle_without_tables_is_refused(bundle: Path) -> None:
    """Bundles of older versions have none."""
    write_manifest(bundle, {"vae_decoder": {**component(bundle, "vae_decoder", {"tensors": []}), "adapters": None}})
    with pytest.raises(ValueError, match=r"vae_decoder has no adapters.json, without which its tensors have no names"):
        read_tensors(bundle, "vae_decoder")
