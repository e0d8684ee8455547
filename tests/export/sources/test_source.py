"""A diffusers folder is untrusted input: class names, configs, weights, JSON."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdxl_trt.engines.bundle.manifest import Scheduler
from sdxl_trt.engines.errors import CorruptError, SdxlTrtError, SourceError, UsageError
from sdxl_trt.export.checkpoints.checkpoint import open_file
from sdxl_trt.export.components import Options, plan_components
from sdxl_trt.export.sources.source import BASE_CLASS, REFINER_CLASS, open_pipeline, open_source, open_vae, with_vae

CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
}
SCHEDULER = {"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "timestep_spacing": "leading"}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a folder of configs with changes to its index."""

    def run(class_name: str = BASE_CLASS, **changes: Any) -> Path:
        index = {"_class_name": class_name, "_diffusers_version": "0.39.0", **CLASSES, **changes}
        for name in CLASSES:
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        return tmp_path

    return run


def test_a_base_is_read(write: Write) -> None:
    root = write(force_zeros_for_empty_prompt=False)
    source = open_pipeline(root, BASE_CLASS)
    assert list(source.models) == ["text_encoder", "text_encoder_2", "unet", "vae"]
    assert list(source.tokenizers) == ["tokenizer", "tokenizer_2"]
    assert source.models["unet"].config == {"name": "unet"}
    assert [source.models[name].name for name in ("unet", "vae")] == [f"{root.name}/unet", f"{root.name}/vae"]
    assert (source.index["_class_name"], source.scheduler_config) == (BASE_CLASS, SCHEDULER)
    assert (source.scheduler.beta_start, source.scheduler.timestep_spacing) == (0.00085, "leading")
    assert (source.requires_aesthetics_score, source.force_zeros_for_empty_prompt) == (False, False)
    assert source.name == root.name


def test_a_refiner_has_one_encoder_and_its_score(write: Write) -> None:
    absent = [None, None]
    root = write(REFINER_CLASS, text_encoder=absent, tokenizer=absent, requires_aesthetics_score=True)
    source = open_pipeline(root, REFINER_CLASS)
    assert list(source.models) == ["text_encoder_2", "unet", "vae"]
    assert list(source.tokenizers) == ["tokenizer_2"]
    assert source.requires_aesthetics_score
    assert source.force_zeros_for_empty_prompt, "diffusers' default if the index does not state it"


def test_a_base_has_no_score_whatever_its_index_says(write: Write) -> None:
    assert not open_pipeline(write(requires_aesthetics_score=True), BASE_CLASS).requires_aesthetics_score


ABSENT = {"text_encoder": [None, None], "tokenizer": [None, None]}


@pytest.mark.parametrize(
    ("given_class", "changes", "asked"),
    [(REFINER_CLASS, ABSENT | {"requires_aesthetics_score": True}, BASE_CLASS), (BASE_CLASS, {}, REFINER_CLASS)],
)
def test_the_errors_for_swapped_folders_name_the_right_options(
    write: Write, given_class: str, changes: dict[str, Any], asked: str
) -> None:
    option = {BASE_CLASS: "--base", REFINER_CLASS: "--refiner"}
    with pytest.raises(
        SourceError, match=f"{option[asked]} .* is a {given_class}, which goes to {option[given_class]}"
    ):
        open_pipeline(write(given_class, **changes), asked)


@pytest.mark.parametrize("class_name", ["StableDiffusionPipeline", None, 7, ["x"], "os.system"])
def test_another_pipeline_is_not_sdxl(write: Write, class_name: Any) -> None:
    with pytest.raises(SourceError, match="not SDXL"):
        open_pipeline(write(class_name), BASE_CLASS)


def test_a_missing_folder_and_a_folder_without_a_pipeline_have_different_errors(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such folder"):
        open_pipeline(tmp_path / "none", BASE_CLASS)
    with pytest.raises(SourceError, match=r"has no model_index\.json"):
        open_pipeline(tmp_path, BASE_CLASS)
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="no such folder"):
        open_pipeline(tmp_path / "file", BASE_CLASS)


@pytest.mark.parametrize("name", ["text_encoder_2", "unet", "vae", "tokenizer_2", "scheduler"])
def test_a_missing_part_is_named(write: Write, name: str) -> None:
    remedy = "give an autoencoder with --vae, or download" if name == "vae" else "download"
    with pytest.raises(SourceError, match=f"has no {name}; {remedy}"):
        open_pipeline(write(**{name: [None, None]}), BASE_CLASS)
    root = write()
    (root / name).rename(root / "elsewhere")
    with pytest.raises(SourceError, match=f"has no {name}; {remedy}"):
        open_pipeline(root, BASE_CLASS)


