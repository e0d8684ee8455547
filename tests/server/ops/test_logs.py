"""The log line of a request, and that of a job which ends after its request."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from sdxl_trt.engines import EngineError

ASKED = {"prompt": "MARKERWORD", "size": "64x128", "steps": 4, "seed": 3, "n": 2, "user": "MARKERWORD"}
SECONDS = {"queue_s", "encode_s", "swap_s", "base_s", "refiner_s", "decode_s"}


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    def read() -> list[dict[str, Any]]:
        said = [record for record in caplog.records if record.name == "sdxl_trt.server.requests"]
        return [json.loads(record.getMessage()) for record in said]

    with caplog.at_level(logging.INFO, "sdxl_trt.server"):
        yield read
    assert "MARKER" not in caplog.text


def test_a_line_says_what_was_asked_and_what_it_took(served: Any, lines: Any) -> None:
    with served() as client:
        client.post("/v1/images/generations", json=ASKED, headers={"X-Request-ID": "me-1"})
    (line,) = lines()
    assert set(line) >= SECONDS
    assert {name: value for name, value in line.items() if name not in SECONDS | {"time", "seconds"}} == {
        "id": "me-1", "who": "peer:10.0.0.9", "api": "openai", "method": "POST", "route": "/v1/images/generations",
        "status": 200, "size": "64x128", "steps": 4, "pictures": 2, "sampler": "euler", "cancelled": False,
        "warnings": 0,
    }  # fmt: skip
    assert 0 < line["base_s"] <= line["seconds"]


def test_a_line_of_a_failure_says_how_far_it_came(served: Any, lines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise EngineError("MARKERWORD")

    with served() as client:
        monkeypatch.setattr("sdxl_trt.server.desk.studio.Studio.decode", fails)
        client.post("/v1/images/generations", json=ASKED)
        client.post("/v1/images/generations", json={**ASKED, "size": "MARKERWORD"})
    failed, refused = lines()
    assert failed["status"] == 500
    assert failed["base_s"] > 0
    assert "decode_s" not in failed
    assert "size" not in refused


def test_a_job_has_a_line_of_its_own_when_it_ends(served: Any, lines: Any, graph: dict[str, Any]) -> None:
    graph["6"]["inputs"]["text"] = "MARKERWORD"
    with served() as client:
        asked = {"prompt": graph, "client_id": "MARKERWORD"}
        assert client.post("/prompt", json=asked, headers={"X-Request-ID": "me-1"}).status_code == 200
        while client.get("/prompt").json()["exec_info"]["queue_remaining"]:
            pass
    (job,) = (line for line in lines() if "job" in line)
    assert (job["id"], job["job"], job["pictures"], job["steps"], job["size"]) == ("me-1", "done", 1, 2, "64x64")
    assert job["base_s"] > 0
