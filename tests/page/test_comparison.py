"""Blind comparisons: votes, what the browser keeps of them, two tabs, and browsers that keep nothing."""

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, Route, expect

from tests.api.live import Live
from tests.page.axe import grave
from tests.page.conftest import Visit

HOLD = """() => new Promise(resolve => {
    const request = indexedDB.open("manylora.comparisons");
    request.onsuccess = () => {
        const store = request.result.transaction("comparisons", "readwrite").objectStore("comparisons");
        const held = () => { if (!window.released) store.count().onsuccess = held; };
        held();
        resolve();
    };
})"""
"""Keeps the store busy until ``released`` is set: what is to be stored waits."""
PUT = """value => new Promise(resolve => {
    const request = indexedDB.open("manylora.comparisons");
    request.onsuccess = () => {
        const transaction = request.result.transaction("comparisons", "readwrite");
        transaction.objectStore("comparisons").put(value);
        transaction.oncomplete = () => (request.result.close(), resolve());
    };
})"""


def start(page: Page, prompts: str = "One\nTwo\nThree") -> None:
    """Begin a comparison of red and the base."""
    page.get_by_label("First target").fill("red")
    page.get_by_label("Second target").fill("tiny")
    page.get_by_label("Prompts, one a line").fill(prompts)
    page.get_by_text("How both are asked").click()
    page.get_by_label("Most tokens").fill("6")
    page.get_by_role("button", name="Start").click()


def begun(page: Page) -> Page:
    """Begin a comparison of red and the base; return the page when all answers are there."""
    start(page)
    page.get_by_role("region", name="Which answer is better?").wait_for()
    expect(page.get_by_text("still to come")).to_have_count(0)
    return page


def test_a_blind_comparison(visit: Visit, live: Live, tmp_path: Path) -> None:
    page = visit("adapters")
    page.get_by_role("link", name="Blind comparison").click()
    page.get_by_label("First target").fill("red")
    page.get_by_label("Second target").fill("tiny")
    page.get_by_label("Prompts, one a line").fill("One\nTwo\n\nThree")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Four"}\n{"x": 1}\n{"prompt": "Five"}\n{"prompt": "Six"}\n')
    page.get_by_label("File of prompts").set_input_files(rows)
    expect(page.get_by_text("line 2 has no field")).to_be_visible()
    page.get_by_text("How both are asked").click()
    page.get_by_label("Most tokens").fill("6")
    page.get_by_role("button", name="Start").click()

    pair = page.get_by_role("region", name="Which answer is better?")
    pair.wait_for()
    expect(page.get_by_text("still to come")).to_have_count(0)
    assert grave(page) == []
    assert "red@1" not in page.get_by_role("main").inner_text()
    page.keyboard.press("1")
    expect(page.get_by_text("1 of 6 decided")).to_be_visible()
    page.keyboard.press("u")
    expect(page.get_by_text("0 of 6 decided")).to_be_visible()
    page.keyboard.press("0")
    expect(page.get_by_text("1 of 6 decided")).to_be_visible()
    page.reload()
    expect(page.get_by_text("1 of 6 decided")).to_be_visible()
    for votes in range(2, 7):
        page.keyboard.press("2")
        if votes < 6:
            expect(page.get_by_text(f"{votes} of 6 decided")).to_be_visible()
    result = page.get_by_role("region", name=re.compile("better|decided", re.IGNORECASE))
    expect(result).to_contain_text("Wilson's interval")
    assert grave(page) == []
    expect(result.get_by_role("row", name="Ties")).to_contain_text("1")
    with page.expect_download() as download:
        result.get_by_role("button", name="Export as JSONL").click()
    lines = [json.loads(line) for line in download.value.path().read_text().splitlines()]
    assert [line["messages"][-1]["content"] for line in lines] == ["One", "Two", "Three", "Four", "Five", "Six"]
    assert [line["vote"] for line in lines].count("tie") == 1
    assert all(line["a"]["served"] == "red@1" and line["b"]["served"] == "tiny" for line in lines)
    voted = sum(line["vote"] == line["left"] for line in lines)
    assert voted == 0, "all votes were for the right one"
    page.get_by_role("link", name="Blind comparison").click()
    expect(page.get_by_text("6 of 6 decided")).to_be_visible()
    page.get_by_role("button", name="Forget red@1 and tiny").click()
    expect(page.get_by_text("6 of 6 decided")).to_have_count(0)


