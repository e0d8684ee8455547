"""trt-serve as a process of its own, on the embedded pair, and a real browser that looks at its page.

The browser is the system's (CHROMIUM names another one); none is downloaded.
"""

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

collect_ignore_glob = [] if find_spec("playwright") else ["*"]
ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("TRT_SERVE_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
SECONDS = 60.0


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


@pytest.fixture
def open_page(browser: Any, server: str) -> Iterator[Open]:
    """Open the page in a context of its own, with options of it; at the end nothing may have gone wrong."""
    opened: list[tuple[Any, Watch]] = []

    def open_(address: str = server, *, ready: bool = True, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        context.set_default_timeout(SECONDS * 1000)
        page = context.new_page()
        page.watch = Watch(page, address)
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
