"""Talk: what a browser keeps, in two tabs, without room, or not at all; and where the keyboard goes on."""

import re

from playwright.sync_api import Locator, Page, expect

from tests.api.live import Live
from tests.page.axe import grave
from tests.page.conftest import Visit


def _ask(page: Page, prompt: str) -> Locator:
    """Send a prompt; return its turn when it is answered."""
    if page.get_by_label("Most tokens").count() == 0:
        page.get_by_role("button", name="Options").click()
        page.get_by_label("Most tokens").fill("4")
    place = page.get_by_role("article").count()
    page.get_by_placeholder("Write a prompt").fill(prompt)
    page.get_by_placeholder("Write a prompt").press("Enter")
    turn = page.get_by_role("article").nth(place)
    expect(turn.get_by_role("button", name="Regenerate")).to_be_visible()
    return turn


def _kept(page: Page) -> Locator:
    return page.get_by_role("complementary", name="Conversations").get_by_role("listitem")


def test_two_tabs_with_one_conversation(visit: Visit, live: Live) -> None:
    page = visit("talk")
    _ask(page, "One")
    other = page.context.new_page()
    other.goto(page.url)
    _kept(other).get_by_role("button", name="One").click()
    _ask(other, "Two")
    page.bring_to_front()
    expect(page.get_by_text("Another tab has changed this conversation.")).to_be_visible()
    _ask(page, "Three")
    expect(page.get_by_text("What you have here goes on as a copy.")).to_be_visible()
    assert grave(page) == []
    expect(page.get_by_role("heading", level=1)).to_have_text("One (copy)")
    for tab in (page, other):
        expect(_kept(tab)).to_have_text([re.compile(r"One \(copy\)"), re.compile("One(?! .copy)")])
    _kept(page).nth(1).get_by_role("button", name="One").click()
    expect(page.get_by_role("article").last).to_contain_text("Two")
    expect(page.get_by_text("Another tab")).to_have_count(0)
    _kept(page).get_by_role("button", name="Delete").click()
    expect(other.get_by_text("Another tab has deleted this conversation")).to_be_visible()


def test_a_conversation_that_is_not_kept(visit: Visit, live: Live) -> None:
    page = visit("talk")
    _ask(page, "Old")
    page.evaluate("localStorage.setItem('others', 'x'.repeat(5 * 1024 * 1024 - 3000))")
    page.get_by_role("button", name="New").click()
    prompt = page.get_by_placeholder("Write a prompt")
    prompt.fill("y" * 6000)
    prompt.press("Enter")
    expect(page.get_by_role("alert").filter(has_text="is not kept")).to_contain_text("the browser has no room for it")
    expect(_kept(page)).to_have_text(re.compile("Old"))
    expect(page.get_by_role("article").get_by_role("button", name="Regenerate")).to_be_visible()
    page.get_by_role("link", name="Health").click()
    expect(page).to_have_title("Health · tiny")
    page.go_back()
    expect(page.get_by_role("alert").filter(has_text="is not kept")).to_contain_text("the browser has no room for it")
    page.evaluate("localStorage.removeItem('others')")
    _ask(page, "More")
    expect(page.get_by_text("is not kept")).to_have_count(0)
    expect(_kept(page)).to_have_count(2)


def test_what_is_no_conversation_hides_none(visit: Visit, live: Live) -> None:
    page = visit("talk")
    _ask(page, "Mine")
    page.evaluate("localStorage.setItem('manylora.talk.index', '{\"list\": [{}]}')")
    page.evaluate("localStorage.setItem('manylora.talk.odd', '{\"turns\": [1]}')")
    page.evaluate("sessionStorage.setItem('manylora.talk.current', 'odd')")
    page.reload()
    expect(_kept(page)).to_have_count(2)
    odd = _kept(page).filter(has_text="Cannot be read")
    expect(odd).to_contain_text("another version of the page, or something else, has kept it")
    odd.get_by_role("button", name="Delete").click()
    expect(_kept(page)).to_have_count(1)
    _kept(page).get_by_role("button", name="Mine").click()
    expect(page.get_by_role("article")).to_have_count(1)


def test_a_browser_that_keeps_nothing(visit: Visit, live: Live) -> None:
    page = visit("health")
    refuse = "get() { throw new DOMException('not allowed', 'SecurityError') }"
    for area in ("localStorage", "sessionStorage"):
        page.add_init_script(f"Object.defineProperty(window, '{area}', {{ {refuse} }})")
    page.goto(f"{page.url.partition('#')[0]}?#/talk")
    expect(page.get_by_text("This browser keeps nothing for this page")).to_be_visible()
    _ask(page, "Hi")
    expect(page.get_by_role("alert")).to_contain_text("“Hi” is not kept: the browser keeps nothing for this page")
    for name in ("Adapters", "Training", "Health"):
        page.get_by_role("link", name=name, exact=True).click()
        expect(page.get_by_role("main").get_by_role("heading", level=1)).to_be_visible()
    page.get_by_role("link", name="Talk").click()
    expect(page.get_by_role("article")).to_have_count(1)


def test_a_link_is_followed_once(visit: Visit, live: Live) -> None:
    page = visit("talk?adapter=red&prompt=Hello")
    prompt, model = page.get_by_placeholder("Write a prompt"), page.get_by_label("Model of column 1")
    expect(prompt).to_have_value("Hello")
    expect(model).to_have_value("red")
    page.reload()
    expect(model).to_have_value("red")  # nothing was written yet that a link would replace
    _ask(page, "Mine")
    prompt.fill("not sent yet")
    page.get_by_role("link", name="Health").click()
    expect(page).to_have_title("Health · tiny")
    page.go_back()
    expect(page.get_by_role("article")).to_have_count(1)
    expect(prompt).to_have_value("not sent yet")
    page.reload()
    expect(page.get_by_role("article")).to_have_count(1)
    page.evaluate("location.hash = '#/talk?adapter=green'")
    expect(model).to_have_value("green")
    expect(page.get_by_role("article")).to_have_count(0)


def test_the_keyboard_goes_on_where_it_was(visit: Visit, live: Live) -> None:
    page = visit("talk")
    turn = _ask(page, "One")
    _ask(page, "Two")
    edit = turn.get_by_role("button", name="Edit")
    edit.press("Enter")
    page.keyboard.press("Escape")
    expect(edit).to_be_focused()
    edit.press("Enter")
    turn.get_by_role("button", name="Cancel").press("Enter")
    expect(edit).to_be_focused()
    turn.get_by_role("button", name="Delete").press("Enter")
    expect(page.get_by_role("article")).to_have_count(1)
    expect(page.get_by_role("article")).to_be_focused()
    page.get_by_role("article").get_by_role("button", name="Delete").press("Enter")
    expect(page.get_by_placeholder("Write a prompt")).to_be_focused()
    _ask(page, "Three")
    page.get_by_role("button", name="Rename").press("Enter")
    page.keyboard.press("Escape")
    expect(_kept(page).get_by_role("button", name="Three")).to_be_focused()
    clear = page.get_by_role("button", name="Delete all")
    clear.press("Enter")
    assert grave(page) == []
    page.get_by_role("button", name="Keep them").press("Enter")
    expect(clear).to_be_focused()
    clear.press("Enter")
    page.get_by_role("button", name="Delete them").press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
