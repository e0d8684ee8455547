"""Small SDXL-shaped pairs as diffusers folders, and the bundles exported from them, shared by all tests."""

import copy
import functools
import gc
import importlib.util
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

# No deadlines: durations depend on how busy the machine is.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

# Two test processes on two cores: torch's spinning threads would starve both, and so would those of ONNX Runtime.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Let each session of ONNX Runtime compute in the thread that calls it; its own threads spin between calls."""
    import onnxruntime

    class OneThread(onnxruntime.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", OneThread)
        yield


def pytest_collection_finish() -> None:
    """Exclude the imports' hundreds of thousands of permanent objects from garbage collection."""
    gc.collect()
    gc.freeze()


WORDS = ["a", "red", "fox", "in", "the", "snow", "blue", "star", "blurry"]


@dataclass(frozen=True)
class Shape:
    """The differences between the pairs of the tests."""

    base: dict[str, Any]
    refiner: dict[str, Any]
    vae_channels: tuple[int, ...] = (16, 32)
    widths: tuple[int, int] = (32, 48)
    eos_token_id: int = 2
    prefix: bool = True
    legacy_vae: bool = False
    own_refiner_parts: bool = False
    force_zeros: tuple[bool, bool] = (True, False)
    aesthetics: bool = True
    scheduler: dict[str, Any] = field(default_factory=dict)


SHAPES = {
    # SDXL's structure: three and four levels, heads per block, encoders stored with transformers < 5's prefix.
    "outline": Shape(
        base={
            "block_out_channels": (16, 32, 32), "attention_head_dim": (1, 2, 4),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 1, 2), "layers_per_block": 1,
        },
        refiner={
            "block_out_channels": (16, 32, 32, 32), "attention_head_dim": (2, 2, 4, 4),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": 1, "layers_per_block": 1,
        },
    ),
    # Two levels, one head width, convolutional projections; the refiner shares nothing with the base.
    "apart": Shape(
        base={
            "block_out_channels": (16, 32), "attention_head_dim": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": (2, 1), "use_linear_projection": False,
        },
        refiner={
            "block_out_channels": (16, 24, 32), "attention_head_dim": (2, 3, 4), "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1,
            "transformer_layers_per_block": (2, 1, 1),
        },
        eos_token_id=0, prefix=False, own_refiner_parts=True, force_zeros=(False, True), vae_channels=(8, 16, 16),
    ),
    # Older files: attention names of the first autoencoders; a refiner without aesthetics; other schedules.
    "legacy": Shape(
        base={
            "block_out_channels": (16, 32), "attention_head_dim": (2, 4), "act_fn": "gelu",
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1, "upcast_attention": True,
        },
        refiner={
            "block_out_channels": (32, 32), "attention_head_dim": (4, 2),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1,
        },
        legacy_vae=True, aesthetics=False, vae_channels=(8, 16),
        scheduler={"timestep_spacing": "trailing", "prediction_type": "v_prediction", "beta_schedule": "linear"},
    ),
}  # fmt: skip


