"""The report on a bundle: every figure matches the manifest, and lines fit a terminal."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle, write_manifest
from sdxl_trt.engines.bundle.manifest import LoraRecord
from sdxl_trt.engines.bundle.plan_record import BuildFlags, Environment, PlanKey, PlanMemory, PlanRecord
from sdxl_trt.engines.bundle.profile import Range, fixed
from sdxl_trt.engines.bundle.records import FileRecord
from sdxl_trt.engines.errors import CorruptError, IncompatibleError, UsageError, VerificationError
from sdxl_trt.engines.host.tables import WIDTH
from sdxl_trt.engines.inspection.compare import Agreement
from sdxl_trt.engines.inspection.rebuilds import find_rebuilds
from sdxl_trt.engines.inspection.report import inspect_bundle
from sdxl_trt.engines.inspection.verification import Verification
from sdxl_trt.engines.plans.sizes import Sizes, profiles_of
from sdxl_trt.mini.embedded import bundle_path

RTX_4090 = Environment(
    flavour="tensorrt", tensorrt="11.3.0.12", gpu="NVIDIA GeForce RTX 4090", compute_capability="8.9",
    driver="580.65.06", platform="linux-x86_64",
)  # fmt: skip
ANYWHERE = Environment(
    flavour="tensorrt-rtx", tensorrt="1.7.0.1", gpu="any", compute_capability="any", driver="any",
    platform="linux-x86_64",
)  # fmt: skip
SIZES = Sizes(
    height=Range(min=512, opt=1024, max=1280), width=Range(min=512, opt=1024, max=1280), batch=fixed(1),
    tokens=Range(min=77, opt=77, max=231),
)  # fmt: skip
MIB = 1 << 20


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Return a copy of the embedded pair, which has no plans."""
    return read_bundle(shutil.copytree(bundle_path(), tmp_path / "bundle"))


@pytest.fixture
def plan(bundle: Bundle) -> Callable[..., Bundle]:
    """Return a function that adds a plan with dummy content for a component, and returns the bundle read again."""

    def make(name: str, sizes: Sizes = SIZES, environment: Environment = RTX_4090, **settings: Any) -> Bundle:
        manifest = read_bundle(bundle.root).manifest
        component = manifest.components[name]
        key = PlanKey(
            component=name, graph=settings.pop("graph", component.graph.sha256), weights=component.weights.sha256,
            environment=environment, profiles=profiles_of(component, sizes, 8), flags=BuildFlags(**settings),
        )  # fmt: skip
        file = f"plans/{name}-{environment.flavour}.plan"
        (bundle.root / "plans").mkdir(exist_ok=True)
        (bundle.root / file).write_bytes(b"plan")
        record = PlanRecord(
            key=key, file=FileRecord(file=file, size=4, sha256="0" * 64), seconds=87.3,
            memory=PlanMemory(weights=4890 * MIB, activations=303 * MIB, streamable=4200 * MIB),
        )  # fmt: skip
        write_manifest(bundle.root, msgspec.structs.replace(manifest, plans=(*manifest.plans, record)))
        return read_bundle(bundle.root)

    return make


def _text(root: Path, **options: bool) -> str:
    """Return the report with wrapped lines joined, after checking their width."""
    lines = inspect_bundle(root, **options).lines
    assert max(len(line) for line in lines if str(root) not in line) <= WIDTH
    assert [line for line in lines if line != line.rstrip() or not line.isprintable()] == []
    return re.sub(r"\n {7,}", " ", "\n".join(lines))


def test_every_graph_is_listed(bundle: Bundle) -> None:
    text = _text(bundle.root)
    rows = [line.split() for line in text.splitlines() if re.match(r"  \w+ +(unet|shallow|text_encoder|vae)", line)]
    assert [row[0] for row in rows] == list(bundle.manifest.components)
    for name, kind, precision, parameters, _, size, _, opset, key in rows:
        component = bundle.manifest.components[name]
        # A shallow UNet's weights are its UNet's, and count there.
        own = [file for file in component.files if kind != "shallow_unet" or file != component.weights]
        on_disk = sum((bundle.root / file.file).stat().st_size for file in own)
        assert (kind, precision, opset) == (component.kind, "fp16", str(component.opset))
        assert float(parameters) == pytest.approx(component.parameters / 1e6, abs=0.05)
        assert float(size) == pytest.approx(on_disk / MIB, abs=0.05)
        assert component.key.startswith(key)
    everything = sum(path.stat().st_size for path in bundle.root.glob("*/*") if "tokenizer" not in path.parent.name)
    (total,) = re.findall(r"  total +\S+ M +(\S+) MiB", text)
    assert float(total) == pytest.approx(everything / MIB, abs=0.1)
    assert "plans: none" in text
    assert bundle.manifest.note.split(",")[0] in text


