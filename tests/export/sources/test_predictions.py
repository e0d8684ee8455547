"""The schedules that single files state, against ComfyUI's rule (supported_models.SDXL.model_type)."""

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
    """Return ComfyUI's settings for the tensors: v_pred decides, ztsnr counts only with v_pred."""
    return V | (ZERO if "ztsnr" in names else {}) if "v_pred" in names else {}


@pytest.mark.parametrize(
    "names", [set(), {"v_pred"}, {"ztsnr"}, {"v_pred", "ztsnr"}], ids=lambda names: "+".join(sorted(names)) or "none"
)
def test_tensors_are_followed_as_in_comfyui(names: set[str]) -> None:
    warned: list[str] = []
    assert said_schedule(names, {}, "x", warned.append) == _comfyui(names)
    assert [line for line in warned if "ignored ztsnr" in line] == warned
    assert bool(warned) == (names == {"ztsnr"}), "an ignored tensor causes a warning"


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
def test_header_entries_are_followed_or_cause_a_warning(
    names: set[str], metadata: dict[str, str], changes: dict[str, Any], line: str
) -> None:
    warned: list[str] = []
    assert said_schedule(names, metadata, "file", warned.append) == changes
    assert [bool(re.search(line, text)) for text in warned] == ([True] if line else [])


def test_every_entry_has_an_effect_or_causes_a_warning() -> None:
    """Any combination of entries gives v-prediction, or a warning why not."""
    headers = [{"modelspec.prediction_type": word} for word in ("v", "epsilon")]
    headers += [{"ss_v_parameterization": "True"}, {"ss_zero_terminal_snr": "True"}]
    for names, one, other in itertools.product([set(), {"v_pred"}, {"ztsnr"}], headers, headers):
        warned: list[str] = []
        changes = said_schedule(names, one | other, "x", warned.append)
        words = {*names, *(one | other), *(one | other).values()}
        says_v = bool(words & {"v_pred", "v", "ss_v_parameterization"})
        assert (changes.get("prediction_type") == "v_prediction") == says_v
        if words & {"ztsnr", "ss_zero_terminal_snr"}:
            assert changes.get("rescale_betas_zero_snr") or warned
        if says_v and "epsilon" in words:
            assert warned


def test_a_files_schedule_is_read(made: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    root, _, ldm = made("outline", "base")
    save_file(ldm | {"ztsnr": torch.empty(0)}, tmp_path / "x.safetensors", {"modelspec.prediction_type": "v"})
    source = open_checkpoint_file(tmp_path / "x.safetensors", "base", configs=root)
    assert source.scheduler.prediction_type == "v_prediction"
    assert source.scheduler.rescale_betas_zero_snr
    assert "using v-prediction, as the header states" in caplog.text