def test_a_vote_counts_when_it_is_stored(visit: Visit, live: Live) -> None:
    page = begun(visit("adapters?compare="))
    page.evaluate(HOLD)
    page.keyboard.press("1")
    page.keyboard.press("1")  # while it is being stored, nobody has seen another pair
    page.evaluate("new Promise(resolve => requestAnimationFrame(() => requestAnimationFrame(resolve)))")
    assert "0 of 3 decided" in page.get_by_role("main").inner_text()
    page.evaluate("window.released = true")
    expect(page.get_by_text("1 of 3 decided")).to_be_visible()
    page.reload()
    expect(page.get_by_text("1 of 3 decided")).to_be_visible()


def test_two_tabs_do_not_undo_each_other(visit: Visit, live: Live) -> None:
    page = begun(visit("adapters?compare="))
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.get_by_text("0 of 3 decided")).to_be_visible()
    other.keyboard.press("1")
    expect(other.get_by_text("1 of 3 decided")).to_be_visible()
    page.bring_to_front()
    page.keyboard.press("2")
    expect(page.get_by_role("alert")).to_contain_text("Another tab has changed this comparison")
    expect(page.get_by_role("status").filter(has_text="is better")).to_have_count(0)  # the vote is not counted
    page.get_by_role("button", name="Show it as it is kept").click()
    expect(page.get_by_text("1 of 3 decided")).to_be_visible()
    page.keyboard.press("2")
    expect(page.get_by_text("2 of 3 decided")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)


@pytest.mark.parametrize("secure", [True, False])
def test_one_tab_asks_at_a_time(visit: Visit, live: Live, secure: bool) -> None:
    page = visit()
    if not secure:  # then tabs do not know of each other
        page.context.add_init_script("delete Navigator.prototype.locks")
    page.goto(f"{page.url.partition('#')[0]}?#/adapters?compare=")
    held: list[Route] = []
    released = False
    page.context.route(re.compile("completions"), lambda route: route.continue_() if released else held.append(route))
    start(page)
    expect(page.get_by_text("6 answers are still to come")).to_be_visible()
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.get_by_text(": another tab asks for them" if secure else "No pair is ready.")).to_be_visible()
    assert grave(other) == []
    assert {route.request.frame.page for route in held} == {page}
    released = True
    for route in held:
        route.continue_()
    expect(page.get_by_text("still to come")).to_have_count(0)
    if not secure:
        other.reload()
    other.get_by_role("region", name="Which answer is better?").wait_for()
    expect(other.get_by_text("still to come")).to_have_count(0)
    other.keyboard.press("1")
    expect(other.get_by_text("1 of 3 decided")).to_be_visible()
    for tab in (page, other):
        expect(tab.get_by_role("alert")).to_have_count(0)


def test_what_is_no_comparison_is_said_and_forgotten_on_request(visit: Visit, live: Live) -> None:
    page = begun(visit("adapters?compare="))
    page.evaluate(PUT, {"id": "odd", "pairs": "none"})
    page.evaluate("location.hash = '#/adapters?compare=odd'")
    expect(page.get_by_role("alert")).to_contain_text("is no comparison")
    page.evaluate("location.hash = '#/adapters?compare='")
    expect(page.get_by_text("0 of 3 decided")).to_be_visible()
    expect(page.get_by_text("This browser keeps 1 more that this version of the page cannot read.")).to_be_visible()
    page.get_by_role("button", name="Forget what cannot be read").click()
    expect(page.get_by_text("cannot read")).to_have_count(0)
    expect(page.get_by_text("0 of 3 decided")).to_be_visible()


def test_a_browser_that_keeps_nothing_compares_all_the_same(visit: Visit, live: Live) -> None:
    page = visit()
    page.add_init_script("IDBFactory.prototype.open = () => { throw new DOMException('not allowed', 'SecurityError') }")
    page.goto(f"{page.url.partition('#')[0]}?#/adapters?compare=")
    expect(page.get_by_role("alert")).to_contain_text("This browser keeps no comparisons (not allowed)")
    begun(page)
    page.keyboard.press("1")
    expect(page.get_by_text("1 of 3 decided")).to_be_visible()
    expect(page.get_by_role("alert").last).to_contain_text("This browser does not keep it (not allowed): export it.")