def test_columns_are_aligned(bundle: Bundle) -> None:
    head, *rows = (line for line in inspect_bundle(bundle.root).lines[2:9])
    assert head.startswith("graphs")
    for title in ("kind", "precision", "key"):
        assert all(row[head.index(title) - 2 : head.index(title)] == "  " for row in rows[:-1])
    assert {row.index(" MiB") for row in rows} == {head.index("size")}


def test_a_plan_is_described_in_pixels_and_words(plan: Callable[..., Bundle]) -> None:
    root = plan("unet").root
    text = _text(root)
    (record,) = read_bundle(root).manifest.plans
    assert re.search(rf"  unet +tensorrt +0\.0 MiB +4890 MiB +303 MiB +87 s +{record.key.digest()[:12]}\n", text)
    assert "512 to 1280 pixels a side (tuned for 1024), 1 to 2 rows, 77 to 231 tokens (tuned for 77)\n" in text
    assert "for TensorRT 11.3.0.12, NVIDIA GeForce RTX 4090 (8.9), driver 580.65.06, linux-x86_64\n" in text


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("unet", {"static": True}, "1024 pixels a side, 1 row, 77 tokens; or 1024 pixels a side, 2 rows, 77 tokens"),
        ("unet", {"width": fixed(768)}, "512 to 1280 pixels high (tuned for 1024), 768 pixels wide, 1 to 2 rows"),
        ("text_encoder", {}, "1 to 8 prompts (tuned for 2)"),
        ("vae_decoder", {"width": fixed(768), "height": fixed(768)}, "768 pixels a side, 1 picture"),
        ("vae_encoder", {"width": fixed(768), "height": fixed(768)}, "768 pixels a side, 1 picture"),
    ],
)
def test_profiles_are_listed_in_pixels(plan: Any, name: str, sizes: dict[str, Any], words: str) -> None:
    assert words in _text(plan(name, msgspec.structs.replace(SIZES, **sizes)).root)


def test_each_profile_states_its_activations(plan: Callable[..., Bundle]) -> None:
    bundle = plan("unet")
    (record,) = bundle.manifest.plans
    memory = msgspec.structs.replace(record.memory, profile_activations=(177 * MIB, 303 * MIB, 758 * MIB))
    manifest = msgspec.structs.replace(bundle.manifest, plans=(msgspec.structs.replace(record, memory=memory),))
    write_manifest(bundle.root, manifest)
    text = _text(bundle.root)
    assert (
        "1024 pixels a side, 1 row, 77 tokens: 177 MiB; or 1024 pixels a side, 2 rows, 77 tokens: 303 MiB; or" in text
    )
    assert "512 to 1280 pixels a side (tuned for 1024), 1 to 2 rows, 77 to 231 tokens (tuned for 77): 758 MiB\n" in text
    memory = msgspec.structs.replace(memory, profile_activations=(1, 2))
    manifest = msgspec.structs.replace(manifest, plans=(msgspec.structs.replace(record, memory=memory),))
    write_manifest(bundle.root, manifest)
    with pytest.raises(CorruptError, match="a plan of 'unet' does not fit that component"):
        read_bundle(bundle.root)


def test_the_build_flags_of_a_plan_are_listed(plan: Callable[..., Bundle]) -> None:
    settings = {"weight_streaming": True, "hardware_compatible": True, "workspace": 2048 * MIB}
    text = _text(plan("unet", SIZES, ANYWHERE, **settings).root)
    assert "for TensorRT for RTX 1.7.0.1, any RTX GPU, linux-x86_64; workspace 2048 MiB;" in text
    assert "4200 MiB of weights may be streamed; hardware compatible" in text
    assert "; same compute capability\n" in _text(plan("vae_decoder", same_compute_capability=True).root)


def test_texts_of_the_manifest_stay_on_one_line(bundle: Bundle) -> None:
    lora = LoraRecord(name="style\n\x1b[31m.safetensors", sha256="0" * 64, scale=0.8, text_scale=0.3)
    manifest = msgspec.structs.replace(bundle.manifest, loras=(lora,), note="a\nb\x07" + " long" * 40)
    write_manifest(bundle.root, manifest)
    text = _text(bundle.root)
    assert "LoRA style [31m.safetensors at 0.8 (0.3 on the text encoders), in the base" in text
    assert "note: a b long long" in text


