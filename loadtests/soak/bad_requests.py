"""Requests that a server must refuse, each with a 4xx that says why."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

REFUSALS = frozenset({400, 404, 405, 411, 413, 415, 422})

Bad = tuple[str, str, dict[str, Any]]
"""Method, path, content."""


def bad_request(rng: random.Random) -> Bad:
    """Return one of many kinds of bad requests."""
    return rng.choice(RANDOM_KINDS)(rng) if rng.random() < RANDOM_SHARE else rng.choice(KINDS)


def _completion(**fields: Any) -> Bad:
    return "POST", "/v1/completions", {"json": {"prompt": "A", "max_tokens": 2, **fields}}


def _chat(**fields: Any) -> Bad:
    body = {"messages": [{"role": "user", "content": "A"}], "max_tokens": 2, **fields}
    return "POST", "/v1/chat/completions", {"json": body}


def _schema(schema: object) -> Mapping[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def _upload(*files: tuple[str, bytes], name: str = "soak/bad") -> Bad:
    parts = [("files", file) for file in files]
    return "POST", "/v1/adapters", {"data": {"name": name}, "files": parts}


def _text(path: str, text: str | bytes) -> Bad:
    return "POST", path, {"content": text, "headers": {"content-type": "application/json"}}


def _garbage(rng: random.Random) -> Bad:
    return _text("/v1/completions", rng.randbytes(rng.randint(1, 2000)))


def _cut_json(rng: random.Random) -> Bad:
    whole = json.dumps({"prompt": "once upon a time", "max_tokens": 3, "stop": ["a", "b"]})
    return _text("/v1/completions", whole[: rng.randrange(len(whole))])


def _garbage_upload(rng: random.Random) -> Bad:
    config = b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}'
    weights = rng.randbytes(rng.randint(0, 20_000))
    return _upload(("adapter_config.json", config), ("adapter_model.safetensors", weights))


KINDS: Sequence[Bad] = (
    _completion(adapter="soak/nobody"),
    _completion(adapter="soak/fixed-0@999"),
    _completion(adapter="../etc/passwd"),
    _completion(model="no-such-model"),
    _completion(max_tokens=-7),
    _completion(max_tokens="many"),
    _completion(max_tokens=10**12),
    _completion(temperature="hot"),
    _completion(temperature=-1),
    _completion(top_p=7),
    _completion(n=10**6),
    _completion(logprobs=10**6),
    _completion(stop=["x"] * 1000),
    _completion(logit_bias={"x": "y"}),
    _completion(no_such_field=1),
    _completion(prompt={"a": 1}),
    _completion(prompt=[-1]),
    _completion(prompt=[10**9]),
    _completion(prompt="word " * 100_000),
    _completion(seed="x"),
    _chat(messages=[]),
    _chat(messages="hello"),
    _chat(messages=[{"role": "nobody", "content": "A"}]),
    _chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]),
    _chat(tools=[{"type": "function"}]),
    _chat(tool_choice="required"),
    _chat(response_format=_schema({"type": "no-such-type"})),
    _chat(response_format=_schema({"$ref": "#/nowhere"})),
    _chat(response_format={"type": "no-such-format"}),
    _chat(adapter=[{"name": "soak/fixed-0", "weight": "heavy"}]),
    _chat(stream="perhaps"),
    _text("/v1/completions", ""),
    _text("/v1/chat/completions", "[" * 20_000),
    _text("/v1/completions", '{"prompt": "\\ud800"}'),
    _text("/v1/completions", b"\xff\xfe"),
    _text("/v1/embeddings", "null"),
    ("POST", "/v1/embeddings", {"json": {"input": []}}),
    ("POST", "/v1/tokenize", {"json": {}}),
    ("GET", "/v1/adapters/soak/nobody", {}),
    ("GET", "/v1/no-such-route", {}),
    ("DELETE", "/v1/adapters/soak/nobody", {}),
    ("DELETE", "/v1/aliases/soak/nobody", {}),
    ("PATCH", "/v1/completions", {"json": {}}),
    ("GET", "/v1/adapters?limit=-5", {}),
    ("POST", "/v1/adapters/soak/fixed-0/activate", {"json": {"version": 999}}),
    ("POST", "/v1/adapters/soak/fixed-0/activate", {"json": {"version": "one"}}),
    ("PUT", "/v1/aliases/soak/bad", {"json": {"targets": []}}),
    ("PUT", "/v1/aliases/soak/bad", {"json": {"targets": [{"adapter": "soak/nobody"}]}}),
    ("PUT", "/v1/aliases/soak/bad", {"json": {"targets": [{"adapter": "soak/fixed-0", "weight": -1}]}}),
    _upload(("adapter_config.json", b"{}")),
    _upload(("adapter_config.json", b"not json"), ("adapter_model.safetensors", b"")),
    _upload(("adapter_model.safetensors", b"\xff" * 64)),
    _upload(("../../escape", b"x")),
    _upload(("adapter_config.json", b"{}"), name="no spaces allowed"),
)

RANDOM_KINDS: Sequence[Callable[[random.Random], Bad]] = (_garbage, _cut_json, _garbage_upload)
RANDOM_SHARE = 0.15
"""Share of bad requests that are of random bytes."""
