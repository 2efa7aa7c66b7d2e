"""Speculation over HTTP: the same answers in fewer steps, the field that turns it off, and its metrics.

In float32 the tiny model's largest logits lie further apart than rounding reaches, so the reference serves here.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from server.compute.reference.backend import EagerForward
from server.engine.speculation import StepCosts
from tests.api.live import Live, request, running, tiny_service
from tests.api.operation.test_metrics import value
from tests.tiny import tiny_tokenizer

PROMPT = "abcd abcd abcd abc"
FEW = {str(token): 100.0 for token in tiny_tokenizer()("abcd ", add_special_tokens=False)["input_ids"]}
"""A bias under which the answer has only these letters, and so repeats itself."""


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server that drafts whenever it can."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(EagerForward, "batch_invariant", True)
        service = tiny_service(tmp_path_factory.mktemp("speculation"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StepCosts, "row", 0.0)
        patched.setattr(StepCosts, "comparable", True)
        with running(service) as live:
            yield live


def answer(live: Live, **fields: Any) -> tuple[dict[str, Any], int, int]:
    """The response, and how many tokens were drafted and accepted for it."""
    before = live.service.engine.stats()
    response = live.complete(prompt=PROMPT, max_tokens=60, logit_bias=FEW, **fields)
    after = live.service.engine.stats()
    return response, after.drafted_tokens - before.drafted_tokens, after.accepted_tokens - before.accepted_tokens


def test_a_request_can_turn_it_off_and_gets_the_same_answer(drafting: Live) -> None:
    steps = []
    responses = []
    for fields in ({}, {"speculation": None}, {"speculation": True}, {"speculation": False}):
        before = drafting.service.engine.stats().steps
        response, drafted, accepted = answer(drafting, **fields)
        steps.append(drafting.service.engine.stats().steps - before)
        responses.append((response["choices"], response["usage"]["completion_tokens"]))
        assert bool(drafted) == bool(accepted) == (fields.get("speculation") is not False)
    assert responses == [responses[0]] * 4
    assert responses[0][1] == 60
    assert max(steps[:3]) < steps[3]


@pytest.mark.parametrize("fields", [{"temperature": 0.8, "seed": 4}, {"repetition_penalty": 1.1}])
def test_samplings_keep_their_answers(drafting: Live, fields: dict[str, Any]) -> None:
    drafted, plain = (answer(drafting, speculation=flag, **fields)[0]["choices"] for flag in (True, False))
    assert drafted == plain


def test_a_stop_string_among_accepted_tokens_ends_the_answer_before_it(drafting: Live) -> None:
    text = answer(drafting, speculation=False)[0]["choices"][0]["text"]
    for at in range(5, 50, 7):
        stop = text[at : at + 3]
        cut, plain = (answer(drafting, speculation=flag, stop=stop)[0] for flag in (True, False))
        assert cut["choices"] == plain["choices"]
        assert cut["usage"] == plain["usage"]
        assert cut["choices"][0]["text"] == text[: text.index(stop)]


def test_a_stream_has_the_same_text_and_usage(drafting: Live) -> None:
    body = request(prompt=PROMPT, max_tokens=60, logit_bias=FEW, stream_options={"include_usage": True})
    streams = [drafting.stream(**body, speculation=flag) for flag in (True, False)]
    texts = ["".join(c["text"] for e in events for c in e["choices"]) for events in streams]
    assert texts[0] == texts[1]
    assert streams[0][-1]["usage"]["completion_tokens"] == 60
    assert len(streams[0]) < len(streams[1]), "accepted tokens come in one event"


def test_drafted_and_accepted_tokens_are_counted(drafting: Live) -> None:
    _, drafted, accepted = answer(drafting)
    assert drafted >= accepted > 0
    stats = drafting.service.engine.stats()
    assert value(drafting, "manylora_drafted_tokens_total") == stats.drafted_tokens
    assert value(drafting, "manylora_accepted_tokens_total") == stats.accepted_tokens
    base = drafting.http.get("/v1/models").json()["data"][0]["id"]
    assert value(drafting, "vllm:spec_decode_num_draft_tokens_total", model_name=base) == stats.drafted_tokens
    assert value(drafting, "vllm:spec_decode_num_accepted_tokens_total", model_name=base) == stats.accepted_tokens


def test_nothing_is_drafted_where_bits_depend_on_the_rows(live: Live) -> None:
    assert answer(live)[1] == 0
    assert value(live, "vllm:spec_decode_num_draft_tokens_total") == 0
