"""The routes: progress, interrupt, skip, options, menus, keys, clients that leave, and what an answer holds."""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.testclient import TestClient

from sdxl_trt.engines import ResourceError
from sdxl_trt.engines.bundle import read_bundle
from sdxl_trt.mini import bundle_path
from sdxl_trt.server import Options
from sdxl_trt.server.desk import Ended

SMALL = {"prompt": "a red star", "negative_prompt": "blur", "seed": 7, "steps": 2, "width": 64, "height": 64}
KEYS = Options(keys=frozenset({"own-key", "another-key"}))
OWN, OTHER = ({"Authorization": f"Bearer {key}"} for key in ("own-key", "another-key"))
IDLE = {
    "progress": 0.0,
    "eta_relative": 0.0,
    "state": {"skipped": False, "interrupted": False, "stopping_generation": False, "job": "", "job_count": 0,
              "job_timestamp": "0", "job_no": 0, "sampling_step": 0, "sampling_steps": 0},
    "current_image": None,
    "textinfo": None,
}  # fmt: skip


class Running:
    """A request that is drawn in a thread of its own, until somebody stops it."""

    def __init__(self, client: TestClient, headers: dict[str, str], **fields: Any) -> None:
        self._client, self._headers = client, headers
        self._pool = ThreadPoolExecutor(1)
        body = {**SMALL, **fields}
        self._answer = self._pool.submit(client.post, "/sdapi/v1/txt2img", json=body, headers=headers)

    def progress(self, *, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Ask until the answer is as it should be."""
        while True:
            told: dict[str, Any] = self._client.get("/sdapi/v1/progress", headers=self._headers).json()
            if until(told):
                return told

    def ended(self) -> Any:
        answer = self._answer.result(30)
        self._pool.shutdown()
        return answer


def test_idle_is_exactly_nothing(fake: Callable[..., Any]) -> None:
    client, _ = fake()
    assert client.get("/sdapi/v1/progress").json() == IDLE
    assert client.post("/sdapi/v1/interrupt").json() == {}
    assert client.post("/sdapi/v1/skip").json() == {}


def test_a_job_in_work_is_shown_and_interrupted(fake: Callable[..., Any], info_of: Callable[[Any], Any]) -> None:
    client, _ = fake(held=True)
    running = Running(client, {}, n_iter=2, force_task_id="task(1)")
    told = running.progress(until=lambda told: told["progress"] > 0.0)
    assert told["state"]["job_count"] == 2
    assert (told["state"]["sampling_step"], told["state"]["sampling_steps"]) == (1, 2)
    assert told["progress"] == pytest.approx(1 / 6)
    assert told["current_image"].startswith("iVBOR")
    assert client.get("/sdapi/v1/progress?skip_current_image=true").json()["current_image"] is None
    task = client.post("/internal/progress", json={"id_task": "task(1)", "id_live_preview": -1}).json()
    assert (task["active"], task["queued"], task["completed"]) == (True, False, False)
    assert task["live_preview"].startswith("data:image/png;base64,")
    again = client.post("/internal/progress", json={"id_task": "task(1)", "id_live_preview": task["id_live_preview"]})
    assert again.json()["live_preview"] is None
    assert client.post("/sdapi/v1/interrupt").status_code == 200
    answer = running.ended()
    assert answer.status_code == 200
    assert len(answer.json()["images"]) == 2
    assert info_of(answer)["all_seeds"] == [7, 8]
    assert "interrupted" in answer.headers["X-TRT-Warnings"]
    assert client.get("/sdapi/v1/progress").json() == IDLE
    after = client.post("/internal/progress", json={"id_task": "task(1)"}).json()
    assert (after["active"], after["queued"], after["completed"]) == (False, False, True)


def test_a_waiting_job_says_its_place_and_is_let_go_without_a_picture(fake: Callable[..., Any]) -> None:
    client, _ = fake(held=True, starts=False)
    running = Running(client, {})
    told = running.progress(until=lambda told: told["state"]["job_count"] > 0)
    assert (told["progress"], told["textinfo"], told["eta_relative"]) == (0.0, "In queue: 3", 12.5)
    client.post("/sdapi/v1/interrupt")
    answer = running.ended()
    assert (answer.status_code, answer.json()["images"]) == (200, [])
    assert json.loads(answer.json()["info"])["infotexts"] == []


def test_another_keys_job_is_neither_shown_nor_stopped(fake: Callable[..., Any]) -> None:
    client, desk = fake(KEYS, held=True)
    running = Running(client, OWN, force_task_id="task(1)")
    running.progress(until=lambda told: told["progress"] > 0.0)
    assert client.get("/sdapi/v1/progress", headers=OTHER).json() == IDLE
    task = client.post("/internal/progress", json={"id_task": "task(1)"}, headers=OTHER).json()
    assert [task[name] for name in ("active", "queued", "completed")] == [False] * 3
    for path in ("interrupt", "skip"):
        client.post(f"/sdapi/v1/{path}", headers=OTHER)
        assert desk.tickets[0].stop is None
    client.post("/sdapi/v1/skip", headers=OWN)
    assert running.ended().status_code == 200
    assert desk.tickets[0].stop == "interrupted"


def test_interrupt_all_is_as_in_a1111(fake: Callable[..., Any]) -> None:
    client, desk = fake(Options(keys=KEYS.keys, interrupt_all=True), held=True)
    running = Running(client, OWN)
    running.progress(until=lambda told: told["progress"] > 0.0)
    client.post("/sdapi/v1/interrupt", headers=OTHER)
    assert running.ended().status_code == 200
    assert desk.tickets[0].stop == "interrupted"


def test_skip_leaves_a_job_of_several_pictures_alone_and_says_so(fake: Callable[..., Any]) -> None:
    client, desk = fake(held=True)
    running = Running(client, {}, n_iter=2)
    running.progress(until=lambda told: told["progress"] > 0.0)
    assert "skip" in client.post("/sdapi/v1/skip").headers["X-TRT-Warnings"]
    assert desk.tickets[0].stop is None
    client.post("/sdapi/v1/interrupt")
    running.ended()


def test_without_a_key_the_answer_is_basics(fake: Callable[..., Any]) -> None:
    client, _ = fake(KEYS)
    answer = client.get("/sdapi/v1/options")
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, 'Basic realm="trt-serve"')
    assert answer.json().keys() == {"error", "detail", "body", "errors"}


def test_pictures_are_in_the_order_of_their_seeds_however_they_are_drawn(
    fake: Callable[..., Any], info_of: Callable[[Any], Any]
) -> None:
    client, _ = fake(backwards=True)
    answer = client.post("/sdapi/v1/txt2img", json={**SMALL, "batch_size": 3})
    facts = info_of(answer)
    assert facts["all_seeds"] == [7, 8, 9]
    assert [f"Seed: {seed}" in text for seed, text in zip((7, 8, 9), facts["infotexts"], strict=True)] == [True] * 3
    assert facts.keys() >= {
        "prompt", "all_prompts", "negative_prompt", "all_negative_prompts", "seed", "all_seeds", "subseed",
        "all_subseeds", "subseed_strength", "width", "height", "sampler_name", "cfg_scale", "steps", "batch_size",
        "restore_faces", "face_restoration_model", "sd_model_name", "sd_model_hash", "sd_vae_name", "sd_vae_hash",
        "seed_resize_from_w", "seed_resize_from_h", "denoising_strength", "extra_generation_params",
        "index_of_first_image", "infotexts", "styles", "job_timestamp", "clip_skip",
        "is_using_inpainting_conditioning",
    }  # fmt: skip


def test_send_images_false_sends_none(fake: Callable[..., Any]) -> None:
    client, _ = fake()
    answer = client.post("/sdapi/v1/txt2img", json={**SMALL, "send_images": False})
    assert answer.json()["images"] == []
    assert answer.json()["parameters"]["send_images"] is False


@pytest.mark.parametrize(
    ("ended", "status"),
    [
        (Ended("failed", ResourceError("no memory")), 500),
        (Ended("failed", RuntimeError("a red star at /srv/x")), 500),
        (Ended("deadline"), 504),
        (Ended("cancelled"), 503),
    ],
)
def test_what_fails_is_told_in_this_apis_shape(fake: Callable[..., Any], ended: Ended, status: int) -> None:
    client, _ = fake(ends=ended)
    answer = client.post("/sdapi/v1/txt2img", json=SMALL)
    assert answer.status_code == status
    assert answer.json().keys() == {"error", "detail", "body", "errors"}
    assert "star" not in answer.text


def test_the_log_hears_of_size_steps_and_seconds(fake: Callable[..., Any]) -> None:
    client, _ = fake()
    client.post("/sdapi/v1/txt2img", json={**SMALL, "n_iter": 2})
    notes = client.app.state.finished[-1].caller.notes
    assert notes == {"size": "64x64", "steps": 2, "pictures": 2, "sampler": "Euler", "cancelled": False,
                     "queue_s": 0.25, "swap_s": 0.5}  # fmt: skip


@pytest.mark.parametrize(("policy", "stops"), [(None, True), ("cancel", True), ("finish", False)])
def test_a_client_that_leaves_stops_its_order_as_the_option_says(
    alone: Callable[..., Any], policy: Any, *, stops: bool
) -> None:
    async def main() -> Any:
        app, desk = alone(Options(on_disconnect=policy), held=True)
        body = [{"type": "http.request", "body": json.dumps(SMALL).encode()}]

        async def receive() -> Any:
            if body:
                return body.pop()
            while not desk.tickets or desk.tickets[0].started is None:
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            return

        scope = {"type": "http", "method": "POST", "path": "/sdapi/v1/txt2img", "query_string": b"", "headers": [
            (b"host", b"127.0.0.1:8188")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8188), "scheme": "http",
            "http_version": "1.1", "root_path": "", "asgi": {"version": "3.0"}}  # fmt: skip
        task = asyncio.create_task(app(scope, receive, send))
        async with asyncio.timeout(20):
            while not desk.tickets or desk.tickets[0].started is None or (stops and desk.tickets[0].stop is None):
                await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        stopped = desk.tickets[0].stop
        desk.tickets[0].cancel()
        await task
        return stopped

    assert asyncio.run(main()) == ("cancelled" if stops else None)


def test_a_repeated_request_is_drawn_once(fake: Callable[..., Any]) -> None:
    client, desk = fake()
    answers = [client.post("/sdapi/v1/txt2img", json={**SMALL, "seed": -1}, headers={"Idempotency-Key": "a"})
               for _ in range(2)]  # fmt: skip
    assert len(desk.orders) == 1
    assert answers[0].json()["images"] == answers[1].json()["images"]
    assert [answer.headers.get("Idempotent-Replayed") for answer in answers] == [None, "true"]


def test_a_header_shortens_the_deadline(fake: Callable[..., Any]) -> None:
    client, desk = fake(Options(deadline=60))
    for seconds in ("5", "900", "nan", "0", "x"):
        client.post("/sdapi/v1/txt2img", json=SMALL, headers={"X-Request-Timeout-Seconds": seconds})
    assert [order.deadline for order in desk.orders] == [5.0, 60.0, 60.0, 60.0, 60.0]


def test_options_are_changed_only_where_the_server_allows_it(fake: Callable[..., Any]) -> None:
    for allowed in (False, True):
        client, desk = fake(Options(allow_options=allowed))
        told = client.get("/sdapi/v1/options").json()
        answer = client.post("/sdapi/v1/options", json={**told, "sdxl_crop_top": 16, "samples_format": "webp"})
        assert (answer.status_code, answer.json()) == (200, None)
        assert ("X-TRT-Warnings" in answer.headers) is not allowed
        client.post("/sdapi/v1/txt2img", json=SMALL)
        assert desk.orders[0].work.crop == ((16, 0) if allowed else (0, 0))
        assert client.get("/sdapi/v1/options").json()["samples_format"] == ("webp" if allowed else "png")


def test_the_menus_are_those_that_clients_read(fake: Callable[..., Any]) -> None:
    client, _ = fake()
    menus = {path: client.get(f"/sdapi/v1/{path}").json() for path in (
        "samplers", "schedulers", "sd-models", "sd-vae", "upscalers", "latent-upscale-modes", "scripts", "script-info",
        "embeddings", "loras", "hypernetworks", "face-restorers", "realesrgan-models", "prompt-styles", "cmd-flags",
        "memory")}  # fmt: skip
    assert {each["name"] for each in menus["samplers"]} >= {"Euler a", "DPM++ 2M", "DDIM", "UniPC"}
    assert not {each["name"] for each in menus["samplers"]} & {"DPM fast", "DPM adaptive", "Restart", "PLMS"}
    assert {each["name"]: each["label"] for each in menus["schedulers"]}["karras"] == "Karras"
    assert menus["embeddings"] == {"loaded": {}, "skipped": {}}
    assert menus["memory"] == {"ram": {}, "cuda": {}}
    empty = {"sd-vae", "latent-upscale-modes", "script-info", "loras", "hypernetworks", "face-restorers",
             "realesrgan-models", "prompt-styles"}  # fmt: skip
    assert all(menus[path] == [] for path in empty)


@pytest.mark.parametrize("path", ["train/embedding", "extra-single-image", "interrogate", "unload-checkpoint",
                                  "server-kill", "refresh-checkpoints"])  # fmt: skip
def test_everything_else_is_not_found(fake: Callable[..., Any], path: str) -> None:
    client, _ = fake()
    answer = client.post(f"/sdapi/v1/{path}", json={})
    assert answer.status_code == 404
    assert answer.json()["error"] == "HTTPException"


def test_loras_and_embeddings_are_listed_by_name(fake: Callable[..., Any], tmp_path: Any) -> None:
    import struct

    (tmp_path / "sub").mkdir()
    for name in ("ink.safetensors", "sub/line.safetensors", "sub/ink.safetensors", "old.pt"):
        (tmp_path / name).write_bytes(b"")
    head = json.dumps({name: {"dtype": "F32", "shape": [2, 1], "data_offsets": [start, start + 8]}
                       for name, start in (("clip_l", 0), ("clip_g", 8))}).encode()  # fmt: skip
    (tmp_path / "neg.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(16))
    client, _ = fake(Options(lora_dir=tmp_path, embedding_dir=tmp_path))
    loras = client.get("/sdapi/v1/loras").json()
    assert [each["name"] for each in loras] == ["line", "neg"]
    assert not any(str(tmp_path) in each["path"] for each in loras)
    told = client.get("/sdapi/v1/embeddings").json()
    assert (told["loaded"]["neg"]["vectors"], told["loaded"]["neg"]["shape"]) == (2, 2)
    assert [*told["skipped"]] == ["line"]


def test_the_models_are_called_by_any_of_their_names() -> None:
    from sdxl_trt.server.a1111.body import Models

    models = Models.of(read_bundle(bundle_path()).manifest)
    assert models.refiner is not None
    for name in (models.refiner.title, "refiner", "Refiner.safetensors", models.refiner.hash, models.refiner.sha256):
        assert models.refines(name)
    assert not models.refines("None")
