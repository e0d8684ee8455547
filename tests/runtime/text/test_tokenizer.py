"""Token ids against transformers' CLIPTokenizer, for any text that can be typed."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from sdxl_trt.engines.bundle.bundle import Bundle
from sdxl_trt.engines.bundle.manifest import Manifest, Scheduler, Stage, Tokenizer, Vae
from sdxl_trt.engines.bundle.records import FileRecord
from sdxl_trt.engines.errors import CorruptError, UsageError
from sdxl_trt.mini import bundle_path
from sdxl_trt.runtime.adapters import Embeddings
from sdxl_trt.runtime.text import tokenizer as tokenizer_module
from sdxl_trt.runtime.text.placeholders import row_of, split_placeholders
from sdxl_trt.runtime.text.tokenizer import PromptTokenizer, _parsed
from sdxl_trt.runtime.text.vectors import Vector

WORDS = ["a", "red", "fox", "in", "the", "snow", "blue", "star"]
SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
PADS = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}
NO_SPECIALS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def _write_source(folder: Path, pad: str) -> None:
    """Write a CLIP tokenizer of all bytes and a few words, in the layout of published folders."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
    merges = list(dict.fromkeys(merges))
    tokens = symbols + [symbol + "</w>" for symbol in symbols] + ["".join(pair) for pair in merges]
    vocabulary = [*dict.fromkeys(tokens), SPECIAL["bos_token"], SPECIAL["eos_token"]]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **SPECIAL, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _bundle(root: Path, records: dict[str, Tokenizer]) -> Bundle:
    vae = Vae(decoder="v", encoder=None, scaling_factor=1.0, latent_channels=4, factor=8)
    stage = Stage(
        unet="u", text_encoders=(), vae=vae, scheduler=Scheduler(), time_ids=(), sample_size=16, size_multiple=8,
        force_zeros_for_empty_prompt=True,
    )  # fmt: skip
    manifest = Manifest(
        format="f", format_version=1, generator="g", precision="fp32", components={}, tokenizers=records, base=stage
    )
    return Bundle(root, manifest)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokenizers")
    for name, pad in PADS.items():
        _write_source(root / name, pad)
    return root


@pytest.fixture(scope="module")
def bundle(sources: Path) -> Bundle:
    """Return a bundle with both tokenizers, written from the sources as the exporter writes them."""
    from sdxl_trt.export.sources.tokenizers import load_tokenizer

    records = {}
    for name in PADS:
        loaded = load_tokenizer(sources / name)
        (sources / f"{name}.json").write_bytes(loaded.json)
        digest = hashlib.sha256(loaded.json).hexdigest()
        records[name] = Tokenizer(
            file=FileRecord(file=f"{name}.json", size=len(loaded.json), sha256=digest),
            max_length=loaded.max_length, bos_id=loaded.bos_id, eos_id=loaded.eos_id, pad_id=loaded.pad_id,
        )  # fmt: skip
    return _bundle(sources, records)


@pytest.fixture(scope="module")
def ours(bundle: Bundle) -> dict[str, PromptTokenizer]:
    return {name: PromptTokenizer(bundle, name) for name in PADS}


@pytest.fixture(scope="module")
def reference(sources: Path) -> Callable[[str, str], list[int]]:
    """Return a function that gives transformers' ids of a text, with diffusers' options."""
    from transformers import CLIPTokenizer

    loaded: dict[str, Any] = {name: CLIPTokenizer.from_pretrained(sources / name) for name in PADS}

    def ids(name: str, text: str) -> list[int]:
        given = loaded[name](text, padding="max_length", max_length=77, truncation=True)
        return list(given.input_ids)

    return ids


@pytest.mark.parametrize("name", PADS)
@pytest.mark.parametrize(
    "text",
    ["", " ", "a red fox in the snow", "A RED Fox", "  a\t red\n\nfox ", "don't", "a,b;c!", "!!!", "ein Fuß im Schnee",
     "红狐狸", "🦊 fox 👨‍👩‍👧", "e\u0301 é", "x" * 400, "red " * 74, "red " * 75, "red " * 76, "a " * 300,
     "<|endoftext|>", "a <|startoftext|> fox", "a<|endoftext|>fox", "\x00\x07", "½ ٣ Ⅷ 3dogs", "\u00a0\u200b"],
)  # fmt: skip
def test_ids_are_transformers(ours: Any, reference: Any, name: str, text: str) -> None:
    ids = ours[name].ids(text)
    assert (ids.dtype, ids.shape) == (np.int64, (77,))
    assert ids.tolist() == reference(name, text)


