"""The files of docs/deploy fit the commands, options and graphs that they name."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdxl_trt.engines.bundle import read_bundle
from sdxl_trt.mini import bundle_path
from sdxl_trt.server import serve_config
from sdxl_trt.server.cli import _parser
from sdxl_trt.server.ray import Cluster

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "docs" / "deploy"
COMPONENTS = {
    name: component for name, component in read_bundle(bundle_path()).manifest.components.items() if name != "vae_tiny"
}
"""Those of the embedded pair that SDXL's own checkpoints have too."""
TYPES = {"float16": "TYPE_FP16", "float32": "TYPE_FP32", "int64": "TYPE_INT64"}
SPEC = re.compile(r'\{ name: "([^"]+)" data_type: (\w+) dims: \[ ([^\]]+) \] \}')


def _parsed(words: list[str]) -> Any:
    return _parser().parse_args(words)


def test_the_container_starts_the_server_and_compose_gives_it_options() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["trt-serve"]' in text
    (command,) = re.findall(r"^CMD (\[.*\])$", text, re.M)
    assert _parsed(yaml.safe_load(command)).port == 8188
    extras = re.search(r"ARG EXTRAS=(\S+)", text)
    assert extras is not None
    declared = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text().partition("optional-dep")[2], re.M)
    assert {*extras[1].split(","), "ray", "cpu"} <= {*declared}
    assert "/health/live" in text
    assert (ROOT / "constraints.txt").exists()


def test_compose_is_read_only_and_waits_longer_than_the_grace() -> None:
    (service,) = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].values()
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).exists()
    assert service["read_only"]
    assert all(volume["read_only"] for volume in service["volumes"])
    assert service["cap_drop"] == ["ALL"]
    assert int(service["stop_grace_period"].removesuffix("s")) > _parsed(service["command"]).grace
    assert service["ports"] == [f"127.0.0.1:8188:{_parsed(service['command']).port}"]


def test_the_unit_starts_the_server_without_privileges() -> None:
    lines = [line.partition("=") for line in (DEPLOY / "trt-serve.service").read_text().splitlines()]
    unit = {key: value for key, found, value in lines if found and not key.startswith("#")}
    program, *words = shlex.split(unit["ExecStart"])
    assert program.endswith("/trt-serve")
    assert int(unit["TimeoutStopSec"]) > _parsed(words).grace
    assert unit["DynamicUser"] == unit["NoNewPrivileges"] == "yes"
    assert unit["CapabilityBoundingSet"] == ""
    assert unit["ProtectSystem"] == "strict"


def test_kuberays_config_names_options_and_waits_longer_than_the_grace(tmp_path: Path) -> None:
    spec = yaml.safe_load((DEPLOY / "kuberay.yaml").read_text())["spec"]
    config = yaml.safe_load(spec["serveConfigV2"])
    (application,) = config["applications"]
    module, name = application["import_path"].split(":")
    assert (module, name) == (serve_config.__name__, serve_config.application.__name__)
    args = application["args"]
    stated = {name: value for name, value in args.items() if name not in ("layout", "devices", "seconds")}
    (tmp_path / "keys").write_text("one\ntwo\n")
    options = serve_config.options_of_args({**stated, "api_key_file": str(tmp_path / "keys")})
    assert (options.engines, options.keys) == (Path("/bundle"), {"one", "two"})
    assert Cluster(**{name: args[name] for name in ("layout", "devices")}).devices == 3
    assert config["http_options"]["request_timeout_s"] == args["deadline"] + 5
    (workers,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert workers["replicas"] == args["devices"]
    assert workers["template"]["spec"]["terminationGracePeriodSeconds"] > args["grace"] + 10
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert args["engines"] in {mount["mountPath"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("name", sorted(COMPONENTS))
def test_tritons_configs_name_the_tensors_of_the_graphs(name: str) -> None:
    text = (DEPLOY / "triton" / name / "config.pbtxt").read_text()
    assert f'name: "{name}"\nplatform: "tensorrt_plan"\nmax_batch_size: 0\n' in text
    inputs, outputs = text.split("output [")
    for part, specs in ((inputs, COMPONENTS[name].inputs), (outputs, COMPONENTS[name].outputs)):
        graph = {re.sub(r"\d+$", "N", spec.name): spec for spec in specs}
        stated = {re.sub(r"\.\d+$", ".N", tensor): (kind, dims) for tensor, kind, dims in SPEC.findall(part)}
        assert {*stated} == {*graph}
        for tensor, (kind, dims) in stated.items():
            assert kind == TYPES[graph[tensor].dtype]
            sizes = [int(size) for size in dims.split(",")]
            assert [size == -1 for size in sizes] == [isinstance(size, str) for size in graph[tensor].shape]


def test_every_component_has_a_config_and_the_page_copies_each() -> None:
    names = {path.parent.name for path in DEPLOY.glob("triton/*/config.pbtxt")}
    assert names == {*COMPONENTS}
    (copied,) = re.findall(r"^for name in (.*); do$", (ROOT / "docs" / "deploy.md").read_text(), re.M)
    assert {*copied.split()} == names


def test_the_pages_commands_have_their_options() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text()
    commands = re.findall(r"^trt-serve .*$", page, re.M)
    assert len(commands) >= 4
    for command in commands:
        _parsed(shlex.split(command)[1:])
    told = {word for action in _parser()._actions for word in action.option_strings}
    named = set(re.findall(r"`(--(?:ray|residency|grace|deadline|lora-dir|embedding-dir|fixed-batch)[a-z-]*)", page))
    assert {"--ray", "--ray-layout", "--ray-seconds", "--ray-devices", "--ray-address"} <= named
    assert named <= told
    for file in re.findall(r"\]\((deploy/[^)]+)\)", page):
        assert (ROOT / "docs" / file).exists()
