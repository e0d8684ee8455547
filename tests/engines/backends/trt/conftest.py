"""The outline pair's bundle with simulated plans, and fixtures to run them."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines.backends.ort.engine import OrtEngine
from sdxl_trt.engines.backends.trt.engine import TrtDevice, TrtEngine, open_device
from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.bundle.manifest import Component
from sdxl_trt.engines.bundle.plan_record import PlanRecord
from sdxl_trt.engines.engine import numpy_dtype

SIZES: dict[str, int | tuple[int, int, int]] = {
    "height": (16, 32, 48), "width": (16, 32, 48), "batch": (1, 1, 2), "tokens": (77, 77, 154),
}  # fmt: skip
AXES = {"rows": 2, "pictures": 1, "prompts": 2, "height": 8, "width": 8, "tokens": 77}
STEP = ("sample", "timestep")
TOLERANCE = 1e-3

Inputs = dict[str, np.ndarray]


class Planned:
    """A bundle with simulated plans for `simulated`: makes engines, their inputs, and ONNX Runtime references."""

    def __init__(self, simulated: Any, root: Path) -> None:
        self.bundle: Bundle = read_bundle(root)
        plans = self.bundle.manifest.plans
        self.records: dict[str, PlanRecord] = {each.key.component: each for each in plans if not each.for_loras}
        self.slot_records = {each.key.component: each for each in plans if each.for_loras}
        self._simulated = simulated

    def engine(self, name: str, device: TrtDevice, **options: Any) -> TrtEngine:
        return TrtEngine(self.bundle, self.records[name], device, **options)

    def slot_engine(self, name: str, device: TrtDevice, **options: Any) -> TrtEngine:
        return TrtEngine(self.bundle, self.slot_records[name], device, **options)

    def reference(self, name: str) -> OrtEngine:
        return _reference(self.bundle.root, name)

    def inputs(self, name: str, seed: int = 0, **axes: int) -> Inputs:
        return _random_inputs(self.bundle.manifest.components[name], seed, **axes)

    def constants(self, inputs: Inputs) -> Inputs:
        return {name: array for name, array in inputs.items() if name not in STEP}

    def step(self, inputs: Inputs) -> Inputs:
        return {name: array for name, array in inputs.items() if name in STEP}

    def run(self, engine: Any, inputs: Inputs) -> Inputs:
        """Bind the constants of `inputs` and run one step."""
        engine.bind(self.constants(inputs))
        return dict(engine.infer(self.step(inputs) or inputs))

    def assert_near(self, found: Inputs, expected: Inputs) -> None:
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_allclose(found[name], array, atol=TOLERANCE, rtol=0, err_msg=name)

    def assert_empty(self) -> None:
        """Assert that the device is empty, and that no TensorRT engine or context is alive."""
        assert self._simulated.current_bytes == 0
        assert self._simulated.living["ICudaEngine"] == self._simulated.living["IExecutionContext"] == 0


@functools.cache
def _reference(root: Path, name: str) -> OrtEngine:
    engine = OrtEngine(read_bundle(root), name)
    engine.load()
    return engine


def _random_inputs(component: Component, seed: int, **axes: int) -> Inputs:
    rng = np.random.default_rng(seed)
    # The sides are in latents, except for a VAE encoder: it takes pixels.
    sizes = AXES | ({"height": 16, "width": 16} if component.kind == "vae_encoder" else {}) | axes
    inputs = {}
    for spec in component.inputs:
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]
        values = rng.integers(0, 99, shape) if spec.dtype == "int64" else rng.standard_normal(shape)
        inputs[spec.name] = values.astype(numpy_dtype(spec))
    return inputs


@pytest.fixture(scope="session")
def outline(pairs) -> Path:
    """Export the bundle before the simulated modules are installed: torch imports `tensorrt` if it finds it."""
    return Path(pairs("outline").bundle)


@pytest.fixture(scope="session")
def made() -> dict[str, tuple[Path, dict[str, tuple[Path, Path]]]]:
    """Cache bundles with plans between tests, and the paths of their graphs for the simulated device."""
    return {}


@pytest.fixture
def plan(outline, simulated, tmp_path_factory, made) -> Callable[..., Planned]:
    """Return a function that returns the bundle with plans of the given sizes and options.

    Tests share it; a test that changes it needs a `fresh` one.
    """

    def get(*, fresh: bool = False, **options: Any) -> Planned:
        key = repr(sorted(options.items()))
        if fresh or key not in made:
            simulated.sources.clear()
            target = tmp_path_factory.mktemp("plans") / "bundle"
            root, sources = simulated.bundle(outline, target, **(SIZES | options)), dict(simulated.sources)
            if fresh:
                return Planned(simulated, root)
            made[key] = root, sources
        root, sources = made[key]
        simulated.sources.update(sources)
        return Planned(simulated, root)

    return get


@pytest.fixture
def planned(plan) -> Planned:
    return plan()


@pytest.fixture
def device(simulated) -> Iterator[TrtDevice]:
    with open_device("tensorrt") as device:
        yield device
    assert device.usage.device == device.usage.pinned == 0
