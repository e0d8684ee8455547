"""The page in a real browser: drawing, cancelling, the gallery, sweeps, start pictures, errors, keys, and looks."""

import base64
import io
import json
import re
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image, ImageChops

PROMPT = "a large red star on a blue background"
MOST_BYTES = 60_000
Open = Callable[..., Any]


def fill(page: Any, prompt: str = PROMPT, *, steps: int = 4, seed: str = "7", size: str = "64x64") -> None:
    width, height = size.split("x")
    for name, value in {"prompt": prompt, "steps": str(steps), "seed": seed, "width": width, "height": height}.items():
        page.fill(f"#{name}", value)


def draw(page: Any, prompt: str = PROMPT, **settings: Any) -> None:
    """Draw a picture, and wait until it is shown."""
    count = page.locator("#pictures button").count()
    fill(page, prompt, **settings)
    page.click("#draw")
    drawn(page, count + 1)


def drawn(page: Any, count: int) -> None:
    """Wait until the gallery has `count` pictures, and nothing is drawn."""
    page.wait_for_selector(f"#pictures button:nth-child({count})")
    page.wait_for_selector("#draw:not([disabled])")


KEPT = """async () => {
  const store = await import('/page/store.js');
  const text = async (blob) => {
    const bytes = new Uint8Array(await blob.arrayBuffer());
    let raw = '';
    for (const byte of bytes) raw += String.fromCharCode(byte);
    return btoa(raw);
  };
  return Promise.all((await store.all()).map(async (item) => ({...item, thumb: null, blob: await text(item.blob),
    start: item.start && await text(item.start)})));
}"""


def kept(page: Any) -> list[dict[str, Any]]:
    """Return the pictures that the browser keeps, the newest first, with their files as bytes."""
    return [{**item, "file": base64.b64decode(item["blob"])} for item in page.evaluate(KEPT)]


