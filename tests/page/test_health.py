"""Health: live figures of a real server, what is slow in words, and keys that may not look."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Route, expect

from server.access.key_spec import KeySpec
from tests.api.live import ADAPTERS, Live, running, tiny_service, wait_for
from tests.page.conftest import Visit, look_again
from tests.tiny import save_adapter, tiny_model


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Live]:
    """A server with one slot for two adapters."""
    model = tiny_model()
    adapters: dict[str, Path] = {
        name: save_adapter(model, tmp_path / name, seed, **ADAPTERS[name]) for seed, name in enumerate(("red", "green"))
    }
    with running(tiny_service(tmp_path, adapter=adapters, max_rank=8, max_device_adapters=1)) as live:
        yield live


def test_what_is_slow_is_said_in_words(visit: Visit, narrow: Live) -> None:
    page = visit("health", url=str(narrow.http.base_url))
    words = page.get_by_role("region", name="What is slow, and why")
    expect(words).to_contain_text("Nothing is slow: no request has come.")
    expect(page.get_by_role("main")).to_contain_text("ready")
    for name in ("red", "green", "red", "green"):
        narrow.complete(model=name)
    look_again(page)
    expect(words).to_contain_text("2 adapters share 1 slot")
    expect(words).to_contain_text("--max-device-adapters")

    figures = page.get_by_role("figure").filter(has_text="Adapters on the device")
    expect(figures.get_by_role("row").last).to_contain_text("1")

    table = page.get_by_role("region", name="By adapter")
    rows = table.get_by_role("row")
    expect(rows.filter(has_text="red")).to_contain_text("2no")
    expect(rows.filter(has_text="green")).to_contain_text("2yes")
    head = table.get_by_role("columnheader", name="adapter")
    head.get_by_role("button").click()
    expect(head).to_have_attribute("aria-sort", "ascending")
    expect(rows.nth(1)).to_contain_text("green")
    head.get_by_role("button").press("Enter")
    expect(head).to_have_attribute("aria-sort", "descending")
    expect(rows.nth(1)).to_contain_text("red")

    page.keyboard.press("/")
    page.keyboard.type("gre")
    expect(rows).to_have_count(2)
    narrow.complete(model="green")
    look_again(page)
    expect(rows.nth(1)).to_contain_text("3yes")  # a new look changes the figures, not what was typed
    expect(table.get_by_label("Find an adapter")).to_have_value("gre")

    page.get_by_role("link", name="Talk").click()
    page.get_by_role("link", name="Health").click()
    # The table needs two looks: the earlier ones are still there, whatever the server does now.
    narrow.server.should_exit = True
    narrow.thread.join()
    look_again(page)
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached. The figures below are the last")
    expect(page.get_by_role("main")).to_contain_text("no answer")
    expect(rows.filter(has_text="green")).to_contain_text("3yes")


def test_one_look_alone_shows_no_span_of_time(visit: Visit, live: Live) -> None:
    page, looks = visit("talk"), []

    def answer_once(route: Route) -> None:
        looks.append(route)
        if len(looks) == 1:
            route.continue_()

    page.route("**/metrics", answer_once)
    page.evaluate(
        """() => {
            window.drawn = [];
            const { fillText } = CanvasRenderingContext2D.prototype;
            CanvasRenderingContext2D.prototype.fillText = function (text, ...places) {
                window.drawn.push(text);
                return fillText.call(this, text, ...places);
            };
        }"""
    )
    page.get_by_role("link", name="Health").click()
    expect(page.get_by_role("figure").filter(has_text="Adapters on the device")).to_contain_text("slots")
    expect(page.get_by_role("region", name="By adapter")).not_to_contain_text("in the last")
    wait_for(lambda: page.evaluate("drawn.some((text) => /^:\\d\\d$/.test(text))"))  # a minute's seconds
    assert not [text for text in page.evaluate("drawn") if re.match(r"20\d\d|[A-Z][a-z][a-z]$", text)]  # years, months


def test_a_key_without_the_scope_is_told(visit: Visit, tmp_path: Path) -> None:
    service = tiny_service(tmp_path)
    secret = service.keyring.store.add(KeySpec(name="app", scopes=["infer"]))[1]
    with running(service) as live:
        page = visit("health", url=str(live.http.base_url))
        page.get_by_label("API key").fill(secret)
        page.get_by_role("button", name="Continue").click()
        expect(page.get_by_role("main")).to_contain_text("The key app lacks the scope metrics")
        expect(page.get_by_role("figure")).to_have_count(0)
