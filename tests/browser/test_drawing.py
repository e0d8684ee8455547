"""The page in a real browser draws, says what is drawn, cancels, and draws the same again."""

import base64
import json
import re
import time
import urllib.request
from collections.abc import Callable
from typing import Any

PROMPT = "a large red star on a blue background"
Same = Callable[[bytes, bytes], bool]


def by_curl(server: str, **settings: Any) -> bytes:
    """Return the picture that another client is given for the same settings."""
    request = urllib.request.Request(f"{server}/v1/images/generations", json.dumps(settings).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        return base64.b64decode(json.loads(answer.read())["data"][0]["b64_json"])


def test_a_picture_is_previewed_drawn_and_kept_with_its_record(page: Any, server: str, same_pixels: Same) -> None:
    page.visitor.fill(steps=60, size="128x128")
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector(".frame img:not([hidden])")
    told = page.get_attribute("[role=progressbar]", "aria-valuetext")
    assert re.fullmatch(r"(Base|Refiner), step \d+ of \d+|Handing over.*|Decoding", told), told
    page.visitor.drawn(1)
    page.wait_for_selector("#again")
    names, values = (page.locator(f".facts {tag}").all_inner_texts() for tag in ("dt", "dd"))
    facts = dict(zip(names, values, strict=True))
    assert (facts["Size"], facts["Steps"], facts["Seed"]) == ("128 × 128", "47 + 13", "7")
    page.click(".record summary")
    assert '"handoff_step": 47' in page.inner_text(".record pre")
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "a-large-red-star-on-a-blue-background-7.png"
    theirs = by_curl(server, prompt=PROMPT, steps=60, seed=7, size="128x128")
    assert same_pixels(download.value.path().read_bytes(), theirs)
    [item] = page.visitor.kept()
    assert item["record"]["prompt"] == PROMPT


def test_previews_come_while_it_is_drawn_and_differ(page: Any) -> None:
    page.evaluate("""() => {
      globalThis.seen = new Set();
      new MutationObserver(() => {
        const shown = document.querySelector('.drawing .frame img');
        if (shown?.src) globalThis.seen.add(shown.src);
      }).observe(document.getElementById('stage'), {subtree: true, attributes: true, childList: true});
    }""")
    page.visitor.draw(steps=40)
    assert page.evaluate("globalThis.seen.size") == 3


def test_the_handoff_says_who_takes_how_many_steps(page: Any) -> None:
    page.visitor.fill(steps=30)
    page.locator("#count-base", has_text="23").wait_for()
    assert page.inner_text("#count-refiner") == "7"
    page.locator("#handoff").fill("0.5")
    assert (page.inner_text("#count-base"), page.inner_text("#count-refiner")) == ("14", "16")
    page.locator(".switch").click()
    assert (page.inner_text("#count-base"), page.inner_text("#count-refiner")) == ("30", "0")
    assert page.locator("#handoff").is_disabled()
    page.visitor.draw(steps=4)
    [item] = page.visitor.kept()
    assert item["record"]["handoff_step"] is None
    assert item["split"] == [4, 0]


def test_scores_samplers_and_schedules_reach_the_picture(page: Any) -> None:
    page.locator("#score").fill("9.5")
    page.select_option("#sampler", "heun")
    page.select_option("#scheduler", "trailing")
    page.fill("#guidance", "3")
    page.fill("#negative", "a green ring")
    page.visitor.draw(steps=10)
    found = page.visitor.kept()[0]["record"]
    assert {name: found[name] for name in ("aesthetic_score", "sampler", "schedule", "guidance", "negative")} == {
        "aesthetic_score": 9.5, "sampler": "heun", "schedule": "trailing", "guidance": 3.0, "negative": "a green ring",
    }  # fmt: skip
    assert page.inner_text("#fine-says") == "4 changed"


def test_a_seed_that_a_browser_would_round_is_exact(page: Any, same_pixels: Same) -> None:
    page.visitor.draw(seed=str(2**64 - 1))
    assert page.locator(".facts dd", has_text=str(2**64 - 1)).count() == 1
    page.click("#again")
    page.visitor.drawn(2)
    one, other = page.visitor.kept()
    assert '"seed": 18446744073709551615,' in one["texts"]["sdxl-trt"]
    assert same_pixels(one["file"], other["file"])


def test_same_again_is_the_same_and_a_new_seed_is_not(page: Any, same_pixels: Same) -> None:
    page.visitor.draw(seed="")
    page.fill("#prompt", "something else")  # what is in the form does not matter
    page.click("#again")
    page.visitor.drawn(2)
    page.visitor.draw(seed="")
    new, again, first = page.visitor.kept()
    assert same_pixels(first["file"], again["file"])
    assert first["seed"] == again["seed"] != new["seed"]
    assert not same_pixels(first["file"], new["file"])


def test_esc_cancels_and_the_server_stops(page: Any, server: str) -> None:
    page.visitor.fill(steps=999)
    page.click("#draw")
    page.locator(".words", has_text="Base, step").wait_for()
    page.keyboard.press("Escape")
    page.wait_for_selector("#draw:not([disabled])")
    assert page.locator("#pictures button").count() == 0
    assert page.locator("#cancel").is_hidden()
    end = time.monotonic() + 20
    while page.request.get(f"{server}/metrics").text().count('trt_inflight_pictures{state="base"} 0.0') != 1:
        assert time.monotonic() < end, "the server goes on"
        time.sleep(0.1)  # another process tells us in no other way
    page.visitor.draw()
    assert len(page.visitor.kept()) == 1


def test_what_was_cancelled_can_be_drawn_again(page: Any) -> None:
    page.visitor.fill(steps=120)
    page.click("#draw")
    page.locator(".words", has_text="Base, step").wait_for()
    page.click("#cancel")
    page.wait_for_selector("#draw:not([disabled])")
    page.click("#draw")
    page.visitor.drawn(1)
    assert page.visitor.kept()[0]["record"]["steps"] == 120


def test_what_is_typed_before_the_server_answers_stays(page: Any) -> None:
    page.visitor.fill("what was there before")
    held: list[Any] = []
    page.route("**/page/facts", lambda route: held.append(route))  # noqa: PLW0108 - playwright takes no built-in
    with page.expect_request("**/page/facts"):
        page.reload(wait_until="commit")
    page.fill("#prompt", "early")
    page.keyboard.press("Control+Enter")  # too early, and no error
    held[0].continue_()
    page.wait_for_selector("main:not(.waits)")
    assert (page.input_value("#prompt"), page.input_value("#seed")) == ("early", "7")


def test_others_can_be_looked_at_meanwhile(page: Any) -> None:
    page.visitor.draw()
    page.visitor.fill(steps=999)
    page.click("#draw")
    page.wait_for_selector(".stage.drawing")
    page.click("#pictures button")
    page.wait_for_selector(".stage.picture")
    page.click("#watch")
    page.wait_for_selector(".stage.drawing")
    page.click("#cancel")
    page.wait_for_selector(".stage.picture")
