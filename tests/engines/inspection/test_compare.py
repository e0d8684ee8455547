"""Comparisons by Polygraphy of pairs of engines with a known difference."""

import contextlib
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from sdxl_trt.engines.backends.ort.engine import OrtEngine
from sdxl_trt.engines.backends.ort.providers import shape_limits
from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.bundle.profile import Profile
from sdxl_trt.engines.engine import Array, Engine, check_inputs
from sdxl_trt.engines.errors import CorruptError, EngineError, IncompatibleError
from sdxl_trt.engines.inspection.compare import Agreement, Opened, compare_engines, compare_pair, reference_of
from sdxl_trt.engines.inspection.example_inputs import example_inputs
from sdxl_trt.engines.plans.sizes import profiles_of, stage_sizes
from sdxl_trt.mini.embedded import bundle_path

SEED = 3
DECODER = "vae_decoder"
Change = Callable[[Array], Array]


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """Return the embedded pair: fp16, trained."""
    return read_bundle(bundle_path())


def _opened(engine: Any) -> Opened:
    @contextlib.contextmanager
    def opened() -> Iterator[Engine]:
        engine.load()
        try:
            yield engine
        finally:
            engine.unload()

    return opened


def _feeds(bundle: Bundle, name: str) -> list[dict[str, Array]]:
    """Return inputs of the smallest size that a plan accepts."""
    smallest = {key: (shapes[0],) * 3 for key, shapes in shape_limits(bundle, name).shapes.items()}
    return [example_inputs(bundle, name, Profile(shapes=smallest), SEED)]


class Canned:
    """An engine that returns recorded outputs, changed."""

    def __init__(self, bundle: Bundle, name: str, outputs: dict[str, Array], change: Change = np.copy) -> None:
        self.component = bundle.manifest.components[name]
        self._outputs, self._change = outputs, change
        self.calls: list[str] = []

    def load(self) -> None:
        self.calls.append("load")

    def unload(self) -> None:
        self.calls.append("unload")

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        check_inputs(self.component, dict(inputs))
        self.calls.append("infer")
        return {name: self._change(array) for name, array in self._outputs.items()}


def _results(bundle: Bundle, name: str) -> dict[str, Array]:
    with _opened(OrtEngine(bundle, name))() as engine:
        return engine.infer(_feeds(bundle, name)[0])


@pytest.fixture(scope="module")
def decoded(bundle: Bundle) -> dict[str, Array]:
    """Return the decoder's real outputs."""
    return _results(bundle, DECODER)


def _judge(bundle: Bundle, decoded: dict[str, Array], change: Change) -> Agreement:
    left, right = Canned(bundle, DECODER, decoded, change), Canned(bundle, DECODER, decoded)
    (found,) = compare_pair(bundle, DECODER, _opened(left), _opened(right), _feeds(bundle, DECODER))
    assert left.calls == right.calls == ["load", "infer", "unload"]
    return found


def test_a_provider_agrees_with_itself(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    found = compare_engines(
        bundle, ["text_encoder_2", "vae_decoder"], "ort-cpu", "ort-cpu", progress=told.append
    )  # fmt: skip
    assert told == ["text_encoder_2", "vae_decoder"]
    outputs = [spec.name for name in told for spec in bundle.manifest.components[name].outputs]
    assert [each.output for each in found] == outputs
    assert all(each.passed and each.max_abs == 0 and each.cosine > 1 - 1e-12 for each in found)
    assert all(each.allowed > 0 for each in found)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""  # stdout is for results


def test_the_figures_are_right(bundle: Bundle, decoded: dict[str, Array]) -> None:
    """Compared with numpy, for an error within the limits."""
    exact = decoded["sample"].astype(np.float64)
    error = np.zeros(exact.shape)
    error[0, 0, 0, 0] = np.ptp(exact) / 100
    found = _judge(bundle, decoded, lambda array: array.astype(np.float64) + error)
    wrong = exact + error
    assert found.passed
    assert found.max_abs == pytest.approx(error.max(), rel=1e-6)
    assert found.mean_abs == pytest.approx(error.mean(), rel=1e-3)
    cosine = np.sum(wrong * exact) / np.sqrt(np.sum(wrong**2) * np.sum(exact**2))
    assert found.cosine == pytest.approx(cosine, abs=1e-12)
    assert found.allowed == pytest.approx(0.03 * np.ptp(exact), rel=1e-6)


def _one(value: float) -> Change:
    def change(array: Array) -> Array:
        changed = array.astype(np.float64)
        changed[0, 0, 3, 3] = value
        return changed

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda array: array * np.float16(1.1),  # which does not change the cosine
        lambda array: array + np.float16(0.05) * np.sign(np.sin(np.arange(array.size).reshape(array.shape))),
        lambda array: -array,
        lambda array: array[:, ::-1],
        lambda array: array.swapaxes(-1, -2),
        lambda array: array[..., :-1],
        np.zeros_like,
        _one(np.nan),
        _one(np.inf),
        _one(1e4),
    ],
    ids=["scaled", "noisy", "negated", "channels", "turned", "cut", "nothing", "nan", "infinite", "spot"],
)
def test_a_wrong_output_is_found(bundle: Bundle, decoded: dict[str, Array], change: Change) -> None:
    assert not _judge(bundle, decoded, change).passed


