"""`embedding:name` in diffusers' way: where a name ends, what an encoder without vectors reads, and where it pools."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdxl_trt.engines.bundle.manifest import Tokenizer
from sdxl_trt.engines.bundle.records import FileRecord
from sdxl_trt.engines.errors import SourceError, UsageError
from sdxl_trt.runtime.adapters import NO_EMBEDDINGS, Embedding, Embeddings
from sdxl_trt.runtime.text.placeholders import Piece, has_words, row_of, split_placeholders
from sdxl_trt.runtime.text.vectors import PLACEHOLDER, Vector
from sdxl_trt.runtime.text.weighting import Chunk

BOS, EOS, PAD = 1000, 1001, 7
SPEC = Tokenizer(file=FileRecord(file="t", size=0, sha256="0" * 64), max_length=12, bos_id=BOS, eos_id=EOS, pad_id=PAD)
COUNTS = {"ink": 3, "ink2": 1, "v1.2": 1, "styles/oil": 2, "a-b": 1}


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Embeddings:
    folder = tmp_path_factory.mktemp("embeddings")
    for name, count in COUNTS.items():
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file({"clip_l": np.full((count, 4), len(name), np.float32)}, path)
    (folder / "old.pt").write_bytes(b"\x80\x02")
    return Embeddings(folder)


def _named(pieces: Sequence[Piece]) -> list[str]:
    """Return the pieces' texts, placeholders in angle brackets."""
    return [f"<{piece.text}>" if piece.embedding else piece.text for piece in pieces if piece.text]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a fox", ["a fox"]),
        ("embedding:ink", ["<embedding:ink>"]),
        ("a embedding:ink, fox", ["a ", "<embedding:ink>", ", fox"]),
        ("(embedding:ink:1.2) fox", ["(", "<embedding:ink>", ":1.2) fox"]),
        ("embedding:ink2.", ["<embedding:ink2>", "."]),
        ("embedding:ink.safetensors!", ["<embedding:ink.safetensors>", "!"]),
        ("embedding:v1.2, embedding:styles/oil", ["<embedding:v1.2>", ", ", "<embedding:styles/oil>"]),
        ("embedding:oil;embedding:ink", ["<embedding:oil>", ";", "<embedding:ink>"]),
        ("embedding:a-b", ["<embedding:a-b>"]),
        ("myembedding:ink", ["myembedding:ink"]),
        ("embedding: ink", ["embedding: ink"]),
    ],
)
def test_a_name_ends_before_punctuation(text: str, pieces: list[str], embeddings: Embeddings) -> None:
    assert _named(split_placeholders(text, embeddings)) == pieces
    assert "".join(piece.text for piece in split_placeholders(text, embeddings)) == text
    assert has_words(text) == any(piece.startswith("<") for piece in pieces)


@pytest.mark.parametrize("word", ["nothing", "inks", "ink3", "ink_2", "../ink", "/etc/ink"])
def test_a_word_without_a_file_is_refused(word: str, embeddings: Embeddings) -> None:
    with pytest.raises(UsageError, match=r"^embedding:.*: .* has no .*\.safetensors; check the name") as raised:
        split_placeholders(f"a fox, embedding:{word}, blue", embeddings)
    assert word in str(raised.value)


def test_a_pickled_file_is_refused(embeddings: Embeddings) -> None:
    with pytest.raises(SourceError, match=r"old\.pt is pickled"):
        split_placeholders("embedding:old, fox", embeddings)


def test_without_a_folder_the_word_is_text() -> None:
    assert split_placeholders("embedding:ink fox", NO_EMBEDDINGS) == [Piece("embedding:ink fox")]


def _words(text: str) -> list[int]:
    """Return one token for every three characters of each word."""
    return [len(word) for word in text.split() for _ in range(0, len(word), 3)]


@pytest.fixture
def read(embeddings: Embeddings) -> Callable[..., tuple[Chunk, int]]:
    def row(text: str, *, at_largest: bool = True, lacks: str = "") -> tuple[Chunk, int]:
        def vectors(found: Embedding) -> list[Vector | None]:
            count = len(found.tensors["clip_l"])
            return [None if found.name == lacks else Vector(found, "clip_l", row) for row in range(count)]

        return row_of(split_placeholders(text, embeddings), vectors, SPEC, _words, at_largest=at_largest)

    return row


def test_vectors_take_their_places_before_the_cut(read: Callable[..., tuple[Chunk, int]]) -> None:
    chunk, cut = read("a embedding:ink fox", at_largest=False)
    assert chunk.ids.tolist() == [BOS, 1, *[PLACEHOLDER] * 3, 3, EOS, *[PAD] * 5]
    assert [(place, vector.row) for place, vector in chunk.vectors] == [(2, 0), (3, 1), (4, 2)]
    assert (cut, set(chunk.weights.tolist())) == (0, {1.0})
    chunk, cut = read("a " * 8 + "embedding:ink fox", at_largest=False)
    assert chunk.ids.tolist() == [BOS, *[1] * 8, *[PLACEHOLDER] * 2, EOS]
    assert ([vector.row for _, vector in chunk.vectors], cut) == ([0, 1], 2)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a embedding:ink fox", 4),
        ("embedding:ink embedding:oil", 5),
        ("embedding:oil embedding:ink embedding:oil", 5),
        ("embedding:oil embedding:ink a embedding:ink", 5),
        ("a a a a a a a a embedding:ink", 10),
        ("embedding:oil a a a a a a a a embedding:ink", 2),
    ],
)
def test_the_end_token_stands_where_the_largest_added_id_does(
    text: str, place: int, read: Callable[..., tuple[Chunk, int]]
) -> None:
    """transformers pools at the first of the largest ids; added tokens have ids in the order in which they load."""
    chunk, _ = read(text)
    assert int(chunk.ids.argmax()) == place
    assert PLACEHOLDER in read(text, at_largest=False)[0].ids[[place]]


def test_an_encoder_without_vectors_reads_the_word_as_text(read: Callable[..., tuple[Chunk, int]]) -> None:
    chunk, _ = read("a embedding:ink fox", lacks="ink.safetensors")
    assert chunk.ids.tolist() == [BOS, 1, *[13] * 5, 3, EOS, *[PAD] * 3]
    assert chunk.vectors == ()


def test_an_end_token_before_a_vector_is_refused(embeddings: Embeddings) -> None:
    pieces = split_placeholders("fox embedding:ink", embeddings)
    with pytest.raises(UsageError, match=r"the prompt has <\|endoftext\|> before an embedding"):
        row_of(pieces, lambda found: [Vector(found, "clip_l", 0)], SPEC, lambda text: [EOS] * len(text.split()),
               at_largest=False)  # fmt: skip
