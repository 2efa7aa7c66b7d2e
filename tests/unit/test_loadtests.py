"""The load test itself: the same work for every server, whole answers only, figures that are right."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from loadtests import report, run
from loadtests.adapters import Geometry, write_adapter, write_adapters
from loadtests.client import RequestFailed, Target, Timing, complete
from loadtests.workload import CASES, Request, Shape, requests

TINY = Geometry(hidden=32, intermediate=48, layers=2, heads=4, kv_heads=2, head_dim=8)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=TINY.hidden,
        intermediate_size=TINY.intermediate,
        num_hidden_layers=TINY.layers,
        num_attention_heads=TINY.heads,
        num_key_value_heads=TINY.kv_heads,
        initializer_range=0.3,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).train(False)
    return model


# --- workload


def test_same_seed_same_work_other_seed_other_prompts() -> None:
    case, shape = CASES["distinct"], Shape()
    assert requests(case, shape, 16, "0/0") == requests(case, shape, 16, "0/0")
    prompts = [
        request.prompt
        for seed in ("0/warm-up", "0/0", "0/1", "1/0")
        for clients in (1, 16)
        for name in CASES
        for plan in requests(CASES[name], shape, clients, seed)
        for request in plan
    ]
    beginnings = {" ".join(prompt.split()[:8]) for prompt in prompts}
    assert len(beginnings) == len(prompts), "two prompts begin alike, so a prompt cache would help"
    assert {len(prompt.split()) for prompt in prompts} == {shape.prompt_tokens}


def test_distinct_clients_never_share_an_adapter() -> None:
    for turn in zip(*requests(CASES["distinct"], Shape(), 16, "0"), strict=True):
        assert len({request.adapter for request in turn}) == 16


def test_a_lone_client_goes_through_the_adapters() -> None:
    (plan,) = requests(CASES["distinct"], Shape(requests_at_least=16), 1, "0")
    assert len({request.adapter for request in plan}) == 16


def test_base_and_single_ask_for_none_and_one() -> None:
    def asked(name: str) -> set[str | None]:
        return {request.adapter for plan in requests(CASES[name], Shape(), 16, "0") for request in plan}

    assert asked("base") == {None}
    assert asked("single") == {"bench-000"}


def test_zipf_asks_most_for_the_first() -> None:
    plans = requests(CASES["zipf"], Shape(requests_per_client=200), 16, "0")
    counts = Counter(request.adapter for plan in plans for request in plan)
    assert len(counts) == 64
    # 1 / H(64) = 0.211 of 3200 requests, give or take 4 standard deviations of 23.
    assert 675 - 92 < counts["bench-000"] < 675 + 92
    assert counts["bench-000"] > counts["bench-003"] > counts["bench-031"]


# --- adapters


def test_geometry_is_the_models(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    expected = {
        (name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert set(Geometry.read(tmp_path / "config.json").linears()) == expected


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own
def test_peft_loads_the_adapter_and_the_output_moves(tmp_path: Path) -> None:
    write_adapter(tmp_path, TINY, seed=1, rank=4, alpha=8)
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        plain = tiny_llama()(tokens).logits
        adapted = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
        loaded = {name: tensor for name, tensor in adapted.state_dict().items() if "lora_" in name}
        moved = adapted(tokens).logits
    assert len(loaded) == 2 * 7 * TINY.layers
    assert all(tensor.count_nonzero() > 0 for tensor in loaded.values()), "a tensor was not loaded"
    change = (moved - plain).norm() / plain.norm()
    assert 0.01 < change < 0.5


def test_adapters_differ_and_can_be_made_again(tmp_path: Path) -> None:
    first = write_adapters(tmp_path / "a", TINY, 3)
    again = write_adapters(tmp_path / "b", TINY, 3)

    def contents(folders: dict[str, Path]) -> list[bytes]:
        return [(folder / "adapter_model.safetensors").read_bytes() for folder in folders.values()]

    assert contents(first) == contents(again)
    assert len(set(contents(first))) == 3


# --- client


def event(text: str, **more: Any) -> str:
    choices = [{"index": 0, "text": text, "finish_reason": None}]
    return f"data: {json.dumps({'model': 'tiny', 'choices': choices} | more)}\n\n"


def usage(tokens: int) -> str:
    counted = {"prompt_tokens": 5, "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 2}}
    return f"data: {json.dumps({'model': 'tiny', 'choices': [], 'usage': counted})}\n\n"


DONE = "data: [DONE]\n\n"
GOOD = [event("a"), event(""), event("b"), event("c"), usage(4), DONE]


def ask(target: Target, request: Request, events: list[str], status: int = 200) -> tuple[Timing, dict[str, Any]]:
    """What the client makes of a server that answers with ``events``, and what it sent."""
    app = FastAPI()
    bodies: list[dict[str, Any]] = []

    @app.post("/v1/completions", response_model=None)
    async def answer(body: dict[str, Any]) -> JSONResponse | StreamingResponse:
        bodies.append(body)
        if status != 200:
            return JSONResponse({"error": {"message": "no such thing"}}, status)

        async def stream() -> AsyncIterator[str]:
            for line in events:
                yield line

        return StreamingResponse(stream(), media_type="text/event-stream")

    async def send() -> Timing:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await complete(http, target, request)

    return asyncio.run(send()), bodies[0]


MANYLORA = Target("manylora", "tiny")
VLLM = Target("vllm", "tiny")
PLAIN = Request("hello", 4, None)
ADAPTED = Request("hello", 4, "bench-001")


def test_a_whole_answer_is_timed_by_its_texts() -> None:
    timing, body = ask(MANYLORA, PLAIN, GOOD)
    assert len(timing.arrivals) == 3
    assert len(timing.gaps) == 2
    assert (timing.prompt_tokens, timing.cached_tokens, timing.output_tokens) == (5, 2, 4)
    assert timing.first > 0
    assert (body["model"], body["adapter"]) == ("tiny", None)
    assert (body["temperature"], body["ignore_eos"], body["max_tokens"]) == (0, True, 4)


def test_each_server_is_asked_for_an_adapter_in_its_own_way() -> None:
    served = event("a", adapter=[{"name": "bench-001", "id": "0" * 64, "weight": 1.0}])
    _, body = ask(MANYLORA, ADAPTED, [served, *GOOD])
    assert (body["model"], body["adapter"]) == ("tiny", "bench-001")
    _, body = ask(VLLM, ADAPTED, [event("a", model="bench-001"), *GOOD])
    assert body["model"] == "bench-001"
    assert "adapter" not in body


@pytest.mark.parametrize(
    ("request_", "events", "status", "reason"),
    [
        (PLAIN, GOOD, 404, "status 404: .*no such thing"),
        (PLAIN, [event("a"), 'data: {"error": {"message": "step failed"}}\n\n', DONE], 200, "step failed"),
        (PLAIN, GOOD[:-1], 200, r"without \[DONE\]"),
        (PLAIN, [event("a"), usage(1), DONE], 200, "asked for 4 tokens, got 1"),
        (PLAIN, [event("a"), DONE], 200, "asked for 4 tokens, got None"),
        (PLAIN, [event(""), usage(4), DONE], 200, "no text"),
        (PLAIN, ["data: {\n\n", DONE], 200, "JSONDecodeError"),
        (ADAPTED, GOOD, 200, "asked for `bench-001`, answered by `tiny`"),
    ],
    ids=["status", "error event", "early end", "too few", "no usage", "no text", "not JSON", "base for adapter"],
)
def test_anything_less_is_a_failure(request_: Request, events: list[str], status: int, reason: str) -> None:
    with pytest.raises(RequestFailed, match=reason):
        ask(MANYLORA, request_, events, status)


def test_a_dead_server_is_a_failure() -> None:
    async def send() -> None:
        async with httpx.AsyncClient(base_url="http://127.0.0.1:1", trust_env=False) as http:
            await complete(http, MANYLORA, PLAIN)

    with pytest.raises(RequestFailed, match="ConnectError"):
        asyncio.run(send())


# --- report


def timing(started: float, *arrivals: float) -> Timing:
    return Timing(started, arrivals, prompt_tokens=10, cached_tokens=0, output_tokens=len(arrivals))


def test_figures_are_medians_over_rounds() -> None:
    quick = report.Round(1.0, (timing(0.0, 0.1, 0.2, 0.3), timing(0.0, 0.3, 0.4, 0.5)))
    slow = report.Round(2.0, (timing(0.0, 0.2, 0.4, 0.6), timing(0.0, 0.4, 0.6, 0.8)))
    slowest = report.Round(3.0, (timing(0.0, 1.0, 1.3, 1.6),), ("status 500",))
    row = report.figures("base", 2, [slow, slowest, quick])
    assert row.tokens_per_second == pytest.approx(3.0)
    assert row.spread == pytest.approx((6 - 1) / 3)
    assert row.first_p50 == pytest.approx(300)
    assert row.first_p95 == pytest.approx(390)
    assert row.gap_p50 == pytest.approx(200)
    assert row.requests == 6
    assert row.failures == ("status 500",)
    assert "1 of 6" in report.markdown([row])
    lines = report.aligned([row, row]).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_a_round_of_failures_has_no_figures_and_no_crash() -> None:
    row = report.figures("base", 2, [report.Round(1.0, (), ("status 500", "status 500"))])
    assert row.tokens_per_second == 0
    assert row.requests == 2
    assert "nan" in report.aligned([row])


# --- run


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--concurrency", "0"], "--concurrency: must be at least 1 (got 0)"),
        (["--cases", "many"], "invalid choice: 'many'"),
        (["--cases", "single"], "--adapter-dir is needed with --url"),
        (["--spawn", "vllm serve", "--peer", "vllm"], "--spawn starts manylora"),
        (["--url", "http://x", "--spawn", "y"], "not allowed with"),
    ],
)
def test_bad_options_are_named(
    arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["run", *arguments])
    with pytest.raises(SystemExit) as stop:
        run.main()
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


def test_no_server_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["run", "--url", "http://127.0.0.1:1", "--cases", "base"])
    assert run.main() == 2
    assert "cannot measure this server" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "reason"), [("false", "it ended with status 1"), ("no-such-command", "No such file")]
)
def test_a_server_that_does_not_start_is_told(
    command: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["run", "--spawn", command, "--cases", "base"])
    assert run.main() == 2
    assert reason in capsys.readouterr().err
