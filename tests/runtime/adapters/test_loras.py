"""A request's LoRAs settled against the embedded pair: what is applied, said and refused; nothing is loaded."""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdxl_trt.engines.adapters.file import open_lora
from sdxl_trt.engines.bundle import LoraRecord
from sdxl_trt.engines.errors import CorruptError, IncompatibleError, SourceError, UsageError
from sdxl_trt.engines.host import sha256_file
from sdxl_trt.runtime import Request
from sdxl_trt.runtime.adapters.loras import MOST_LORAS, LoraFact, find_recorded
from sdxl_trt.runtime.adapters.use import LoraUse
from sdxl_trt.runtime.images import as_input
from sdxl_trt.runtime.request import ResolvedRequest, Side, resolve_request

MakeLora = Callable[..., Path]


@pytest.fixture
def resolved(embedded: Any) -> Callable[..., ResolvedRequest]:
    """Return a function that resolves a request against the embedded pair, or a bundle with another manifest."""

    def resolve(*loras: LoraUse, prompt: str = "a star", changed: dict[str, Any] | None = None,
                **more: Any) -> ResolvedRequest:  # fmt: skip
        bundle = msgspec.structs.replace(embedded, manifest=msgspec.structs.replace(embedded.manifest,
                                                                                    **(changed or {})))  # fmt: skip
        request = Request(prompt, loras=loras, seed=1, **more)
        return resolve_request(request, bundle.manifest, None, bundle)

    return resolve


Resolve = Callable[..., ResolvedRequest]


def test_loras_keep_their_order_and_scales(make_lora: MakeLora, resolved: Resolve, tmp_path: Path) -> None:
    ink, pen = make_lora(tmp_path / "ink.safetensors"), make_lora(tmp_path / "pen.safetensors", seed=1)
    request = resolved(LoraUse(str(ink), 0.5), LoraUse(str(pen), -1.0, 0.25), negative="")
    assert [(each.lora.name, each.scale, each.on("text_encoder")) for each in request.loras["base"]] == [
        ("ink.safetensors", 0.5, 0.5),
        ("pen.safetensors", -1.0, 0.25),
    ]
    assert request.loras["refiner"] == ()
    facts = request.lora_facts["base"]
    assert [(each.name, each.sha256, each.scale, each.text_scale) for each in facts] == [
        ("ink.safetensors", sha256_file(ink), 0.5, None),
        ("pen.safetensors", sha256_file(pen), -1.0, 0.25),
    ]


def test_the_refiner_has_loras_only_if_it_is_asked(make_lora: MakeLora, resolved: Resolve, tmp_path: Path) -> None:
    ink = make_lora(tmp_path / "ink.safetensors", "text_encoder_2")
    own = make_lora(tmp_path / "own.safetensors", "unet", refiner=True)
    request = resolved(refiner_loras=(LoraUse(str(own)), LoraUse(str(ink), 0.5)))
    assert request.loras["base"] == ()
    assert [each.lora.name for each in request.loras["refiner"]] == ["own.safetensors", "ink.safetensors"]
    assert request.notes == ()


def test_a_name_in_the_prompt_is_the_same_request(make_lora: MakeLora, resolved: Resolve, tmp_path: Path) -> None:
    make_lora(tmp_path / "style" / "ink.safetensors")
    given = resolved(LoraUse("ink", 0.8, 0.5), lora_dir=tmp_path)
    for prompt in ("a star<lora:ink:0.5:0.8>", "<lyco:style/ink:te=0.5:unet=0.8>a star"):
        for compat in ("diffusers", "comfyui"):
            named = resolved(prompt=prompt, lora_dir=tmp_path, compat=compat)
            assert (named.loras, named.lora_facts, named.prompt.text) == (given.loras, given.lora_facts, "a star")
    second = resolved(prompt_2="shiny <lora:ink:0.5:0.8>", lora_dir=tmp_path)
    assert (second.loras, second.prompt.text_2) == (given.loras, "shiny ")


def test_a_tag_is_never_encoded_in_silence(make_lora: MakeLora, resolved: Resolve, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="<lora:ink>: there is no folder to find 'ink' in; give it with --lora-dir"):
        resolved(prompt="a star <lora:ink:1>")
    make_lora(tmp_path / "ink.safetensors")
    request = resolved(negative="<lora:ink:1> bad", lora_dir=tmp_path)
    assert request.loras.get("base", ()) == ()
    (note,) = request.notes
    assert note.startswith("the negative prompt has '<lora:ink:1>', which is read as words, as in A1111; write it")