def test_equal_infinities_fail(bundle: Bundle, decoded: dict[str, Array]) -> None:
    sides = [_opened(Canned(bundle, DECODER, decoded, _one(np.inf))) for _ in range(2)]
    (found,) = compare_pair(bundle, DECODER, *sides, _feeds(bundle, DECODER))
    assert not found.passed


def test_the_worst_of_several_calls_counts(bundle: Bundle, decoded: dict[str, Array]) -> None:
    left, right = Canned(bundle, DECODER, decoded), Canned(bundle, DECODER, decoded)
    left._change = lambda array: array if left.calls.count("infer") == 1 else -array
    (found,) = compare_pair(bundle, DECODER, _opened(left), _opened(right), _feeds(bundle, DECODER) * 2)
    assert not found.passed
    assert found.cosine == pytest.approx(-1)
    assert left.calls == ["load", "infer", "infer", "unload"]


def _damage(source: Bundle, root: Path, name: str, change: Change) -> Bundle:
    """Return a copy of `source` with changed weights of component `name`, and their digest in its manifest."""
    shutil.copytree(source.root, root)
    component = source.manifest.components[name]
    file = root / component.weights.file
    weights = np.fromfile(file, np.float16)
    change(weights).tofile(file)
    record = msgspec.structs.replace(component.weights, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    changed = msgspec.structs.replace(component, weights=record)
    parts = {**source.manifest.components, name: changed}
    return Bundle(root, msgspec.structs.replace(source.manifest, components=parts))


def _negated(start: float, count: int) -> Change:
    def change(weights: Array) -> Array:
        first = int(start * len(weights))
        weights[first : first + count] *= -1
        return weights

    return change


@pytest.mark.parametrize(("name", "start"), [("vae_decoder", 0.9), ("text_encoder", 0.97)])
def test_damaged_weights_are_found(bundle: Bundle, tmp_path: Path, name: str, start: float) -> None:
    """A thousand consecutive weights of two million have the wrong sign."""
    wrong = _damage(bundle, tmp_path / "wrong", name, _negated(start, 1000))
    sides = [_opened(OrtEngine(each, name)) for each in (wrong, bundle)]
    assert not all(each.passed for each in compare_pair(bundle, name, *sides, _feeds(bundle, name)))


def test_fp32_has_stricter_limits_than_fp16(bundle: Bundle, decoded: dict[str, Array], tmp_path: Path) -> None:
    """Fifty weights with the wrong sign: an error within the limits of fp16, but not of fp32."""
    wrong = _results(_damage(bundle, tmp_path / "wrong", DECODER, _negated(0.5, 50)), DECODER)
    exact = msgspec.structs.replace(bundle.manifest.components[DECODER], precision="fp32")
    strict = Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, components={DECODER: exact}))
    sides = [_opened(Canned(bundle, DECODER, outputs)) for outputs in (wrong, decoded)]
    verdicts = [compare_pair(each, DECODER, *sides, _feeds(bundle, DECODER))[0].passed for each in (bundle, strict)]
    assert verdicts == [True, False]


def test_files_with_another_digest_are_not_compared(bundle: Bundle, tmp_path: Path) -> None:
    changed = _damage(bundle, tmp_path / "changed", "vae_decoder", _negated(0.5, 10))
    with pytest.raises(CorruptError, match="sha256"):
        compare_engines(Bundle(changed.root, bundle.manifest), ["vae_decoder"], "ort-cpu", "ort-cpu")


def test_an_engine_that_fails_is_unloaded_and_its_error_raised(bundle: Bundle, decoded: dict[str, Array]) -> None:
    def fail(_: Array) -> Array:
        raise EngineError("the device is gone")

    left, right = Canned(bundle, DECODER, decoded, fail), Canned(bundle, DECODER, decoded)
    with pytest.raises(EngineError, match="the device is gone"):
        compare_pair(bundle, DECODER, _opened(left), _opened(right), _feeds(bundle, DECODER))
    assert (left.calls, right.calls) == (["load", "infer", "unload"], [])


def test_an_error_of_polygraphy_is_explained(bundle: Bundle, decoded: dict[str, Array]) -> None:
    feed = _feeds(bundle, DECODER)[0]
    sides = [_opened(Canned(bundle, DECODER, decoded)) for _ in range(2)]
    with pytest.raises(EngineError, match="comparing vae_decoder: Polygraphy failed"):
        compare_pair(bundle, DECODER, *sides, [{"latent_sample": feed["latent_sample"][:, :3]}])


