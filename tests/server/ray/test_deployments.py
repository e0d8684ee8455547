"""The application as Ray Serve has it, in Ray's local testing mode, and what the command says without Ray."""

import asyncio
import importlib.util
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.engines import UsageError
from sdxl_trt.server.cli import main
from sdxl_trt.server.options import Options
from sdxl_trt.server.ray import Cluster, Layout, Parts, built
from sdxl_trt.server.ray.deployments import OneId
from sdxl_trt.server.ray.options import Deployed
from sdxl_trt.server.serve_config import options_of_args

WITHOUT_RAY = importlib.util.find_spec("ray") is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompts", "a"], "--prompts: trt-serve draws lists with --ray; without it: trt-generate --prompts a"),
        (["--ray-devices", "2"], "--ray-devices goes with --ray; give both or none"),
        (["--ray-layout", "split"], "--ray-layout goes with --ray; give both or none"),
        (["--ray", "--prompts", "list.txt"], "--prompts FILE and --out DIR go together; give both or none"),
        (["--ray", "--out", "."], "--prompts FILE and --out DIR go together; give both or none"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


@pytest.mark.skipif(not WITHOUT_RAY, reason="Ray is installed")
@pytest.mark.parametrize("words", [[], ["--prompts", "list.txt", "--out", "out"]])
def test_without_ray_the_command_says_what_to_install(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("a star")
    assert main(["--ray", "--port", "0", *words]) == 2
    assert capsys.readouterr().err == "error: ray is missing; install it with: pip install 'sdxl-trt[server,ray]'\n"


def test_a_config_file_states_options_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\n")
    stated = {
        "engines": "/bundle",
        "deadline": 30,
        "aliases": ["a"],
        "trusted_proxies": ["10.0.0.1/8"],
        "api_key_file": str(tmp_path / "keys"),
    }
    options = options_of_args(stated)
    assert options == Options(engines=Path("/bundle"), deadline=30.0, aliases=("a",), keys=frozenset({"one"}),
                              trusted_proxies=(ip_network("10.0.0.0/8"),))  # fmt: skip
    for wrong in ({"engine": "/bundle"}, {"queue": "many"}, {"engines": 3}, {"trusted_proxies": ["a"]}):
        with pytest.raises(UsageError, match=r"args: .*trt-serve's options"):
            options_of_args(wrong)


@pytest.mark.skipif(WITHOUT_RAY, reason="needs Ray")
@pytest.mark.parametrize("layout", [Layout(2, 1, 0, 1.0, ""), Layout(0, 0, 2, 1.0, "")], ids=["split", "together"])
def test_an_application_has_an_ingress_and_its_pools(layout: Layout) -> None:
    from ray.serve._private.build_app import build_app

    parts = Parts(*([lambda *_: None] * 3))  # type: ignore[arg-type]
    made = build_app(built(layout, Deployed(Options(), gpus=True), parts), name="it")
    found = {each.name: each for each in made.deployments}
    assert {*found} == ({"Ingress", "Base", "Refiner"} if layout.split else {"Ingress", "Base"})
    assert made.ingress_deployment_name == "Ingress"
    assert found["Base"]._deployment_config.max_ongoing_requests == 8
    assert found["Base"]._deployment_config.autoscaling_config.max_replicas == 2
    assert found["Base"].ray_actor_options["num_gpus"] == 1
    assert found["Ingress"].num_replicas == 1


def test_the_proxys_request_id_is_the_only_one() -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Request-ID", b"a"), (b"a", b"b")]})

    async def send(message: Any) -> None:
        sent.append(message["headers"])

    for headers in ([(b"x-request-id", b"a")], []):
        asyncio.run(OneId(app)({"type": "http", "headers": headers}, None, send))
    assert sent == [[(b"a", b"b")], [(b"X-Request-ID", b"a"), (b"a", b"b")]]


def test_a_cluster_is_what_the_command_line_states() -> None:
    assert Cluster() == Cluster("auto", None, None, None)
