"""Hub ids, from a cache on disk without a network, and from a local hub on the loopback device."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save

from sdxl_trt.engines.errors import ResourceError, SdxlTrtError, SourceError, UsageError
from sdxl_trt.export.sources import hub
from sdxl_trt.export.sources.hub import HubId, fetch_pipeline, fetch_vae, parse_hub_id
from sdxl_trt.export.sources.source import BASE_CLASS, open_source, open_vae
from sdxl_trt.export.sources.unets import open_unet

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/tiny-xl"
MODELS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
          "text_encoder_2": "model"}  # fmt: skip
CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
}  # fmt: skip
Files = dict[str, bytes]


def _files(*variants: str) -> Files:
    """Return a pipeline repository with weights of each of `variants`, and many files that an export does not read.

    No two files are equal, since the cache stores and downloads equal files once.
    """
    files = {"model_index.json": json.dumps({"_class_name": BASE_CLASS, **CLASSES}).encode()}
    for number, (name, stem) in enumerate(MODELS.items()):
        class_name = CLASSES[name][1]
        files[f"{name}/config.json"] = json.dumps({"_class_name": class_name, "part": name}).encode()
        for variant in variants:
            mark = f".{variant}" if variant else ""
            files[f"{name}/{stem}{mark}.safetensors"] = save({variant or "plain": torch.tensor([number])})
        files[f"{name}/{stem}.bin"] = b"pickled"
        files[f"{name}/openvino_model.xml"] = b"<x/>"
    for name in ("tokenizer", "tokenizer_2"):
        for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            files[f"{name}/{file}"] = json.dumps({name: file}).encode()
    files["scheduler/scheduler_config.json"] = b"{}"
    return files | {"sd_xl.safetensors": b"5 GB", "README.md": b"#", "vae_1_0/config.json": b"{}"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that writes a repository to an empty cache as the hub's client does; the client is offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def write(files: Files, *, repo: str = REPO, commit: str = COMMIT, branch: str = "main") -> Path:
        root = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        for name, content in files.items():
            blob = root / "blobs" / hashlib.sha256(content).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            link = root / "snapshots" / commit / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        (root / "refs" / branch).parent.mkdir(parents=True, exist_ok=True)
        (root / "refs" / branch).write_text(commit)
        return root / "snapshots" / commit

    return write


def _variants(source: Any) -> list[str]:
    return [next(iter(model.checkpoint().tensors)) for model in source.models.values()]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("a/b", HubId("a/b")), ("a-b_c.d/e.f-1", HubId("a-b_c.d/e.f-1")), ("a/b@v1", HubId("a/b", "v1")),
     ("a/b@refs/pr/7", HubId("a/b", "refs/pr/7")), (f"a/b@{COMMIT}", HubId("a/b", COMMIT)), ("a", None),
     ("a/b/c", None), ("./a", None), ("../a", None), ("/a/b", None), ("a/b@", None), ("", None), ("a b/c", None),
     ("a/b.safetensors", None), ("a/b.ckpt", None), ("mini", None), ("https://host/a", None)],
)  # fmt: skip
def test_ids_are_distinguished_from_paths(spec: str, expected: HubId | None) -> None:
    assert parse_hub_id(spec) == expected


@pytest.mark.parametrize("spec", [REPO, f"{REPO}@main", f"{REPO}@{COMMIT}"])
def test_a_cached_pipeline_is_opened_offline(cache: Callable[..., Path], spec: str) -> None:
    snapshot = cache(_files(""))
    source = open_source(spec, "base")
    assert source.root == snapshot
    assert source.name == f"{REPO}@{COMMIT}"
    assert source.models["unet"].name == f"{REPO}@{COMMIT}/unet"
    assert _variants(source) == ["plain"] * 4


def test_a_branch_is_followed_to_its_commit(cache: Callable[..., Path]) -> None:
    cache(_files(""))
    other = cache(_files(""), commit="f" * 40, branch="refs/pr/7")
    assert open_source(f"{REPO}@refs/pr/7", "base").root == other


@pytest.mark.parametrize(
    ("there", "precision", "taken"),
    [(("", "fp16"), "fp32", "plain"), (("", "fp16"), "fp16", "fp16"), (("", "fp16"), "bf16", "fp16"),
     (("",), "fp16", "plain"), (("fp16",), "fp32", "fp16"), (("", "bf16"), "fp16", "plain")],
)  # fmt: skip
def test_the_precision_chooses_the_variant(
    cache: Callable[..., Path], there: tuple[str, ...], precision: str, taken: str
) -> None:
    cache(_files(*there))
    assert _variants(open_source(REPO, "base", precision=precision)) == [taken] * 4


def test_a_variant_that_one_component_lacks_is_not_used(cache: Callable[..., Path]) -> None:
    files = _files("", "fp16")
    del files["vae/diffusion_pytorch_model.fp16.safetensors"]
    cache(files)
    assert _variants(open_source(REPO, "base", precision="fp16")) == ["plain"] * 4


def test_a_local_folder_is_preferred_to_a_hub_id(
    cache: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache(_files(""))
    monkeypatch.chdir(tmp_path)
    (tmp_path / REPO).mkdir(parents=True)
    with pytest.raises(SourceError, match=r"has no model_index\.json, so it is not a diffusers pipeline folder"):
        open_source(REPO, "base")


def test_an_autoencoder_has_its_own_repository_or_a_pipelines(cache: Callable[..., Path]) -> None:
    cache(_files(""))
    config = {"_class_name": "AutoencoderKL", "force_upcast": False}
    own = {"config.json": json.dumps(config).encode(), "sdxl_vae.safetensors": b"",
           "diffusion_pytorch_model.safetensors": save({"own": torch.ones(1)})}  # fmt: skip
    cache(own, repo="someone/vae-fix")
    inner, alone = open_vae(REPO), open_vae("someone/vae-fix")
    assert (inner.name, alone.name) == (f"{REPO}@{COMMIT}/vae", f"someone/vae-fix@{COMMIT}")
    assert alone.config["force_upcast"] is False
    assert [list(vae.checkpoint().tensors) for vae in (inner, alone)] == [["plain"], ["own"]]


def test_a_unet_has_its_own_repository_or_a_pipelines(cache: Callable[..., Path]) -> None:
    config = json.dumps({"addition_embed_type": "text_time", "cross_attention_dim": 2048}).encode()
    alone = {"config.json": config, "diffusion_pytorch_model.fp16.safetensors": save({"u": torch.ones(1)})}
    cache(alone, repo="someone/unet")
    scheduler = b'{"prediction_type": "v_prediction"}'
    cache(_files("") | {"unet/config.json": config, "scheduler/scheduler_config.json": scheduler})
    own, of_pipeline = open_unet("someone/unet", precision="fp16"), open_unet(REPO)
    assert (own.model.name, dict(own.schedule)) == (f"someone/unet@{COMMIT}", {})
    assert list(own.model.checkpoint().tensors) == ["u"]
    assert of_pipeline.model.name == f"{REPO}@{COMMIT}/unet"
    assert of_pipeline.schedule["prediction_type"] == "v_prediction"


def test_the_error_for_an_uncached_model_names_the_cache_and_the_setting(cache: Callable[..., Path]) -> None:
    cache(_files(""))
    for spec in ("someone/else", f"{REPO}@v9"):
        with pytest.raises(SourceError, match=r"^\S+: is not in the cache \S+, and HF_HUB_OFFLINE is set; unset it"):
            open_source(spec, "base")


def test_a_partial_snapshot_is_incomplete(cache: Callable[..., Path]) -> None:
    files = _files("")
    del files["unet/diffusion_pytorch_model.bin"]
    snapshot = cache(files)
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").resolve().unlink()
    with pytest.raises(SourceError, match=rf"{REPO}/unet: no diffusion_pytorch_model\.safetensors; download.*OFFLINE"):
        open_source(REPO, "base")


def test_a_full_disk_is_an_error_even_if_the_cache_has_a_copy(
    cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    cache(_files(""))
    monkeypatch.setattr(hub, "_download", fail)
    with pytest.raises(ResourceError, match="No space left"):
        open_source(REPO, "base")


def test_the_error_for_a_single_file_repository_names_the_remedy(cache: Callable[..., Path]) -> None:
    cache({"config.json": b"{}", "sd_xl.safetensors": b""})
    with pytest.raises(SourceError, match=r"not a diffusers model; download its sd_xl\.safetensors and give the file"):
        open_source(REPO, "base")


def test_environment_variables_are_respected(cache: Callable[..., Path], tmp_path: Path) -> None:
    cache(_files(""))
    code = (
        f"from sdxl_trt.export.sources.hub import HubId, fetch_vae; print(fetch_vae(HubId({REPO!r}), half=False).name)"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == f"{REPO}@{COMMIT}\n", done.stderr


def _http(kind: type[errors.HfHubHTTPError], status: int) -> Exception:
    response = _response(status)
    return kind("long\nexplanation\nof many lines", response=response)


def _response(status: int) -> Any:
    library = sys.modules[errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0]]
    return library.Response(status, request=library.Request("GET", "http://hub"))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [(lambda: _http(errors.RepositoryNotFoundError, 404), SourceError, "neither a local folder nor a model on the hub"),
     (lambda: _http(errors.GatedRepoError, 403), SourceError, f"is gated; accept its licence at .*/{REPO}"),
     (lambda: _http(errors.RevisionNotFoundError, 404), SourceError, "has no revision v1; check the part after @"),
     (lambda: _http(errors.HfHubHTTPError, 503), SourceError, r"the hub cannot be reached \(long\); check the network"),
     (lambda: errors.HFValidationError("bad"), SourceError, "nor a valid hub name"),
     (lambda: errors.OfflineModeIsEnabled("x"), SourceError, "HF_HUB_OFFLINE is set"),
     (lambda: errors.LocalEntryNotFoundError("x"), SourceError, "lost a file"),
     (lambda: OSError(28, "No space left on device"), ResourceError, "free some space"),
     (lambda: ConnectionRefusedError(111, "Connection refused"), SourceError, "cannot be reached .*; check"),
     (lambda: PermissionError(13, "Permission denied"), UsageError, "downloading .*: Permission denied; choose"),
     (lambda: RuntimeError("\n"), SourceError, "cannot be reached")],
)  # fmt: skip
def test_every_failure_is_one_line_with_a_remedy(
    cache: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], Exception],
    kind: type[SdxlTrtError],
    message: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise make()

    monkeypatch.setattr(hub, "_download", fail)
    with pytest.raises(kind, match=message) as caught:
        fetch_pipeline(HubId(REPO, "v1"), half=False)
    assert "\n" not in str(caught.value)
    assert REPO in str(caught.value)


# A hub that answers the client's requests: the commit, the files, their bytes.
class _Hub(http.server.BaseHTTPRequestHandler):
    files: Files
    sent: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/{REPO}/revision/"):
            siblings = [{"rfilename": name} for name in self.files]
            self._send(json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode(), body=body)
        elif path.startswith(f"/api/models/{REPO}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files.items()
            ]
            self._send(json.dumps(tree).encode(), body=body)
        elif path.startswith(f"/{REPO}/resolve/"):
            name = path.removeprefix(f"/{REPO}/resolve/").partition("/")[2]
            if body:
                self.sent.append(name)
            self._send(self.files[name], body=body)
        else:
            self._send(b"{}", body=body, status=404)

    def _send(self, content: bytes, *, body: bool, status: int = 200) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, "Content-Type": "application/json",
                   "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}  # fmt: skip
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture
def online(cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Files], list[str]]]:
    """Return a function that puts a repository on a local hub and returns the list of the files it sends."""
    handler = type("Handler", (_Hub,), {"files": {}, "sent": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")

    def serve(files: Files) -> list[str]:
        handler.files, handler.sent = files, []  # type: ignore[attr-defined]
        return handler.sent  # type: ignore[attr-defined,no-any-return]

    yield serve
    server.shutdown()
    server.server_close()
    thread.join()


def test_only_files_that_an_export_reads_are_downloaded(
    online: Callable[[Files], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = online(_files("", "fp16"))
    source = open_source(REPO, "base", precision="fp16")
    assert _variants(source) == ["fp16"] * 4
    assert source.name == f"{REPO}@{COMMIT}"
    weights = [f"{name}/{stem}.fp16.safetensors" for name, stem in MODELS.items()]
    configs = [name for name in _files() if name.endswith((".json", ".txt")) and not name.startswith("vae_1_0")]
    assert sorted(sent) == sorted(weights + configs)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_source(REPO, "base", precision="fp16").root == source.root, "the cache knows the commit of main"


def test_shards_of_the_chosen_variant_are_downloaded(online: Callable[[Files], list[str]]) -> None:
    files = _files("", "fp16")
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    del files["unet/diffusion_pytorch_model.safetensors"]
    index = {"weight_map": {"a": shards[0].removeprefix("unet/"), "b": shards[1].removeprefix("unet/")}}
    files["unet/diffusion_pytorch_model.safetensors.index.json"] = json.dumps(index).encode()
    files |= {shards[0]: save({"a": torch.ones(1)}), shards[1]: save({"b": torch.ones(1)})}
    files["unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors"] = b"not this one"
    sent = online(files)
    assert list(open_source(REPO, "base").models["unet"].checkpoint().tensors) == ["a", "b"]
    assert [name for name in sorted(sent) if "-of-" in name] == shards


def test_an_autoencoder_alone_is_downloaded(online: Callable[[Files], list[str]]) -> None:
    sent = online(_files("", "fp16"))
    assert fetch_vae(HubId(REPO), half=False).variant == ""
    assert sorted(sent) == ["model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]


def test_the_cache_is_used_if_the_hub_is_unreachable(
    cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    snapshot = cache(_files(""))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with caplog.at_level("INFO", "sdxl_trt.export"):
        assert fetch_pipeline(HubId(REPO), half=False).folder == snapshot
    assert "using the copy in the cache" in caplog.text
    with pytest.raises(SourceError, match=r"someone/else: the hub cannot be reached \(.*\); check the network"):
        fetch_pipeline(HubId("someone/else"), half=False)
