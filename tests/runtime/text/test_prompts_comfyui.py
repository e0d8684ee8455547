"""The text encoders' input for a prompt in ComfyUI mode, against ComfyUI's own tokens and weights."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.bundle.manifest import TensorSpec, TextEncoder
from sdxl_trt.engines.engine import Array
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.mini.embedded import bundle_path
from sdxl_trt.runtime.adapters import NO_EMBEDDINGS, Embedding, Embeddings
from sdxl_trt.runtime.text.encoder import Prompt, PromptEncoder
from sdxl_trt.runtime.text.vectors import PLACEHOLDER, Vector
from sdxl_trt.runtime.text.weighting import Segment, chunked, parse_weights, with_embeddings

RECORDED = Path(__file__).parents[2] / "comfyui"
PROMPTS: list[dict[str, Any]] = json.loads((RECORDED / "prompts.json").read_bytes())
PADS = {"clip_l": 49407, "clip_g": 0}


class Reader:
    """A text encoder that returns `value` for a prompt and 0 for the empty one: weighted, 1 becomes the weight."""

    value = 1.0

    def __init__(self, pad: int) -> None:
        names = ("hidden_states.0", "hidden_states.1", "text_embeds")
        outputs = [SimpleNamespace(name=name) for name in names]
        self.component = SimpleNamespace(outputs=outputs, takes_embeddings=False)
        self.empty = [49406, 49407, *[pad] * 75]
        self.given: list[list[int]] = []

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        rows = inputs["input_ids"].tolist()
        self.given += rows
        hidden = np.array([np.full((77, 1), self.value * (row != self.empty), np.float32) for row in rows])
        return {name: np.zeros((len(rows), 1), np.float32) if name == "text_embeds" else hidden for name in outputs}


class Encoding:
    """A PromptEncoder over the embedded pair's tokenizers, which are SDXL's, and a UNet that takes `dtype`."""

    def __init__(self, dtype: str) -> None:
        bundle = read_bundle(bundle_path())
        spec = TensorSpec(name="encoder_hidden_states", dtype=dtype, shape=("rows",))
        unet: Any = SimpleNamespace(input=lambda _name: spec)
        encoders = (TextEncoder(component="clip_l", tokenizer="tokenizer", pooled=False),
                    TextEncoder(component="clip_g", tokenizer="tokenizer_2", pooled=True))  # fmt: skip
        self.stage = msgspec.structs.replace(bundle.manifest.base, unet="u", text_encoders=encoders)
        parts = {"u": unet, **dict.fromkeys(PADS, SimpleNamespace(config={"max_position_embeddings": 77}))}
        manifest = msgspec.structs.replace(bundle.manifest, base=self.stage, components=parts)
        self.readers: dict[str, Reader] = {}
        pool: Any = SimpleNamespace(
            bundle=SimpleNamespace(manifest=manifest, path=bundle.path),
            phase=lambda name, **_: [self.readers[name]],
            holds=lambda _use: False,
        )
        self.encoder = PromptEncoder(pool)

    def __call__(self, text: str, text_2: str) -> np.ndarray:
        """Return hidden states (tokens, 2); `readers` then hold the ids that they were given."""
        self.readers = {name: Reader(pad) for name, pad in PADS.items()}
        (embeds,) = self.encoder.encode([(self.stage, Prompt(text, text_2))], "u", weighted=True)
        return embeds.hidden


@pytest.fixture(scope="module")
def encode() -> Encoding:
    return Encoding("float32")


def test_tokens_and_weights_are_comfyuis(encode: Encoding) -> None:
    for case in PROMPTS:
        if "clip_l" not in case:
            continue
        if any("inf" in chunk["weights"].values() for chunk in case["clip_l"]):
            with pytest.raises(UsageError, match="a weight of inf in the prompt; choose -10000 to 10000"):
                encode(case["text"], case["text"])
            continue
        hidden = encode(case["text"], case["text"])
        for column, (name, pad) in enumerate(PADS.items()):
            rows = [chunk["ids"] + [pad] * (77 - len(chunk["ids"])) for chunk in case[name]]
            weights = np.ones((len(rows), 77), np.float32)
            for number, chunk in enumerate(case[name]):
                for place, weight in chunk["weights"].items():
                    weights[number, int(place)] = weight
            # Equal rows are encoded once, and the empty prompt only if there are weights.
            empty = encode.readers[name].empty
            weighted = [empty] if (weights != 1.0).any() else []
            assert encode.readers[name].given == [*map(list, dict.fromkeys(map(tuple, rows + weighted)))], case["name"]
            written = [number for number, row in enumerate(rows) if row != empty]
            found = hidden[:, column].reshape(-1, 77)[written]
            np.testing.assert_allclose(found, weights[written], rtol=1e-6, err_msg=case["name"])


def test_parentheses_are_parsed_as_in_comfyui() -> None:
    for text, expected in json.loads((RECORDED / "parser.json").read_bytes()):
        found = [(segment.text, segment.weight) for segment in parse_weights(text)]
        assert found == [(part, pytest.approx(weight, rel=1e-12, nan_ok=True)) for part, weight in expected], text


@pytest.mark.parametrize(
    ("text", "parts", "names"),
    [
        ("a embedding:ink fox", ["a", "fox"], ["ink"]),
        ("embedding:ink", [], ["ink"]),
        ("a fox, embedding:ink, blurry", ["a fox,", ", blurry"], ["ink"]),
        ("a\nembedding:one embedding:two,", ["a", ", "], ["one", "two"]),
        ("anembedding:ink fox", ["anembedding:ink fox"], []),
        ("embedding: ink  fox", ["fox"], ["ink"]),
    ],
)
def test_embeddings_are_left_out(text: str, parts: list[str], names: list[str]) -> None:
    assert with_embeddings([Segment(text, 1.2)], NO_EMBEDDINGS) == ([Segment(part, 1.2) for part in parts], names)


def test_an_embedding_that_is_left_out_is_warned_of_once(encode: Encoding, caplog: pytest.LogCaptureFixture) -> None:
    encode("a (embedding:ink:1.2) fox, embedding:ink", "a embedding:ink fox")
    assert [record.getMessage().split(" is ")[0] for record in caplog.records] == ["embedding:ink"]
    with pytest.raises(UsageError, match="an embedding: without a name"):
        encode("a embedding:", "")


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Embeddings:
    folder = tmp_path_factory.mktemp("embeddings")
    for name in ("ink", "oil,", "styles/old"):
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file({"clip_l": np.ones((2, 4), np.float32)}, path)
    return Embeddings(folder)


@pytest.mark.parametrize(
    ("text", "parts", "names"),
    [
        ("a embedding:ink fox", ["a", "<ink>", "fox"], []),
        ("embedding:ink", ["<ink>"], []),
        ("a fox,\tembedding:ink, blurry", ["a fox,", "<ink>", ", blurry"], []),
        ("embedding:ink,,  red   fox", ["<ink>", ",, red fox"], []),
        ("embedding:oil, fox", ["<oil,>", "fox"], []),
        ("embedding:styles/old.safetensors embedding:ink", ["<old>", "<ink>"], []),
        ("embedding:ink[0.5] fox", ["<ink>", "[0.5] fox"], []),
        ("embedding:ink<x> fox", ["<ink>", "<x> fox"], []),
        ("embedding:ink. fox", ["fox"], ["ink."]),
        ("embedding:../ink fox embedding:a:b", ["fox"], ["../ink", "a:b"]),
        ("fox,embedding:ink", ["fox,embedding:ink"], []),
    ],
)
def test_embeddings_are_found_where_comfyui_finds_them(
    text: str, parts: list[str], names: list[str], embeddings: Embeddings
) -> None:
    found, missing = with_embeddings([Segment(text, 1.2)], embeddings)
    shown = [f"<{part.embedding.name.removesuffix('.safetensors')}>" if part.embedding else part.text for part in found]
    assert (shown, missing) == (parts, names)
    assert {part.weight for part in found} <= {1.2}


def _chunks(segments: list[Segment], fits: bool) -> list[Any]:
    spec = read_bundle(bundle_path()).manifest.tokenizers["tokenizer"]

    def vectors(found: Embedding) -> list[Vector | None]:
        return [Vector(found, "clip_l", row) if fits else None for row in range(len(found.tensors["clip_l"]))]

    return chunked(segments, spec, lambda text: [5] * len(text.split()), vectors)


@pytest.mark.parametrize(("count", "first"), [(7, 0), (8, 3)])
def test_an_embedding_moves_to_the_next_chunk_or_is_split_like_a_word(count: int, first: int) -> None:
    long = Embedding("a", "0" * 64, {"clip_l": np.ones((count, 4), np.float32)})
    chunks = _chunks([Segment("a " * 72, 1.0), Segment("", 1.3, long), Segment("fox", 1.0)], fits=True)
    assert [len(chunk.vectors) for chunk in chunks] == [first, count - first]
    assert [vector.row for chunk in chunks for _, vector in chunk.vectors] == list(range(count))
    assert [place for place, _ in chunks[1].vectors] == list(range(1, 1 + count - first))
    for chunk in chunks:
        weighted = {place for place, _ in chunk.vectors}
        assert set(np.flatnonzero(chunk.weights != 1).tolist()) == weighted
        assert (chunk.ids[[*weighted]] == PLACEHOLDER).all()


def test_an_embedding_for_other_encoders_leaves_its_places_at_the_end() -> None:
    """ComfyUI leaves the vectors out after it has counted their places: ids move up, weights stay."""
    other = Embedding("a", "0" * 64, {"clip_l": np.ones((3, 4), np.float32)})
    (chunk,) = _chunks([Segment("", 1.0, other), Segment("a red", 1.0), Segment("fox", 1.4)], fits=False)
    assert chunk.ids[:6].tolist() == [49406, 5, 5, 5, 49407, 49407]
    assert np.flatnonzero(chunk.weights != 1).tolist() == [6]
    assert chunk.vectors == ()


@pytest.mark.parametrize("weight", ["inf", "-inf", "nan", "10001", "-1e30", "1e999"])
def test_an_extreme_weight_is_refused(encode: Encoding, weight: str) -> None:
    with pytest.raises(UsageError, match=r"a weight of .* in the prompt; choose -10000 to 10000"):
        encode(f"a (red:{weight}) fox", "")
    assert [reader.given for reader in encode.readers.values()] == [[], []]


def test_a_weight_beyond_the_range_of_the_unet_is_refused(encode: Encoding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader, "value", 20.0)
    half = Encoding("float16")
    for each in (encode, half):
        assert each("a (fox:3000)", "").max() == 60_000
    assert encode("a (fox:5000)", "").max() == 100_000
    with pytest.raises(UsageError, match="a weight of 5000 takes the prompt beyond the range of the float16 UNet"):
        half("a (fox:5000)", "")
