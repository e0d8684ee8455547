"""What single files say of their schedule, beside ComfyUI's rule for it (supported_models.SDXL.model_type)."""

import itertools
import re
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdxl_trt.export.sources.predictions import said_schedule
from sdxl_trt.export.sources.source import open_checkpoint_file

V = {"prediction_type": "v_prediction"}
ZERO = {"rescale_betas_zero_snr": True}


def _comfyui(names: set[str]) -> dict[str, Any]:
    """Return what ComfyUI makes of the tensors: v_pred decides, ztsnr counts beside it only."""
    return V | (ZERO if "ztsnr" in names else {}) if "v_pred" in names else {}


@pytest.mark.parametrize(
    "names", [set(), {"v_pred"}, {"ztsnr"}, {"v_pred", "ztsnr"}], ids=lambda names: "+".join(sorted(names)) or "none"
)
def test_tensors_are_followed_as_in_comfyui(names: set[str]) -> None:
    told: list[str] = []
    assert said_schedule(names, {}, "x", told.append) == _comfyui(names)
    assert [line for line in told if "ignored ztsnr" in line] == told
    assert bool(told) == (names == {"ztsnr"}), "a word that is not followed is told"


CASES: list[tuple[set[str], dict[str, str], dict[str, Any], str]] = [
    (set(), {"modelspec.prediction_type": "epsilon"}, {}, ""),
    (set(), {"ss_v_parameterization": "False"}, {}, ""),
    (set(), {"modelspec.prediction_type": "v"}, V, "as the header states .modelspec.prediction_type v."),
    (set(), {"modelspec.prediction_type": "v_prediction"}, V, "there is no tensor v_pred"),
    (set(), {"ss_v_parameterization": "True"}, V, "ss_v_parameterization True"),
    ({"v_pred"}, {"modelspec.prediction_type": "v"}, V, ""),
    ({"v_pred"}, {"modelspec.prediction_type": "epsilon"}, V, "the header states otherwise.*using v-prediction"),
    (set(), {"modelspec.prediction_type": "epsilon", "ss_v_parameterization": "True"}, V, "another entry states"),
    (set(), {"modelspec.prediction_type": "flow"}, {}, "ignored modelspec.prediction_type 'flow'"),
    ({"v_pred"}, {"ss_zero_terminal_snr": "True"}, V | ZERO, ""),
    ({"ztsnr"}, {"modelspec.prediction_type": "v"}, V | ZERO, "there is no tensor v_pred"),
    (set(), {"ss_zero_terminal_snr": "True"}, {}, "ignored ss_zero_terminal_snr .*, which needs v-prediction"),
    (set(), {"ss_zero_terminal_snr": "False", "modelspec.prediction_type": "None"}, {}, ""),
    (set(), {"modelspec.timestep_range": "0,200"}, {}, "only part of the timesteps .*0,200"),
    (set(), {"modelspec.timestep_range": "0,1000"}, {}, ""),
]


@pytest.mark.parametrize(("names", "metadata", "changes", "line"), CASES)
def test_what_a_header_says_is_followed_or_told(
    names: set[str], metadata: dict[str, str], changes: dict[str, Any], line: str
) -> None:
    told: list[str] = []
    assert said_schedule(names, metadata, "file", told.append) == changes
    assert [bool(re.search(line, text)) for text in told] == ([True] if line else [])


def test_no_word_is_without_consequence() -> None:
    """Whatever combination of words: v-prediction follows, or a line says why not."""
    headers = [{"modelspec.prediction_type": word} for word in ("v", "epsilon")]
    headers += [{"ss_v_parameterization": "True"}, {"ss_zero_terminal_snr": "True"}]
    for names, one, other in itertools.product([set(), {"v_pred"}, {"ztsnr"}], headers, headers):
        told: list[str] = []
        changes = said_schedule(names, one | other, "x", told.append)
        words = {*names, *(one | other), *(one | other).values()}
        says_v = bool(words & {"v_pred", "v", "ss_v_parameterization"})
        assert (changes.get("prediction_type") == "v_prediction") == says_v
        if words & {"ztsnr", "ss_zero_terminal_snr"}:
            assert changes.get("rescale_betas_zero_snr") or told
        if says_v and "epsilon" in words:
            assert told


def test_a_file_is_read_so(made: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    root, _, ldm = made("outline", "base")
    save_file(ldm | {"ztsnr": torch.empty(0)}, tmp_path / "x.safetensors", {"modelspec.prediction_type": "v"})
    source = open_checkpoint_file(tmp_path / "x.safetensors", "base", configs=root)
    assert source.scheduler.prediction_type == "v_prediction"
    assert source.scheduler.rescale_betas_zero_snr
    assert "using v-prediction, as the header states" in caplog.text
