"""The page's files and what it may offer: by table, within its policy, and equal to what the server itself uses."""

import asyncio
import gzip
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI

from sdxl_trt.engines.bundle import Range, read_bundle
from sdxl_trt.engines.plans import PlanLimits
from sdxl_trt.mini import bundle_path
from sdxl_trt.runtime import Request
from sdxl_trt.runtime.request import SAMPLERS, resolve_request
from sdxl_trt.server import Options
from sdxl_trt.server.http import Gate, add_handlers
from sdxl_trt.server.openai.body import Sizes, read_asked
from sdxl_trt.server.page import router
from sdxl_trt.server.page.facts import FRACTIONS, facts
from sdxl_trt.server.page.routes import FILES, FOLDER

BUNDLE = read_bundle(bundle_path())
MANIFEST = BUNDLE.manifest
POLICY = "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'"
KEY = {"Authorization": "Bearer sk-1"}
MOST_BYTES = 60_000
PLAN = PlanLimits(height=Range(min=512, opt=1024, max=1536), width=Range(min=512, opt=1024, max=1536), pictures=1,
                  tokens=Range(min=77, opt=77, max=77))  # fmt: skip
Ask = Callable[..., httpx.Response]


def served(options: Options | None = None) -> Ask:
    """Return what sends one request to the page of a server with `options`."""
    options = options or Options()
    app = FastAPI()
    app.state.desk = SimpleNamespace(pipeline=SimpleNamespace(manifest=MANIFEST, pool=SimpleNamespace(limits=None)))
    app.include_router(router(options))
    app.add_middleware(Gate, options=options)
    add_handlers(app, options)

    def ask(path: str, method: str = "GET", **headers: str) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8188") as client:
                return await client.request(method, path, headers=headers)

        return asyncio.run(send())

    return ask


@pytest.fixture(scope="module")
def ask() -> Ask:
    return served()


PATHS = ["/", *(f"/page/{name}" for name in FILES if name != "index.html")]


@pytest.mark.parametrize("path", PATHS)
def test_a_file_is_served_with_its_type_and_policy(ask: Ask, path: str) -> None:
    answer = ask(path)
    name = path.rpartition("/")[2] or "index.html"
    assert answer.status_code == 200
    assert answer.content == (FOLDER / name).read_bytes()
    assert answer.headers["content-type"] == FILES[name]
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-cache"
    head = ask(path, "HEAD")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == answer.headers["content-length"]


