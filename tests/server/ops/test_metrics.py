"""Metrics: what was sent is what is counted, and no label is open."""

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

ASKED = {"prompt": "a red star", "size": "64x64", "steps": 4, "seed": 3}
GENERATIONS = "/v1/images/generations"
CLOSED = {
    "api": {"openai", "a1111", "comfyui", "page", "ops"}, "status": {"none", "1xx", "2xx", "3xx", "4xx", "5xx"},
    "outcome": {"ok", "refused", "cancelled", "deadline", "error"}, "reason": {"queue", "rate", "deadline", "size"},
    "state": {"waiting", "base", "handed_over", "refiner"},
    "stage": {"picture", "encode", "swap_base", "base", "swap_refiner", "refiner", "load", "decode"},
}  # fmt: skip
NAMES = {
    "trt_requests", "trt_request_duration_seconds", "trt_queue_duration_seconds", "trt_stage_duration_seconds",
    "trt_step_duration_seconds", "trt_batch_rows", "trt_batch_padding_ratio", "trt_queue_depth",
    "trt_inflight_pictures", "trt_pictures", "trt_steps", "trt_rejected", "trt_oldest_wait_seconds", "trt_ready",
    "trt_websockets", "trt_engine_loaded", "trt_build_info",
}  # fmt: skip


def counted(text: str) -> dict[tuple[str, ...], float]:
    """Return the value of each sample by its name and the values of its labels, in the order of their names."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_was_sent_is_what_is_counted(served: Any) -> None:
    with served(rate_requests=4, max_body=5000) as client:
        sent = [
            client.post(GENERATIONS, json=ASKED),
            client.post(GENERATIONS, json={**ASKED, "n": 2}),
            client.post(GENERATIONS, json={**ASKED, "handoff": None}),
            client.post(GENERATIONS, json={**ASKED, "steps": "many"}),
            client.post(GENERATIONS, json={**ASKED, "prompt": "x" * 9000}),
            client.post(GENERATIONS, json=ASKED, headers={"X-Request-Timeout-Seconds": "0.000001"}),
            client.post(GENERATIONS, json=ASKED),
            client.post(GENERATIONS, json=ASKED),
            client.get("/nowhere"),
        ]
        metrics = client.get("/metrics")
    assert [answer.status_code for answer in sent] == [200, 200, 200, 400, 413, 429, 200, 429, 404]
    values = counted(metrics.text)
    requests = {key[1:]: value for key, value in values.items() if key[0] == "trt_requests_total"}
    assert requests == {
        ("openai", "ok", GENERATIONS, "2xx"): 4, ("openai", "refused", GENERATIONS, "4xx"): 3,
        ("openai", "refused", "none", "4xx"): 1, ("comfyui", "refused", "none", "4xx"): 1,
    }  # fmt: skip
    assert {key[1]: value for key, value in values.items() if key[0] == "trt_rejected_total"} == {
        "queue": 0, "rate": 1, "deadline": 1, "size": 1,
    }  # fmt: skip
    assert values["trt_pictures_total",] == 5
    steps = {key[1]: value for key, value in values.items() if key[0] == "trt_steps_total"}
    assert sum(steps.values()) == 5 * 4
    assert steps["refiner"] == 4 * (4 - (steps["base"] - 4) / 4)
    assert values["trt_step_duration_seconds_count", "base"] == steps["base"]
    assert values["trt_queue_duration_seconds_count", "openai"] == 4
    assert values["trt_stage_duration_seconds_count", "decode"] == 5
    assert values["trt_batch_rows_sum", "base"] >= 2 * steps["base"]
    assert values["trt_batch_padding_ratio_count", "base"] == values["trt_batch_rows_count", "base"]
    assert values["trt_queue_depth", "waiting"] == values["trt_oldest_wait_seconds",] == 0


def test_names_are_those_of_the_contract_and_labels_are_closed(served: Any) -> None:
    with served() as client:
        client.post(GENERATIONS, json=ASKED)
        client.get("/MARKERWORD", params={"a": "MARKERWORD"}, headers={"X-Request-ID": "MARKERWORD"})
        families = [*text_string_to_metric_families(client.get("/metrics").text)]
        engines = set(client.app.state.desk.pipeline.manifest.components)
    assert {family.name for family in families if not family.name.endswith("_created")} == NAMES
    routes = {"none", GENERATIONS}
    for family in families:
        for sample in family.samples:
            for label, value in sample.labels.items():
                known = CLOSED | {"route": routes, "engine": engines}
                assert (
                    label in ("le", "version", "bundle", "provider", "residency", "computes") or value in known[label]
                ), sample
    loaded = {sample.labels["engine"]: sample.value for family in families if family.name == "trt_engine_loaded"
              for sample in family.samples}  # fmt: skip
    assert loaded["unet"] == 1


def test_the_memory_of_a_gpu_is_told_where_there_is_one(served: Any, opened: list[Any]) -> None:
    with served() as client:
        assert "trt_gpu_memory_used_bytes" not in client.get("/metrics").text
        opened[0].pool.memory = lambda: (3, 10)
        assert counted(client.get("/metrics").text)["trt_gpu_memory_used_bytes", "0"] == 7


def test_with_a_port_of_their_own_metrics_are_nowhere_else(served: Any) -> None:
    with served(metrics_port=1) as client:
        assert client.get("/metrics").status_code == 404


@pytest.mark.parametrize("rows", [None, 4])
def test_rows_that_no_picture_uses_are_padding(served: Any, rows: int | None) -> None:
    with served(fixed_batch=rows is not None) as client:
        client.post(GENERATIONS, json=ASKED)
        values = counted(client.get("/metrics").text)
    ratio = values["trt_batch_padding_ratio_sum", "base"] / values["trt_batch_padding_ratio_count", "base"]
    assert (ratio > 0) == (rows is not None)


def test_answers_say_what_a_key_may_still_ask_for(served: Any) -> None:
    with served(rate_requests=2) as client:
        answers = [client.post(GENERATIONS, json=ASKED) for _ in range(3)]
        health = client.get("/health/live")
    told = [(answer.status_code, answer.headers["x-ratelimit-limit-requests"],
             answer.headers["x-ratelimit-remaining-requests"]) for answer in answers]  # fmt: skip
    assert told == [(200, "2", "1"), (200, "2", "0"), (429, "2", "0")]
    reset = [answer.headers["x-ratelimit-reset-requests"] for answer in answers]
    assert all(each.endswith("s") and 0 < int(each[:-1]) <= 60 for each in reset)
    assert "x-ratelimit-limit-requests" not in health.headers
    with served() as client:
        assert "x-ratelimit-limit-requests" not in client.post(GENERATIONS, json=ASKED).headers


def test_each_picture_of_a_batch_is_counted(served: Any, graph: dict[str, Any]) -> None:
    graph["5"]["inputs"]["batch_size"] = 3
    with served() as client:
        assert client.post("/prompt", json={"prompt": graph}).status_code == 200
        while client.get("/prompt").json()["exec_info"]["queue_remaining"]:
            pass
        values = counted(client.get("/metrics").text)
    assert (values["trt_pictures_total",], values["trt_steps_total", "base"]) == (3, 6)
    assert values["trt_queue_duration_seconds_count", "comfyui"] == 1