@settings(deadline=None, suppress_health_check=NO_SPECIALS, max_examples=300)
@given(
    text=st.text(max_size=120)
    | st.lists(st.sampled_from([*WORDS, "RED", "!", "'s", "<|endoftext|>", "7", "é", "狐", " "])).map(" ".join)
)
def test_any_prompt_has_transformers_ids(ours: Any, reference: Any, text: str) -> None:
    for name in PADS:
        assert ours[name].ids(text).tolist() == reference(name, text)


VECTORS = {"ink": 3, "oil": 1}
NAMED = [f"embedding:{name}" for name in VECTORS]


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Embeddings:
    folder = tmp_path_factory.mktemp("embeddings")
    for name, count in VECTORS.items():
        save_file({"clip_l": np.full((count, 4), count, np.float32)}, folder / f"{name}.safetensors")
    return Embeddings(folder)


@pytest.fixture(scope="module")
def extended(sources: Path) -> dict[str, Any]:
    """Return transformers' tokenizers with the tokens that load_textual_inversion adds."""
    from transformers import CLIPTokenizer

    loaded: dict[str, Any] = {name: CLIPTokenizer.from_pretrained(sources / name) for name in PADS}
    for tokenizer in loaded.values():
        for name, count in VECTORS.items():
            tokenizer.add_tokens([f"embedding:{name}"] + [f"embedding:{name}_{i}" for i in range(1, count)])
    return loaded


def _read(prompt: str, tokenizer: PromptTokenizer, embeddings: Embeddings) -> list[int | str]:
    """Return a prompt's row: ids, and the added token in place of each vector."""
    chunk, _ = row_of(
        split_placeholders(prompt, embeddings),
        lambda found: [Vector(found, "clip_l", row) for row in range(len(found.tensors["clip_l"]))],
        tokenizer.spec, tokenizer.pieces, at_largest=False,
    )  # fmt: skip
    row: list[int | str] = chunk.ids.tolist()
    for place, vector in chunk.vectors:
        token = f"embedding:{vector.embedding.name.removesuffix('.safetensors')}"
        row[place] = f"{token}_{vector.row}" if vector.row else token
    return row


@settings(deadline=None, suppress_health_check=NO_SPECIALS, max_examples=150)
@given(
    parts=st.lists(st.tuples(st.sampled_from([*WORDS, *NAMED, "RED", "7", "é"]),
                             st.sampled_from([" ", "  ", ", ", "\n", ".", " (", ") ", "!", ":1.2) "])),
                   max_size=90)
)  # fmt: skip
def test_any_prompt_with_placeholders_has_transformers_ids(
    ours: Any, extended: Any, embeddings: Embeddings, parts: list[tuple[str, str]]
) -> None:
    prompt = "".join(word + gap for word, gap in parts)
    # What diffusers' maybe_convert_prompt does.
    expanded = prompt.replace("embedding:ink", "embedding:ink embedding:ink_1 embedding:ink_2")
    for name in PADS:
        ids = extended[name](expanded, padding="max_length", max_length=77, truncation=True).input_ids
        added = extended[name].get_added_vocab()
        tokens = {number: token for token, number in added.items() if token.startswith("embedding:")}
        assert _read(prompt, ours[name], embeddings) == [tokens.get(number, number) for number in ids]


def test_each_of_the_two_tokenizers_has_its_own_padding(ours: Any) -> None:
    first, second = (ours[name].ids("fox") for name in PADS)
    assert first[:3].tolist() == second[:3].tolist()
    assert set(first[3:].tolist()) == {ours["tokenizer"].spec.eos_id}
    assert set(second[3:].tolist()) == {0}, "'!' is the first token of the vocabulary"


def test_a_prompt_that_fits_is_not_cut(ours: Any) -> None:
    assert ours["tokenizer"].cut_off("") == ""
    assert ours["tokenizer"].cut_off("red " * 75) == ""


def test_the_cut_part_is_given_in_the_users_own_words(ours: Any) -> None:
    assert ours["tokenizer"].cut_off("red " * 75 + "Blue  STAR") == "Blue  STAR"


