"""A bundle that was exported anew: it is served after it has drawn, and what fails changes nothing."""

import logging
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.engines import CorruptError
from sdxl_trt.runtime import Pipeline
from sdxl_trt.server.ops import Reloader

KEY = {"Authorization": "Bearer sk-1"}
KEYS = frozenset({"sk-1"})
ASKED = {"prompt": "a red star", "size": "64x64", "steps": 2, "seed": 3}


def test_a_reload_serves_the_new_bundle_and_closes_the_old_one(served: Any, opened: list[Pipeline]) -> None:
    with served(keys=KEYS) as client:
        before = client.post("/v1/images/generations", json=ASKED, headers=KEY).json()["data"]
        answer = client.post("/admin/reload", headers=KEY)
        assert answer.status_code == 200
        assert client.app.state.desk.pipeline is opened[1]
        assert client.post("/v1/images/generations", json=ASKED, headers=KEY).json()["data"] == before
        assert opened[0].pool.closed  # type: ignore[attr-defined]
        assert client.get("/health/ready").status_code == 200
        assert answer.json()["bundle"] in client.get("/metrics", headers=KEY).text


def test_lists_of_models_follow_a_link_that_was_changed(
    served: Any, opened: list[Pipeline], pipeline: Pipeline, tmp_path: Path
) -> None:
    link = tmp_path / "current"
    folders = [tmp_path / name for name in ("monday", "tuesday")]
    for folder in folders:
        folder.symlink_to(pipeline.pool.bundle.root)
    link.symlink_to(folders[0])
    with served(keys=KEYS, engines=link) as client:
        opened[0].pool.bundle = pipeline.pool.bundle.__class__(folders[0], pipeline.manifest)
        assert client.get("/v1/models", headers=KEY).json()["data"][0]["id"] == "monday"
        assert client.post("/admin/reload", headers=KEY).status_code == 200
        opened[1].pool.bundle = pipeline.pool.bundle.__class__(folders[1], pipeline.manifest)
        assert client.get("/v1/models", headers=KEY).json()["data"][0]["id"] == "tuesday"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (CorruptError("{folder}/manifest.json: broken manifest; run export-engines again"),
         "the one before is served on: manifest.json: broken manifest; run export-engines again"),
        (RuntimeError("{folder} MARKERWORD"),
         "the one before is served on: no picture could be drawn with it (RuntimeError)"),
    ],
    ids=["corrupt", "bug"],
)  # fmt: skip
def test_a_bundle_that_fails_leaves_the_old_one_in_service(
    served: Any, opened: list[Pipeline], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    caplog: pytest.LogCaptureFixture, fault: Exception, reason: str,
) -> None:  # fmt: skip
    def open_bundle(*_: Any, **__: Any) -> Pipeline:
        raise type(fault)(str(fault).replace("{folder}", str(tmp_path)))

    with caplog.at_level(logging.INFO, "sdxl_trt.server"), served(keys=KEYS, engines=tmp_path) as client:
        monkeypatch.setattr("sdxl_trt.server.app.open_bundle", open_bundle)
        answer = client.post("/admin/reload", headers=KEY)
        assert (answer.status_code, answer.json()["error"]["message"]) == (409, reason)
        assert client.app.state.desk.pipeline is opened[0]
        assert client.post("/v1/images/generations", json=ASKED, headers=KEY).status_code == 200
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1
    assert str(tmp_path) not in caplog.text
    assert "MARKERWORD" not in caplog.text + answer.text


def test_only_a_key_and_no_page_of_another_origin_may_ask(served: Any, opened: list[Pipeline]) -> None:
    listed = frozenset({"http://page.example"})
    with served(keys=KEYS, cors_origins=listed) as client:
        answers = [
            client.post("/admin/reload"),
            client.post("/admin/reload", headers={"Authorization": "Bearer sk-2"}),
            client.post("/admin/reload", headers=KEY | {"Origin": "http://evil.example"}),
            client.post("/admin/reload", headers=KEY | {"Origin": "http://page.example"}),
            client.get("/admin/reload", headers=KEY),
        ]
    with served() as client:
        answers.append(client.post("/admin/reload"))
    assert [answer.status_code for answer in answers] == [401, 401, 403, 403, 405, 403]
    assert "--api-key-file" in answers[-1].json()["error"]["message"]
    assert len(opened) == 2


def test_one_reload_runs_at_a_time_and_none_when_the_server_stops(served: Any, opened: list[Pipeline]) -> None:
    with served(keys=KEYS) as client:
        reloader: Reloader = client.app.state.reloader
        reloader._busy = True
        assert client.post("/admin/reload", headers=KEY).status_code == 409
        reloader._busy = False
        client.app.state.desk.draining = True
        assert client.post("/admin/reload", headers=KEY).status_code == 409
    assert len(opened) == 1
