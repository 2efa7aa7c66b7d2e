"""Generated adapters load in PEFT and llama.cpp; the client accepts complete and right answers only."""

import asyncio
import json
from pathlib import Path
from typing import Any, get_args

import aiohttp
import gguf
import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestServer
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from loadtests.drive.client import RequestFailed, Timing, complete
from loadtests.drive.peers import LlamaCpp, Manylora, Target, Vllm
from loadtests.workload.adapters import AdapterGenerator, ModelShape, Targets
from loadtests.workload.gguf_adapters import write_gguf
from loadtests.workload.workload import Request

TINY = ModelShape(hidden=32, intermediate=48, layers=2, heads=4, kv_heads=2, head_dim=8)


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


# --- adapters


def test_the_linear_layers_are_those_of_the_model(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    expected = {
        (name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert set(ModelShape.read(tmp_path / "config.json").linears()) == expected


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own
def test_peft_loads_the_adapter_and_the_output_changes(tmp_path: Path) -> None:
    folder = AdapterGenerator(TINY, seed=1, ranks=(4,)).write(tmp_path, 0)
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        plain = tiny_llama()(tokens).logits
        adapted = PeftModel.from_pretrained(tiny_llama(), str(folder))
        loaded = {name: tensor for name, tensor in adapted.state_dict().items() if "lora_" in name}
        moved = adapted(tokens).logits
    assert len(loaded) == 2 * 7 * TINY.layers
    assert all(tensor.count_nonzero() > 0 for tensor in loaded.values()), "a tensor was not loaded"
    change = (moved - plain).norm() / plain.norm()
    assert 0.01 < change < 0.5


SHAPE = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("[]", "object"),
        ("{", "is not JSON"),
        ('{"hidden_size": 8}', "`intermediate_size` is missing"),
        (json.dumps(SHAPE | {"num_hidden_layers": 10**9}), "`num_hidden_layers` must be at most 1,000"),
        (json.dumps(SHAPE | {"num_attention_heads": 0}), "`num_attention_heads` must be at least 1"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_bad_config_is_named(config: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(config)
    with pytest.raises(ValueError, match=reason):
        ModelShape.read(file)


def test_adapters_differ_and_can_be_generated_again() -> None:
    first, again = AdapterGenerator(TINY, ranks=(2, 4)), AdapterGenerator(TINY, ranks=(2, 4))
    contents = [first.files(number)["adapter_model.safetensors"] for number in range(3)]
    assert contents == [again.files(number)["adapter_model.safetensors"] for number in range(3)]
    assert len(set(contents)) == 3
    assert [json.loads(first.files(number)["adapter_config.json"])["r"] for number in range(3)] == [2, 4, 2]


def test_fewer_targets_make_fewer_layers() -> None:
    layers = {targets: len(list(TINY.linears(targets))) // TINY.layers for targets in get_args(Targets)}
    assert layers == {"all-linear": 7, "attention": 4, "qv": 2}


def test_llama_cpp_gets_the_same_adapter_in_its_own_order(tmp_path: Path) -> None:
    generator = AdapterGenerator(TINY, ranks=(2,))
    reader = gguf.GGUFReader(write_gguf(generator, tmp_path, 1))
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == 2 * 7 * TINY.layers
    assert reader.fields["adapter.lora.alpha"].contents() == 4
    for name, a, b in generator.tensors(1):
        if name == "model.layers.1.self_attn.k_proj":
            assert (tensors["blk.1.attn_k.weight.lora_a"] == a).all()
            # Rows of the first head: llama.cpp interleaves the two halves that transformers rotates.
            assert (tensors["blk.1.attn_k.weight.lora_b"][:8] == b[[0, 4, 1, 5, 2, 6, 3, 7]]).all()
        if name == "model.layers.1.mlp.down_proj":
            assert (tensors["blk.1.ffn_down.weight.lora_b"] == b).all()


# --- client


def event(text: str, **more: Any) -> str:
    choices = [{"index": 0, "text": text, "finish_reason": None}]
    return f"data: {json.dumps({'model': 'tiny', 'choices': choices} | more)}\n\n"


def usage(tokens: int, **more: Any) -> str:
    counted = {"prompt_tokens": 5, "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 2}}
    return f"data: {json.dumps({'model': 'tiny', 'choices': [], 'usage': counted} | more)}\n\n"


DONE = "data: [DONE]\n\n"
GOOD = [event("a"), event(""), event("b"), event("c"), usage(4), DONE]


def ask(target: Target, request: Request, events: list[str], status: int = 200) -> tuple[Timing, dict[str, Any]]:
    """Return the client's timing of a server that answers with ``events``, and the body that the client sent."""
    bodies: list[dict[str, Any]] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.json())
        if status != 200:
            return web.json_response({"error": {"message": "no such thing"}}, status=status)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for event in events:
            await response.write(event.encode())
        return response

    async def send() -> Timing:
        app = web.Application()
        app.router.add_post(f"/{target.path}", answer)
        async with TestServer(app) as server, aiohttp.ClientSession(server.make_url("/")) as http:
            return await complete(http, target, request)

    return asyncio.run(send()), bodies[0]


MANYLORA = Target(Manylora("tiny"), "completions")
VLLM = Target(Vllm("tiny"), "completions")
LLAMACPP = Target(LlamaCpp("tiny", {"bench-001": 7}), "completions")
CHAT = Target(Manylora("tiny"), "chat")
PLAIN = Request("hello", 4, None)
ADAPTED = Request("hello", 4, "bench-001")


def test_a_complete_answer_is_timed_by_its_events_with_text() -> None:
    timing, body = ask(MANYLORA, PLAIN, GOOD)
    assert len(timing.arrivals) == 3
    assert len(timing.gaps) == 2
    assert (timing.prompt_tokens, timing.cached_tokens, timing.output_tokens) == (5, 2, 4)
    assert 0 < timing.ttft <= timing.e2e
    assert (body["model"], body["adapter"], body["prompt"]) == ("tiny", None, "hello")
    assert (body["temperature"], body["ignore_eos"], body["max_tokens"]) == (0, True, 4)


def test_time_per_token_uses_the_servers_count() -> None:
    timing = Timing(None, 10.0, (11.0, 11.5, 13.0), 13.1, prompt_tokens=5, cached_tokens=0, output_tokens=9)
    assert timing.tpot == pytest.approx(2.0 / 8)
    assert timing.gaps == pytest.approx([0.5, 1.5])
    assert timing.e2e == pytest.approx(3.1)
    assert Timing(None, 0.0, (1.0,), 1.0, 5, 0, 1).tpot is None


@pytest.mark.parametrize("arrivals", [(11.0,), (11.0, 11.0)], ids=["one event", "two at once"])
def test_text_that_arrived_all_at_once_has_no_time_per_token(arrivals: tuple[float, ...]) -> None:
    assert Timing(None, 10.0, arrivals, 11.1, 5, 0, output_tokens=9).tpot is None


def test_each_server_is_asked_for_an_adapter_in_its_own_way() -> None:
    served = event("a", adapter=[{"name": "bench-001@3", "id": "0" * 64, "weight": 1.0}])
    _, body = ask(MANYLORA, ADAPTED, [served, usage(4, adapter=[{"name": "bench-001@3"}]), DONE])
    assert (body["model"], body["adapter"]) == ("tiny", "bench-001")
    _, body = ask(VLLM, ADAPTED, [event("a", model="bench-001"), usage(4, model="bench-001"), DONE])
    assert body["model"] == "bench-001"
    assert "adapter" not in body
    assert ask(LLAMACPP, ADAPTED, GOOD)[1]["lora"] == [{"id": 7, "scale": 1.0}]
    assert ask(LLAMACPP, PLAIN, GOOD)[1]["lora"] == []


def test_a_chat_answer_is_read_from_its_deltas() -> None:
    def delta(**fields: str) -> str:
        return f"data: {json.dumps({'model': 'tiny', 'choices': [{'delta': fields}]})}\n\n"

    timing, body = ask(CHAT, PLAIN, [delta(role="assistant", content=""), delta(content="a"), delta(), usage(4), DONE])
    assert len(timing.arrivals) == 1
    assert body["messages"] == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("request_", "events", "status", "reason"),
    [
        (PLAIN, GOOD, 404, "^status 404: .*no such thing"),
        (PLAIN, [event("a"), 'data: {"error": {"message": "step failed"}}\n\n', DONE], 200, "step failed"),
        (PLAIN, GOOD[:-1], 200, r"without \[DONE\]"),
        (PLAIN, [event("a"), usage(1), DONE], 200, "asked for 4 tokens, got 1"),
        (PLAIN, [event("a"), DONE], 200, "asked for 4 tokens, got None"),
        (PLAIN, [event(""), usage(4), DONE], 200, "no text"),
        (PLAIN, ["data: {\n\n", DONE], 200, "an event that is not part of a completion"),
        (ADAPTED, GOOD, 200, "asked for `bench-001`, but `tiny` answered"),
        (PLAIN, [event("a"), event("b", model="other"), *GOOD[1:]], 200, "asked for `tiny`, but `other` answered"),
        (PLAIN, ["data: 7\n\n", DONE], 200, "an event that is not part of a completion"),
        (PLAIN, [f"data: {'[' * 100_000}\n\n", DONE], 200, "an event that is not part of a completion"),
        (
            PLAIN,
            [event("a"), event("", usage={"completion_tokens": 4}), DONE],
            200,
            "the usage in the answer has prompt_tokens None",
        ),
    ],
    ids=[
        "status",
        "error event",
        "early end",
        "too few",
        "no usage",
        "no text",
        "not JSON",
        "base for adapter",
        "another half way",
        "no event",
        "too deep",
        "half a usage",
    ],
)
def test_an_incomplete_or_wrong_answer_is_a_failure(
    request_: Request, events: list[str], status: int, reason: str
) -> None:
    with pytest.raises(RequestFailed, match=reason):
        ask(MANYLORA, request_, events, status)


def test_a_dead_server_is_a_failure() -> None:
    async def send() -> None:
        async with aiohttp.ClientSession("http://127.0.0.1:1") as http:
            await complete(http, MANYLORA, PLAIN)

    with pytest.raises(RequestFailed, match=r"^connection refused: no server listens there$"):
        asyncio.run(send())


@pytest.mark.parametrize(
    ("scheme", "bytes_", "reason"),
    [
        ("http", b"SSH-2.0-OpenSSH_9\r\n", "^it does not speak HTTP$"),
        ("http", b"", "^the connection was closed before the answer was complete$"),
        ("http", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n", "^the connection was closed before"),
        ("https", b"HTTP/1.1 400 Bad Request\r\n\r\n", "^it does not speak HTTPS$"),
    ],
)
def test_a_connection_without_an_answer_is_described(scheme: str, bytes_: bytes, reason: str) -> None:
    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(bytes_)
        writer.close()

    async def send() -> None:
        async with await asyncio.start_server(reply, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with aiohttp.ClientSession(f"{scheme}://127.0.0.1:{port}") as http:
                await complete(http, MANYLORA, PLAIN)

    with pytest.raises(RequestFailed, match=reason):
        asyncio.run(send())
