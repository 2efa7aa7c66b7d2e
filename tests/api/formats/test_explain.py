"""``explain`` and ``Server-Timing``: where the time of a request went."""

from typing import Any

from tests.api.live import Live, request

SPANS = ("queue_ms", "load_ms", "prefill_ms", "decode_ms")


def test_answers_explain_their_time_on_request(live: Live) -> None:
    for fields in ({"adapter": "red"}, {}, {"adapter": "red", "n": 2}):
        answer = live.complete(**fields, explain=True)
        check(answer["explain"], bool(fields))
        assert "explain" not in live.complete(**fields)


def check(explain: dict[str, Any], adapted: bool) -> None:
    assert set(explain) == {*SPANS, "adapter_load", "batch_adapters", "preemptions"}
    assert all(explain[span] >= 0 for span in SPANS)
    assert explain["decode_ms"] > 0
    assert explain["adapter_load"] in (("cold", "warm") if adapted else (None,))
    assert explain["batch_adapters"] >= 1
    assert explain["preemptions"] == 0


def test_a_stream_explains_itself_in_its_last_chunk(live: Live) -> None:
    for options in (None, {"include_usage": True}):
        events = live.stream(**request(explain=True, adapter="green"), stream_options=options)
        check(events[-1]["explain"], adapted=True)
        assert events[-1]["choices"] == []
        assert ("usage" in events[-1]) == bool(options)
        assert not any("explain" in event for event in events[:-1])


def test_a_chat_explains_itself(live: Live) -> None:
    body = {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 5, "explain": True, "ignore_eos": True}
    check(live.http.post("/v1/chat/completions", json=body).json()["explain"], adapted=False)


def test_an_answer_ended_by_a_stop_string_explains_itself(live: Live) -> None:
    stop = live.text()[4:7]
    check(live.complete(stop=stop, explain=True)["explain"], adapted=False)


def test_server_timing(live: Live) -> None:
    header = live.http.post("/v1/completions", json=request()).headers["server-timing"]
    spans = dict(part.split(";dur=") for part in header.split(", "))
    assert set(spans) == {"queue", "load", "prefill", "decode"}
    assert all(float(value) >= 0 for value in spans.values())
