"""Plans for LoRAs on the simulated device: LoRAs enter as inputs, nothing is loaded again, and results are ORT's."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdxl_trt.engines.adapters.file import open_lora
from sdxl_trt.engines.adapters.scaled import ScaledLora
from sdxl_trt.engines.backends.ort.engine import OrtEngine
from sdxl_trt.engines.bundle.tensor_table import Slot, read_table
from sdxl_trt.engines.errors import CorruptError, EngineError, IncompatibleError

MOST = 8
MakeLora = Callable[..., ScaledLora]


@pytest.fixture
def slotted(plan) -> Any:
    return plan(lora_rank=MOST)


@pytest.fixture
def lora(slotted, tmp_path: Path) -> MakeLora:
    """Return a function that writes a LoRA for some slots of a component and returns it at a scale."""

    def make(name: str, rank: int, *, seed: int, scale: float = 1.0, every: int = 1, first: int = 0) -> ScaledLora:
        rng = np.random.default_rng(seed)
        slots = list(read_table(slotted.bundle, name).slots_by_module.values())[first::every]
        prefix = name.removeprefix("refiner_")
        tensors = {
            f"{prefix}.{slot.module}.lora_{part}.weight": (rng.standard_normal(shape) / 8).astype(np.float32)
            for slot in slots
            for part, shape in _stored(slot, rank).items()
        }
        path = tmp_path / f"{name}-{rank}-{seed}.safetensors"
        save_file(tensors, path)
        return ScaledLora(open_lora(path), scale)

    return make


def _stored(slot: Slot, rank: int) -> dict[str, tuple[int, ...]]:
    return {"down": (rank, slot.inputs, *slot.kernel), "up": (slot.outputs, rank, *(1 for _ in slot.kernel))}


def _patched(slotted: Any, name: str, loras: Iterable[ScaledLora]) -> OrtEngine:
    """Return ONNX Runtime with the LoRAs in its weights."""
    engine = OrtEngine(slotted.bundle, name)
    engine.adapt(tuple(loras))
    engine.load()
    return engine


@pytest.mark.parametrize("name", ["unet", "text_encoder", "text_encoder_2", "refiner_unet"])
def test_a_plan_for_loras_equals_onnx_runtime_with_patched_weights(slotted, device, lora, name: str) -> None:
    loras = lora(name, 2, seed=1, scale=0.7), lora(name, 3, seed=2, scale=-0.4, every=2)
    inputs = slotted.inputs(name)
    reference, plain = _patched(slotted, name, loras), slotted.reference(name)
    engine = slotted.slot_engine(name, device)
    engine.adapt(loras)
    engine.load()
    run = slotted.run if "timestep" in inputs else lambda engine, given: engine.infer(given)
    for _ in range(3):  # without a graph, captured, launched again
        expected = run(reference, inputs)
        slotted.assert_near(run(engine, inputs), expected)
    output = list(expected)[-1]
    assert np.abs(expected[output] - run(plain, inputs)[output]).max() > 0.05, "the LoRAs have no effect"
    reference.unload()
    engine.unload()
    slotted.assert_empty()


def test_other_loras_upload_factors_only(slotted, device, simulated, lora) -> None:
    inputs = slotted.inputs("unet")
    engine = slotted.slot_engine("unet", device)
    engine.adapt((lora("unet", 4, seed=1),))
    engine.load()
    engine.bind(slotted.constants(inputs))
    step = slotted.step(inputs)
    for turn in range(3):
        changed = (lora("unet", 4, seed=turn + 2),)
        simulated.since()
        engine.adapt(changed)
        slots = read_table(slotted.bundle, "unet").slots_by_module.values()
        factors = sum(4 * np.prod(shape) for slot in slots for shape in slot.sizes(4).values())
        assert simulated.since() == {"HostToDevice": factors}, "weights would be counted too"
        engine.adapt(changed)
        assert simulated.since() == {}, "the same LoRAs are not copied again"
        reference = _patched(slotted, "unet", changed)
        reference.bind(slotted.constants(inputs))
        for _ in range(2):
            slotted.assert_near(engine.infer(step), reference.infer(step))
        reference.unload()
        simulated.since()
    assert simulated.calls["cudaStreamBeginCapture"] == 1, "addresses have changed"
    engine.unload()


def test_another_rank_or_other_modules_are_captured_anew(slotted, device, simulated, lora) -> None:
    inputs = slotted.inputs("unet")
    engine = slotted.slot_engine("unet", device)
    engine.load()
    engine.bind(slotted.constants(inputs))
    sets = [(lora("unet", 2, seed=1),), (lora("unet", 8, seed=2, every=3),), (lora("unet", 2, seed=3, every=2),),
            (lora("unet", 2, seed=4, every=2, first=1),)]  # fmt: skip
    for loras in (*sets, *sets):
        engine.adapt(loras)
        reference = _patched(slotted, "unet", loras)
        reference.bind(slotted.constants(inputs))
        for rows in (2, 2, 1):
            step = {name: array[:rows] for name, array in slotted.step(inputs).items()}
            slotted.assert_near(engine.infer(step), reference.infer(step))
        reference.unload()
    assert simulated.calls["cudaGraphLaunch"] > 0
    engine.unload()
    slotted.assert_empty()


def test_slots_without_a_lora_share_one_buffer_of_zeros(slotted, device, simulated, lora) -> None:
    engine = slotted.slot_engine("unet", device)
    engine.load()
    before = simulated.current_bytes
    engine.adapt((lora("unet", 4, seed=1, every=1000),))  # a single module
    slots = read_table(slotted.bundle, "unet").slots_by_module.values()
    largest = max(4 * np.prod(shape) for slot in slots for shape in slot.sizes(4).values())
    assert simulated.current_bytes - before <= 2 * largest + 3 * 256
    engine.unload()


def test_the_engine_runs_only_with_loras(slotted, device, lora) -> None:
    engine = slotted.slot_engine("text_encoder", device)
    engine.load()
    with pytest.raises(EngineError, match=r"infer before adapt"):
        engine.infer(slotted.inputs("text_encoder"))
    engine.adapt((lora("text_encoder", 2, seed=1),))
    engine.infer(slotted.inputs("text_encoder"))
    engine.adapt(())
    with pytest.raises(EngineError, match=r"infer before adapt"):
        engine.infer(slotted.inputs("text_encoder"))
    engine.unload()


def test_a_damaged_lora_leaves_those_before_in_place(slotted, device, lora) -> None:
    engine, inputs = slotted.slot_engine("text_encoder", device), slotted.inputs("text_encoder")
    engine.load()
    sound, damaged = lora("text_encoder", 2, seed=1), lora("text_encoder", 2, seed=2)
    _damage(damaged)
    engine.adapt((sound,))
    expected = engine.infer(inputs)
    with pytest.raises(CorruptError):
        engine.adapt((damaged,))
    slotted.assert_near(engine.infer(inputs), expected)
    engine.unload()


def _damage(lora: ScaledLora) -> None:
    """Change a LoRA's file after it was opened."""
    lora.lora.path.write_bytes(lora.lora.path.read_bytes() + b"more")


