"""The parent's side of a build: whatever its child does, it returns a complete plan or one error, and leaves no child.

The child is a substitute: each test writes its few lines, and it sends the same messages as the real one.
"""

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sdxl_trt.engines import errors
from sdxl_trt.engines.build import process as build
from sdxl_trt.engines.build.process import BuildEvent, BuildJob, build_plan
from sdxl_trt.engines.bundle.profile import Profile
from sdxl_trt.engines.errors import EngineError, ResourceError, UsageError

PRELUDE = """
import hashlib, json, os, signal, sys
job = json.loads(sys.stdin.readline())
def say(**message):
    sys.stdout.write(json.dumps(message) + "\\n")
    sys.stdout.flush()
def made(**changes):
    digest = hashlib.sha256(b"plan plan").hexdigest()
    return {"type": "made", "size": 9, "sha256": digest, "chunks": {"size": 16, "sha256": [digest]}, "activations": 3,
            "weights": 4, "streamable": 0, "parse_seconds": 0.5, "layers": 7} | changes
def write(data=b"plan plan"):
    with open(sys.argv[1], "r+b") as file:
        file.write(data)
def wait():
    sys.stdin.read()
"""
GOOD = "write(); say(**made())"
Job = Callable[..., BuildJob]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Return a function that makes a job whose child runs `code`."""
    modules = tmp_path / "modules"
    modules.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(modules))
    monkeypatch.setattr(build, "WORKER", "stand_in")

    def make(code: str, plan: Path = tmp_path / "plans/a.plan", log: Path = tmp_path / "plans/a.log") -> BuildJob:
        (modules / "stand_in.py").write_text(PRELUDE + code)
        (tmp_path / "plans").mkdir(exist_ok=True)
        profile = Profile(shapes={"sample": ((1, 4, 8, 8), (2, 4, 8, 8), (2, 4, 16, 16))})
        return BuildJob(
            component="unet", graph=tmp_path / "model.onnx", profiles=(profile,), flavour="tensorrt", plan=plan, log=log
        )

    return make


def _left(job: BuildJob) -> list[str]:
    return sorted(path.name for path in job.plan.parent.iterdir())


def test_a_plan_and_its_figures(job: Job) -> None:
    built = build_plan(job(GOOD))
    assert built.plan.read_bytes() == b"plan plan"
    assert (built.component, built.size, built.sha256) == ("unet", 9, hashlib.sha256(b"plan plan").hexdigest())
    assert (built.activations, built.weights, built.streamable, built.layers) == (3, 4, 0, 7)
    assert built.parse_seconds == 0.5
    assert built.seconds > 0
    assert built.peak_anonymous > 1 << 20
    assert built.peak_file > 1 << 20
    assert sorted(path.name for path in built.plan.parent.iterdir()) == ["a.log", "a.plan"]


def test_the_child_gets_the_job(job: Job) -> None:
    asked = job("sys.stderr.write(json.dumps(job)); " + GOOD)
    build_plan(asked)
    import msgspec

    assert msgspec.json.decode(asked.log.read_bytes(), type=BuildJob, dec_hook=lambda kind, v: kind(v)) == asked


def test_phases_are_reported_as_they_change(job: Job) -> None:
    told: list[BuildEvent] = []
    code = "say(type='phase', phase='parsing'); say(type='phase', phase='building', share=0.25); "
    build_plan(job(code + GOOD), progress=told.append)
    assert {event.component for event in told} == {"unet"}
    assert (told[-1].phase, told[-1].share) == ("building", 0.25)
    assert [event.seconds for event in told] == sorted(event.seconds for event in told)


def test_progress_continues_while_the_child_is_silent(job: Job) -> None:
    """The child sends one message and nothing more until it is killed; events keep coming."""
    told: list[BuildEvent] = []

    def note(event: BuildEvent) -> None:
        told.append(event)
        if [one.phase for one in told].count("building") == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(job("say(type='phase', phase='building'); wait()"), progress=note)
    assert told[-1].seconds > told[-2].seconds
    assert told[-1].resident > 1 << 20


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_an_interrupt_ends_the_child_and_leaves_nothing(job: Job) -> None:
    """The child ignores every signal that can be ignored."""
    told: list[BuildEvent] = []

    def interrupt(event: BuildEvent) -> None:
        told.append(event)
        if event.phase.isdigit():
            signal.raise_signal(signal.SIGINT)

    ignoring = "signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    asked = job(ignoring + "write(); say(type='phase', phase=str(os.getpid())); wait(); signal.pause()")
    asked.plan.write_bytes(b"the plan before")
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            build_plan(asked, progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert _gone(int(told[-1].phase))
    assert asked.plan.read_bytes() == b"the plan before"
    assert _left(asked) == ["a.log", "a.plan"]


def test_an_error_of_the_callback_ends_the_child(job: Job) -> None:
    told: list[int] = []

    def fail(event: BuildEvent) -> None:
        if event.phase.isdigit():
            told.append(int(event.phase))
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        build_plan(job("say(type='phase', phase=str(os.getpid())); wait()"), progress=fail)
    assert _gone(told[0])


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("say(**made())", "wrote 0 of 9 bytes"),
        ("say(**made(size=0))", "wrote 0 of 0 bytes"),
        ("write(b'plan'); say(**made())", "wrote 4 of 9 bytes"),
        ("write()", "ended without a result"),
        ("write(); say(type='phase', phase='writing')", "ended without a result"),
        (GOOD + "; sys.exit(3)", "ended with exit code 3"),
        ("raise ImportError('no such thing')", "ImportError: no such thing"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
    ],
)
def test_a_failed_build_raises_and_leaves_no_plan(code: str, said: str, job: Job) -> None:
    asked = job(code)
    with pytest.raises(EngineError, match=said) as caught:
        build_plan(asked)
    assert str(asked.log) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert _left(asked) == ["a.log"]


def test_a_crash_names_the_last_error_of_the_log(job: Job) -> None:
    code = "sys.stderr.write('[E] the cause\\n[I] chatter\\n'); sys.stderr.flush(); os.kill(os.getpid(), signal.SIGILL)"
    asked = job(code.replace("[E]", "[E] once\\n[E]"))
    with pytest.raises(EngineError, match=r"was killed by SIGILL \((the cause|Fatal Python error.*)\)"):
        build_plan(asked)
    assert "[E] the cause" in asked.log.read_text()


def test_a_kill_for_lack_of_memory_is_recognized(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    kills = iter((4, 5))
    monkeypatch.setattr(build, "_oom_kills", lambda: next(kills))
    with pytest.raises(ResourceError, match="ran out of memory"):
        build_plan(job("os.kill(os.getpid(), signal.SIGKILL)"))


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        (0xC0000005, EngineError, r"its process was ended by an access violation \(0xC0000005\) \(the log is empty\)"),
        (0xC0000135, EngineError, r"a missing DLL \(0xC0000135\)"),
        (0xC0000420, EngineError, r"was ended by Windows \(0xC0000420\)"),
        (0xC0000017, ResourceError, "this machine ran out of memory"),
        (0xC000012D, ResourceError, "this machine ran out of memory"),
    ],
)
def test_an_end_by_windows_is_named(code: int, kind: type[Exception], said: str, job: Job) -> None:
    """Windows returns the status with which it ends a process as its exit code."""
    asked = job("")
    asked.log.touch()
    with pytest.raises(kind, match=said):
        build._outcome(asked, None, code, killed=False)


@pytest.mark.parametrize("name", errors.__all__)
def test_a_refusal_raises_the_error_that_it_names(name: str, job: Job) -> None:
    kind = getattr(errors, name)
    expected = kind if isinstance(kind, type) else EngineError
    with pytest.raises(expected, match="because of that") as caught:
        build_plan(job(f"say(type='refused', error={name!r}, message='because of that')"))
    assert type(caught.value) is expected


def test_what_the_child_prints_is_in_the_log(job: Job) -> None:
    asked = job("print('noise'); print('{\"type\": \"other\"}', flush=True); " + GOOD)
    assert build_plan(asked).size == 9
    assert asked.log.read_text() == 'noise\n{"type": "other"}\n'


def test_the_working_directory_is_not_searched_for_modules(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = job("import planted_here")
    (asked.plan.parent / "planted_here.py").write_text("")
    monkeypatch.chdir(asked.plan.parent)
    with pytest.raises(EngineError, match="No module named 'planted_here'"):
        build_plan(asked)


@pytest.mark.parametrize("which", ["plan", "log"])
def test_a_missing_folder_is_named(which: str, job: Job, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no-such-folder"):
        build_plan(job(GOOD, **{which: tmp_path / "no-such-folder/a"}))


@pytest.mark.parametrize("own", [None, "7"])
def test_the_allocator_settings_can_be_overridden(own: str | None, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    if own:
        monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", own)
    asked = job("sys.stderr.write(os.environ['MALLOC_TRIM_THRESHOLD_']); " + GOOD)
    build_plan(asked)
    assert asked.log.read_text() == (own or "131072")