@pytest.mark.parametrize("entry", [["diffusers", "AutoencoderKL"], [None, None], None])
def test_an_autoencoder_may_be_missing_if_another_replaces_it(write: Write, entry: Any, pairs: Any) -> None:
    root = write(**({} if entry is None else {"vae": entry}))
    if entry is None:
        index = json.loads((root / "model_index.json").read_text())
        del index["vae"]
        (root / "model_index.json").write_text(json.dumps(index))
    for there in (True, False):
        (root / "vae" / "config.json").unlink() if there else shutil.rmtree(root / "vae")
        source = open_source(root, "base", vae=False)
        assert "vae" not in source.models
    assert list(source.models) == ["text_encoder", "text_encoder_2", "unet"]
    completed = with_vae(source, open_vae(pairs("outline").base))
    assert completed.models["vae"].name == "base/vae"
    (root / "unet").rename(root / "elsewhere")
    with pytest.raises(SourceError, match="has no unet; download"):
        open_source(root, "base", vae=False)


@pytest.mark.parametrize("name", ["tokenizer", "text_encoder"])
def test_the_first_encoder_comes_with_its_tokenizer(write: Write, name: str) -> None:
    with pytest.raises(SourceError, match=f"has no {name}; download"):
        open_pipeline(write(**{name: [None, None]}), BASE_CLASS)


def test_a_base_may_lack_its_first_encoder(write: Write) -> None:
    absent = {name: [None, None] for name in ("text_encoder", "tokenizer")}
    assert set(open_pipeline(write(**absent), BASE_CLASS).models) == {"text_encoder_2", "unet", "vae"}


@pytest.mark.parametrize(
    "setting", [{"prediction_type": "flow"}, {"timestep_spacing": "nope"}, {"beta_schedule": "squaredcos_cap_v2"}]
)
def test_a_schedule_that_the_runtime_lacks_is_refused_at_export(write: Write, setting: dict[str, str]) -> None:
    root = write()
    path = root / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(SourceError, match="is not supported"):
        open_pipeline(root, BASE_CLASS)


@pytest.mark.parametrize("entry", [["evil_module", "Model"], ["pipeline", "unet.py"], ["diffusers"], [1, 2]])
def test_custom_code_is_never_loaded(write: Write, entry: list[Any]) -> None:
    with pytest.raises(SourceError, match="custom code is never loaded"):
        open_pipeline(write(unet=entry), BASE_CLASS)


JSON_FILES = ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000])
def test_broken_json_is_corrupt_and_named(write: Write, name: str, raw: bytes) -> None:
    root = write()
    (root / name).write_bytes(raw)
    with pytest.raises(CorruptError, match=f"{Path(name).name}.*download it again"):
        open_pipeline(root, BASE_CLASS)


@pytest.mark.parametrize("name", JSON_FILES[1:])
def test_a_missing_config_is_named(write: Write, name: str) -> None:
    root = write()
    (root / name).unlink()
    with pytest.raises(SourceError, match=f"{Path(name).name}: missing"):
        open_pipeline(root, BASE_CLASS)


def test_a_folder_in_place_of_a_config_is_a_usage_error(write: Write) -> None:
    root = write()
    (root / "unet" / "config.json").unlink()
    (root / "unet" / "config.json").mkdir()
    with pytest.raises(UsageError):
        open_pipeline(root, BASE_CLASS)


@pytest.mark.parametrize(
    "change",
    [{"num_train_timesteps": "1000"}, {"num_train_timesteps": 0}, {"num_train_timesteps": 1.5}, {"beta_start": "x"},
     {"beta_schedule": 7}, {"timestep_spacing": []}, {"steps_offset": 0.5}, {"prediction_type": {}}],
)  # fmt: skip
def test_a_scheduler_config_with_wrong_types_is_corrupt(write: Write, change: dict[str, Any]) -> None:
    """A value that is accepted here would make a manifest that nobody can read."""
    root = write()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER | change))
    with pytest.raises(CorruptError, match="scheduler_config"):
        open_pipeline(root, BASE_CLASS)


def test_null_in_a_scheduler_config_is_the_default(write: Write) -> None:
    root = write()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps({"steps_offset": None, "trained_betas": None}))
    assert open_pipeline(root, BASE_CLASS).scheduler.steps_offset == 0


# Schedulers of published fine-tunes.
FINE_TUNES = {
    "turbo": {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing", "beta_start": 0.00085,
              "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon", "steps_offset": 1,
              "interpolation_type": "linear", "sample_max_value": 1.0, "skip_prk_steps": True, "clip_sample": False},
    "lightning": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "beta_start": 0.00085,
                  "beta_schedule": "scaled_linear", "prediction_type": "epsilon", "final_sigmas_type": "zero",
                  "sigma_max": None, "sigma_min": None, "timestep_type": "discrete", "use_karras_sigmas": False},
    "one step": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "prediction_type": "sample"},
    "lcm": {"_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0,
            "timestep_spacing": "leading", "thresholding": False},
    "v": {"_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "ddim": {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "clip_sample": False, "skip_prk_steps": True,
             "timestep_spacing": "leading"},
}  # fmt: skip


