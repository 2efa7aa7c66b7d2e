"""The frame of the page: views, keyboard, theme, the key."""

from playwright.sync_api import expect

from tests.page.axe import grave
from tests.page.conftest import Visit


def test_the_views_are_a_click_away(visit: Visit) -> None:
    page = visit()
    views = page.get_by_role("navigation", name="Views")
    for name in ("Adapters", "Training", "Health", "Talk"):
        views.get_by_role("link", name=name).click()
        expect(views.get_by_role("link", name=name)).to_have_attribute("aria-current", "page")
        expect(page).to_have_title(f"{name} · tiny")


def test_the_keyboard_goes_everywhere(visit: Visit) -> None:
    page = visit("adapters")
    expect(page).to_have_title("Adapters · tiny")
    page.keyboard.press("g")
    page.keyboard.press("h")
    expect(page).to_have_title("Health · tiny")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_contain_text("go to Training")
    # A letter that every font has: with others the button would be empty on some machines.
    expect(page.get_by_role("button", name="Close")).to_have_text("\xd7")
    assert grave(page) == []
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_a_theme_that_was_chosen_stays(visit: Visit) -> None:
    page = visit()
    page.get_by_label("Theme").select_option("dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.reload()
    expect(page.get_by_label("Theme")).to_have_value("dark")
    assert page.evaluate(background) == dark
    page.get_by_label("Theme").select_option("light")
    assert page.evaluate(background) != dark


def test_a_name_with_dots_reaches_no_other_route(visit: Visit) -> None:
    asked: list[str] = []
    page = visit()
    page.on("request", lambda request: asked.append(request.url))
    page.evaluate("location.hash = '#/adapters/../keys'")
    expect(page.get_by_role("alert").first).to_contain_text('no parts "." or ".."')
    assert not any("keys" in url for url in asked)
