"""A picture is chosen, pasted, dropped or taken from the gallery, and the next one starts from it."""

import base64
import io
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

Same = Callable[[bytes, bytes], bool]


def picture(width: int = 64, height: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (240, 220, 40)).save(file, "PNG")
    return file.getvalue()


def test_a_picture_can_be_chosen_to_start_from(page: Any, same_pixels: Same) -> None:
    page.set_input_files("#file", {"name": "yellow.png", "mimeType": "image/png", "buffer": picture()})
    page.wait_for_selector("#started")
    assert page.inner_text("#start-size") == "64 × 64 pixels"
    page.locator("#strength").fill("0.5")
    page.visitor.draw(steps=10)
    [item] = page.visitor.kept()
    assert base64.b64decode(item["start"]) == picture()
    assert (item["record"]["strength"], item["split"]) == (0.5, [3, 2])
    page.click("#start-remove")
    page.click("#again")
    page.visitor.drawn(2)
    one, other = page.visitor.kept()
    assert same_pixels(one["file"], other["file"])
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
    page.visitor.draw()
    page.click("#start-from")
    page.wait_for_selector("#started")
    page.visitor.draw(steps=5)
    assert base64.b64decode(page.visitor.kept()[0]["start"]) == page.visitor.kept()[1]["file"]