def test_json_contains_what_the_lines_state(plan: Callable[..., Bundle]) -> None:
    root = plan("unet").root
    told = json.loads(msgspec.json.encode(inspect_bundle(root, why_rebuild=True).json))
    manifest = read_bundle(root).manifest
    assert [graph["component"] for graph in told["graphs"]] == list(manifest.components)
    assert told["stages"] == ["base", "refiner"]
    (unet,) = told["plans"]
    assert unet["memory"] == {"weights": 4890 * MIB, "activations": 303 * MIB, "streamable": 4200 * MIB}
    assert unet["key"] == manifest.plans[0].key.digest()
    assert unet["profiles"][2]["shapes"]["sample"] == [[1, 4, 64, 64], [2, 4, 128, 128], [2, 4, 160, 160]]
    assert unet["problem"] == ""
    assert {each["component"] for each in told["rebuild"][0]["components"]} == set(manifest.components)


def test_a_bundle_without_graphs_is_reported(plan: Callable[..., Bundle]) -> None:
    bundle = plan("unet")
    for component in bundle.manifest.components.values():
        shutil.rmtree((bundle.root / component.graph.file).parent, ignore_errors=component.kind == "shallow_unet")
    write_manifest(bundle.root, msgspec.structs.replace(bundle.manifest, onnx=False))
    text = _text(bundle.root, why_rebuild=True)
    assert "not in this bundle, which contains only plans" in text
    assert "is missing" not in text


def _statuses(bundle: Bundle) -> dict[str, tuple[str, list[str]]]:
    (rebuilds,) = find_rebuilds(bundle)
    return {each.component: (each.status, each.reasons) for each in rebuilds.components}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[[Environment], None]:
    """Return a function that sets the environment of this machine."""
    return lambda environment: monkeypatch.setattr(
        "sdxl_trt.engines.backends.trt.environment.current_environment", lambda _flavour: environment
    )


def test_what_would_be_rebuilt_and_why(plan: Any, here: Any) -> None:
    for name in ("unet", "text_encoder", "vae_decoder"):
        plan(name)
    bundle = plan("text_encoder_2", graph="1" * 64)
    (bundle.root / "plans/text_encoder-tensorrt.plan").unlink()
    (bundle.root / "plans/vae_decoder-tensorrt.plan").write_bytes(b"pl")
    here(RTX_4090)
    assert _statuses(bundle) == {
        "unet": ("usable", []),
        "text_encoder": ("stale", ["its file is missing"]),
        "text_encoder_2": ("stale", ["the graph was exported again after the plan was built"]),
        "vae_decoder": ("stale", ["its file has 2 bytes instead of 4"]),
        "vae_encoder": ("missing", []),
        "vae_tiny": ("missing", []),
        "refiner_unet": ("missing", []),
        "unet_shallow": ("missing", []),
        "refiner_unet_shallow": ("missing", []),
    }
    here(msgspec.structs.replace(RTX_4090, tensorrt="11.4.0.106", driver="590.1.2"))
    text = _text(bundle.root, why_rebuild=True)
    assert "tensorrt: here is TensorRT 11.4.0.106, NVIDIA GeForce RTX 4090 (8.9), driver 590.1.2, linux-x86_64" in text
    assert re.search(
        r"  unet +would be rebuilt: TensorRT is 11\.4\.0\.106, the plan was built with 11\.3\.0\.12\n",
        text)  # fmt: skip
    assert re.search(r"  refiner_unet +would be built: it has no plan\n", text)


def test_another_driver_is_a_note(plan: Any, here: Any) -> None:
    bundle = plan("unet")
    here(msgspec.structs.replace(RTX_4090, driver="590.1.2"))
    assert _statuses(bundle)["unet"] == ("usable", [])
    text = _text(bundle.root, why_rebuild=True)
    note = "built with NVIDIA driver 580.65.06, here is 590.1.2"
    assert f"its plan is used as it is (note: {note})\n" in text
    told = json.loads(msgspec.json.encode(inspect_bundle(bundle.root, why_rebuild=True).json))
    parts = {each["component"]: each["notes"] for each in told["rebuild"][0]["components"]}
    assert parts["unet"] == [note]
    assert parts["vae_decoder"] == []


def test_the_driver_of_a_build_is_shown_from_its_record(plan: Any) -> None:
    bundle = plan("unet", SIZES, msgspec.structs.replace(RTX_4090, driver="any"))
    (record,) = bundle.manifest.plans
    record = msgspec.structs.replace(record, driver="590.1.2")
    write_manifest(bundle.root, msgspec.structs.replace(bundle.manifest, plans=(record,)))
    assert "NVIDIA GeForce RTX 4090 (8.9), driver 590.1.2, linux-x86_64\n" in _text(bundle.root)
    told = json.loads(msgspec.json.encode(inspect_bundle(bundle.root).json))
    assert told["plans"][0]["environment"]["driver"] == "590.1.2"