def test_an_engine_that_cannot_have_its_loras_back_is_not_as_before(slotted, device, lora) -> None:
    engine, inputs = slotted.slot_engine("text_encoder", device), slotted.inputs("text_encoder")
    engine.load()
    loras = lora("text_encoder", 2, seed=1), lora("text_encoder", 2, seed=2)
    engine.adapt(loras[:1])
    for each in loras:
        _damage(each)
    # A pool keeps an engine whose LoRAs are refused by a CorruptError, and drops it for any other error.
    with pytest.raises(EngineError, match=r"text_encoder: the LoRAs that it had cannot be put back: .*changed while"):
        engine.adapt(loras[1:])
    with pytest.raises(EngineError, match="before load"):
        engine.infer(inputs)


def test_ranks_above_the_plan_are_refused_with_the_command(slotted, device, lora) -> None:
    engine = slotted.slot_engine("unet", device)
    loras = lora("unet", 6, seed=1), lora("unet", 4, seed=2, scale=0.5)
    with pytest.raises(IncompatibleError) as caught:
        engine.adapt(loras)
    assert str(caught.value) == (
        "unet-6-1.safetensors (rank 6) and unet-4-2.safetensors (rank 4) need a rank of 10 in unet, and its tensorrt"
        " plan was built for 8; build plans for it with: export-engines --engine tensorrt --lora-rank 10 --out"
        f" {slotted.bundle.root}"
    )


def test_a_plan_without_slots_refuses_loras(slotted, device, lora) -> None:
    engine = slotted.engine("unet", device)
    with pytest.raises(IncompatibleError, match=r"the tensorrt plan of unet takes no LoRAs; build one .* --lora-rank"):
        engine.adapt((lora("unet", 2, seed=1),))
    engine.adapt(())
