"""Lists: what their lines ask for, what is there already, and what the actors draw."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.engines import CorruptError, UsageError
from sdxl_trt.runtime import Request
from sdxl_trt.runtime.images import SETTINGS, read_texts
from sdxl_trt.server.options import Options
from sdxl_trt.server.ray import open_ingress
from sdxl_trt.server.ray.lists import entries
from sdxl_trt.server.ray.lists.entries import Entry, draw_list, entries_of, missing
from sdxl_trt.server.ray.lists.stages import Base, Failed, Files, Refiner, Whole

SMALL = Request("a red star", steps=4, width=64, height=64, seed=5, handoff=0.5)
Far = Any


def _listed(folder: Path, *lines: str) -> list[Entry]:
    path = folder / "prompts.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return entries_of(path, Options(lora_dir=folder))


def test_a_line_is_a_prompt_or_settings(tmp_path: Path) -> None:
    found = _listed(tmp_path, "# of May", "", "a red star", '{"prompt": "a fox", "steps": 9, "seed": 3, "count": 2}')
    assert [(each.number, each.request.prompt, each.request.steps) for each in found] == [
        (1, "a red star", 30), (2, "a fox", 9),
    ]  # fmt: skip
    assert (found[1].request.seed, found[1].request.count, found[1].request.lora_dir) == (3, 2, tmp_path)
    assert [path.name for path in found[1].paths(tmp_path, 2)] == ["000002-0.png", "000002-1.png"]


def test_a_line_without_a_seed_has_the_same_one_in_every_run(tmp_path: Path) -> None:
    first = [each.request.seed for each in _listed(tmp_path, "a star", "a fox", "a star")]
    again = [each.request.seed for each in _listed(tmp_path, "a fox", "a star", "a star")]
    assert len({*first}) == 3
    assert {*first} == {*again}
    assert first[0] == again[1]


@pytest.mark.parametrize("line", ['{"prompt": "a", "step": 3}', '{"steps": "many"}', '{"prompt": ', "{a|b}"])
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(UsageError, match=r"prompts.txt: prompt 2: .*trt-generate --schema lists the settings"):
        _listed(tmp_path, "a star", line)


def test_a_request_that_cannot_be_drawn_is_refused_before_anything_is(tmp_path: Path) -> None:
    found = _listed(tmp_path, '{"prompt": "a", "width": 64, "height": 72}')
    with pytest.raises(UsageError, match="prompt 1: "):
        missing(found, tmp_path, open_ingress(Options()))


def _written(far: Far, entry: Entry, folder: Path) -> None:
    for path, picture in zip(
        entry.paths(folder, entry.request.count or 1), far.base.generate(entry.request), strict=True
    ):
        picture.save(path)


def test_a_whole_picture_with_its_record_is_not_drawn_again(far: Far, tmp_path: Path) -> None:
    found = [Entry(number, replace(SMALL, seed=number, count=2 if number == 3 else None)) for number in range(1, 6)]
    ingress = open_ingress(Options())
    assert missing(found, tmp_path, ingress) == found
    for entry in found:
        _written(far, entry, tmp_path)
    assert missing(found, tmp_path, ingress) == []
    (tmp_path / "000001.png").write_bytes((tmp_path / "000001.png").read_bytes()[:-30])
    (tmp_path / "000003-1.png").unlink()
    (tmp_path / "000004.png").write_bytes((tmp_path / "000005.png").read_bytes())  # another seed's
    assert [entry.number for entry in missing(found, tmp_path, ingress)] == [1, 3, 4]
    changed = [replace(each, request=replace(each.request, steps=5)) for each in found]
    assert missing(changed, tmp_path, ingress) == changed


def test_a_cached_picture_is_there_though_only_drawing_tells_its_full_steps(far: Far, tmp_path: Path) -> None:
    found = [Entry(1, replace(SMALL, steps=9, cache=2))]
    _written(far, found[0], tmp_path)
    assert json.loads(read_texts(found[0].paths(tmp_path, 1)[0])[SETTINGS])["full_steps"] < 9
    assert missing(found, tmp_path, open_ingress(Options())) == []


def test_the_actors_draw_what_one_device_draws(far: Far) -> None:
    requests = [SMALL, replace(SMALL, handoff=None), replace(SMALL, seed=9, sampler="euler_ancestral", count=2)]
    values = [pickle.dumps(request) for request in requests]
    split = Refiner(Options(), lambda _: far.refiner)(Base(Options(), lambda _: far.base)(values))
    together = Whole(Options(), lambda _: far.base)(values)
    for request, one, other in zip(requests, split, together, strict=True):
        apart, whole = pickle.loads(one), pickle.loads(other)
        assert isinstance(apart, Files)
        assert apart == whole
        pictures = [*far.base.generate(request)]
        texts = [read_texts(data)[SETTINGS] for data in apart.pictures]
        assert [json.loads(text) for text in texts] == [json.loads(json.dumps(each.metadata)) for each in pictures]


def test_one_request_that_fails_fails_alone(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    start = far.base.start

    def refuse(request: Request, *more: Any) -> Any:
        if request.seed == 2:
            raise CorruptError("a.safetensors: changed while it was read")
        return start(request, *more)

    monkeypatch.setattr(far.base, "start", refuse)
    values = [pickle.dumps(replace(SMALL, seed=seed)) for seed in (1, 2, 3)]
    left = Base(Options(), lambda _: far.base)(values)
    ended = [pickle.loads(value) for value in Refiner(Options(), lambda _: far.refiner)(left)]
    assert [type(each) for each in ended] == [Files, Failed, Files]
    assert type(ended[1].error) is CorruptError


def test_the_end_of_a_list_is_a_summary_and_the_first_error(
    far: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        json.dumps({"prompt": "a star", "steps": 4, "width": 64, "height": 64, "seed": seed}) for seed in (1, 2, 3)
    ]
    found, out = _listed(tmp_path, *lines), tmp_path / "out" / "of" / "it"
    out.mkdir(parents=True)
    _written(far, found[0], out)

    def drawn(requests: Any, *_: Any) -> Any:
        assert [*requests] == [2, 3]
        values = [pickle.dumps(request) for request in requests.values()]
        (first, _) = Whole(Options(), lambda _: far.base)(values)
        yield 2, pickle.loads(first)
        yield 3, Failed(CorruptError("NaN"))

    monkeypatch.setattr(entries, "drawn", drawn)
    with pytest.raises(CorruptError, match="prompt 3 and 0 others failed: NaN; the same command draws them again"):
        draw_list(Options(), None, tmp_path / "prompts.txt", out, lambda _: far.base)  # type: ignore[arg-type]
    told = capsys.readouterr().out.splitlines()
    assert told == [str(out / "000002.png"), "3 prompts: 1 drawn, 1 were there, 1 failed"]
    assert [entry.number for entry in missing(found, out, open_ingress(Options()))] == [3]
