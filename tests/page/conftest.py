"""Fixtures: a server with the built page, and a Chromium that fails a test for any error on the page."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

import server
from tests.api.live import ADAPTERS, PATIENCE, Live, running, tiny_service
from tests.page.chromium import find_chromium
from tests.tiny import save_adapter, tiny_model

Visit = Callable[..., Page]
"""Open a place of the page, such as ``adapters/legal``; keywords are those of ``Browser.new_context``."""
BUILT = Path(server.__file__).parent / "page" / "dist" / "index.html"
ELSEWHERE = "elsewhere.test"
"""A name of this machine that the browser takes for another machine's: plain HTTP from there is not a secure origin."""
EXPECTED = ("Failed to load resource", "Cross-Origin-Opener-Policy header has been ignored")
expect.set_options(timeout=PATIENCE * 1000)


def look_again(page: Page) -> None:
    """Let the page ask the server now, as it does when somebody comes back to its tab, not after its usual pause."""
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


def stop_looking(page: Page) -> None:
    """Let the page ask the server for nothing by itself any more, as in a tab that nobody sees."""
    page.evaluate("Object.defineProperty(document, 'hidden', {value: true})")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium. Skips where `make test` could not get what the page is built and looked at with.

    One for each module: as long as Playwright runs, no other test of this process can start an event loop.
    """
    if not BUILT.is_file():
        pytest.skip("the page is not built: run `make page`, which needs a registry of npm")
    try:
        program, variables = find_chromium()
    except LookupError as error:
        pytest.skip(str(error))
    with sync_playwright() as playwright:
        # A container's root has no sandbox; the pages are our own, and on this machine.
        elsewhere = f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1"
        yield playwright.chromium.launch(
            executable_path=program,
            env={**os.environ, **variables},
            args=["--no-sandbox", "--disable-dev-shm-usage", "--no-proxy-server", elsewhere],
        )


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server of the tiny model with three adapters, without keys."""
    root, model = tmp_path_factory.mktemp("page"), tiny_model()
    adapters: dict[str, Path] = {
        name: save_adapter(model, root / name.replace("/", "-"), seed, **lora)
        for seed, (name, lora) in enumerate(ADAPTERS.items())
    }
    with running(tiny_service(root, adapter=adapters, max_rank=16)) as live:
        yield live


@pytest.fixture
def visit(browser: Browser, live: Live) -> Iterator[Visit]:
    """Opens places of the page on ``live`` or the server at ``url``; asserts afterwards that nothing went wrong there.

    Errors are those of scripts and of the console, which has violations of the Content-Security-Policy. The browser
    also logs responses with an error status; these are left to the tests, which look at what the page says of them. Nor
    does it count that ``ELSEWHERE`` is no secure origin, where browsers ignore one of the server's headers and say so.
    """
    contexts, errors = [], []

    def console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not any(words in message.text for words in EXPECTED):
            errors.append(message.text)

    def open_place(place: str = "", url: str | None = None, **options: object) -> Page:
        # Without a language, a machine whose own is "C" gives pages one that JavaScript does not know.
        usual = {"viewport": {"width": 1280, "height": 800}, "locale": "en-US"}
        contexts.append(browser.new_context(**{**usual, **options}))  # type: ignore[arg-type]
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE * 1000)
        page.on("console", console)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{url or live.http.base_url}/#/{place}".replace("//#", "/#"))
        return page

    yield open_place
    for context in contexts:
        context.close()
    assert not errors