def test_what_has_no_effect_is_said(make_lora: MakeLora, resolved: Resolve, tmp_path: Path) -> None:
    ink = str(make_lora(tmp_path / "ink.safetensors", "text_encoder"))
    own = str(make_lora(tmp_path / "own.safetensors", "unet", refiner=True))
    (idle,) = resolved(LoraUse(ink, 1.0, 0.0), handoff=None).notes[-1:]
    assert idle == f"{ink}: has no effect: it changes nothing that runs, at the scales that are given"
    assert resolved(refiner_loras=(LoraUse(ink),)).notes == (
        f"{ink}: has no effect: it changes nothing that runs, at the scales that are given",
        f"{ink}: also changes a text_encoder, which this stage does not have",
    )
    assert "the refiner does not run" in resolved(refiner_loras=(LoraUse(own),), handoff=None).notes[0]
    twice = resolved(LoraUse(ink), LoraUse(ink, 0.5), handoff=None)
    assert len(twice.loras["base"]) == 2
    assert twice.notes == (f"{ink}: is given 2 times, and its scales add up: 1.5 on the UNet",)
    unet = str(make_lora(tmp_path / "unet.safetensors", "unet"))
    assert resolved(LoraUse(unet, 1.0, 0.0), LoraUse(unet, 0.0, 1.0), handoff=None).notes == (
        f"{unet}: has nothing for the text encoders, so their scale 1 has no effect",
        f"{unet}: has no effect: it changes nothing that runs, at the scales that are given",
    )
    assert "the refiner was not trained with this LoRA" in resolved(LoraUse(ink)).notes[0]


def test_what_cannot_be_used_is_one_line(make_lora: MakeLora, resolved: Resolve, tmp_path: Path) -> None:
    ink = make_lora(tmp_path / "ink.safetensors")
    make_lora(tmp_path / "style" / "ink.safetensors")
    other = make_lora(tmp_path / "other.safetensors", "unet", wider=3)
    (tmp_path / "old.pt").write_bytes(b"")
    (tmp_path / "notes.safetensors").write_bytes(b"not a LoRA")
    whole = LoraRecord(name="ink.safetensors", sha256=sha256_file(ink), scale=0.8)
    cases: list[tuple[tuple[LoraUse, ...], dict[str, Any], type[Exception], str]] = [
        ((LoraUse("gone.safetensors"),), {}, UsageError, "gone.safetensors: no such file"),
        ((LoraUse("gone"),), {}, UsageError, "--lora gone: no such file; .*--lora-dir DIR"),
        ((LoraUse("gone"),), {"lora_dir": tmp_path}, UsageError, "--lora gone: .* has no gone.safetensors"),
        ((LoraUse("ink"),), {"lora_dir": tmp_path}, UsageError, "is the name of .*ink.safetensors and of .*style"),
        ((LoraUse("../ink"),), {"lora_dir": tmp_path / "style"}, UsageError, "is not the name of a file in a folder"),
        ((LoraUse(str(tmp_path / "old.pt")),), {}, SourceError, "is a pickled LoRA"),
        ((LoraUse(str(tmp_path / "notes.safetensors")),), {}, CorruptError, "notes.safetensors"),
        ((LoraUse(str(other)),), {}, SourceError, "LoRA for another model"),
        ((LoraUse(str(ink), float("nan")),), {}, UsageError, "scale nan; give a number from"),
        ((LoraUse(str(ink), 1.0, 1e9),), {}, UsageError, r"scale 1e\+09; give a number from"),
        ((LoraUse(str(ink)),) * (MOST_LORAS + 1), {}, UsageError, f"give at most {MOST_LORAS}"),
        ((LoraUse(str(ink)),), {"changed": {"loras": (whole,)}}, UsageError,
         "ink.safetensors: is fused into this bundle at 0.8 already; leave it out"),
        ((), {"refiner_loras": (LoraUse(str(ink)),), "changed": {"refiner": None}}, UsageError, "the bundle has none"),
        ((), {"refiner_loras": (LoraUse(str(other)),)}, SourceError, "another model.*trained on SDXL's refiner"),
    ]  # fmt: skip
    for loras, more, kind, says in cases:
        with pytest.raises(kind, match=says) as caught:
            resolved(*loras, **more)
        assert "\n" not in str(caught.value), says


def test_another_lora_on_a_bundle_with_fused_ones_is_fine(
    make_lora: MakeLora, resolved: Resolve, tmp_path: Path
) -> None:
    ink = make_lora(tmp_path / "ink.safetensors")
    fused = LoraRecord(name="ink.safetensors", sha256="0" * 64, scale=0.8, tensors_sha256="1" * 64)
    request = resolved(LoraUse(str(ink)), handoff=None, changed={"loras": (fused,)})
    assert (len(request.loras["base"]), request.notes) == (1, ())