def pixels(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("RGB")


def equal(one: bytes, other: bytes) -> bool:
    return ImageChops.difference(pixels(one), pixels(other)).getbbox() is None


def record(item: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(item["texts"]["sdxl-trt"])
    return found


def by_curl(server: str, **settings: Any) -> bytes:
    """Return the picture that another client is given for the same settings."""
    request = urllib.request.Request(f"{server}/v1/images/generations", json.dumps(settings).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        return base64.b64decode(json.loads(answer.read())["data"][0]["b64_json"])


# ---------------------------------------------------------------- drawing


def test_a_picture_is_previewed_drawn_and_kept_with_its_record(page: Any, server: str) -> None:
    fill(page, steps=60, size="128x128")
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector(".frame img:not([hidden])")
    told = page.get_attribute("[role=progressbar]", "aria-valuetext")
    assert re.fullmatch(r"(Base|Refiner), step \d+ of \d+|Handing over.*|Decoding", told), told
    drawn(page, 1)
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
    assert equal(download.value.path().read_bytes(), theirs)
    [item] = kept(page)
    assert record(item)["prompt"] == PROMPT


def test_previews_come_while_it_is_drawn_and_differ(page: Any) -> None:
    page.evaluate("""() => {
      globalThis.seen = new Set();
      new MutationObserver(() => {
        const shown = document.querySelector('.drawing .frame img');
        if (shown?.src) globalThis.seen.add(shown.src);
      }).observe(document.getElementById('stage'), {subtree: true, attributes: true, childList: true});
    }""")
    draw(page, steps=40)
    assert page.evaluate("globalThis.seen.size") == 3


def test_the_handoff_says_who_takes_how_many_steps(page: Any) -> None:
    fill(page, steps=30)
    page.locator("#count-base", has_text="23").wait_for()
    assert page.inner_text("#count-refiner") == "7"
    page.locator("#handoff").fill("0.5")
    assert (page.inner_text("#count-base"), page.inner_text("#count-refiner")) == ("14", "16")
    page.locator(".switch").click()
    assert (page.inner_text("#count-base"), page.inner_text("#count-refiner")) == ("30", "0")
    assert page.locator("#handoff").is_disabled()
    draw(page, steps=4)
    [item] = kept(page)
    assert record(item)["handoff_step"] is None
    assert item["split"] == [4, 0]


def test_scores_samplers_and_schedules_reach_the_picture(page: Any) -> None:
    page.locator("#score").fill("9.5")
    page.select_option("#sampler", "heun")
    page.select_option("#scheduler", "trailing")
    page.fill("#guidance", "3")
    page.fill("#negative", "a green ring")
    draw(page, steps=10)
    found = record(kept(page)[0])
    assert {name: found[name] for name in ("aesthetic_score", "sampler", "schedule", "guidance", "negative")} == {
        "aesthetic_score": 9.5, "sampler": "heun", "schedule": "trailing", "guidance": 3.0, "negative": "a green ring",
    }  # fmt: skip
    assert page.inner_text("#fine-says") == "4 changed"


def test_a_seed_that_a_browser_would_round_is_exact(page: Any) -> None:
    draw(page, seed=str(2**64 - 1))
    assert page.locator(".facts dd", has_text=str(2**64 - 1)).count() == 1
    page.click("#again")
    drawn(page, 2)
    one, other = kept(page)
    assert '"seed": 18446744073709551615,' in one["texts"]["sdxl-trt"]
    assert equal(one["file"], other["file"])


def test_same_again_is_the_same_and_a_new_seed_is_not(page: Any) -> None:
    draw(page, seed="")
    page.fill("#prompt", "something else")  # what is in the form does not matter
    page.click("#again")
    drawn(page, 2)
    draw(page, seed="")
    new, again, first = kept(page)
    assert equal(first["file"], again["file"])
    assert first["seed"] == again["seed"] != new["seed"]
    assert not equal(first["file"], new["file"])


def test_esc_cancels_and_the_server_stops(page: Any, server: str) -> None:
    fill(page, steps=999)
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
    draw(page)
    assert len(kept(page)) == 1


def test_what_was_cancelled_can_be_drawn_again(page: Any) -> None:
    fill(page, steps=120)
    page.click("#draw")
    page.locator(".words", has_text="Base, step").wait_for()
    page.click("#cancel")
    page.wait_for_selector("#draw:not([disabled])")
    page.click("#draw")
    drawn(page, 1)
    assert record(kept(page)[0])["steps"] == 120


def test_what_is_typed_before_the_server_answers_stays(page: Any) -> None:
    fill(page, "what was there before")
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
    draw(page)
    fill(page, steps=999)
    page.click("#draw")
    page.wait_for_selector(".stage.drawing")
    page.click("#pictures button")
    page.wait_for_selector(".stage.picture")
    page.click("#watch")
    page.wait_for_selector(".stage.drawing")
    page.click("#cancel")
    page.wait_for_selector(".stage.picture")


# ---------------------------------------------------------------- the gallery


def test_the_gallery_survives_a_reload_and_can_be_emptied(page: Any) -> None:
    draw(page, "a green ring on a white background")
    draw(page, "an orange cross on a black background")
    before = kept(page)
    page.reload()
    page.wait_for_selector("#again")
    assert kept(page) == before
    assert page.input_value("#prompt") == "an orange cross on a black background"
    page.wait_for_selector("#pictures img")
    page.click("#delete")
    page.wait_for_selector("#toast button")
    assert [item["settings"]["prompt"] for item in kept(page)] == ["a green ring on a white background"]
    page.click("#toast button")
    page.wait_for_selector("#pictures button:nth-child(2)")
    assert kept(page) == before
    page.click("#clear")
    page.click("text=Keep them")
    assert len(kept(page)) == 2
    page.click("#clear")
    page.click("#ask-yes")
    page.wait_for_selector(".stage.empty")
    page.reload()
    page.wait_for_selector(".stage.empty .examples")
    assert kept(page) == []


def test_the_gallery_is_bounded(page: Any) -> None:
    found = page.evaluate("""async () => {
      const {tooMany, MOST} = await import('/page/store.js');
      const items = (count, size) => Array.from({length: count}, () => ({blob: {size}, start: null}));
      return [MOST, ...[items(130, 1), items(9, 2 ** 26), items(1, 2 ** 30)].map((each) => tooMany(each).length)];
    }""")
    assert found == [120, 10, 5, 0]


def test_settings_of_a_picture_come_back_into_the_form(page: Any) -> None:
    page.locator("#handoff").fill("0.6")
    draw(page, steps=10, seed="3")
    fill(page, "something else", steps=5, seed="", size="128x128")
    page.locator("#handoff").fill("0.9")
    page.click("#use")
    assert [page.input_value(f"#{name}") for name in ("prompt", "steps", "seed", "width", "handoff")] == [
        PROMPT, "10", "3", "64", "0.6",
    ]  # fmt: skip


# ---------------------------------------------------------------- sweeps and start pictures


def test_a_sweep_is_a_row_with_one_seed_and_labels(page: Any) -> None:
    draw(page, steps=10, seed="5")
    page.click("#sweep")
    drawn(page, 6)
    page.wait_for_selector(".stage.swept:not(.drawing)")
    assert page.locator(".row figcaption b").all_inner_texts() == [
        "Handoff 60 %", "Handoff 70 %", "Handoff 80 %", "Handoff 90 %", "Base alone"
    ]  # fmt: skip
    assert page.locator(".row figcaption .hint").all_inner_texts() == ["6 + 4", "7 + 3", "8 + 2", "9 + 1", "10"]
    items = kept(page)
    assert {item["seed"] for item in items} == {"5"}
    assert [record(item)["handoff_step"] for item in items] == [6, 7, 8, 9, None, 8]
    assert equal(items[2]["file"], items[5]["file"])
    assert not equal(items[0]["file"], items[4]["file"])
    page.locator(".row button.frame").nth(1).click()
    page.wait_for_selector(".stage.picture")
    page.reload()
    page.wait_for_selector("#see-sweep")
    page.click("#see-sweep")
    assert page.locator(".row figcaption b").count() == 5


def picture(width: int = 64, height: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (240, 220, 40)).save(file, "PNG")
    return file.getvalue()


def test_a_picture_can_be_chosen_to_start_from(page: Any) -> None:
    page.set_input_files("#file", {"name": "yellow.png", "mimeType": "image/png", "buffer": picture()})
    page.wait_for_selector("#started")
    assert page.inner_text("#start-size") == "64 × 64 pixels"
    page.locator("#strength").fill("0.5")
    draw(page, steps=10)
    [item] = kept(page)
    assert base64.b64decode(item["start"]) == picture()
    assert (record(item)["strength"], item["split"]) == (0.5, [3, 2])
    page.click("#start-remove")
    page.click("#again")
    drawn(page, 2)
    one, other = kept(page)
    assert equal(one["file"], other["file"])
    assert page.locator("#sweep").count() == 0


DROP = """([kind, text]) => {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], 'a.png', {type: 'image/png'}));
  const event = kind === 'paste' ? new ClipboardEvent('paste', {clipboardData: transfer, bubbles: true})
    : new DragEvent('drop', {dataTransfer: transfer, bubbles: true, cancelable: true});
  document.body.dispatchEvent(event);
}"""


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_a_picture_can_be_pasted_or_dropped(page: Any, kind: str) -> None:
    page.evaluate(DROP, [kind, base64.b64encode(picture(96, 64)).decode()])
    page.locator("#start-size", has_text="96 × 64 pixels").wait_for()


def test_what_is_no_picture_is_said_beside_it(page: Any) -> None:
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.locator("#image-wrong", has_text="no picture that can be read").wait_for()
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": picture(5000, 4000)})
    page.locator("#image-wrong", has_text="5000 × 4000 pixels; this server takes 16777216").wait_for()
    assert page.locator("#started").is_hidden()


def test_a_drawn_picture_can_be_the_start(page: Any) -> None:
    draw(page)
    page.click("#start-from")
    page.wait_for_selector("#started")
    draw(page, steps=5)
    assert base64.b64decode(kept(page)[0]["start"]) == kept(page)[1]["file"]


# ---------------------------------------------------------------- errors and keys


def test_a_wrong_value_is_shown_where_it_is_and_can_be_mended(page: Any) -> None:
    page.watch.allowed.append("status of 400")
    fill(page, size="100x64")
    page.click("#draw")
    page.locator("#size-wrong", has_text="multiples of 64").wait_for()
    assert page.get_attribute("#width", "aria-invalid") == "true"
    assert page.get_attribute("#width", "aria-errormessage") == "size-wrong"
    assert "100x64 was given" in page.inner_text(".failed .message")
    page.click("text=Use 128 × 64")
    drawn(page, 1)
    assert page.locator("#size-wrong").is_hidden()
    assert kept(page)[0]["width"] == 128


@pytest.mark.parametrize(("name", "value", "says"), [
    ("prompt", " ", "Say what the picture shows"), ("seed", "-4", "whole number"), ("steps", "", "Give a number"),
    ("seed", str(2**64), "choose -1 to 18446744073709551615"), ("steps", "5000", "choose 1 to"),
])  # fmt: skip
def test_a_refused_field_says_why(page: Any, name: str, value: str, says: str) -> None:
    page.watch.allowed.append("status of 400")
    fill(page)
    page.fill(f"#{name}", value)
    page.click("#draw")
    page.locator(f"#{name}-wrong", has_text=says).wait_for()
    page.fill(f"#{name}", "5")
    assert page.locator(f"#{name}-wrong").is_hidden()


def test_a_server_that_is_gone_is_said_and_asked_again(page: Any) -> None:
    page.watch.allowed.append("ERR_INTERNET_DISCONNECTED")
    fill(page)
    page.context.set_offline(True)
    page.click("#draw")
    page.locator(".failed h2", has_text="does not answer").wait_for()
    page.context.set_offline(False)
    page.click(".failed button")
    drawn(page, 1)


def test_a_key_is_asked_for_and_forgotten(open_page: Open, key_server: str) -> None:
    page = open_page(key_server, ready=False)
    page.watch.allowed.append("status of 401")
    page.wait_for_selector("#key-dialog[open]")
    assert page.evaluate("document.activeElement.id") == "key"
    page.fill("#key", "sk-wrong")
    page.keyboard.press("Enter")
    page.locator("#key-says", has_text="did not take this key").wait_for()
    page.fill("#key", "sk-1")
    page.keyboard.press("Enter")
    page.wait_for_selector("main:not(.waits)")
    draw(page)
    assert "sk-1" not in page.evaluate("JSON.stringify({...localStorage, ...sessionStorage}) + document.cookie")
    page.reload()
    page.wait_for_selector("#key-dialog[open]")
    page.click("#key-cancel")
    page.locator(".failed h2", has_text="wants a key").wait_for()


def test_nothing_that_the_server_says_is_markup(open_page: Open, server: str) -> None:
    page = open_page()
    page.watch.allowed.append("status of 429")
    text = "<img src=x onerror=alert(1)> full"
    page.route("**/v1/images/generations", lambda route: route.fulfill(
        status=429, headers={"Retry-After": "7"}, json={"error": {"message": text, "code": "queue_full"}}))  # fmt: skip
    fill(page, "<b>bold</b>")
    page.click("#draw")
    page.locator(".failed .message", has_text=text).wait_for()
    page.locator(".failed .hint", has_text="There may be a place in").wait_for()
    page.unroute("**/v1/images/generations")
    page.click(".failed button")
    drawn(page, 1)
    assert page.inner_text(".about .prompt") == "<b>bold</b>"


# ---------------------------------------------------------------- looks and keys


@pytest.mark.parametrize("width", [320, 390, 1024])
def test_no_width_scrolls_sideways(open_page: Open, width: int) -> None:
    page = open_page(viewport={"width": width, "height": 844})
    page.watch.allowed.append("status of 400")
    sides = "[document.documentElement.scrollWidth, innerWidth]"
    found = [page.evaluate(sides)]
    fill(page, "a " * 40 + "x" * 200, steps=6)
    page.click("#draw")
    page.wait_for_selector(".stage.drawing")
    found.append(page.evaluate(sides))
    drawn(page, 1)
    page.click(".record summary")
    found.append(page.evaluate(sides))
    page.click("#sweep")
    drawn(page, 4)
    page.wait_for_selector(".stage.swept:not(.drawing)")
    found.append(page.evaluate(sides))
    page.fill("#width", "1")
    page.click("#draw")
    page.wait_for_selector(".failed")
    found.append(page.evaluate(sides))
    assert [wide for wide, inner in found if wide > inner] == []


CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = (c) => c.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const under = (e) => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor);
    if (c[3] > 250) return c; } return [255, 255, 255, 255]; };
  return [...document.querySelectorAll('body *')].filter((e) => e.checkVisibility()
      && !e.closest('.off, .skip, svg, :disabled')
      && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()))
    .map((e) => { const [a, b] = [light(rgba(getComputedStyle(e).color)), light(under(e))].sort((x, y) => y - x);
      return [e.textContent.trim().slice(0, 30), (a + 0.05) / (b + 0.05)]; }).filter(([, ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(open_page: Open, scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    page.watch.allowed.append("status of 400")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 17, 20)"
    assert dark == (scheme == "dark")
    assert page.evaluate(CONTRAST) == []
    draw(page)
    assert page.evaluate(CONTRAST) == []
    page.fill("#width", "1")
    page.click("#draw")
    page.wait_for_selector(".failed")
    assert page.evaluate(CONTRAST) == []


def test_the_other_scheme_is_one_click_away_and_stays(open_page: Open) -> None:
    page = open_page(color_scheme="light")
    assert page.get_attribute("#theme", "aria-label") == "Switch to dark"
    page.click("#theme")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(17, 17, 20)"
    page.reload()
    page.wait_for_selector("main:not(.waits)")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == paper
    assert page.get_attribute("#theme", "aria-label") == "Switch to light"


def test_everything_can_be_done_from_the_keyboard(page: Any) -> None:
    fill(page)
    page.reload()
    page.wait_for_selector("main:not(.waits)")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.id") == "prompt"
    for count in (1, 2, 3):
        page.keyboard.press("Control+A")
        page.keyboard.type(f"a red star, {count}")
        page.keyboard.press("Control+Enter")
        drawn(page, count)
    assert page.evaluate("document.activeElement.id") == "prompt"
    shown = page.locator(".about .prompt")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("ArrowRight")
    assert shown.inner_text() == "a red star, 2"
    page.keyboard.press("ArrowLeft")
    assert shown.inner_text() == "a red star, 3"
    page.locator("#pictures [tabindex='0']").focus()
    page.keyboard.press("End")
    assert shown.inner_text() == "a red star, 1"
    page.keyboard.press("Delete")
    assert shown.inner_text() == "a red star, 2"
    assert page.evaluate("document.activeElement.closest('#pictures') !== null")
    assert len(kept(page)) == 2


def test_the_handoff_is_set_from_the_keyboard(page: Any) -> None:
    page.locator("#handoff").focus()
    page.keyboard.press("ArrowLeft")
    assert page.input_value("#handoff") == "0.79"
    assert re.match(r"79 %: base \d+, refiner \d+ steps", page.get_attribute("#handoff", "aria-valuetext"))


NAMELESS = """() => [...document.querySelectorAll('button, input, select, textarea, a, dialog, [role=progressbar]')]
  .filter((e) => !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.labels?.length
    || e.textContent.trim() || e.querySelector('img[alt]')?.alt)).map((e) => e.outerHTML.slice(0, 80))"""


def test_every_control_has_a_name(page: Any) -> None:
    assert page.evaluate(NAMELESS) == []
    draw(page)
    assert page.evaluate(NAMELESS) == []


def test_nothing_moves_for_those_who_ask_for_it(open_page: Open) -> None:
    page = open_page(reduced_motion="reduce")
    fill(page, steps=999)
    page.click("#draw")
    page.locator(".words", has_text="Base, step").wait_for()
    assert page.evaluate("document.getAnimations().length") == 0
    page.click("#cancel")
    page.wait_for_selector("#draw:not([disabled])")


def test_the_page_is_small_and_its_own(open_page: Open, server: str) -> None:
    page = open_page(ready=False)
    sizes: list[int] = []
    page.on("requestfinished", lambda request: sizes.append(sum(request.sizes()[name] for name in (
        "responseBodySize", "responseHeadersSize"))))  # fmt: skip
    page.reload()
    page.wait_for_selector("main:not(.waits)")
    page.wait_for_load_state("networkidle")
    assert len(sizes) > 10
    assert sum(sizes) < MOST_BYTES
