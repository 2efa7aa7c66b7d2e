"""The API key on the page: asked for once, kept for the session, never shown again."""

import re
from collections.abc import Iterator, Mapping

import pytest
from playwright.sync_api import Page, expect

from server.access.key_spec import KeySpec
from tests.api.live import Live, running, tiny_service
from tests.page.axe import grave
from tests.page.conftest import Visit


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Live, Mapping[str, str]]]:
    """A server that asks for keys, and its keys' secrets by name."""
    service = tiny_service(tmp_path_factory.mktemp("keyed"))
    specs = [KeySpec(name="operator", scopes=["admin"]), KeySpec(name="app", scopes=["infer"])]
    secrets = {spec.name: service.keyring.store.add(spec)[1] for spec in specs}
    with running(service) as live:
        yield live, secrets


def _sign_in(page: Page, secret: str) -> None:
    page.get_by_label("API key").fill(secret)
    page.get_by_role("button", name="Continue").click()


def _sign_out(page: Page, answer: str) -> None:
    """Sign out by the button that says ``answer``, and wait until the page has been loaded again, as it then does."""
    with page.expect_event("load"):
        page.get_by_role("dialog", name="Sign out?").get_by_role("button", name=answer).click()


def test_a_key_is_asked_for_once(visit: Visit, keyed: tuple[Live, Mapping[str, str]]) -> None:
    live, secrets = keyed
    page = visit("health", url=str(live.http.base_url))
    _sign_in(page, f"{secrets['operator']}\u200b")
    expect(page.get_by_role("alert")).to_contain_text("characters that no key has")
    assert grave(page) == []
    _sign_in(page, "mine")
    expect(page.get_by_role("alert")).to_contain_text("not valid")
    _sign_in(page, secrets["operator"])
    expect(page).to_have_title("Health · tiny")
    expect(page.get_by_role("banner")).to_contain_text("operator")
    page.reload()
    expect(page).to_have_title("Health · tiny")
    assert secrets["operator"] not in page.content()
    assert page.evaluate("JSON.stringify(localStorage) + document.cookie").find(secrets["operator"]) == -1
    page.get_by_role("button", name="Sign out").click()
    question = page.get_by_role("dialog", name="Sign out?")
    expect(question).to_contain_text("This browser keeps no conversations and no comparisons.")
    assert grave(page) == []
    _sign_out(page, "Sign out")
    expect(page.get_by_label("API key")).to_be_empty()
    page.reload()
    expect(page.get_by_label("API key")).to_be_visible()


def test_nothing_that_a_key_saw_stays_unsaid(visit: Visit, keyed: tuple[Live, Mapping[str, str]]) -> None:
    live, secrets = keyed
    page = visit("talk", url=str(live.http.base_url))
    _sign_in(page, secrets["operator"])
    page.get_by_role("button", name="Options").click()
    page.get_by_label("Most tokens").fill("100000")
    page.get_by_label("Prompt", exact=True).fill("My secret")
    page.get_by_label("Prompt", exact=True).press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("100000")
    page.get_by_label("Prompt", exact=True).fill("not sent yet")
    page.get_by_role("button", name="Sign out").click()
    question = page.get_by_role("dialog", name="Sign out?")
    expect(question).to_contain_text("This browser keeps 1 conversation. Whoever uses it next can read what stays.")
    assert grave(page) == []
    _sign_out(page, "Sign out and keep all")

    _sign_in(page, secrets["app"])
    expect(page.get_by_role("banner")).to_contain_text("app")
    kept = page.get_by_role("complementary", name="Conversations").get_by_role("listitem")
    expect(kept).to_have_text(re.compile("My secret"))
    expect(page.get_by_role("heading", level=1)).to_have_text("New conversation")
    expect(page.get_by_label("Prompt", exact=True)).to_be_empty()
    kept.get_by_role("button", name="My secret").click()
    # While it is answered, which must not bring it back.
    page.get_by_role("button", name="Options").click()
    page.get_by_label("Most tokens").fill("")
    page.get_by_role("article").get_by_role("button", name="Regenerate").click()
    page.get_by_role("button", name="Sign out").click()
    _sign_out(page, "Sign out and delete all")
    expect(page.get_by_label("API key")).to_be_empty()
    assert page.evaluate("Object.keys({...localStorage, ...sessionStorage}).filter(it => it != 'manylora.theme')") == []


def test_another_key_after_one_that_was_revoked(visit: Visit, keyed: tuple[Live, Mapping[str, str]]) -> None:
    live, secrets = keyed
    stored, secret = live.service.keyring.store.add(KeySpec(name="leaver", scopes=["infer"]))
    page = visit("talk", url=str(live.http.base_url))
    _sign_in(page, secret)
    page.get_by_label("Prompt", exact=True).fill("not sent yet")
    live.http.delete(f"/v1/keys/{stored.key.id}", headers={"authorization": f"Bearer {secrets['operator']}"})
    page.get_by_label("Prompt", exact=True).press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("key")
    page.get_by_label("API key").fill(secrets["app"])
    with page.expect_event("load"):
        page.get_by_role("button", name="Continue").click()
    expect(page.get_by_role("banner")).to_contain_text("app")


def test_a_new_tab_asks_again(visit: Visit, keyed: tuple[Live, Mapping[str, str]]) -> None:
    live, secrets = keyed
    page = visit("talk", url=str(live.http.base_url))
    _sign_in(page, f"  {secrets['app']}\n")
    expect(page.get_by_role("banner")).to_contain_text("app")
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.get_by_label("API key")).to_be_visible()
    other.close()


@pytest.mark.parametrize("width", [390, 768])
def test_a_long_name_of_the_base_leaves_the_head_as_it_is(
    visit: Visit, keyed: tuple[Live, Mapping[str, str]], width: int
) -> None:
    live, secrets = keyed
    page = visit("health", url=str(live.http.base_url), viewport={"width": width, "height": 800})
    _sign_in(page, secrets["app"])
    name = page.get_by_title("the base model")
    height = name.bounding_box()["height"]  # type: ignore[index]
    name.evaluate("span => { span.textContent = 'organisation/a-base-with-a-long-name-8b-instruct'; }")
    assert name.bounding_box()["height"] == height  # type: ignore[index]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    expect(page.get_by_title("the key that you use")).to_be_in_viewport(ratio=1)
