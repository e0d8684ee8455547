"""Plans for LoRAs built by the real builder: graphs of the embedded pair, and of a cousin with other layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import onnx_ir as ir
import pytest

from sdxl_trt.engines.build.process import BuildJob, build_plan
from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.bundle.profile import Profile, Range
from sdxl_trt.engines.errors import SdxlTrtError
from sdxl_trt.engines.plans.sizes import profiles_of, rank_range, stage_sizes
from sdxl_trt.export.graph.slots import add_slots
from sdxl_trt.mini.embedded import bundle_path

pytestmark = pytest.mark.usefixtures("tensorrt")
RANK = 32


def _profiles(bundle: Bundle, name: str, *, static: bool) -> tuple[Profile, ...]:
    """Return the larger static profile, or the one for a range, as export-engines builds them."""
    sizes = msgspec.structs.replace(stage_sizes(bundle.manifest), static=static)
    return profiles_of(bundle.manifest.components[name], sizes, bundle.manifest.base.vae.factor)[-1:]


def _slotted(bundle: Bundle, name: str, folder: Path) -> Path:
    """Write the slot graph of a component, with its weights beside it, and return its path."""
    model = ir.load(bundle.root / name / "model.onnx")
    add_slots(model)
    folder.mkdir()
    ir.save(model, folder / "adapters.onnx")
    weights = bundle.path(bundle.manifest.components[name].weights)
    (folder / weights.name).write_bytes(weights.read_bytes())
    return folder / "adapters.onnx"


def _job(folder: Path, bundle: Bundle, name: str, *, static: bool, **changes: Any) -> BuildJob:
    job = BuildJob(
        component=name,
        graph=_slotted(bundle, name, folder / "graph"),
        profiles=_profiles(bundle, name, static=static),
        lora_rank=rank_range(RANK),
        flavour="tensorrt-rtx",
        plan=folder / "plan",
        log=folder / "log",
    )
    return msgspec.structs.replace(job, **changes)


def _check(job: BuildJob, bundle: Bundle) -> None:
    built = build_plan(job)
    log = job.log.read_text()
    assert "[E]" not in log
    assert f"LoRA rank 1:16:{RANK}" in log
    assert "lora_down" not in log.splitlines()[0], "the log names a thousand inputs"
    # TensorRT folds a few small constants.
    assert built.weights >= 0.99 * bundle.manifest.components[job.component].weights.size
    assert len(built.profile_activations or (1,)) == len(job.profiles)


@pytest.mark.parametrize("static", [pytest.param(True, id="static"), pytest.param(False, id="dynamic")])
@pytest.mark.parametrize(
    "name",
    [
        "text_encoder",
        pytest.param("text_encoder_2", marks=pytest.mark.builds),
        pytest.param("unet", marks=pytest.mark.builds),
        pytest.param("refiner_unet", marks=pytest.mark.builds),
    ],
)
def test_plans_for_loras_of_the_embedded_pair_are_built(name: str, static: bool, tmp_path: Path) -> None:
    bundle = read_bundle(bundle_path())
    _check(_job(tmp_path, bundle, name, static=static), bundle)


@pytest.mark.builds
@pytest.mark.parametrize("static", [pytest.param(True, id="static"), pytest.param(False, id="dynamic")])
def test_a_cousin_with_convolutional_projections_is_built(
    static: bool, pairs: Callable[[str], Any], tmp_path: Path
) -> None:
    bundle = read_bundle(pairs("apart").bundle)
    _check(_job(tmp_path, bundle, "unet", static=static), bundle)


def test_slots_without_a_rank_are_an_error(tmp_path: Path) -> None:
    bundle = read_bundle(bundle_path())
    with pytest.raises(SdxlTrtError, match=r"lora_down|profile"):
        build_plan(_job(tmp_path, bundle, "text_encoder", static=True, lora_rank=None))
    assert not (tmp_path / "plan").exists()


def test_a_rank_of_0_is_no_rank() -> None:
    """A request without LoRAs runs the usual plan, so ranks begin at 1, whatever TensorRT takes."""
    assert rank_range(8) == Range(min=1, opt=8, max=8)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"min": 0, "opt": 1, "max": 1}, Range)
