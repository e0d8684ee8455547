"""Untrusted files and texts given to trt-generate: either a run, or a one-line error and an exit code."""

import io
import json
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdxl_trt.runtime.cli import series
from sdxl_trt.runtime.cli.generate import main as trt_generate
from sdxl_trt.runtime.comfyui.graph import MAX_BYTES
from sdxl_trt.runtime.comfyui.writer import write_workflow
from sdxl_trt.runtime.images.files import PARAMETERS, SETTINGS, WORKFLOW
from sdxl_trt.runtime.images.metadata import describe
from sdxl_trt.runtime.pipeline import batch as batches
from sdxl_trt.runtime.pipeline.pipeline import open_bundle
from sdxl_trt.runtime.request.request import Request
from sdxl_trt.runtime.request.resolve import resolve_request

FUZZ = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], derandomize=True, deadline=None,
    max_examples=60,
)  # fmt: skip
PATIENCE = 20.0
"""Seconds of processor time: finds hangs, independent of a busy machine."""


@pytest.fixture
def outcome(
    pairs: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Return a function that runs the command without running engines, and returns its exit code and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batches.Batch, "steps", lambda self: iter(()))
    monkeypatch.setattr(series.Series, "finish", lambda *_, **__: {})
    common = ["--engines", str(pairs("outline").bundle), "--json"]

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        started = time.process_time()
        try:
            code = trt_generate([*arguments, *common])
        except SystemExit as exc:  # argparse's own errors
            code = int(exc.code or 0)
        said = capsys.readouterr().err
        assert time.process_time() - started < PATIENCE
        errors = [line for line in said.splitlines() if not line.startswith(("warning: ", "note: "))]
        assert len(errors) == (code != 0), said
        assert all(error.startswith("error: ") and len(error) < 2000 for error in errors), said[:3000]
        assert code in {0, 2, 5}, said
        assert "defect" not in said
        return code, said

    yield run
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "sdxl-"))] == []


@pytest.fixture(scope="module")
def graph(pairs: Callable[[str], Any]) -> Any:
    """Return a valid workflow."""
    request = Request("a red fox", compat="comfyui", steps=4, seed=3, width=32, height=32, handoff_step=2)
    with open_bundle(pairs("outline").bundle) as pipeline:
        return write_workflow(request, resolve_request(request, pipeline.manifest), pipeline.manifest)


@pytest.fixture(scope="module")
def made(graph: Any) -> dict[str, str]:
    """Return the metadata texts of a picture made by a workflow."""
    metadata = {
        "prompt": "a red fox", "prompt_2": "a red fox", "negative": "", "negative_2": "", "seed": 3, "steps": 4,
        "handoff_step": 2, "guidance": 5.0, "refiner_guidance": 5.0, "guidance_rescale": 0.0,
        "guidance_interval": (0.0, 1.0), "sampler": "euler", "refiner_sampler": "euler", "schedule": "",
        "width": 32, "height": 32, "aesthetic_score": 6.0, "negative_aesthetic_score": 2.5,
        "injected_latents": False, "compat": "comfyui", "workflow": True,
    }  # fmt: skip
    return describe(metadata, graph)


def _chunk(kind: bytes, data: bytes, *, check: int | None = None, length: int | None = None) -> bytes:
    check = zlib.crc32(kind + data) if check is None else check
    return struct.pack(">I", len(data) if length is None else length) + kind + data + struct.pack(">I", check)


