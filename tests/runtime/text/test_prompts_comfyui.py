"""The text encoders' input for a prompt in ComfyUI mode, against ComfyUI's own tokens and weights."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.bundle.manifest import TensorSpec, TextEncoder
from sdxl_trt.engines.engine import Array
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.mini.embedded import bundle_path
from sdxl_trt.runtime.text.encoder import Prompt, PromptEncoder
from sdxl_trt.runtime.text.weighting import Segment, parse_weights, without_embeddings

RECORDED = Path(__file__).parents[2] / "comfyui"
PROMPTS: list[dict[str, Any]] = json.loads((RECORDED / "prompts.json").read_bytes())
PADS = {"clip_l": 49407, "clip_g": 0}


class Reader:
    """A text encoder that returns `value` for a prompt and 0 for the empty one: weighted, 1 becomes the weight."""

    value = 1.0

    def __init__(self, pad: int) -> None:
        names = ("hidden_states.0", "hidden_states.1", "text_embeds")
        self.component = SimpleNamespace(outputs=[SimpleNamespace(name=name) for name in names])
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
    assert without_embeddings([Segment(text, 1.2)]) == ([Segment(part, 1.2) for part in parts], names)


def test_an_embedding_that_is_left_out_is_warned_of_once(encode: Encoding, caplog: pytest.LogCaptureFixture) -> None:
    encode("a (embedding:ink:1.2) fox, embedding:ink", "a embedding:ink fox")
    assert [record.getMessage().split(" is ")[0] for record in caplog.records] == ["embedding:ink"]
    with pytest.raises(UsageError, match="an embedding: without a name"):
        encode("a embedding:", "")


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