def _write_tokenizer(folder: Path, pad: str) -> int:
    """Write a small CLIP tokenizer (bytes and a few words) and return the id of its end token."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    symbols = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(len(hidden))]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
    vocabulary = symbols + [symbol + "</w>" for symbol in symbols] + ["".join(pair) for pair in merges]
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = pad
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocabulary) - 1


def _rename_keys(file: Path, rename: Callable[[str], str]) -> None:
    from safetensors.torch import load_file, save_file

    save_file({rename(name): tensor.clone() for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def _legacy_attention(name: str) -> str:
    for new, old in (
        (".to_q.", ".query."),
        (".to_k.", ".key."),
        (".to_v.", ".value."),
        (".to_out.0.", ".proj_attn."),
    ):
        name = name.replace(new, old)
    return name


def _save_encoder(folder: Path, cls: Any, width: int, eos: int, seed: int, *, prefix: bool) -> None:
    import torch
    from transformers import CLIPTextConfig

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=eos + 1 if eos > 2 else 600, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=77, projection_dim=width, eos_token_id=eos, bos_token_id=0,
        hidden_act="quick_gelu" if cls.__name__ == "CLIPTextModel" else "gelu",
    )  # fmt: skip
    cls(config).save_pretrained(folder)
    stored = folder / "model.safetensors"
    _rename_keys(stored, lambda name: name.removeprefix("text_model."))
    if prefix:
        bare = "text_projection.weight"
        _rename_keys(stored, lambda name: name if name == bare else f"text_model.{name}")


def _save_vae(folder: Path, channels: tuple[int, ...], seed: int, *, legacy: bool, scaling: float = 0.13025) -> None:
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=channels, down_block_types=("DownEncoderBlock2D",) * len(channels), norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * len(channels), layers_per_block=1, latent_channels=4,
        sample_size=64, scaling_factor=scaling,
    )  # fmt: skip
    vae.save_pretrained(folder)
    if legacy:
        _rename_keys(folder / "diffusion_pytorch_model.safetensors", _legacy_attention)


def _save_unet(folder: Path, shape: dict[str, Any], context: int, pooled: int, ids: int, seed: int) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    settings = {
        "sample_size": 16, "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "norm_num_groups": 8,
        "use_linear_projection": True, "cross_attention_dim": context,
        "projection_class_embeddings_input_dim": pooled + 8 * ids,
    }  # fmt: skip
    UNet2DConditionModel(**(settings | shape)).save_pretrained(folder)


def make_pair(folder: Path, shape: Shape) -> None:
    """Write `base/` and `refiner/` of `shape` as diffusers folders."""
    from diffusers import EulerDiscreteScheduler
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    for stage in ("base", "refiner"):
        root, refiner = folder / stage, stage == "refiner"
        own = refiner and shape.own_refiner_parts
        seed = 100 if own else 0
        index: dict[str, Any] = {
            "_class_name": "StableDiffusionXLImg2ImgPipeline" if refiner else "StableDiffusionXLPipeline",
            "_diffusers_version": "0.39.0",
            "force_zeros_for_empty_prompt": shape.force_zeros[refiner],
            "scheduler": ["diffusers", "EulerDiscreteScheduler"], "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "text_encoder": [None, None] if refiner else ["transformers", "CLIPTextModel"],
            "tokenizer": [None, None] if refiner else ["transformers", "CLIPTokenizer"],
        }  # fmt: skip
        if refiner:
            index["requires_aesthetics_score"] = shape.aesthetics
        end = _write_tokenizer(root / "tokenizer_2", pad="!")
        eos = 2 if shape.eos_token_id == 2 else end
        widths = (shape.widths[0], shape.widths[1] + 16 * own)
        _save_encoder(
            root / "text_encoder_2",
            CLIPTextModelWithProjection,
            widths[1],
            eos,
            2 + seed,
            prefix=shape.prefix,
        )
        if not refiner:
            _write_tokenizer(root / "tokenizer", pad="<|endoftext|>")
            _save_encoder(root / "text_encoder", CLIPTextModel, widths[0], eos, 1, prefix=shape.prefix)
        _save_vae(
            root / "vae",
            shape.vae_channels,
            3 + seed,
            legacy=shape.legacy_vae,
            scaling=0.2 if own else 0.13025,
        )
        ids = 5 if refiner and shape.aesthetics else 6
        context = widths[1] if refiner else sum(widths)
        _save_unet(root / "unet", shape.refiner if refiner else shape.base, context, widths[1], ids, 4 + refiner)
        settings = {
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "timestep_spacing": "leading", "steps_offset": 1,
        }  # fmt: skip
        EulerDiscreteScheduler(**(settings | shape.scheduler)).save_pretrained(root / "scheduler")
        (root / "model_index.json").write_text(json.dumps(index))


@dataclass(frozen=True)
class Pair:
    """A pair's diffusers folders, and the fp32 bundle exported from them on first use."""

    name: str
    shape: Shape
    base: Path
    refiner: Path
    export: Callable[[], Path]

    @property
    def bundle(self) -> Path:
        """The exported bundle, shared by all tests: do not change it."""
        return self.export()


def _shared(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Make a folder once for all test processes."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if root.name.startswith("popen-") else root
    target = root / f"shared-{name}"
    with FileLock(root / f"{name}.lock"):
        done = target / ".done"
        if not done.exists():
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            make(target)
            done.touch()
    return target


Convert = Callable[..., Any]


@pytest.fixture(scope="session")
def translations_once() -> Iterator[None]:
    """Let torch's exporter collect its table of translations once per process, instead of a second for each graph."""
    from torch.onnx._internal.exporter import _registration

    usual = _registration.ONNXRegistry
    collected = functools.cache(lambda opset: usual.from_torchlib(opset_version=opset))

    class Registry(usual):
        @classmethod
        def from_torchlib(cls, opset_version: int) -> Any:
            found = copy.copy(collected(opset_version))
            found.functions = {target: list(each) for target, each in found.functions.items()}  # exports add their own
            return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_registration, "ONNXRegistry", Registry)
        yield


