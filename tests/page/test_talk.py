"""Talk: what people do there, against a real server. The tiny model's text makes no sense, but is the server's."""

import contextlib
import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, Request, expect

from tests.api.live import Live, enduring_model, running, tiny_service, wait_for
from tests.page.axe import grave
from tests.page.conftest import ELSEWHERE, Visit
from tests.tiny import save_adapter
from training.data.formats import to_conversation

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"sky": {"enum": ["clear", "grey"]}},
            "required": ["sky"],
            "additionalProperties": False,
        },
    },
}
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    "[a](javascript:alert(3)) <javascript:alert(4)> [b](data:text/html,x)",
    "![tracker](https://example.com/pixel.png)",
    "<iframe srcdoc='<script>alert(6)</script>'><svg onload=alert(7)>",
    "`<b onclick=alert(8)>` **<i>** \u202egnp.exe\u202c \u0007\u001b[31m",
    "[x]: javascript:alert(9) [x] {@html y} ${1} {{2}}",
    "x" * 120 + "[" * 20 + "*" * 20 + "`" * 19,
)


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server whose answers take seconds, with a context that has room for tools, and two adapters."""
    root, model = tmp_path_factory.mktemp("talk"), enduring_model()
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    adapters = {name: save_adapter(model, root / name, seed, **lora) for seed, name in enumerate(("red", "green"))}
    settings = {"max_model_len": 8192, "allowed_host": (ELSEWHERE,)}
    with running(tiny_service(root, model, adapter=adapters, **settings)) as live:
        yield live
        wait_for(live.idle)


@pytest.fixture
def talk(visit: Visit, roomy: Live) -> Iterator[Page]:
    """The view, with greedy answers of 12 tokens."""
    page = visit("talk", url=str(roomy.http.base_url))
    page.get_by_role("button", name="Options").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("12")
    yield page
    wait_for(roomy.idle)


def prompt_of(page: Page) -> Locator:
    return page.get_by_placeholder("Write a prompt")


def ask(page: Page, prompt: str) -> Locator:
    """Send a prompt; return its turn when all columns have answered."""
    turns = page.get_by_role("article")
    place = turns.count()
    prompt_of(page).fill(prompt)
    prompt_of(page).press("Enter")
    expect(turns).to_have_count(place + 1)
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    return turns.nth(place)


def sent(page: Page) -> list[dict[str, Any]]:
    """Return the list to which the bodies of chat requests are added."""
    bodies: list[dict[str, Any]] = []

    def add(request: Request) -> None:
        if request.url.endswith("/v1/chat/completions"):
            bodies.append(json.loads(request.post_data or ""))

    page.on("request", add)
    return bodies


def answer_to(live: Live, body: dict[str, Any]) -> str:
    """Return the text of the whole answer to a request."""
    plain = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
    response = live.http.post("/v1/chat/completions", json=plain)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def test_columns_answer_the_same_prompt(visit: Visit, roomy: Live) -> None:
    page = visit("talk?adapter=red&adapter=green", url=str(roomy.http.base_url))
    bodies = sent(page)
    page.get_by_label("Plain text").check()
    page.get_by_role("button", name="Options").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("12")
    page.get_by_role("button", name="Add column").click()
    # The third column: a mix, by the list of names and by a slider.
    page.get_by_label("Model of column 3").fill("gre")
    page.get_by_role("listbox").get_by_role("option", name="green").click()
    page.get_by_role("button", name="Mix").nth(2).click()
    page.get_by_label("Adapter 2 of column 3").press("ArrowDown")
    expect(page.get_by_role("listbox").get_by_role("option")).to_have_text(
        [re.compile(name) for name in ("tiny *base", "green", "red")]
    )
    page.get_by_label("Adapter 2 of column 3").fill("red@")
    page.get_by_role("listbox").get_by_role("option", name="red@1 version").click()
    page.get_by_label("Weight of red@1", exact=True).fill("0.5")
    turn = ask(page, "Once upon a time")
    bodies.sort(key=lambda body: "adapter" in body)
    assert [(body["model"], body.get("adapter")) for body in bodies] == [
        ("red", None),
        ("green", None),
        ("tiny", [{"name": "green", "weight": 1}, {"name": "red@1", "weight": 0.5}]),
    ]
    columns = [turn.get_by_role("region", name=f"Column {column}") for column in (1, 2, 3)]
    texts = [column.locator(".plain").text_content() for column in columns]
    assert texts == [answer_to(roomy, body) for body in bodies]
    assert len(set(texts)) == 3
    for column, names in zip(columns, ("red@1", "green@1", "1 green@1 + 0.5 red@1"), strict=True):
        expect(column.locator("summary")).to_contain_text(names)
        for figure in ("tokens/s", "first text", "prompt tokens", "cached", "cut: most tokens reached"):
            expect(column.locator("summary")).to_contain_text(figure)
    # One column's error leaves the others alone.
    page.get_by_label("Model of column 1").fill("rad")
    second = ask(page, "And then")
    expect(second.get_by_role("alert")).to_contain_text("rad")
    expect(second.get_by_role("region", name="Column 2").locator("summary")).to_contain_text("green@1")
    page.get_by_label("Model of column 1").fill("red")
    page.get_by_label("Model of column 1").press("Escape")
    second.get_by_role("button", name="Regenerate").first.click()
    expect(second.get_by_role("region", name="Column 1").locator("summary")).to_contain_text("red@1")
    assert [message["role"] for message in bodies[-1]["messages"]] == ["user", "assistant", "user"]
    assert bodies[-1]["messages"][1]["content"] == texts[0]


def test_a_mix_begins_without_the_base(visit: Visit, roomy: Live) -> None:
    page = visit("talk?adapter=tiny", url=str(roomy.http.base_url))
    page.get_by_role("button", name="Mix").click()
    for place in (1, 2):
        field = page.get_by_label(f"Adapter {place} of column 1")
        expect(field).to_have_value("")
        expect(field).to_have_attribute("placeholder", "an adapter")
    page.get_by_label("Adapter 2 of column 1").fill("red")
    bodies = sent(page)
    ask(page, "Once upon a time")
    assert (bodies[0]["model"], bodies[0].get("adapter")) == ("red", None)


def test_plain_http_from_another_machine(visit: Visit, roomy: Live) -> None:
    page = visit("talk", url=f"http://{ELSEWHERE}:{roomy.http.base_url.port}")
    assert page.evaluate("isSecureContext") is False
    page.get_by_role("button", name="Options").click()
    page.get_by_label("Most tokens").fill("4")
    turn = ask(page, "Once upon a time")
    expect(turn.locator("summary")).to_contain_text("cut: most tokens reached")
    turn.get_by_role("button", name="Copy").click()
    expect(turn).to_contain_text("select the text and copy it")
    for place in ("adapters", "adapters?compare=", "adapters?register=", "training", "health", "talk"):
        page.evaluate("place => { location.hash = `#/${place}`; }", place)
        expect(page.get_by_role("main").get_by_role("heading", level=1)).to_be_visible()
    page.reload()
    expect(page.get_by_role("article")).to_have_count(1)


def test_stopping_keeps_what_there_is(talk: Page, roomy: Live) -> None:
    talk.get_by_label("Most tokens").fill("")
    talk.get_by_role("button", name="Add column").click()
    prompt_of(talk).fill("Once")
    prompt_of(talk).press("Shift+Enter")
    prompt_of(talk).press_sequentially("upon")
    prompt_of(talk).press("Enter")
    answers = [talk.get_by_role("region", name=f"Column {column}").locator("[aria-busy] > *") for column in (1, 2)]
    for answer in answers:  # both grow at the same time
        expect(answer.first).not_to_have_text("Waiting for the first token …")
    expect(talk.get_by_role("button", name="Stop")).to_be_visible()
    # Somebody who has scrolled up stays where they are.
    turns = talk.get_by_role("region", name="The conversation")
    talk.set_viewport_size({"width": 1280, "height": 400})
    wait_for(lambda: turns.evaluate("it => it.scrollHeight > it.clientHeight + 50 && it.scrollTop > 20"))
    turns.hover()
    talk.mouse.wheel(0, -10_000)
    wait_for(lambda: turns.evaluate("it => it.scrollTop") == 0)
    height = turns.evaluate("it => it.scrollHeight")
    wait_for(lambda: turns.evaluate("it => it.scrollHeight") > height)
    assert turns.evaluate("it => it.scrollTop") == 0
    talk.get_by_role("button", name="To the end").click()
    talk.keyboard.press("Escape")
    expect(talk.get_by_role("button", name="Send", exact=True)).to_be_visible()
    wait_for(roomy.idle)
    for answer in answers:
        expect(answer.last.locator("summary")).to_contain_text("stopped")
    expect(talk.get_by_text("Once upon", exact=False).first).to_have_text("Once\nupon")
    text = answers[0].first.text_content()
    talk.reload()
    expect(answers[0].first).to_have_text(text or "")
    expect(answers[0].last.locator("summary")).to_contain_text("stopped")


def test_conversations_are_left_while_they_are_answered(talk: Page, roomy: Live) -> None:
    talk.get_by_label("Most tokens").fill("6000")  # minutes
    talk.get_by_label("Plain text").check()
    kept = talk.get_by_role("complementary", name="Conversations").get_by_role("listitem")
    answer = talk.get_by_role("article").locator(".plain")

    def begin(prompt: str) -> None:
        prompt_of(talk).fill(prompt)
        prompt_of(talk).press("Enter")
        expect(answer).not_to_be_empty()

    def length() -> int:
        return len(answer.text_content() or "")

    begin("First")
    grown = length()
    kept.get_by_role("button", name="First").click()  # the one that is shown
    wait_for(lambda: length() > grown)
    expect(talk.get_by_role("button", name="Stop")).to_be_visible()
    talk.get_by_role("button", name="New").click()
    begin("Second")
    for name in ("First", "Second"):
        kept.get_by_role("button", name=name).click()
        expect(talk.get_by_role("heading", level=1)).to_have_text(name)
        expect(answer).not_to_be_empty()
        expect(talk.get_by_role("article").locator("summary")).to_contain_text("stopped")
    # What is deleted stays deleted when its stream has ended.
    again = talk.get_by_role("article").get_by_role("button", name="Regenerate")
    again.click()
    expect(talk.get_by_role("button", name="Stop")).to_be_visible()
    kept.get_by_role("button", name="Delete").click()
    wait_for(roomy.idle)
    talk.reload()
    expect(kept).to_have_count(1)
    kept.get_by_role("button", name="First").click()
    again.click()
    expect(talk.get_by_role("button", name="Stop")).to_be_visible()
    talk.get_by_role("button", name="Delete all").click()
    talk.get_by_role("button", name="Delete them").click()
    wait_for(roomy.idle)
    talk.reload()
    expect(kept).to_have_count(0)


def test_answers_run_nothing_and_ask_nobody(talk: Page, roomy: Live) -> None:
    asked: list[str] = []
    talk.on("request", lambda request: asked.append(request.url))
    talk.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    talk.get_by_label("Most tokens").fill("4000")
    talk.get_by_label("The answer is").select_option("one of these lines")
    inside = "it => [...it.querySelectorAll('.markdown *')].map(e => [e.tagName, ...e.getAttributeNames()].join(' '))"
    elements, links = set(), set()
    for text in HOSTILE:
        talk.get_by_label("Answers, one a line").fill(text)
        turn = ask(talk, "Say it")
        expect(turn.locator("summary")).to_contain_text("complete")
        markdown = turn.locator(".markdown")
        assert markdown.inner_text().strip()
        assert markdown.bounding_box()["width"] < 800  # type: ignore[index]
        elements.update(turn.evaluate(inside))
        links.update(markdown.locator("a[href]").evaluate_all("links => links.map(link => link.href)"))
        talk.get_by_label("Plain text").check()
        assert turn.locator(".plain").text_content() == text
        talk.get_by_label("Plain text").uncheck()
        turn.get_by_role("button", name="Delete").click()
    assert elements <= {"P", "A target rel", "A href target rel", "BR", "CODE", "STRONG", "EM", "DEL"}
    assert links
    assert all(link.startswith("https://example.com/") for link in links)
    assert all(url.startswith((str(roomy.http.base_url), "blob:")) for url in asked)


def test_how_sure_it_was_of_each_token(talk: Page, roomy: Live) -> None:
    bodies = sent(talk)
    talk.get_by_label("How sure").check()
    turn = ask(talk, "Once")
    tokens = turn.get_by_role("listbox")
    expect(tokens.get_by_role("option")).to_have_count(12)
    body = {**bodies[0], "stream": False, "stream_options": None}
    content = roomy.http.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    assert "".join(tokens.get_by_role("option").all_text_contents()) == answer_to(roomy, bodies[0])
    tokens.focus()
    talk.keyboard.press("ArrowRight")
    expect(tokens.get_by_role("option", selected=True)).to_have_attribute("data-place", "1")
    card = turn.get_by_role("status")
    expect(card.get_by_role("row")).to_have_count(len(content[1]["top_logprobs"]))
    talk.keyboard.press("Escape")
    expect(card).to_have_count(0)
    tokens.get_by_role("option").nth(2).hover()
    expect(card.get_by_role("row")).to_have_count(5)
    assert grave(talk) == []


def test_json_and_tools(talk: Page) -> None:
    bodies = sent(talk)
    talk.get_by_label("Most tokens").fill("200")
    talk.get_by_label("The answer is").select_option("JSON by a schema")
    talk.get_by_label("JSON schema").fill('{"enum": [1,\n 2,]}')
    expect(talk.get_by_role("alert")).to_have_text("line 2, column 4: expected a value")
    prompt_of(talk).fill("One?")
    expect(talk.get_by_role("button", name="Send", exact=True)).to_be_disabled()
    talk.get_by_label("JSON schema").fill('{"enum": [1]}')
    expect(ask(talk, "One?").locator(".markdown")).to_have_text("1")
    talk.get_by_label("The answer is").select_option("any text")
    talk.get_by_label("Tools").fill(json.dumps([WEATHER]))
    talk.get_by_label("The model calls tools").select_option("always, one call")
    turn = ask(talk, "The weather?")
    expect(turn.locator("summary").first).to_contain_text("calls a tool")
    expect(turn.locator("pre").first).to_have_text(re.compile(r'^\{\s*"sky": "(clear|grey)"\s*\}$'))
    talk.get_by_label("The model calls tools").select_option("never")
    turn.get_by_label("Result of weather").fill('{"sky": "clear"}')
    turn.get_by_role("button", name="Send the result").click()
    expect(turn.locator("summary")).to_have_count(2)
    assistant, tool = bodies[-1]["messages"][-2:]
    assert (assistant["tool_calls"][0]["function"]["name"], tool["content"]) == ("weather", '{"sky": "clear"}')
    assert tool["tool_call_id"] == assistant["tool_calls"][0]["id"]


def test_code_sends_what_the_page_sends(talk: Page, roomy: Live) -> None:
    bodies = sent(talk)
    options = {"Top p": "0.9", "Top k": "40", "Min p": "0.01", "Seed": "7", "Presence penalty": "0.1"}
    options |= {"Frequency penalty": "0.2", "Repetition penalty": "1.1", "System prompt": 'It\'s "so" \\ $x\u202e'}
    for label, value in {**options, "Stop texts": "END\n\\n\\n"}.items():
        talk.get_by_label(label).fill(value)
    talk.get_by_label("How sure").check()
    talk.get_by_label("Model of column 1").fill("red")
    talk.get_by_role("button", name="Mix").click()
    turn = ask(talk, "Don't say `hello`\n</script>")
    talk.get_by_label("How sure").uncheck()
    talk.get_by_label("Plain text").check()
    text = turn.locator(".plain").text_content() or ""
    talk.get_by_label("How sure").check()
    talk.get_by_role("button", name="Code", exact=True).click()
    code = talk.get_by_label("The code")
    assert grave(talk) == []
    words = shlex.split(code.text_content() or "")
    assert words[:3] == ["curl", "-N", f"{str(roomy.http.base_url).rstrip('/')}/v1/chat/completions"]
    assert json.loads(words[words.index("-d") + 1]) == bodies[0]
    assert set(bodies[0]) >= {
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "adapter",
        "logprobs",
        "repetition_penalty",
    } - {"adapter"}
    talk.get_by_label("Language").select_option("Python")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code.text_content() or "", "code.py", "exec"), {})
    assert printed.getvalue() == text


def test_conversations_are_kept_and_travel(talk: Page, tmp_path: Path) -> None:
    bodies = sent(talk)
    ask(talk, "One")
    ask(talk, "Two")
    first = talk.get_by_role("article", name="Turn 1")
    first.get_by_role("button", name="Edit").click()
    expect(first.get_by_text("drops the turn after it")).to_be_visible()
    first.get_by_label("Prompt").fill("Three")
    first.get_by_label("Prompt").press("Enter")
    expect(talk.get_by_role("article")).to_have_count(1)
    expect(first.get_by_role("button", name="Regenerate")).to_be_visible()
    assert [message["content"] for message in bodies[-1]["messages"]] == ["Three"]
    talk.get_by_role("button", name="New").click()
    expect(talk.get_by_role("article")).to_have_count(0)
    ask(talk, "Four")
    kept = talk.get_by_role("complementary", name="Conversations").get_by_role("listitem")
    expect(kept).to_have_count(2)
    talk.get_by_role("button", name="Rename").click()
    talk.get_by_label("Name of the conversation").fill("The fourth")
    talk.keyboard.press("Enter")
    expect(talk.get_by_role("heading", level=1)).to_have_text("The fourth")
    # Another view, and back: all is as it was.
    prompt_of(talk).fill("not sent yet")
    talk.get_by_role("link", name="Health").click()
    talk.get_by_role("link", name="Talk").click()
    expect(talk.get_by_role("heading", level=1)).to_have_text("The fourth")
    expect(prompt_of(talk)).to_have_value("not sent yet")
    with talk.expect_download() as download:
        talk.get_by_role("button", name="Export all").click()
    path = tmp_path / "rows.jsonl"
    download.value.save_as(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    prompts = [to_conversation(row, "chat", "rows.jsonl").turns[0].content for row in rows]
    assert prompts == ["Four", "Three"]
    talk.get_by_role("button", name="Delete all").click()
    talk.get_by_role("button", name="Delete them").click()
    expect(kept).to_have_count(0)
    with path.open("a") as file:
        file.write("nonsense\n")
    talk.get_by_label("A JSONL file to import").set_input_files(path)
    expect(kept).to_have_count(2)
    expect(talk.get_by_text("2 of 3 imported")).to_contain_text("Line 3: line 1, column 1: expected a value")
    kept.filter(has_text="Four").get_by_role("button", name="Four").click()
    talk.get_by_role("article").get_by_role("button", name="Delete").click()
    expect(talk.get_by_role("article")).to_have_count(0)
