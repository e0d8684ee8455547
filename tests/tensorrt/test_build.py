"""Plans of the embedded pair built by the real builder, and the errors of builds that cannot work."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import msgspec
import onnx
import pytest
from onnx import TensorProto, helper

from sdxl_trt.engines.build.process import BuildEvent, BuildJob, BuiltPlan, build_plan
from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.bundle.manifest import Component
from sdxl_trt.engines.bundle.plan_record import BuildFlags
from sdxl_trt.engines.bundle.profile import Profile, fixed
from sdxl_trt.engines.errors import CorruptError, EngineError, ResourceError, SdxlTrtError, UsageError
from sdxl_trt.engines.plans.sizes import component_profiles, profiles_of, stage_sizes
from sdxl_trt.mini.embedded import bundle_path

pytestmark = pytest.mark.usefixtures("tensorrt")
GRAPHS = ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder", "refiner_unet")
SMALL = "vae_decoder"


@cache
def _component(name: str) -> Component:
    return read_bundle(bundle_path()).manifest.components[name]


def _profiles(name: str, *, static: bool = False) -> tuple[Profile, ...]:
    """Return one profile: with `static` the one with guidance, the larger of two; else a range of sizes.

    The exporter's profiles of an autoencoder are always static, but those of other graphs need not be.
    """
    component = _component(name)
    manifest = read_bundle(bundle_path()).manifest
    sizes = msgspec.structs.replace(stage_sizes(manifest), static=static)
    profiles = profiles_of(component, sizes, manifest.base.vae.factor)
    if component.kind.startswith("vae") and not static:
        unit = manifest.base.vae.factor if component.kind == "vae_decoder" else 1
        sides = {"height": sizes.height.over(unit), "width": sizes.width.over(unit)}
        inputs = {spec.name: spec.shape for spec in component.inputs}
        profiles = component_profiles(inputs, [{"pictures": fixed(1), **sides}])
    return profiles[-1:]


def _job(folder: Path, name: str = SMALL, graph: Path | None = None, **changes: object) -> BuildJob:
    job = BuildJob(
        component=name,
        graph=graph or bundle_path() / name / "model.onnx",
        profiles=_profiles(name),
        flavour="tensorrt-rtx",
        plan=folder / f"{name}.plan",
        log=folder / f"{name}.log",
    )
    return msgspec.structs.replace(job, **changes)


def _copy(folder: Path) -> Path:
    """Copy the small graph and its weights, so that a test can damage them."""
    shutil.copytree(bundle_path() / SMALL, folder / "graph")
    return folder / "graph/model.onnx"


def _check(built: BuiltPlan, weights: int) -> None:
    content = built.plan.read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (built.size, built.sha256)
    # A plan contains every weight, and some code.
    assert weights <= built.weights < built.size
    assert built.activations > 0
    assert built.layers > 100
    assert 0 < built.parse_seconds < built.seconds
    assert built.peak_anonymous > weights
    assert built.peak_file > weights


@pytest.mark.parametrize("static", [pytest.param(True, id="static"), pytest.param(False, id="dynamic")])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.builds if "unet" in name else ()) for name in GRAPHS]
)
def test_every_graph_of_the_embedded_pair_is_built(name: str, static: bool, tmp_path: Path) -> None:
    profiles = _profiles(name, static=static)
    spread = [shape for profile in profiles for shape in profile.shapes.values() if shape[0] != shape[2]]
    assert bool(spread) != (static and "text" not in name), "the profiles are not those that this test needs"
    events: list[BuildEvent] = []
    built = build_plan(_job(tmp_path, name, profiles=profiles), progress=events.append)
    _check(built, _component(name).weights.size)
    assert built.streamable == 0
    assert {"loading TensorRT", "parsing", "building"} & {event.phase for event in events}
    shares = [event.share for event in events if event.share is not None]
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] <= 1
    log = (tmp_path / f"{name}.log").read_text()
    assert f"Total Activation Memory: {built.activations} bytes" in log
    assert "[E]" not in log
    assert str(bundle_path()) not in log
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.log", f"{name}.plan"]


def test_two_static_profiles_share_a_plan(tmp_path: Path) -> None:
    """It contains the weights once, and its activations are those of the larger profile."""
    small, large = (Profile(shapes={"latent_sample": ((1, 4, side, side),) * 3}) for side in (8, 16))
    figures = [build_plan(_job(tmp_path, profiles=profiles)) for profiles in [(small,), (large,), (small, large)]]
    assert figures[0].activations < figures[1].activations == figures[2].activations
    assert figures[2].weights < 1.1 * figures[1].weights
    each = figures[2].profile_activations
    assert each == (figures[0].activations, figures[1].activations)
    logged = re.findall(r"Total Activation Memory: (\d+) bytes", (tmp_path / f"{SMALL}.log").read_text())
    assert tuple(map(int, logged)) == each, "the builder states one figure per profile, in their order"


def test_flags_and_timing_cache(tmp_path: Path) -> None:
    flags = BuildFlags(opt_level=1, workspace=256 << 20, weight_streaming=True, hardware_compatible=True)
    timing_cache = tmp_path / "timing.cache"
    job = _job(tmp_path, flavour="tensorrt", flags=flags, timing_cache=timing_cache)
    first = build_plan(job)
    assert first.streamable == first.weights
    assert timing_cache.stat().st_size > 0
    kept = timing_cache.read_bytes()
    build_plan(job)
    assert timing_cache.read_bytes() == kept
    timing_cache.write_bytes(b"garbage")
    assert build_plan(job).size > 0
    assert timing_cache.read_bytes() != b"garbage"


def _break_graph(graph: Path) -> None:
    graph.write_bytes(b"garbage" * 100)


def _cut_graph(graph: Path) -> None:
    graph.write_bytes(graph.read_bytes()[: 1 << 14])


def _lose_weights(graph: Path) -> None:
    (graph.parent / "weights.data").unlink()


def _cut_weights(graph: Path) -> None:
    os.truncate(graph.parent / "weights.data", 1 << 12)


def _unknown_operator(graph: Path) -> None:
    value = helper.make_tensor_value_info("latent_sample", TensorProto.FLOAT, [1, 4, "height", "width"])
    out = helper.make_tensor_value_info("sample", TensorProto.FLOAT, None)
    node = helper.make_node("NoSuchOperator", ["latent_sample"], ["sample"])
    onnx.save(helper.make_model(helper.make_graph([node], "planted", [value], [out])), graph)


@pytest.mark.parametrize(
    ("damage", "kind", "said"),
    [
        (_break_graph, CorruptError, "is not an ONNX graph"),
        (_cut_graph, CorruptError, "is not an ONNX graph"),
        (_lose_weights, EngineError, "rejected it: Failed to open file: .*weights.data;"),
        (_cut_weights, EngineError, "rejected it: ONNX external weights .* out of range .*weights.data"),
        (_unknown_operator, EngineError, "NoSuchOperator"),
    ],
)
def test_a_graph_that_cannot_be_parsed_is_an_error(
    damage: Callable[[Path], None], kind: type[SdxlTrtError], said: str, tmp_path: Path
) -> None:
    graph = _copy(tmp_path)
    damage(graph)
    with pytest.raises(kind, match=said) as caught:
        build_plan(_job(tmp_path, graph=graph))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / f"{SMALL}.plan").exists()


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"latent_sample": ((1, 4, 16, 16), (1, 4, 8, 8), (1, 4, 16, 16))}, "latent_sample"),
        ({"latent_sample": ((1, 5, 8, 8),) * 3}, "latent_sample|profile"),
        ({"latents": ((1, 4, 8, 8),) * 3}, "the graph has latent_sample"),
        ({}, "profile|latent_sample"),
    ],
    ids=["falling", "channels", "name", "none"],
)
def test_an_impossible_profile_is_an_error(shapes: dict[str, object], said: str, tmp_path: Path) -> None:
    profile = msgspec.convert({"shapes": shapes}, Profile)
    with pytest.raises((UsageError, EngineError), match=said):
        build_plan(_job(tmp_path, profiles=(profile,)))
    assert not (tmp_path / f"{SMALL}.plan").exists()


class _Stop(Exception):  # noqa: N818 - it is not an error
    """Raised by a callback once the real builder is running."""


def _pid_of_child() -> int:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    return next(pid for pid, command in commands.items() if b"engines.build.worker" in command)


def _is_building(event: BuildEvent) -> bool:
    return event.share is not None


@pytest.mark.slow
def test_a_killed_child_is_an_error(tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(event: BuildEvent) -> None:
        if _is_building(event) and not killed:
            killed.append(_pid_of_child())
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises((EngineError, ResourceError), match="was killed by SIGKILL"):
        build_plan(_job(tmp_path, "unet"), progress=kill)
    assert [path.name for path in tmp_path.iterdir()] == ["unet.log"]


@pytest.mark.slow
def test_an_interrupt_ends_the_running_builder(tmp_path: Path) -> None:
    pids: list[int] = []

    def stop(event: BuildEvent) -> None:
        if _is_building(event):
            pids.append(_pid_of_child())
            raise _Stop

    with pytest.raises(_Stop):
        build_plan(_job(tmp_path, "unet"), progress=stop)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
    assert [path.name for path in tmp_path.iterdir()] == ["unet.log"]


@pytest.mark.slow
def test_the_builder_ends_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    """A killed parent cannot clean up: the child sees its stdin close while it runs TensorRT's code."""
    plan = tmp_path / "plan"
    plan.touch()
    command = [sys.executable, "-m", "sdxl_trt.engines.build.worker", str(plan)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as child:
        assert child.stdin
        assert child.stdout
        child.stdin.write(msgspec.json.encode(_job(tmp_path, "unet"), enc_hook=str) + b"\n")
        child.stdin.flush()
        for line in child.stdout:
            if msgspec.json.decode(line).get("share") is not None:
                break
        child.stdin.close()
        assert child.wait(60) == 1
        assert b'"made"' not in child.stdout.read()
    assert plan.stat().st_size == 0


def test_a_full_disk_is_a_resource_error(tmp_path: Path) -> None:
    """The worker writes to the file that it is told of: /dev/full."""
    command = [sys.executable, "-m", "sdxl_trt.engines.build.worker", "/dev/full"]
    given = msgspec.json.encode(_job(tmp_path), enc_hook=str) + b"\n"
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as child:
        assert child.stdin
        assert child.stdout
        child.stdin.write(given)
        child.stdin.flush()
        last = msgspec.json.decode(child.stdout.read().splitlines()[-1])
    assert last["type"] == "refused"
    assert last["error"] == "ResourceError"
    assert "No space left on device" in last["message"]
