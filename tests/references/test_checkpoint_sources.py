"""Whole runs of unusual checkpoints, from file to latents, against diffusers with the weights they represent."""

import importlib.util
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_trt.export import Options, export_bundle
from sdxl_trt.export.components import plan_components
from sdxl_trt.export.sources.source import open_source
from sdxl_trt.runtime import Request, open_bundle

pytestmark = [
    pytest.mark.slow,
    # diffusers' own warning: it passes torch tensors to np.array.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.usefixtures("converted_once"),
]
State = dict[str, torch.Tensor]
PROMPT, SEED, STEPS, HANDOFF = "a red fox in the snow", 2**33 + 11, 6, 0.5
TOLERANCE = 1e-3


def _tests_of_export() -> Any:
    """Import tests/export/conftest.py, which writes LDM checkpoints independently of checkpoints/ldm.py."""
    path = Path(__file__).parents[1] / "export" / "conftest.py"
    spec = importlib.util.spec_from_file_location("ldm_checkpoints", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def base(pairs: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the outline pair's base; its configs replace the published ones."""
    root = tmp_path / "published" / "base"
    shutil.copytree(pairs("outline").base, root)
    monkeypatch.setattr("sdxl_trt.export.sources.source.PUBLISHED", tmp_path / "published")
    monkeypatch.setattr("sdxl_trt.export.sources.unets.PUBLISHED", tmp_path / "published")
    shutil.copytree(root, tmp_path / "base")
    return tmp_path / "base"


def _quiet(call: Callable[[], Any]) -> Any:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def _ours(out: Path, base: Path, refiner: Path | None = None, **options: Any) -> np.ndarray:
    """Return the final latents on ONNX Runtime of a bundle exported from `base`."""
    export_bundle(base, refiner, out, Options(precision="fp32", **options))
    handoff = None if refiner is None else HANDOFF
    with open_bundle(out) as pipeline:
        list(pipeline.generate(Request(PROMPT, steps=STEPS, handoff=handoff, seed=SEED, width=32, height=32)))
        return pipeline.run.final


def _theirs(base: Any, refiner: Any = None) -> np.ndarray:
    """Return the final latents of diffusers' pipelines."""
    generator = torch.Generator().manual_seed(SEED)
    settings = {"prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": 5.0, "generator": generator,
                "output_type": "latent"}  # fmt: skip
    for pipeline in filter(None, (base, refiner)):
        pipeline.set_progress_bar_config(disable=True)
    end = {} if refiner is None else {"denoising_end": HANDOFF}
    latents = _quiet(lambda: base(**settings, **end, width=32, height=32).images)
    if refiner is not None:
        latents = _quiet(lambda: refiner(**settings, image=latents, denoising_start=HANDOFF).images)
    found: np.ndarray = latents.numpy()
    return found


def _pipeline(root: Path) -> Any:
    import diffusers

    return _quiet(lambda: diffusers.StableDiffusionXLPipeline.from_pretrained(root))


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    difference = float(np.abs(one - other).max())
    print(f"largest difference {difference:.2e}")
    return difference


def _quantize(state: State, scales: Callable[[torch.Tensor], torch.Tensor]) -> tuple[State, State]:
    """Return a state whose matrices are scaled fp8, and the state that it represents."""
    stored, meant = dict(state), dict(state)
    for name, weight in state.items():
        if name.endswith(".weight") and weight.ndim == 2 and "embedding" not in name:
            scale = scales(weight)
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            stored[name.removesuffix("weight") + "scale_weight"] = scale
            meant[name] = stored[name].float() * scale
    return stored, meant


def _quantize_in_blocks(state: State, side: int) -> tuple[State, State]:
    """Return the same as _quantize, with scales for blocks of `side` rows and columns."""
    stored, meant = dict(state), dict(state)
    for name, weight in state.items():
        if name.endswith(".weight") and weight.ndim == 2:
            grid = [-(-length // side) for length in weight.shape]
            scale = torch.rand(grid, generator=torch.Generator().manual_seed(weight.numel())) / 448 + 0.001
            spread = scale.repeat_interleave(side, 0)[: weight.shape[0]]
            spread = spread.repeat_interleave(side, 1)[:, : weight.shape[1]]
            stored[name] = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
            stored[name.removesuffix("weight") + "weight_scale_inv"] = scale
            meant[name] = stored[name].float() * spread
    return stored, meant


def _change(path: Path, **changes: Any) -> None:
    """Change settings of a JSON file; None removes one."""
    settings = json.loads(path.read_bytes()) | changes
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))


def _largest(weight: torch.Tensor) -> torch.Tensor:
    return weight.abs().max() / 448


def _largest_of_rows(weight: torch.Tensor) -> torch.Tensor:
    return weight.abs().amax(dim=1, keepdim=True) / 448


def test_a_scaled_fp8_file_with_fewer_blocks_runs_with_its_real_weights(base: Path, tmp_path: Path) -> None:
    """A UNet like SSD-1B's, scaled as ComfyUI does, with a header that states v-prediction.

    The up blocks have depths of their own, the middle block one residual layer; there is a marker, and scale_weight and
    scale_input for every matrix of UNet and first encoder.
    """
    import diffusers

    pipeline = _pipeline(base)
    config = dict(pipeline.unet.config) | {
        "transformer_layers_per_block": [1, [2], [1]], "mid_block_type": "UNetMidBlock2D",
        "reverse_transformer_layers_per_block": [[1, 3], [2, 1], 1],
    }  # fmt: skip
    torch.manual_seed(3)
    pipeline.unet = diffusers.UNet2DConditionModel.from_config(config).eval()
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, prediction_type="v_prediction"
    )
    exact = _theirs(pipeline)
    ldm_writer = _tests_of_export()
    states = ldm_writer._states(base) | {"unet": pipeline.unet.state_dict()}
    for component, scales in (("unet", _largest), ("text_encoder", _largest_of_rows)):
        states[component], meant = _quantize(states[component], scales)
        bare = {name.removeprefix("text_model."): tensor for name, tensor in meant.items()}
        getattr(pipeline, component).load_state_dict(bare)
    ldm = ldm_writer._to_ldm(states, "base", 1, 2)
    modules = [name.removesuffix("scale_weight") for name in ldm if name.endswith("scale_weight")]
    assert len(modules) > 100
    ldm |= {f"{module}scale_input": torch.tensor(1.5) for module in modules}
    ldm["model.diffusion_model.scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    tensors = {name: tensor.clone() for name, tensor in ldm.items()}
    save_file(tensors, tmp_path / "ssd.safetensors", {"modelspec.prediction_type": "v"})
    expected = _theirs(pipeline)
    assert _difference(_ours(tmp_path / "out", tmp_path / "ssd.safetensors"), expected) <= TOLERANCE
    assert np.abs(expected - exact).max() > 10 * TOLERANCE, "the effect of fp8 itself would be detected"


def test_a_separate_unet_and_experts_saved_by_each_others_pipelines(
    base: Path, pairs: Callable[[str], Any], tmp_path: Path
) -> None:
    """A base saved by image-to-image, a refiner by text-to-image, a UNet scaled in blocks as in transformers."""
    import diffusers

    pipeline = _pipeline(base)
    torch.manual_seed(5)
    pipeline.unet = diffusers.UNet2DConditionModel.from_config(pipeline.unet.config).eval()
    state, folder = pipeline.unet.state_dict(), tmp_path / "unet"
    stored, meant = _quantize_in_blocks(state, 16)
    pipeline.unet.load_state_dict(meant)
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    _change(shutil.copytree(base / "unet", folder) / "config.json", quantization_config=quantization)
    save_file(stored, folder / "diffusion_pytorch_model.safetensors")
    _change(base / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline", requires_aesthetics_score=False)
    root = shutil.copytree(pairs("outline").refiner, tmp_path / "refiner")
    refiner = _quiet(lambda: diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(root))
    _change(root / "model_index.json", _class_name="StableDiffusionXLPipeline", requires_aesthetics_score=None)
    ours = _ours(tmp_path / "out", base, root, unet=folder)
    assert _difference(ours, _theirs(pipeline, refiner)) <= TOLERANCE


def test_a_base_that_diffusers_saved_by_image_to_image_is_a_base(base: Path, tmp_path: Path) -> None:
    import diffusers

    diffusers.StableDiffusionXLImg2ImgPipeline(**_pipeline(base).components).save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_bytes())
    assert index["_class_name"] == "StableDiffusionXLImg2ImgPipeline"
    plan = plan_components(open_source(tmp_path / "saved", "base"), None, Options(), pytest.fail)[0]["unet"]
    stored = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    read = dict(plan.checkpoint.read(plan.tensor_names()))
    assert all(torch.equal(read[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize(
    ("name", "parts"),
    [("SSD-1B", {"": 1331}),
     ("Segmind-Vega", {"": 745, "down_blocks": 247, "mid_block": 31, "up_blocks": 460})],
)  # fmt: skip
def test_the_published_outlines_have_the_published_sizes(name: str, parts: dict[str, int]) -> None:
    """Segmind states 1.3 billion for SSD-1B, and for Vega 247 million down, 31 in the middle, 460 up.

    Source: blog.segmind.com/segmind-vega-2; the depths are those of ComfyUI's ``unet_config_from_diffusers_unet``.
    """
    import math

    from sdxl_trt.export.graph.models import build_model
    from sdxl_trt.export.sources.configs import PUBLISHED
    from sdxl_trt.export.sources.outlines import SSD_1B, VEGA, config_of

    sdxl = json.loads((PUBLISHED / "base" / "unet" / "config.json").read_bytes())
    config, called = config_of(sdxl, {"SSD-1B": SSD_1B, "Segmind-Vega": VEGA}[name], "x")
    assert called == name
    state = build_model("UNet2DConditionModel", config, "x").state
    for part, millions in parts.items():
        count = sum(math.prod(shape) for key, shape in state.items() if key.startswith(part))
        assert abs(count / 1e6 - millions) < 1, part
