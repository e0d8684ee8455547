"""The page says what is wrong where it is, asks for a key, and shows what the server says as text."""

from collections.abc import Callable
from typing import Any

import pytest

Open = Callable[..., Any]


def test_a_wrong_value_is_shown_where_it_is_and_can_be_mended(page: Any) -> None:
    page.watch.allowed.append("status of 400")
    page.visitor.fill(size="100x64")
    page.click("#draw")
    page.locator("#size-wrong", has_text="multiples of 64").wait_for()
    assert page.get_attribute("#width", "aria-invalid") == "true"
    assert page.get_attribute("#width", "aria-errormessage") == "size-wrong"
    assert "100x64 was given" in page.inner_text(".failed .message")
    page.click("text=Use 128 × 64")
    page.visitor.drawn(1)
    assert page.locator("#size-wrong").is_hidden()
    assert page.visitor.kept()[0]["width"] == 128


@pytest.mark.parametrize(("name", "value", "says"), [
    ("prompt", " ", "Say what the picture shows"), ("seed", "-4", "whole number"), ("steps", "", "Give a number"),
    ("seed", str(2**64), "choose -1 to 18446744073709551615"), ("steps", "5000", "choose 1 to"),
])  # fmt: skip
def test_a_refused_field_says_why(page: Any, name: str, value: str, says: str) -> None:
    page.watch.allowed.append("status of 400")
    page.visitor.fill()
    page.fill(f"#{name}", value)
    page.click("#draw")
    page.locator(f"#{name}-wrong", has_text=says).wait_for()
    page.fill(f"#{name}", "5")
    assert page.locator(f"#{name}-wrong").is_hidden()


def test_a_server_that_is_gone_is_said_and_asked_again(page: Any) -> None:
    page.watch.allowed.append("ERR_INTERNET_DISCONNECTED")
    page.visitor.fill()
    page.context.set_offline(True)
    page.click("#draw")
    page.locator(".failed h2", has_text="does not answer").wait_for()
    page.context.set_offline(False)
    page.click(".failed button")
    page.visitor.drawn(1)


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
    page.visitor.draw()
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
    page.visitor.fill("<b>bold</b>")
    page.click("#draw")
    page.locator(".failed .message", has_text=text).wait_for()
    page.locator(".failed .hint", has_text="There may be a place in").wait_for()
    page.unroute("**/v1/images/generations")
    page.click(".failed button")
    page.visitor.drawn(1)
    assert page.inner_text(".about .prompt") == "<b>bold</b>"
