"""The checks of gpu-check as tests, on machines with a GPU, with the embedded pair."""

import pytest

from sdxl_trt.benchmarks.gpu_check.checks import Check, Skipped, Workplace, all_checks, make_workplace
from sdxl_trt.engines.backends.trt.environment import device_available

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Return one workplace for all checks, so that plans are built and runs made only once."""
    reason = device_available()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("gpu")
    make_workplace(folder, ours=True)
    return Workplace(folder)


@pytest.mark.parametrize("check", all_checks(), ids=lambda check: check.name)
def test_on_the_gpu(check: Check, workplace: Workplace) -> None:
    try:
        assert check.run(workplace)
    except Skipped as exc:
        pytest.skip(str(exc))
