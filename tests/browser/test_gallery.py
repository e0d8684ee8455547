"""The page's gallery keeps pictures, forgets them, and gives their settings back; sweeps are rows of it."""

from collections.abc import Callable
from typing import Any

PROMPT = "a large red star on a blue background"
Same = Callable[[bytes, bytes], bool]


def test_the_gallery_survives_a_reload_and_can_be_emptied(page: Any) -> None:
    page.visitor.draw("a green ring on a white background")
    page.visitor.draw("an orange cross on a black background")
    before = page.visitor.kept()
    page.reload()
    page.wait_for_selector("#again")
    assert page.visitor.kept() == before
    assert page.input_value("#prompt") == "an orange cross on a black background"
    page.wait_for_selector("#pictures img")
    page.click("#delete")
    page.wait_for_selector("#toast button")
    assert [item["settings"]["prompt"] for item in page.visitor.kept()] == ["a green ring on a white background"]
    page.click("#toast button")
    page.wait_for_selector("#pictures button:nth-child(2)")
    assert page.visitor.kept() == before
    page.click("#clear")
    page.click("text=Keep them")
    assert len(page.visitor.kept()) == 2
    page.click("#clear")
    page.click("#ask-yes")
    page.wait_for_selector(".stage.empty")
    page.reload()
    page.wait_for_selector(".stage.empty .examples")
    assert page.visitor.kept() == []


def test_the_gallery_is_bounded(page: Any) -> None:
    found = page.evaluate("""async () => {
      const {tooMany, MOST} = await import('/page/store.js');
      const items = (count, size) => Array.from({length: count}, () => ({blob: {size}, start: null}));
      return [MOST, ...[items(130, 1), items(9, 2 ** 26), items(1, 2 ** 30)].map((each) => tooMany(each).length)];
    }""")
    assert found == [120, 10, 5, 0]


def test_settings_of_a_picture_come_back_into_the_form(page: Any) -> None:
    page.locator("#handoff").fill("0.6")
    page.visitor.draw(steps=10, seed="3")
    page.visitor.fill("something else", steps=5, seed="", size="128x128")
    page.locator("#handoff").fill("0.9")
    page.click("#use")
    assert [page.input_value(f"#{name}") for name in ("prompt", "steps", "seed", "width", "handoff")] == [
        PROMPT, "10", "3", "64", "0.6",
    ]  # fmt: skip


def test_a_sweep_is_a_row_with_one_seed_and_labels(page: Any, same_pixels: Same) -> None:
    page.visitor.draw(steps=10, seed="5")
    page.click("#sweep")
    page.visitor.drawn(6)
    page.wait_for_selector(".stage.swept:not(.drawing)")
    assert page.locator(".row figcaption b").all_inner_texts() == [
        "Handoff 60 %", "Handoff 70 %", "Handoff 80 %", "Handoff 90 %", "Base alone"
    ]  # fmt: skip
    assert page.locator(".row figcaption .hint").all_inner_texts() == ["6 + 4", "7 + 3", "8 + 2", "9 + 1", "10"]
    items = page.visitor.kept()
    assert {item["seed"] for item in items} == {"5"}
    assert [item["record"]["handoff_step"] for item in items] == [6, 7, 8, 9, None, 8]
    assert same_pixels(items[2]["file"], items[5]["file"])
    assert not same_pixels(items[0]["file"], items[4]["file"])
    page.locator(".row button.frame").nth(1).click()
    page.wait_for_selector(".stage.picture")
    page.reload()
    page.wait_for_selector("#see-sweep")
    page.click("#see-sweep")
    assert page.locator(".row figcaption b").count() == 5
