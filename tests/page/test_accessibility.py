"""The page for everybody: nothing that axe-core calls serious, small files, and a first paint that comes soon."""

from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.api.live import Live, wait_for
from tests.page.axe import grave
from tests.page.conftest import BUILT, Visit

MOST_BYTES = 150 * 1024
"""Maximum of what a browser that accepts Brotli loads for all views."""
FIRST_PAINT = 2.0
"""Maximum seconds to the first paint, on a machine that does other things as well."""
READY = {
    "talk": "Write a prompt below",
    "adapters": "red",
    "adapters/red": "Receipt of @1",
    "training": "Runs on disk",
    "health": "Between tokens",
}
"""Place -> a text that stands there once it is drawn."""


@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_grave(visit: Visit, live: Live, width: int) -> None:
    live.complete(model="red")  # so that Health has figures
    page = visit("talk", viewport={"width": width, "height": 800})
    found: list[str] = []
    for place, text in READY.items():
        page.evaluate("place => location.hash = `#/${place}`", place)
        expect(page.get_by_role("main")).to_contain_text(text)
        found += [f"{place}, {violation}" for violation in grave(page)]
    assert found == []


def test_axe_sees_what_is_wrong(visit: Visit) -> None:
    page = visit("training")
    expect(page.get_by_role("main")).to_contain_text(READY["training"])
    page.evaluate("document.querySelector('main').append(document.createElement('input'))")
    assert [line[:22] for line in grave(page)] == ["dark: label (critical)", "light: label (critical"]


def test_the_whole_page_is_small(visit: Visit) -> None:
    files = [path for path in BUILT.parent.rglob("*") if path.is_file() and path.suffix not in (".br", ".gz")]
    sizes = {path.name: (twin if (twin := Path(f"{path}.br")).is_file() else path).stat().st_size for path in files}
    assert "index.html" in sizes
    assert any(name.endswith(".js") for name in sizes)
    assert sum(sizes.values()) < MOST_BYTES, sizes


def test_the_first_paint_comes_soon(visit: Visit) -> None:
    page = visit("talk")

    def painted() -> float:
        """Return the seconds from the start of a load to the first paint of content."""
        page.reload()
        paint = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"
        milliseconds = page.wait_for_function(f"() => {paint}").json_value()
        assert isinstance(milliseconds, int | float)
        return milliseconds / 1000

    # A machine that is busy for a moment proves nothing; one load that is quick does.
    wait_for(lambda: painted() < FIRST_PAINT)