def _png(*chunks: bytes, size: tuple[int, int] = (1, 1), end: bytes | None = None) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    pixels = _chunk(b"IDAT", zlib.compress(bytes(4)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + (_chunk(b"IEND", b"") if end is None else end)


def _text(key: str, text: str) -> bytes:
    return _chunk(b"tEXt", key.encode("latin-1", "replace") + b"\0" + text.encode("latin-1", "replace"))


def test_an_intact_picture_is_repeated_and_its_workflow_run(
    outcome: Any, made: dict[str, str], graph: Any, tmp_path: Path
) -> None:
    """The files that the other tests damage are valid to begin with."""
    (tmp_path / "x.png").write_bytes(_png(*(_text(key, text) for key, text in made.items())))
    (tmp_path / "x.json").write_text(json.dumps(graph))
    for arguments in (("--from", "x.png"), ("--workflow", "x.png"), ("--workflow", "x.json")):
        assert outcome(*arguments)[0] == 0


BOMB = zlib.compress(bytes(80 << 20), 9)
CHUNKS = {
    "zTXt bomb": _chunk(b"zTXt", SETTINGS.encode() + b"\0\0" + BOMB),
    "iTXt bomb": _chunk(b"iTXt", WORKFLOW.encode() + b"\0\1\0\0\0" + BOMB),
    "many bombs": b"".join(_chunk(b"zTXt", b"k%d\0\0" % k + zlib.compress(bytes(1 << 20))) for k in range(80)),
    "broken zTXt": _chunk(b"zTXt", SETTINGS.encode() + b"\0\0" + b"no zlib"),
    "unknown method": _chunk(b"zTXt", SETTINGS.encode() + b"\0\7" + b"x"),
    "iTXt cut short": _chunk(b"iTXt", SETTINGS.encode() + b"\0"),
    "no key": _chunk(b"tEXt", b""),
    "wrong CRC": _chunk(b"tEXt", SETTINGS.encode() + b"\0{}", check=0),
    "size beyond the file": _chunk(b"tEXt", SETTINGS.encode() + b"\0{}", length=2**31 - 1),
    "size beyond the format": _chunk(b"tEXt", SETTINGS.encode() + b"\0{}", length=2**32 - 1),
    "another header": _chunk(b"IHDR", b""),
    "broken EXIF": _chunk(b"eXIf", b"MM\0\x2a\xff\xff\xff\xff"),
    "deep": _text(SETTINGS, "[" * 100_000) + _text(WORKFLOW, '{"a":' * 100_000),
    "control characters": _text(SETTINGS, "\x1b[31m\n\0") + _text(WORKFLOW, "\x1b[31m\n\0"),
}


@pytest.mark.parametrize("option", ["--from", "--workflow"])
@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
def test_a_broken_chunk_is_one_line(outcome: Any, tmp_path: Path, option: str, chunk: bytes) -> None:
    (tmp_path / "x.png").write_bytes(_png(chunk))
    code, said = outcome(option, "x.png")
    assert (code, "\x1b" in said) == (2, False)


def test_a_picture_of_huge_size_is_not_decoded(outcome: Any, made: dict[str, str], tmp_path: Path) -> None:
    texts = [_text(key, text) for key, text in made.items()]
    (tmp_path / "x.png").write_bytes(_png(*texts, size=(2**31 - 1, 2**31 - 1)))
    for option in ("--from", "--workflow"):
        outcome(option, "x.png")


@FUZZ
@given(data=st.data())
def test_a_damaged_picture(outcome: Any, made: dict[str, str], tmp_path: Path, data: st.DataObject) -> None:
    texts = dict(made)
    for key in data.draw(st.lists(st.sampled_from([SETTINGS, WORKFLOW, PARAMETERS]), max_size=2)):
        place = data.draw(st.integers(0, len(texts[key])))
        texts[key] = texts[key][:place] + data.draw(st.text(max_size=4)) + texts[key][place + 1 :]
    content = bytearray(_png(*(_text(key, text) for key, text in texts.items())))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    (tmp_path / "x.png").write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    outcome(data.draw(st.sampled_from(["--from", "--workflow"])), "x.png")


HUGE = st.sampled_from([2**31, 2**53 + 1, 2**63, 2**64, 10**30, -1, 0, 1e308, -1e308, 10_001, 0.5, True, None, "", "4"])
JUNK = HUGE | st.text(max_size=5) | st.lists(HUGE, max_size=3)


@FUZZ
@given(data=st.data())
def test_a_workflow_with_any_value_in_it(outcome: Any, graph: Any, tmp_path: Path, data: st.DataObject) -> None:
    changed = json.loads(json.dumps(graph))
    for _ in range(data.draw(st.integers(1, 3))):
        inputs = changed[data.draw(st.sampled_from(sorted(changed)))]["inputs"]
        inputs[data.draw(st.sampled_from(sorted(inputs)))] = data.draw(
            JUNK | st.tuples(st.sampled_from(sorted(changed)), st.integers(0, 2))
        )
    (tmp_path / "x.json").write_text(json.dumps(changed))
    more = data.draw(st.sampled_from([[], ["--seed", "1"], ["--sweep", "handoff-step=1,none"]]))
    outcome("--workflow", "x.json", *more)


def _many(count: int) -> str:
    return "{" + ",".join(f'"{k}":{{"class_type":"SaveImage"}}' for k in range(count)) + "}"


def _chains(outputs: int, samplers: int) -> str:
    """Return a workflow with many outputs at the end of one chain of samplers."""
    nodes: dict[str, Any] = {
        f"s{k}": {"class_type": "KSampler", "inputs": {"latent_image": [f"s{k - 1}", 0]}} for k in range(samplers)
    }
    nodes["d"] = {"class_type": "VAEDecode", "inputs": {"samples": [f"s{samplers - 1}", 0], "vae": ["c", 2]}}
    nodes |= {f"o{k}": {"class_type": "SaveImage", "inputs": {"images": ["d", 0]}} for k in range(outputs)}
    return json.dumps(nodes)


def _reroutes(count: int) -> str:
    nodes = [{"id": k, "type": "Reroute", "inputs": [{"link": k}], "outputs": [{}]} for k in range(count)]
    links = [[k, (k + 1) % count, 0, k, 0, "X"] for k in range(count)]
    ends = [{"id": count + k, "type": "SaveImage", "inputs": [{"name": "images", "link": 0}]} for k in range(count)]
    return json.dumps({"nodes": nodes + ends, "links": links})


LARGE: dict[str, Callable[[], str]] = {
    "as many nodes as fit": lambda: _many(MAX_BYTES // 40),
    "a million nodes": lambda: _many(1_000_000),
    "too many nodes": lambda: _many(10_001),
    "many pictures": lambda: _many(10_000),
    "many pictures of long chains": lambda: _chains(9_000, 60),
    "a circle of reroutes": lambda: _reroutes(5_000),
    "deep lists": lambda: '{"1":{"class_type":"SaveImage","inputs":{"images":' + "[" * 100_000,
    "deep objects": lambda: '{"a":' * 100_000 + "1" + "}" * 100_000,
    "a long number": lambda: '{"1":{"class_type":"SaveImage","inputs":{"images":' + "9" * 100_000 + "}}}",
    "a long name": lambda: json.dumps({"x" * 100_000: {"class_type": "y" * 100_000}}),
    "one key many times": lambda: "{" + ",".join(['"1":{"class_type":"SaveImage"}'] * 100_000) + "}",
}


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_a_large_workflow_is_bounded(outcome: Any, tmp_path: Path, make: Callable[[], str]) -> None:
    (tmp_path / "x.json").write_text(make())
    assert outcome("--workflow", "x.json")[0] == 2


def _npy(header: str | bytes, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    text = header if isinstance(header, bytes) else header.encode()
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(text))
    return b"\x93NUMPY" + version + size + text + data


def _saved(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


ARRAYS = {
    "objects": lambda: _saved(np.array([{"a": 1}], dtype=object)),
    "pickled code": lambda: b"\x80\x04cos\nsystem\n(S'false'\ntR.",
    "doubles": lambda: _saved(np.zeros((1, 4, 16, 16))),
    "texts": lambda: _saved(np.array(["fox"])),
    "records": lambda: _saved(np.zeros(4, [("a", "f4"), ("b", "O")])),
    "no axis": lambda: _saved(np.float32(1.0)),
    "nan": lambda: _saved(np.full((1, 4, 16, 16), np.nan, np.float32)),
    "another shape": lambda: _saved(np.zeros((1, 3, 16, 16), np.float32)),
    "a terabyte": lambda: _npy("{'descr':'<f4','fortran_order':False,'shape':(1,4,500000,500000)}"),
    "beyond 64 bits": lambda: _npy(f"{{'descr':'<f4','fortran_order':False,'shape':({2**63},{2**63})}}"),
    "no number": lambda: _npy("{'descr':'<f4','fortran_order':False,'shape':(True,'x')}"),
    "negative": lambda: _npy("{'descr':'<f4','fortran_order':False,'shape':(-1,)}", bytes(64)),
    "no header": lambda: _npy("", version=b"\2\0"),
    "long header": lambda: _npy("{" + " " * 60_000 + "}"),
    "endless header": lambda: b"\x93NUMPY\2\0\xff\xff\xff\xff{",
    "code": lambda: _npy("__import__('os').system('false')"),
    "deep": lambda: _npy("(" * 9_000),
    "unclosed": lambda: _npy("{'descr': '"),
    "later version": lambda: _npy("{}", version=b"\7\0"),
    "odd type": lambda: _npy("{'descr':'<f3','fortran_order':False,'shape':(1,)}"),
    "nested type": lambda: _npy("{'descr':[('a','<f4',(1,)*9)],'fortran_order':False,'shape':(1,)}"),
    "an archive": lambda: b"PK\3\4" + bytes(40),
    "nothing": lambda: b"",
}


@pytest.mark.parametrize("make", ARRAYS.values(), ids=ARRAYS)
def test_an_invalid_latents_array_is_refused(outcome: Any, tmp_path: Path, make: Callable[[], bytes]) -> None:
    (tmp_path / "x.npy").write_bytes(make())
    assert outcome("a fox", "--width", "32", "--height", "32", "--latents", "x.npy")[0] == 2


@FUZZ
@given(data=st.data())
def test_a_damaged_array(outcome: Any, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(_saved(np.zeros((1, 4, 16, 16), np.float32)))
    for place in data.draw(st.lists(st.integers(0, 127), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    (tmp_path / "x.npy").write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, 200))])
    outcome("a fox", "--width", "32", "--height", "32", "--latents", "x.npy")


@FUZZ
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode(errors="replace")))
def test_any_content_for_every_file_option(outcome: Any, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    for option in ("--from", "--workflow"):
        assert outcome(option, "x")[0] == 2
    outcome("--prompts", "x", "--seed", "1")


@pytest.mark.parametrize("option", ["--from", "--workflow", "--prompts", "--latents"])
def test_paths_that_are_not_files_are_refused(outcome: Any, tmp_path: Path, option: str) -> None:
    (tmp_path / "folder").mkdir()
    prompt = ["a fox"] if option == "--latents" else []
    for name in ("folder", "missing", "missing/x", "x" * 300, ""):
        assert outcome(*prompt, option, name)[0] == 2