@pytest.fixture(scope="session")
def convert_once(tmp_path_factory: pytest.TempPathFactory, translations_once: None) -> Convert:
    """Return a replacement for the exporter's `convert` that copies what any test process has converted before.

    A component's key covers everything that determines its files, so converting it again would test nothing new.
    """

    def convert(name: str, plan: Any, key: str, root: Path, *rest: Any) -> Any:
        import msgspec

        from sdxl_trt.export.components import convert as conversion

        def make(folder: Path) -> None:
            conversion.convert_component(name, plan, key, root, *rest)
            shutil.copytree(root / name, folder / name)

        kept = _shared(tmp_path_factory, f"{name}-{key[:16]}", make)
        shutil.rmtree(root / name, ignore_errors=True)
        shutil.copytree(kept / name, root / name)
        found = conversion.finished(root, name, key)
        assert found is not None
        source, config = conversion.component_source(plan), conversion.kept_config(plan)
        return msgspec.structs.replace(found, source=source, config=config)  # as the exporter does when it resumes

    return convert


@pytest.fixture
def converted_once(convert_once: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this test's exports reuse components converted before."""
    monkeypatch.setattr("sdxl_trt.export.exporter.convert_component", convert_once)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory, convert_once: Convert) -> Callable[[str], Pair]:
    """Return a function from a name in SHAPES to its Pair, made once."""

    def get(name: str) -> Pair:
        shape = SHAPES[name]

        folder = _shared(tmp_path_factory, name, lambda folder: make_pair(folder, shape))

        def make(bundle: Path) -> None:
            from sdxl_trt.export import Options, export_bundle

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sdxl_trt.export.exporter.convert_component", convert_once)
                export_bundle(folder / "base", folder / "refiner", bundle / "bundle", Options(precision="fp32"))

        def export() -> Path:
            return _shared(tmp_path_factory, f"{name}-bundle", make) / "bundle"

        return Pair(name, shape, folder / "base", folder / "refiner", export)

    return get


