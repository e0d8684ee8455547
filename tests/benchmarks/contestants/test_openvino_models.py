"""What OpenVINO's contestants calibrate on, leave out and keep; tests/peers runs them."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_trt.benchmarks.contestants import openvino_models
from sdxl_trt.benchmarks.contestants.openvino_models import LEFT_OUT, Cache, unet_feed


@pytest.mark.parametrize(
    ("node", "left_out"),
    [
        ("__module.part.conv_in/aten::_convolution/Convolution", True),
        ("__module.part.decoder.conv_out/aten::_convolution/Convolution", True),
        ("__module.part.up_blocks.2.resnets.0.conv_shortcut/aten::_convolution/Convolution", True),
        ("__module.part.time_embedding.linear_1/aten::linear/MatMul", True),
        ("__module.part.up_blocks.2.resnets.1.time_emb_proj/aten::linear/MatMul", True),
        ("__module.part.down_blocks.0.resnets.0.conv1/aten::_convolution/Convolution", False),
        ("__module.part.down_blocks.1.attentions.0.proj_in/aten::linear/MatMul", False),
    ],
)
def test_the_layers_that_we_leave_out_are_told_by_their_names(node: str, *, left_out: bool) -> None:
    assert bool(re.fullmatch(LEFT_OUT, node)) == left_out


@pytest.mark.parametrize(("count", "kept"), [(4, [0, 3, 6, 9]), (1, [0]), (20, list(range(10)))])
def test_samples_are_spread_over_all_calls(count: int, kept: list[int]) -> None:
    calls: Any = [{"sample": np.array(number)} for number in range(10)]
    assert [int(one["sample"]) for one in openvino_models._spread(calls, count)] == kept


def test_a_pipelines_call_becomes_the_models_inputs() -> None:
    torch = pytest.importorskip("torch")
    added = {"text_embeds": torch.ones(2, 5), "time_ids": torch.ones(2, 6)}
    feed = unet_feed(torch.zeros(2, 4, 8, 8), torch.tensor(981), torch.ones(2, 77, 3), added_cond_kwargs=added,
                     timestep_cond=None, return_dict=False)  # fmt: skip
    assert list(feed) == list(openvino_models.UNET_INPUTS)
    assert feed["timestep"].tolist() == [981.0, 981.0]
    assert feed["timestep"].dtype == np.float32
    assert [feed[name].shape for name in ("sample", "time_ids")] == [(2, 4, 8, 8), (2, 6)]


def _save(model: str, path: Path, *, compress_to_fp16: bool) -> None:
    assert not compress_to_fp16
    path.write_text(model)


def test_models_are_made_once_and_a_failure_leaves_no_folder(tmp_path: Path) -> None:
    cache, made = Cache(tmp_path / "new" / "fp32"), []

    def make() -> dict[str, str]:
        made.append(1)
        if len(made) == 1:
            raise MemoryError
        return {"base unet": "a model"}

    with pytest.raises(MemoryError):
        cache.made(make, _save)
    assert not cache.folder.exists()
    seconds = [cache.made(make, _save) for _ in range(2)]
    assert seconds[0] == seconds[1] > 0
    assert len(made) == 2
    assert cache.path("base unet").read_text() == "a model"  # type: ignore[union-attr]
    assert cache.path("decoder") is None