def test_a_fused_lora_with_edited_metadata_is_refused(make_lora: MakeLora, resolved: Resolve, tmp_path: Path) -> None:
    ink, edited = make_lora(tmp_path / "ink.safetensors"), tmp_path / "edited" / "ink.safetensors"
    edited.parent.mkdir()
    save_file(load_file(ink), edited, {"title": "Ink"})
    lora = open_lora(ink)
    fused = LoraRecord.of(lora.name, lora.sha256, 0.8, None, lora.tensors_sha256)
    assert fused.sha256 != sha256_file(edited)
    with pytest.raises(UsageError, match=r"edited.ink.safetensors: is fused into this bundle at 0.8 already"):
        resolved(LoraUse(str(edited)), changed={"loras": (fused,)})
    older = LoraRecord.of(lora.name, lora.sha256, 0.8, None)
    (note,) = resolved(LoraUse(str(edited)), handoff=None, changed={"loras": (older,)}).notes
    assert "the bundle has a LoRA of this name fused at 0.8 already, from a file with another digest" in note


def test_a_bundle_of_an_older_version_is_exported_again(embedded: Any, make_lora: MakeLora, tmp_path: Path) -> None:
    older = {name: msgspec.structs.replace(each, adapters=None) for name, each in embedded.manifest.components.items()}
    bundle = msgspec.structs.replace(embedded, manifest=msgspec.structs.replace(embedded.manifest, components=older))
    ink = LoraUse(str(make_lora(tmp_path / "ink.safetensors")))
    with pytest.raises(IncompatibleError, match=r"older version: .*export-engines"):
        resolve_request(Request(loras=(ink,)), bundle.manifest, None, bundle)
    assert not resolve_request(Request(), bundle.manifest, None, bundle).loras


def test_the_short_hash_is_the_one_of_a1111(make_lora: MakeLora, resolved: Resolve, tmp_path: Path) -> None:
    """It is the digest of the tensors, whatever the header says; a trainer's own digest in the header comes first."""

    def short_hash(path: Path) -> str:
        return resolved(LoraUse(str(path)), handoff=None).lora_facts["base"][0].short_hash

    plain = make_lora(tmp_path / "plain.safetensors")
    told = tmp_path / "told.safetensors"
    save_file(load_file(plain), told, metadata={"ss_output_name": "ink"})
    assert sha256_file(plain) != sha256_file(told)
    assert short_hash(plain) == short_hash(told)
    content = plain.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    (tmp_path / "rest").write_bytes(content[8 + length :])
    assert short_hash(plain) == sha256_file(tmp_path / "rest")[:12]
    save_file(load_file(plain), told, metadata={"sshs_model_hash": "ab" * 32})
    assert short_hash(told) == "ab" * 6
    save_file(load_file(plain), told, metadata={"sshs_model_hash": "<script>"})
    assert short_hash(told) == short_hash(plain)


def test_a_file_that_changes_is_read_again(make_lora: MakeLora, resolved: Resolve, tmp_path: Path) -> None:
    path = make_lora(tmp_path / "ink.safetensors")
    first = resolved(LoraUse(str(path)), handoff=None)
    weights = {name: np.asarray(array) * 2 for name, array in load_file(path).items()}
    save_file(weights, tmp_path / "next.safetensors")
    shutil.move(tmp_path / "next.safetensors", path)
    assert resolved(LoraUse(str(path)), handoff=None).loras != first.loras


def test_sides_of_a_stage_that_does_not_run_are_not_compared_with_it(
    make_lora: MakeLora, resolved: Resolve, tmp_path: Path
) -> None:
    """A workflow's sampler on the refiner alone states its sides for both stages; the base has fused the LoRA."""
    own = make_lora(tmp_path / "own.safetensors", "unet", refiner=True)
    fused = LoraRecord(name="own.safetensors", sha256=sha256_file(own), scale=1.0)
    sides = (Side(text="a star", text_2=""), Side(text="", text_2="", loras=(LoraUse(str(own)),)))
    more: Any = {"compat": "comfyui", "base_sides": sides, "changed": {"loras": (fused,)}}
    image = as_input(np.zeros((64, 64, 3), np.uint8))
    request = resolved(refine=True, image=image, refiner_sides=sides, **more)
    assert [side.prompt.loras and len(side.prompt.loras) for side in request.sides["refiner"]] == [None, 1]
    assert request.lora_facts["base"] == ()
    with pytest.raises(UsageError, match="is fused into this bundle"):
        resolved(handoff=None, **more)


def test_a_name_that_no_folder_has_is_found_beside_the_picture(make_lora: MakeLora, tmp_path: Path) -> None:
    path = make_lora(tmp_path / "co:lon.safetensors")
    fact = LoraFact(name=path.name, sha256=sha256_file(path), scale=1.0)
    (tmp_path / "loras").mkdir()
    assert find_recorded(fact, tmp_path / "loras", tmp_path / "x.png") == path