def test_a_twin_of_another_dtype_gets_the_same_inputs(bundle: Bundle, decoded: dict[str, Array]) -> None:
    left, right = Canned(bundle, DECODER, decoded), Canned(bundle, DECODER, decoded)
    (spec,) = right.component.inputs
    right.component = msgspec.structs.replace(right.component, inputs=(msgspec.structs.replace(spec, dtype="float32"),))
    (found,) = compare_pair(bundle, DECODER, _opened(left), _opened(right), _feeds(bundle, DECODER), "twin")
    assert found.passed
    assert (found.component, found.reference) == (DECODER, "twin")


def test_missing_polygraphy_names_the_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy.comparator", None)
    with pytest.raises(IncompatibleError, match=r"pip install 'sdxl-trt\[verify\]'"):
        compare_engines(bundle, ["vae_decoder"], "ort-cpu", "ort-cpu")


def test_polygraphy_s_loaders_are_not_imported() -> None:
    """They let plans run code on the host. Importing the module does not import Polygraphy."""
    code = """
import sys
import sdxl_trt.engines.inspection.compare as compare
assert not [name for name in sys.modules if name.startswith("polygraphy")]
compare._polygraphy()
found = [name for name in sys.modules if name.startswith(("polygraphy.backend.", "tensorrt", "torch"))]
sys.exit(0 if all(name.startswith("polygraphy.backend.base") for name in found) else f"imported {found}")
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_bf16_decoder_is_compared_with_its_twin(bundle: Bundle) -> None:
    manifest = bundle.manifest
    wide = msgspec.structs.replace(manifest.components["vae_decoder"], precision="bf16")
    vae = msgspec.structs.replace(manifest.base.vae, decoder_bf16="twin")
    changed = msgspec.structs.replace(
        manifest, components={**manifest.components, "twin": wide, "alone": wide},
        base=msgspec.structs.replace(manifest.base, vae=vae),
    )  # fmt: skip
    assert reference_of(changed, "twin", "ort-cpu") == "vae_decoder"
    assert reference_of(changed, "twin", "tensorrt") == "twin"
    assert reference_of(changed, "unet", "ort-cpu") == "unet"
    assert reference_of(changed, "alone", "ort-cpu") is None
    with pytest.raises(IncompatibleError, match="no fp32 twin"):
        compare_engines(Bundle(bundle.root, changed), ["alone"], "ort-cpu", "ort-cpu")


@pytest.mark.parametrize("name", list(read_bundle(bundle_path()).manifest.components))
def test_example_inputs_resemble_those_of_a_run(bundle: Bundle, name: str) -> None:
    component = bundle.manifest.components[name]
    limits = shape_limits(bundle, name)
    inputs = example_inputs(bundle, name, limits, SEED)
    check_inputs(component, inputs)
    assert {key: array.shape for key, array in inputs.items()} == {
        key: shapes[1] for key, shapes in limits.shapes.items()
    }
    again, other = example_inputs(bundle, name, limits, SEED), example_inputs(bundle, name, limits, SEED + 1)
    assert all(np.array_equal(inputs[key], again[key]) for key in inputs)
    assert any(not np.array_equal(inputs[key], other[key]) for key in inputs)
    if component.kind == "unet":
        assert inputs["sample"].std() == pytest.approx(1, abs=0.2)
        low, high = (0, 200) if name == "refiner_unet" else (200, 1000)
        assert low < inputs["timestep"].min() < inputs["timestep"].max() < high
        assert 128 in inputs["time_ids"][0]
        assert (6 in inputs["time_ids"][0]) == (name == "refiner_unet")
    if component.kind == "text_encoder":
        tokenizer = bundle.manifest.tokenizers[name.replace("text_encoder", "tokenizer")]
        for row in inputs["input_ids"]:
            assert row[0] == tokenizer.bos_id
            assert (row == tokenizer.eos_id).sum() >= 1
            assert row[1] < tokenizer.bos_id or row[1] == tokenizer.eos_id
        assert [*zip(*np.nonzero(inputs["embedding_index"]), strict=True)] == [(1, 1)]
        assert 0 < np.abs(inputs["embeddings"]).max() < 0.2
    if component.kind == "vae_decoder":
        vae = bundle.manifest.base.vae
        vae = vae.with_tiny_decoder() if name == vae.tiny else vae
        assert inputs["latent_sample"].std() == pytest.approx(1 / vae.scaling_factor, rel=0.2)


def test_example_inputs_of_a_controlnet_are_a_picture_and_no_earlier_residuals(controlled: Path) -> None:
    bundle = read_bundle(controlled)
    component = bundle.manifest.components["controlnet"]
    sizes = msgspec.structs.replace(stage_sizes(bundle.manifest), static=True)
    profile = profiles_of(component, sizes, bundle.manifest.base.vae.factor)[-1]
    inputs = example_inputs(bundle, "controlnet", profile)
    assert inputs["controlnet_cond"].shape == (2, 3, 128, 128)
    picture = inputs["controlnet_cond"]
    assert 0 <= picture.min() < 0.1
    assert 0.9 < picture.max() <= 1
    assert np.array_equal(inputs["scales"], np.ones((2, 7)))
    assert not inputs["earlier_mid_residual"].any()