def test_the_closest_of_several_plans_counts(plan: Any, here: Any) -> None:
    plan("unet", SIZES, msgspec.structs.replace(RTX_4090, gpu="other", compute_capability="9.0"))
    bundle = plan("unet")
    here(RTX_4090)
    assert _statuses(bundle)["unet"] == ("usable", [])


def test_each_flavour_is_reported_separately(plan: Any, here: Any) -> None:
    plan("unet")
    bundle = plan("vae_decoder", SIZES, ANYWHERE)
    here(RTX_4090)
    assert [each.flavour for each in find_rebuilds(bundle)] == ["tensorrt", "tensorrt-rtx"]


def test_without_tensorrt_the_reason_is_reported(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_flavour: str) -> Environment:
        raise IncompatibleError("provider tensorrt needs tensorrt (No module named 'tensorrt'); pip install it")

    monkeypatch.setattr("sdxl_trt.engines.backends.trt.environment.current_environment", fail)
    bundle = plan("unet")
    assert find_rebuilds(read_bundle(bundle_path()))[0].components[0].status == "missing"  # reported without plans too
    plan("text_encoder", graph="1" * 64)
    text = _text(bundle.root, why_rebuild=True)
    assert "tensorrt: provider tensorrt needs tensorrt (No module named 'tensorrt')" in text
    assert re.search(r"  unet +its plan matches the bundle's graph and weights; whether it fits this", text)
    assert re.search(r"  text_encoder +would be rebuilt: the graph was exported again", text)


def test_missing_files_are_an_error_except_for_why_rebuild(bundle: Bundle) -> None:
    (bundle.root / "unet/weights.data").unlink()
    (bundle.root / "vae_decoder/model.onnx").write_bytes(b"short")
    with pytest.raises(CorruptError):
        inspect_bundle(bundle.root)
    text = _text(bundle.root, why_rebuild=True)
    assert "  unet/weights.data is missing\n" in text
    assert "  vae_decoder/model.onnx has 5 bytes instead of" in text


def test_verification_needs_plans_and_graphs(bundle: Bundle, plan: Any) -> None:
    with pytest.raises(UsageError, match="no plans to verify; build them with: export-engines"):
        inspect_bundle(bundle.root, verify=True)
    write_manifest(bundle.root, msgspec.structs.replace(plan("unet").manifest, onnx=False))
    with pytest.raises(IncompatibleError, match="only plans"):
        inspect_bundle(bundle.root, verify=True)


def _agreement(component: str, output: str, max_abs: float, *, passed: bool = True) -> Agreement:
    return Agreement(
        component=component, reference=component, precision="fp16", output=output, passed=passed, max_abs=max_abs,
        mean_abs=0.0, cosine=1.0, allowed=1.0, required=0.9999,
    )  # fmt: skip


def test_all_differing_outputs_are_named() -> None:
    """The table shows the worst output of each component."""
    agreements = [
        _agreement("text_encoder", "a", 0.5),
        _agreement("text_encoder", "b", 0.1, passed=False),
        _agreement("unet", "out_sample", float("nan"), passed=False),
        _agreement("vae_decoder", "sample", 0.2),
    ]
    verification = Verification("tensorrt", "ort-cpu", agreements)
    assert [(worst.output, count) for worst, count in verification.worst()] == [
        ("b", 2), ("out_sample", 1), ("sample", 1),
    ]  # fmt: skip
    with pytest.raises(VerificationError, match=r"text_encoder b: .*; unet out_sample: .*nan") as caught:
        verification.require()
    assert "vae_decoder" not in str(caught.value)
    Verification("tensorrt", "ort-cpu", [agreements[0], agreements[3]]).require()


def test_controlnets_and_their_plans_are_reported(simulated: Any, controlled: Path, tmp_path: Path) -> None:
    root = simulated.bundle(controlled, tmp_path / "planned", height=128, width=128)
    report = inspect_bundle(root, why_rebuild=True)
    text = "\n".join(report.lines)
    assert "ControlNet edges for the base, in controlnet\nControlNet poses for the base, in controlnet_2" in text
    axes = {line.strip() for line in report.lines if "pixels a side" in line}
    assert axes, "a plan's sizes are those of its named axes: no residual, no 8*height"
    assert not any("|1" in line or "*height" in line for line in report.lines)
