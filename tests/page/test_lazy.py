"""Parts whose files are loaded when somebody goes there: what is said when that fails."""

import re

import pytest
from playwright.sync_api import expect

from tests.api.live import Live
from tests.page.axe import grave
from tests.page.conftest import Visit


@pytest.mark.parametrize(
    ("place", "file", "heading"),
    [
        ("talk", "Talk", "New conversation"),
        ("health", "Health", "Health"),
        ("adapters/red", "Detail", "red"),
        ("adapters?register=", "Register", "Register an adapter"),
        ("adapters?compare=", "Compare", "Blind comparison"),
    ],
)
def test_a_part_that_cannot_be_loaded(visit: Visit, live: Live, place: str, file: str, heading: str) -> None:
    page = visit("training")
    expect(page.get_by_role("heading", level=1)).to_have_text("Training")
    scripts = re.compile(rf"/assets/{file}-[^/]+\.js")
    page.route(scripts, lambda route: route.abort())
    page.evaluate("place => { location.hash = `#/${place}`; }", place)
    expect(page.get_by_role("alert")).to_contain_text("This part of the page cannot be loaded: ")
    page.unroute(scripts)
    page.get_by_role("button", name="Reload the page").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(heading)
    expect(page.get_by_role("alert")).to_have_count(0)


def test_charts_that_cannot_be_drawn_are_tables(visit: Visit, live: Live) -> None:
    live.complete(model="red")
    # As a browser says it of a machine whose language is "C": the library of charts throws when it is loaded.
    page = visit("health", locale="en-US@posix")
    expect(page.get_by_role("region", name="What is slow, and why")).to_be_visible()
    chart = page.get_by_role("figure").filter(has_text="Adapters on the device")
    expect(chart).to_contain_text("It cannot be drawn: Invalid language tag")
    table = chart.get_by_role("table")
    expect(table).to_be_visible()
    assert grave(page) == []
    box = table.bounding_box()
    assert box is not None
    assert box["width"] > 50, "others than screen readers see it"
    expect(table.get_by_role("row").last).to_contain_text("1")
    expect(page.get_by_role("alert")).to_have_count(0)
