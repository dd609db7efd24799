"""A Chromium that can reach nothing but this machine, and a server for the built pages."""
import functools
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.conftest import REQUIRE

CANDIDATES = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
]
THEMES = ("light", "dark")
WINDOW = 1280


class Visit(NamedTuple):
    """A page that was opened, and what happened on it since."""

    page: object                # playwright.sync_api.Page
    foreign: list[str]          # requests to anywhere but the book
    failed: list[str]           # requests that got no answer, or an error
    console: list[str]          # errors on the console, and uncaught exceptions

    def assert_quiet(self) -> None:
        assert not self.foreign, f"asked for something outside the book: {self.foreign}"
        assert not self.failed, f"failed requests: {self.failed}"
        assert not self.console, f"console: {self.console}"


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def server(book) -> Iterator[str]:
    """The address at which the built book is served, on this machine only."""
    handler = functools.partial(_QuietHandler, directory=str(book))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}/"
        httpd.shutdown()


# Not for the whole session: while Playwright's event loop runs, nbval's kernel client cannot start its own.
@pytest.fixture(scope="module")
def browser():
    executable = os.environ.get("KVLIB_CHROMIUM") or next(filter(None, map(shutil.which, CANDIDATES)), None)
    if executable is None:
        (pytest.fail if REQUIRE else pytest.skip)(
            "no Chromium: install it (Debian: apt install chromium) or name one in KVLIB_CHROMIUM")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield chromium
        chromium.close()


def listen(page, seen: Visit, home: str) -> None:
    """Note on `seen` what goes wrong on the page, and every request that does not begin with `home`."""
    def on_request(request) -> None:
        if not request.url.startswith((home, "data:", "blob:")):
            seen.foreign.append(request.url)

    def on_response(response) -> None:
        if response.status >= 400:
            seen.failed.append(f"{response.url}: {response.status}")

    def on_console(message) -> None:
        if message.type == "error":
            seen.console.append(message.text)

    page.on("request", on_request)
    page.on("response", on_response)
    page.on("requestfailed", lambda request: seen.failed.append(f"{request.url}: {request.failure}"))
    page.on("console", on_console)
    page.on("pageerror", lambda error: seen.console.append(f"uncaught {error}"))


@pytest.fixture
def visit(browser):
    """visit(address, theme) opens a page in a fresh profile and waits until it stands."""
    contexts = []

    def open_page(address: str, theme: str = "light") -> Visit:
        context = browser.new_context(viewport={"width": WINDOW, "height": 900}, reduced_motion="reduce")
        contexts.append(context)
        context.set_default_timeout(30_000)
        # as the theme's own switch leaves it
        context.add_init_script(
            f"localStorage.setItem('mode', '{theme}'); localStorage.setItem('theme', '{theme}');")
        page = context.new_page()
        seen = Visit(page, [], [], [])
        home = address[:address.index("/", address.index("://") + 3) + 1]
        listen(page, seen, home)
        page.goto(address, wait_until="load")
        page.wait_for_load_state("networkidle")
        page.wait_for_function("!window.MathJax?.startup || window.MathJax.startup.promise.then(() => true)")
        return seen

    yield open_page
    for context in contexts:
        context.close()
