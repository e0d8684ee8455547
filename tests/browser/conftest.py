"""trt-serve as a process of its own, on the embedded pair, and a real browser that looks at its page.

The browser is the system's (CHROMIUM names another one); none is downloaded.
"""

import base64
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image, ImageChops

collect_ignore_glob = [] if find_spec("playwright") else ["*"]
ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("TRT_SERVE_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
SECONDS = 60.0
PROMPT = "a large red star on a blue background"


@contextmanager
def served(log: Path, *options: str) -> Iterator[str]:
    """Run trt-serve with `options`; yield its address, and stop it by SIGTERM."""
    command = [PYTHON, "-m", "sdxl_trt.server.cli", "--port", "0", *options]
    with log.open("w") as errors, subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors,
                                                   text=True) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("serving on "), log.read_text()
            yield line.rpartition(" ")[2].strip()
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the server that the tests share."""
    with served(tmp_path_factory.mktemp("serve") / "log") as address:
        yield address


@pytest.fixture(scope="session")
def key_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that wants the key sk-1."""
    folder = tmp_path_factory.mktemp("serve-key")
    (folder / "keys").write_text("sk-1\n")
    with served(folder / "log", "--api-key-file", str(folder / "keys")) as address:
        yield address


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert path, "no browser was found; install Debian's chromium, or set CHROMIUM to the path of one"
    with sync_playwright() as playwright:
        # The sandbox needs rights that a container does not give.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


Open = Callable[..., Any]


class Watch:
    """What a page did that it should not: errors, breaches of its policy, and requests to elsewhere.

    `allowed` are parts of messages that a test provokes.
    """

    def __init__(self, page: Any, address: str) -> None:
        self.found: list[str] = []
        self.allowed: list[str] = []
        self._host = urlsplit(address).netloc
        page.on("pageerror", lambda error: self.found.append(f"error: {error}"))
        page.on("console", lambda message: message.type in ("error", "warning") and self.found.append(message.text))
        page.on("request", lambda request: self._ask(request.url))

    def _ask(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("blob", "data") and parts.netloc != self._host:
            self.found.append(f"request: {url}")

    def rest(self) -> list[str]:
        return [text for text in self.found if not any(part in text for part in self.allowed)]


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


class Visitor:
    """What somebody does on a page, in one call each."""

    def __init__(self, page: Any) -> None:
        self.page = page

    def fill(self, prompt: str = PROMPT, *, steps: int = 4, seed: str = "7", size: str = "64x64") -> None:
        """Fill in the form."""
        width, height = size.split("x")
        texts = {"prompt": prompt, "steps": str(steps), "seed": seed, "width": width, "height": height}
        for name, value in texts.items():
            self.page.fill(f"#{name}", value)

    def draw(self, prompt: str = PROMPT, **settings: Any) -> None:
        """Draw a picture, and wait until it is shown."""
        count = self.page.locator("#pictures button").count()
        self.fill(prompt, **settings)
        self.page.click("#draw")
        self.drawn(count + 1)

    def drawn(self, count: int) -> None:
        """Wait until the gallery has `count` pictures, and nothing is drawn."""
        self.page.wait_for_selector(f"#pictures button:nth-child({count})")
        self.page.wait_for_selector("#draw:not([disabled])")

    def kept(self) -> list[dict[str, Any]]:
        """Return the pictures that the browser keeps, the newest first, with their files as bytes and their records."""
        return [
            {**item, "file": base64.b64decode(item["blob"]), "record": json.loads(item["texts"]["sdxl-trt"])}
            for item in self.page.evaluate(KEPT)
        ]


@pytest.fixture
def open_page(browser: Any, server: str) -> Iterator[Open]:
    """Open the page in a context of its own, with options of it; at the end nothing may have gone wrong.

    A page has a `watch` and a `visitor` beside what playwright gives it.
    """
    opened: list[tuple[Any, Watch]] = []

    def open_(address: str = server, *, ready: bool = True, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        context.set_default_timeout(SECONDS * 1000)
        page = context.new_page()
        page.watch, page.visitor = Watch(page, address), Visitor(page)
        opened.append((context, page.watch))
        page.goto(address)
        if ready:
            page.wait_for_selector("main:not(.waits)")
        return page

    yield open_
    for context, watch in opened:
        context.close()
        assert watch.rest() == []


@pytest.fixture
def page(open_page: Open) -> Any:
    return open_page()


def _pixels(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("RGB")


@pytest.fixture(scope="session")
def same_pixels() -> Callable[[bytes, bytes], bool]:
    """Return a function that says whether two files hold the same picture."""
    return lambda one, other: ImageChops.difference(_pixels(one), _pixels(other)).getbbox() is None
