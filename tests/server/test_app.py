"""The whole server as a process: it starts, answers, ends by SIGTERM, and logs nothing that it was told."""

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sdxl_trt.server.cli import main

KEY, WORD = "sk-MARKERKEY", "MARKERWORD"


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator["subprocess.Popen[str]"]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    command = [sys.executable, "-m", "sdxl_trt.server.cli", "--port", "0", "--metrics-port", "0",
               "--api-key-file", str(keys)]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def ask(url: str, body: object = None, **headers: str) -> tuple[int, bytes]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status), answer.read()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read()


def test_a_server_draws_counts_drains_and_logs_no_word_of_its_clients(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    address, metrics_address = (process.stdout.readline().rpartition(" ")[2].strip() for _ in range(2))
    key = {"Authorization": f"Bearer {KEY}"}
    asked = {"prompt": WORD, "size": "64x64", "steps": 2, "seed": 1, "user": WORD}
    answers = [
        ask(f"{address}/v1/images/generations", asked, **key),  # drawn after the test picture
        ask(f"{address}/health/ready"),
        ask(f"{address}/v1/images/generations", {**asked, "size": WORD}, **key),
        ask(f"{address}/v1/images/generations", asked, Authorization=f"Bearer {WORD}"),
        ask(f"{address}/{WORD}?prompt={WORD}", **key),
    ]
    assert [status for status, _ in answers] == [200, 200, 400, 401, 404]
    assert ask(f"{address}/metrics", **key)[0] == 404
    status, metrics = ask(metrics_address)
    assert status == 200
    counted = {
        (sample.labels["api"], sample.labels["outcome"]): sample.value
        for family in text_string_to_metric_families(metrics.decode())
        for sample in family.samples
        if sample.name == "trt_requests_total" and sample.labels["route"] != "none"
    }
    assert counted == {("ops", "ok"): 1, ("openai", "ok"): 1, ("openai", "refused"): 1}
    process.send_signal(signal.SIGHUP)
    assert process.stderr is not None
    written = [process.stderr.readline()]
    while not written[-1].startswith("the bundle was loaded anew in "):
        written.append(process.stderr.readline())
    assert ask(f"{address}/health/ready")[0] == 200
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    lines = [json.loads(line) for line in written[:-1]]
    err = "".join(written) + err
    assert [line["status"] for line in lines] == [200, 400, 401, 404]
    assert lines[0]["who"].startswith("key:")
    for text in (out, err, metrics.decode(), *(body.decode() for _, body in answers[3:])):
        assert WORD not in text
        assert KEY not in text


def test_a_bundle_that_cannot_be_opened_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--port", "0"]) not in (0, 1)
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