def _toy_controlnet(unet: Any, factor: int, rng: np.random.Generator) -> Any:
    """Return an ONNX ControlNet for a UNet's component: a residual is a projection of the picture and the sample."""
    from onnx import TensorProto, helper, numpy_helper

    from sdxl_trt.export.graph.residuals import EARLIER
    from sdxl_trt.export.graph.signatures import residual_names, residual_shapes

    kinds = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
    kind = kinds[unet.input("sample").dtype]
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    shapes = residual_shapes(unet.config)
    inputs = [helper.make_tensor_value_info(spec.name, kinds[spec.dtype], spec.shape)
              for spec in unet.inputs if not spec.optional]  # fmt: skip
    picture = ["rows", 3, f"{factor}*height", f"{factor}*width"]
    inputs += [helper.make_tensor_value_info("controlnet_cond", kind, picture),
               helper.make_tensor_value_info("scales", TensorProto.FLOAT, ["rows", len(shapes)])]  # fmt: skip
    nodes = [helper.make_node("Cast", ["scales"], ["cast"], to=kind)]
    weights = [numpy_helper.from_array(np.array([2, 3], np.int64), "axes")]
    outputs, late = [], []
    for index, (name, (channels, divisor)) in enumerate(zip(residual_names(len(shapes)), shapes, strict=True)):
        sides = [f"{axis}/{divisor}" if divisor > 1 else axis for axis in ("height", "width")]
        outputs.append(helper.make_tensor_value_info(name, kind, ["rows", channels, *sides]))
        late.append(helper.make_tensor_value_info(
            EARLIER + name, kind, ["rows|1", channels, *(f"{side}|1" for side in sides)]))  # fmt: skip
        parts = []
        for source, span, width in (("controlnet_cond", factor * divisor, 3), ("sample", divisor, 4)):
            weight, pooled, made = (f"{name}.{source}.{part}" for part in ("weight", "pooled", "made"))
            values = rng.standard_normal((channels, width, 1, 1)) / 8
            weights.append(numpy_helper.from_array(values.astype(dtype), weight))
            square = {"kernel_shape": [span, span], "strides": [span, span]}
            nodes.append(helper.make_node("AveragePool", [source], [pooled], **square))
            nodes.append(helper.make_node("Conv", [pooled, weight], [made], kernel_shape=[1, 1]))
            parts.append(made)
        weights.append(numpy_helper.from_array(np.array([index], np.int64), f"{name}.index"))
        nodes += [
            helper.make_node("Add", parts, [f"{name}.sum"]),
            helper.make_node("Gather", ["cast", f"{name}.index"], [f"{name}.scale"], axis=1),
            helper.make_node("Unsqueeze", [f"{name}.scale", "axes"], [f"{name}.column"]),
            helper.make_node("Mul", [f"{name}.sum", f"{name}.column"], [f"{name}.own"]),
            helper.make_node("Add", [f"{name}.own", EARLIER + name], [name]),
        ]
    graph = helper.make_graph(nodes, "controlnet", [*inputs, *late], outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", unet.opset)], ir_version=10)


def _write_component(root: Path, name: str, like: Any, model: Any, **changes: Any) -> Any:
    """Write an ONNX model as the component `name` of the bundle at `root`, and return its record."""
    import msgspec

    from sdxl_trt.engines.bundle import TensorSpec
    from sdxl_trt.export.components.convert import file_record

    (root / name).mkdir(exist_ok=True)
    (root / name / "model.onnx").write_bytes(model.SerializeToString())
    weights = root / name / "weights.data"
    if not weights.exists():
        weights.write_bytes(bytes(64))
    types = {1: "float32", 10: "float16"}

    def spec(value: Any) -> TensorSpec:
        tensor = value.type.tensor_type
        shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        return TensorSpec(name=value.name, dtype=types[tensor.elem_type], shape=shape)  # type: ignore[arg-type]

    return msgspec.structs.replace(
        like, graph=file_record(root, root / name / "model.onnx"), weights=file_record(root, weights), cpu_graph=None,
        inputs=tuple(map(spec, model.graph.input)), outputs=tuple(map(spec, model.graph.output)), **changes,
    )  # fmt: skip


def _add_controlnets(source: Path, root: Path) -> None:
    """Copy a bundle, with residual inputs in its UNet and two toy ControlNets, called edges and poses."""
    import msgspec
    import onnx
    import onnx_ir as ir

    from sdxl_trt.engines.bundle import ControlNet, read_bundle, write_manifest
    from sdxl_trt.export.graph.residuals import add_residuals

    shutil.copytree(source, root)
    manifest = read_bundle(root).manifest
    unet, components = manifest.components["unet"], dict(manifest.components)
    model = ir.from_proto(onnx.load(root / "unet" / "model.onnx", load_external_data=False))
    add_residuals(model, "unet", unet.config, "unet")
    components["unet"] = _write_component(root, "unet", unet, ir.to_proto(model))
    nets = []
    for number, name in enumerate(("edges", "poses"), start=1):
        component = "controlnet" if number == 1 else f"controlnet_{number}"
        toy = _toy_controlnet(unet, manifest.base.vae.factor, np.random.default_rng(number))
        components[component] = _write_component(root, component, unet, toy, kind="controlnet", parameters=1)
        nets.append(ControlNet(component=component, name=name))
    plain = {name: msgspec.structs.replace(each, adapters=None) for name, each in components.items()}
    write_manifest(root, msgspec.structs.replace(manifest, components=plain, controlnets=tuple(nets), plans=()))


@pytest.fixture(scope="session")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the embedded bundle with two toy ControlNets, edges and poses: do not change it."""
    from sdxl_trt.mini.embedded import bundle_path

    return (
        _shared(tmp_path_factory, "controlled", lambda folder: _add_controlnets(bundle_path(), folder / "bundle"))
        / "bundle"
    )


@pytest.fixture(scope="session")
def add_controlnets() -> Callable[[Path, Path], None]:
    """Return the function that copies a bundle with two toy ControlNets added."""
    return _add_controlnets


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command, checks its exit code and one-line error, and returns the line."""

    def run(command: Callable[[list[str]], int], arguments: list[str], code: int) -> str:
        capsys.readouterr()
        try:
            found = command(arguments)
        except SystemExit as exc:  # argparse's own errors
            found = exc.code
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if not line.startswith(("warning:", "note:"))]
        assert captured.out == ""
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("error: ")
        assert found == code, lines[0]
        return lines[0]

    return run


class Terminal(io.StringIO):
    """A terminal that keeps the lines drawn on it, at the time that `clock` says."""

    clock = 0.0

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.getvalue().split("\r") if line.strip()]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    terminal = Terminal()
    for clock in ("sdxl_trt.engines.host.progress.time.time", "tqdm.std.time"):
        monkeypatch.setattr(clock, lambda: terminal.clock)
    return terminal


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _simulated_package() -> Any:
    """Import tests/simulated, which is not on sys.path: beside it are folders called `tensorrt` and `runtime`."""
    name, file = "simulated", Path(__file__).parent / "simulated" / "__init__.py"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(file.parent)])
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def simulated() -> Iterator[Any]:
    """A SimulatedDevice with its replacements for `tensorrt` and `cuda.bindings.runtime` installed."""
    device = _simulated_package().SimulatedDevice()
    device.install()
    yield device
    device.remove()
    if device.leaks_matter:
        device.check_no_leaks()