@settings(deadline=None, suppress_health_check=NO_SPECIALS)
@given(count=st.integers(70, 90), words=st.lists(st.sampled_from(["red", "Fox", "the"]), min_size=90, max_size=90))
def test_everything_that_is_cut_is_given(ours: Any, count: int, words: list[str]) -> None:
    text = " ".join(words[:count])
    cut = ours["tokenizer"].cut_off(text)
    assert cut == " ".join(words[75:count])
    kept = text.removesuffix(cut) if cut else text
    assert ours["tokenizer"].ids(kept).tolist() == ours["tokenizer"].ids(text).tolist()


def _damaged(tmp_path: Path, bundle: Bundle, content: bytes, *, recorded: bool) -> Bundle:
    spec = bundle.manifest.tokenizers["tokenizer"]
    (tmp_path / "tokenizer.json").write_bytes(content)
    original = spec.file
    digest = hashlib.sha256(content).hexdigest() if recorded else original.sha256
    record = FileRecord(file="tokenizer.json", size=len(content), sha256=digest)
    return _bundle(tmp_path, {"tokenizer": Tokenizer(file=record, max_length=77, bos_id=1, eos_id=2, pad_id=0)})


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b"\xff", b'{"model": {"type": "BPE"}}', b"[" * 10_000])
def test_a_file_that_is_not_a_tokenizer_is_corrupt(tmp_path: Path, bundle: Bundle, content: bytes) -> None:
    with pytest.raises(CorruptError, match=r"not a tokenizer.*export-engines again"):
        PromptTokenizer(_damaged(tmp_path, bundle, content, recorded=True), "tokenizer")


def test_a_tokenizer_that_was_changed_is_corrupt(tmp_path: Path, bundle: Bundle) -> None:
    content = (bundle.root / "tokenizer.json").read_bytes().replace(b"fox", b"foe")
    with pytest.raises(CorruptError, match="sha256"):
        PromptTokenizer(_damaged(tmp_path, bundle, content, recorded=False), "tokenizer")


def test_a_file_is_parsed_once_and_another_for_itself(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    parse = tokenizers.Tokenizer.from_str

    def counting(text: str) -> Any:
        parsed.append(text)
        return parse(text)

    monkeypatch.setattr(tokenizers, "Tokenizer", SimpleNamespace(from_str=counting))
    monkeypatch.setattr(tokenizer_module, "_with_the_model_of_another", lambda text: None)
    _parsed.cache_clear()
    first, again, other = (PromptTokenizer(bundle, name) for name in ("tokenizer", "tokenizer", "tokenizer_2"))
    assert [text.encode() for text in parsed] == [(bundle.root / f"{name}.json").read_bytes() for name in PADS]
    assert first.pieces("a !fox") == again.pieces("a !fox") != other.pieces("a !fox")


def test_a_prompt_that_is_not_unicode_is_a_usage_error(ours: Any) -> None:
    """A shell's bytes that are not UTF-8 become lone surrogates."""
    for call in (ours["tokenizer"].cut_off, ours["tokenizer"].ids):
        with pytest.raises(UsageError):
            call("fox \udcff")


def test_a_tokenizer_with_the_vocabulary_of_the_last_one_is_the_one_of_its_own_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = ((bundle_path() / name / "tokenizer.json").read_text() for name in ("tokenizer", "tokenizer_2"))
    monkeypatch.setattr(tokenizer_module, "_latest", [(first, tokenizers.Tokenizer.from_str(first))])
    made = tokenizer_module._with_the_model_of_another(second)
    assert made.to_str() == tokenizers.Tokenizer.from_str(second).to_str()
    for text in ("a red fox!", "!<|endoftext|> é東", "  <|startoftext|>!!"):
        expected = tokenizers.Tokenizer.from_str(second).encode(text)
        assert (made.encode(text).ids, made.encode(text).offsets) == (expected.ids, expected.offsets)


@pytest.mark.parametrize(
    "change",
    [
        ('"merges"', '"merges" '),  # any other byte
        ('"id": 49406', '"id": 49405'),  # an id that the vocabulary gives another token
        ('"added_tokens"', '"added_tokenz"'),
        ('"version"', '"added_tokens": [], "version"'),
    ],
)
def test_a_tokenizer_that_differs_in_more_is_parsed_itself(
    change: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = json.dumps(json.loads((bundle_path() / "tokenizer/tokenizer.json").read_text()))
    monkeypatch.setattr(tokenizer_module, "_latest", [(text, tokenizers.Tokenizer.from_str(text))])
    assert tokenizer_module._with_the_model_of_another(text) is not None
    assert change[0] in text
    assert tokenizer_module._with_the_model_of_another(text.replace(*change, 1)) is None
