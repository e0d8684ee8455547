"""The page fits narrow screens, can be read in both schemes and used from the keyboard, and is small."""

import re
from collections.abc import Callable
from typing import Any

import pytest

MOST_BYTES = 60_000
Open = Callable[..., Any]


@pytest.mark.parametrize("width", [320, 390, 1024])
def test_no_width_scrolls_sideways(open_page: Open, width: int) -> None:
    page = open_page(viewport={"width": width, "height": 844})
    page.watch.allowed.append("status of 400")
    sides = "[document.documentElement.scrollWidth, innerWidth]"
    found = [page.evaluate(sides)]
    page.visitor.fill("a " * 40 + "x" * 200, steps=6)
    page.click("#draw")
    page.wait_for_selector(".stage.drawing")
    found.append(page.evaluate(sides))
    page.visitor.drawn(1)
    page.click(".record summary")
    found.append(page.evaluate(sides))
    page.click("#sweep")
    page.visitor.drawn(4)
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
    page.visitor.draw()
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
    page.visitor.fill()
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
        page.visitor.drawn(count)
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
    page.locator(".about .prompt", has_text="a red star, 2").wait_for()  # the picture leaves the store first
    assert page.evaluate("document.activeElement.closest('#pictures') !== null")
    assert len(page.visitor.kept()) == 2


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
    page.visitor.draw()
    assert page.evaluate(NAMELESS) == []


def test_nothing_moves_for_those_who_ask_for_it(open_page: Open) -> None:
    page = open_page(reduced_motion="reduce")
    page.visitor.fill(steps=999)
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