@pytest.mark.parametrize("name", FINE_TUNES)
def test_fine_tunes_with_other_schedulers_open(write: Write, caplog: pytest.LogCaptureFixture, name: str) -> None:
    config = FINE_TUNES[name]
    root = write(scheduler=["diffusers", config["_class_name"]])
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    source = open_source(root, "base")
    assert source.scheduler_config == config
    assert source.scheduler.class_name == config["_class_name"]
    for setting in ("timestep_spacing", "prediction_type"):
        assert getattr(source.scheduler, setting) == config.get(setting, getattr(Scheduler(), setting))
    assert caplog.records == []


def test_the_schedulers_class_is_that_of_the_index(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    found = open_source(write(scheduler=["diffusers", "LCMScheduler"]), "base").scheduler
    assert (found.class_name, found.sampler, found.beta_end) == ("LCMScheduler", "lcm", 0.012)
    assert "names EulerDiscreteScheduler, but model_index.json names LCMScheduler, which is used" in caplog.text


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["diffusers", "FlowMatchEulerDiscreteScheduler"], "FlowMatchEulerDiscreteScheduler adds noise as flow"),
        (["diffusers", "CosineDPMSolverMultistepScheduler"], "CosineDPMSolverMultistepScheduler is for audio models"),
        (["my_scheduler", "EulerDiscreteScheduler"], "custom code is never loaded"),
    ],
)
def test_an_unsupported_scheduler_is_refused(write: Write, entry: list[str], message: str) -> None:
    with pytest.raises(SourceError, match=message) as refused:
        open_source(write(scheduler=entry), "base")
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("spec", ["no/such/folder", "./nothing", "typo", "/absent/folder"])
def test_an_unknown_source_lists_the_valid_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"--refiner .*no such folder.*\.safetensors checkpoint or a hub id"):
        open_source(spec, "refiner")
    with pytest.raises(SourceError, match=r"--vae .*no such folder.*hub id"):
        open_vae(spec)


def test_a_role_is_checked_as_a_class_is(write: Write) -> None:
    with pytest.raises(SourceError, match=r"--refiner .* is a StableDiffusionXLPipeline, which goes to --base"):
        open_source(write(), "refiner")


def test_an_autoencoder_folder_replaces_a_pipelines(pairs: Callable[[str], Any], tmp_path: Path) -> None:
    """As for sdxl-vae-fp16-fix, whose config allows fp16."""
    pair = pairs("outline")
    shutil.copytree(pair.base / "vae", tmp_path / "vae-fix")
    config = json.loads((tmp_path / "vae-fix" / "config.json").read_text()) | {"force_upcast": False}
    (tmp_path / "vae-fix" / "config.json").write_text(json.dumps(config))
    base = open_source(pair.base, "base")
    fixed = with_vae(base, open_vae(tmp_path / "vae-fix"))
    precisions = [
        plan_components(source, None, Options(precision="fp16"), pytest.fail)[0]["vae_decoder"].precision
        for source in (base, fixed)
    ]
    assert precisions[0] != precisions[1] == "fp16"
    assert fixed.models["vae"].name == "vae-fix"
    assert base.models["vae"].name == "base/vae", "the given pipeline is unchanged"
    assert {name: model for name, model in fixed.models.items() if name != "vae"} == {
        name: model for name, model in base.models.items() if name != "vae"
    }


def test_a_pipelines_autoencoder_can_be_used(pairs: Callable[[str], Any]) -> None:
    vae = open_vae(pairs("outline").refiner)
    assert (vae.name, vae.where) == ("refiner/vae", str(pairs("outline").refiner / "vae"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "is a AutoencoderTiny; --vae takes an AutoencoderKL"),
        (None, "no config.json"),
    ],
)
def test_other_sources_than_autoencoders_are_refused(
    tmp_path: Path, config: dict[str, str] | None, message: str
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=message):
        open_vae(tmp_path)


def test_a_folder_of_fp16_files_opens(pairs: Callable[[str], Any], tmp_path: Path) -> None:
    shutil.copytree(pairs("outline").base, tmp_path / "half")
    for path in list((tmp_path / "half").glob("*/*.safetensors")):
        path.rename(path.with_suffix(".fp16.safetensors"))
    plain = open_source(pairs("outline").base, "base").models["unet"].checkpoint()
    assert open_source(tmp_path / "half", "base").models["unet"].checkpoint().tensors.keys() == plain.tensors.keys()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(name=st.sampled_from([*CLASSES, "_class_name", "requires_aesthetics_score"]), value=JSON)
def test_any_index_is_read_or_refused(write: Write, name: str, value: Any) -> None:
    root = write()
    index = {"_class_name": BASE_CLASS, **CLASSES, name: value}
    (root / "model_index.json").write_text(json.dumps(index))
    try:
        open_pipeline(root, BASE_CLASS)
    except SdxlTrtError as exc:
        code = exc.exit_code
    else:
        code = 2
    assert code in (2, 4)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow such names")
def test_weights_that_safetensors_cannot_open_are_not_called_broken(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    path.touch()
    with pytest.raises(UsageError, match="is not UTF-8, and safetensors cannot open such a path; rename it"):
        open_file(path)
