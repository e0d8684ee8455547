"""The inputs of a text encoder for rows with vectors, in the embedded pair's graphs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdxl_trt.engines.backends.ort import OrtEngine
from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.plans import MAX_ROWS_OF_PROMPTS, MAX_VECTORS
from sdxl_trt.mini.embedded import bundle_path
from sdxl_trt.runtime import open_bundle
from sdxl_trt.runtime.adapters import Embedding, Embeddings
from sdxl_trt.runtime.text.encoder import PromptEncoder
from sdxl_trt.runtime.text.prompt import Prompt
from sdxl_trt.runtime.text.vectors import Vector, encoder_inputs

NAME = "text_encoder_2"
OLD = Path(__file__).parents[2] / "format_1" / "bundle"


@pytest.fixture(scope="module")
def engine() -> OrtEngine:
    loaded = OrtEngine(read_bundle(bundle_path()), NAME, standard=True)
    loaded.load()
    return loaded


def _embedding(engine: OrtEngine, seed: int) -> Embedding:
    width = engine.component.input("embeddings").shape[1]
    values = np.random.default_rng(seed).standard_normal((3, int(width)), dtype=np.float32)
    return Embedding(f"{seed}.safetensors", f"{seed:064d}", {"clip_g": values})


def test_a_vector_of_several_rows_is_passed_once(engine: OrtEngine) -> None:
    one, other = _embedding(engine, 1), _embedding(engine, 2)
    ids = np.ones((2, 77), np.int64)
    last = Vector(one, "clip_g", 2)
    rows = (((1, Vector(one, "clip_g", 0)), (2, last)), ((5, Vector(other, "clip_g", 1)), (6, last), (7, last)))
    inputs = encoder_inputs(engine.component, ids, rows)
    index = np.zeros((2, 77), np.int64)
    index[0, [1, 2]], index[1, [5, 6, 7]] = (1, 2), (3, 2, 2)
    np.testing.assert_array_equal(inputs["embedding_index"], index)
    expected = [one.tensors["clip_g"][0], one.tensors["clip_g"][2], other.tensors["clip_g"][1]]
    np.testing.assert_array_equal(inputs["embeddings"], np.array(expected, np.float16))


def test_the_graph_reads_a_vector_like_the_token_with_that_vector(engine: OrtEngine) -> None:
    """Rows of the table, given as vectors, change nothing: neither does the id below a vector, where nothing pools."""
    import onnx  # the table of tokens is an initializer of the graph

    bundle = read_bundle(bundle_path())
    component = bundle.manifest.components[NAME]
    model = onnx.load(bundle.path(component.graph))
    (table,) = [onnx.numpy_helper.to_array(each) for each in model.graph.initializer if "token_embedding" in each.name]
    ids = np.random.default_rng(0).integers(1, 300, (2, 77))
    ids[:, 60] = ids.max() + 1  # pooled at the largest id
    words = Embedding("w", "0" * 64, {"clip_g": table[ids[0, 1:9]].astype(np.float32)})
    placed = tuple((place, Vector(words, "clip_g", place - 1)) for place in range(1, 9))
    plain = engine.infer(dict(encoder_inputs(component, ids)))
    hidden = ids.copy()
    hidden[0, 1:9] = 0
    given = engine.infer(dict(encoder_inputs(component, hidden, [placed, ()])))
    for name, values in plain.items():
        np.testing.assert_array_equal(given[name], values)
    assert not np.array_equal(
        engine.infer(dict(encoder_inputs(component, hidden)))["text_embeds"], plain["text_embeds"]
    )


def test_an_unused_vector_changes_no_bit(engine: OrtEngine) -> None:
    ids = np.random.default_rng(0).integers(0, 300, (3, 77))
    inputs = dict(encoder_inputs(engine.component, ids))
    plain = engine.infer(inputs)
    spoiled = engine.infer(inputs | {"embeddings": np.full_like(inputs["embeddings"], np.nan)})
    for name, values in plain.items():
        np.testing.assert_array_equal(spoiled[name], values)


def test_an_encoder_of_an_older_bundle_has_one_input() -> None:
    component = read_bundle(OLD).manifest.components["text_encoder"]
    assert not component.takes_embeddings
    assert list(encoder_inputs(component, np.zeros((1, 77), np.int64))) == ["input_ids"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, np.ndarray]]]:
    """Return the calls of engines: the component and its inputs."""
    seen: list[tuple[str, dict[str, np.ndarray]]] = []
    infer = OrtEngine.infer

    def watched(self: OrtEngine, inputs: Any, outputs: Any = None) -> Any:
        seen.append((self.name, dict(inputs)))
        return infer(self, inputs, outputs)

    monkeypatch.setattr(OrtEngine, "infer", watched)
    return seen


def _written(folder: Path, engine: OrtEngine, name: str, count: int) -> None:
    width = int(engine.component.input("embeddings").shape[1])
    values = np.random.default_rng(count).standard_normal((count, width), dtype=np.float32)
    save_file({"clip_g": values}, folder / f"{name}.safetensors")


def test_equal_rows_share_a_place_and_calls_hold_what_a_plan_takes(
    engine: OrtEngine, calls: list[tuple[str, dict[str, np.ndarray]]], tmp_path: Path
) -> None:
    for name in ("same", "twin"):
        _written(tmp_path, engine, name, 2)
    for number in range(8):
        _written(tmp_path, engine, f"long{number}", 60 + number)
    texts = ["embedding:same fox", "embedding:twin fox", *(f"embedding:long{number}" for number in range(8))]
    with open_bundle() as pipeline:
        stage = pipeline.manifest.refiner
        assert stage is not None
        prompts = [(stage, Prompt(text, "", embeddings=Embeddings(tmp_path))) for text in [*texts, texts[0]]]
        embeds = PromptEncoder(pipeline.pool).encode(prompts, stage.unet)
    shapes = [(len(inputs["input_ids"]), len(inputs["embeddings"])) for _, inputs in calls]
    # Two files of equal content are one row; vectors in a call are at most MAX_VECTORS.
    assert sum(rows for rows, _ in shapes) == len(texts) - 1
    assert all(rows <= MAX_ROWS_OF_PROMPTS and vectors <= MAX_VECTORS for rows, vectors in shapes)
    assert len(shapes) == 3
    np.testing.assert_array_equal(embeds[0].hidden, embeds[1].hidden)
    np.testing.assert_array_equal(embeds[0].hidden, embeds[-1].hidden)
    assert not np.array_equal(embeds[2].hidden, embeds[3].hidden)