@pytest.mark.parametrize("packing", ["gzip", "identity"])
def test_a_file_that_the_browser_has_is_not_sent_again(ask: Ask, packing: str) -> None:
    accepted = {"Accept-Encoding": packing}
    tag = ask("/page/app.js", **accepted).headers["etag"]
    again = ask("/page/app.js", **accepted, **{"If-None-Match": f'"other", W/{tag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert ask("/page/app.js", **accepted, **{"If-None-Match": '"other"'}).status_code == 200
    assert ask("/page/app.js").headers["vary"] == "Accept-Encoding"


def test_the_whole_page_is_small() -> None:
    sent = {name: len(gzip.compress((FOLDER / name).read_bytes())) for name in FILES}
    assert sum(sent.values()) < MOST_BYTES, sent


def test_the_table_names_every_file_and_nothing_else_is_served(ask: Ask) -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(FILES)
    for path in ("/page/", "/page/index.html", "/page/../cli.py", "/page/%2e%2e/routes.py", "/page/..%2froutes.py",
                 "/page/static/app.js", "/page/routes.py", "/page/app.js/", "/page/app.js%00"):  # fmt: skip
        assert ask(path).status_code in (404, 307), path


def test_the_icon_that_browsers_ask_for_is_no_error(ask: Ask) -> None:
    assert [ask("/favicon.ico", method).status_code for method in ("GET", "HEAD")] == [204, 204]
    assert ask("/", "POST").status_code == 405


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_asks_for_nothing_elsewhere_and_has_nothing_inline(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert re.findall(r"(?:https?:)?//[\w.-]+\.\w+|(?<!#)\burl\(|@import|@font-face", strip_names(text)) == []
    assert re.findall(r"\bon\w+=\"|\bstyle=\"|<style|javascript:|setAttribute\('style'", text) == []
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text) == []
    if name == "index.html":
        scripts = re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)
        assert scripts == [""]


def strip_names(text: str) -> str:
    """Return `text` without the name of SVG's vocabulary, which is looked up nowhere."""
    return text.replace("http://www.w3.org/2000/svg", "")


def test_every_module_and_symbol_that_the_page_names_is_there() -> None:
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    scripts = {name: (FOLDER / name).read_text(encoding="utf-8") for name in FILES if name.endswith(".js")}
    ids = re.findall(r'\bid="([\w-]+)"', html)
    assert len(ids) == len(set(ids))
    named = {name for text in scripts.values() for name in re.findall(r"\$\('([\w-]+)'\)", text)}
    assert named <= set(ids)
    assert set(re.findall(r'(?:for|aria-labelledby|aria-describedby)="([\w-]+)"', html)) <= set(ids)
    assert set(re.findall(r'href="#(i-\w+)"', html)) <= set(ids)
    assert {name for text in scripts.values() for name in re.findall(r"from '\./([\w.]+)'", text)} <= set(scripts)
    assert {f"/page/{name}" for name in scripts} == set(re.findall(r'(?:href|src)="(/page/\w+\.js)"', html))


# ---------------------------------------------------------------- what the page may offer


def test_what_is_offered_is_what_the_runtime_and_the_api_have(ask: Ask) -> None:
    told = ask("/page/facts").json()
    usual, resolved = Request(), resolve_request(Request("a"), MANIFEST)
    sizes = Sizes.of(MANIFEST, None, Options().max_pixels, refined=True)
    assert told["samplers"] == {"usual": resolved.request.sampler, "choices": [*SAMPLERS]}
    assert told["steps"]["usual"] == usual.steps
    assert told["guidance"]["usual"] == usual.guidance
    assert (told["score"]["usual"], told["score"]["negative"]) == (6.0, 2.5)
    assert told["sizes"]["multiple"] == sizes.multiple
    assert told["sizes"]["usual"] == f"{resolved.width}x{resolved.height}"
    assert told["models"] == {"base": "base", "refiner": "refiner"}
    assert resolve_request(Request("a", handoff=told["handoff"]["usual"]), MANIFEST).cut == resolved.cut
    assert int(told["seed"]["high"]) == 2**64 - 1
    for schedule in told["schedules"]["choices"]:
        resolve_request(Request("a", schedule=schedule, steps=5), MANIFEST)


def test_every_size_that_is_offered_is_taken() -> None:
    for limits in (None, PLAN):
        offered = facts(MANIFEST, limits, Options())["sizes"]
        sizes = Sizes.of(MANIFEST, limits, Options().max_pixels, refined=True)
        assert offered["usual"] == offered["choices"][0]
        for size in offered["choices"]:
            asked = read_asked({"prompt": "a", "size": size}).size
            assert asked is not None
            assert sizes.takes(asked), size
    assert facts(MANIFEST, PLAN, Options())["sizes"]["choices"] == ["1024x1024", "1152x896", "1280x832", "1344x768",
                                                                   "896x1152", "832x1280", "768x1344"]  # fmt: skip


def test_a_bundle_without_a_refiner_has_no_handoff_and_no_score() -> None:
    told = facts(msgspec.structs.replace(MANIFEST, refiner=None), None, Options())
    assert (told["handoff"], told["score"], told["models"]["refiner"]) == (None, None, None)


def test_loras_are_offered_by_the_names_that_requests_find(tmp_path: Path) -> None:
    (tmp_path / "styles").mkdir()
    for name in ("b.safetensors", "styles/a.safetensors", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "b.safetensors")
    options = Options(lora_dir=tmp_path)
    assert served(options)("/page/facts").json()["loras"] == ["b", "styles/a"]


@pytest.mark.parametrize("query", ["steps=30", "steps=12&sampler=heun", "steps=9&scheduler=trailing%2Bkarras"])
def test_the_steps_of_each_handoff_are_those_that_are_drawn(ask: Ask, query: str) -> None:
    table = ask(f"/page/steps?{query}").json()
    stated: dict[str, Any] = dict(pair.split("=") for pair in query.replace("%2B", "+").split("&"))
    stated = {"steps": int(stated["steps"]), "sampler": stated.get("sampler", "auto"),
              "schedule": stated.get("scheduler", "")}  # fmt: skip
    assert (table["total"], table["first"], len(table["cuts"])) == (stated["steps"], 0, len(FRACTIONS))
    for percent in (20, 50, 80):
        drawn = resolve_request(Request("a", handoff=percent / 100, **stated), MANIFEST)
        assert table["cuts"][FRACTIONS.index(percent / 100)] == drawn.cut


def test_a_picture_to_start_from_stands_for_the_first_steps(ask: Ask) -> None:
    assert ask("/page/steps?steps=20&strength=0.25").json()["first"] == 15
    assert ask("/page/steps?steps=20&strength=1").json()["first"] == 0


@pytest.mark.parametrize("query", ["steps=0", "steps=x", "sampler=best", "strength=2", "scheduler=a", "steps=999999"])
def test_steps_that_cannot_be_drawn_are_refused(ask: Ask, query: str) -> None:
    answer = ask(f"/page/steps?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_the_page_comes_without_a_key_and_what_it_offers_with_one() -> None:
    ask = served(Options(keys=frozenset({"sk-1"})))
    assert [ask(path).status_code for path in PATHS] == [200] * len(PATHS)
    for path in ("/page/facts", "/page/steps?steps=4"):
        refused = ask(path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert refused.headers["www-authenticate"].startswith("Bearer")
        assert ask(path, **KEY).status_code == 200
    opened = served(Options(keys=frozenset({"sk-1"}), open_apis=frozenset({"openai"})))
    assert opened("/page/facts").status_code == 200
