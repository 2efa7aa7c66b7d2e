"""The servers that can be measured: how each is asked for an adapter, and what its answer says about who answered."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loadtests.workload.workload import Request

PeerName = Literal["manylora", "vllm", "llamacpp"]
EndpointName = Literal["completions", "chat"]


@dataclass(frozen=True, slots=True)
class Manylora:
    """``adapter`` beside ``model``; each event lists the adapters that served it."""

    base: str

    def names(self, adapter: str | None) -> Mapping[str, object]:
        """The fields of a request that ask for an adapter, or for the base."""
        return {"model": self.base, "adapter": adapter}

    def served(self, event: Mapping[str, Any]) -> str | None:
        """Which adapter or base an event of an answer comes from; None where this server does not tell."""
        adapters = event.get("adapter") or []
        # It names the version, as in `bench-000@2`.
        return str(adapters[0]["name"]).partition("@")[0] if adapters else str(event["model"])


@dataclass(frozen=True, slots=True)
class Vllm:
    """An adapter is a model."""

    base: str

    def names(self, adapter: str | None) -> Mapping[str, object]:
        return {"model": adapter or self.base}

    def served(self, event: Mapping[str, Any]) -> str | None:
        return str(event["model"])


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """Adapters by the numbers they got at the server's start. Its answers do not say which one served them."""

    base: str
    numbers: Mapping[str, int]

    def names(self, adapter: str | None) -> Mapping[str, object]:
        # An empty list switches all of them off for this request.
        applied = [] if adapter is None else [{"id": self.numbers[adapter], "scale": 1.0}]
        return {"model": self.base, "lora": applied}

    def served(self, event: Mapping[str, Any]) -> str | None:
        return None


Peer = Manylora | Vllm | LlamaCpp


@dataclass(frozen=True, slots=True)
class Target:
    """The server under test and the endpoint that is used."""

    peer: Peer
    endpoint: EndpointName

    @property
    def path(self) -> str:
        """Below the server's address, which may have a path of its own."""
        return "v1/chat/completions" if self.endpoint == "chat" else "v1/completions"

    def body(self, request: Request) -> dict[str, object]:
        """The JSON body of a streaming request: greedy, all of its tokens."""
        asked: dict[str, object] = {"prompt": request.prompt}
        if self.endpoint == "chat":
            asked = {"messages": [{"role": "user", "content": request.prompt}]}
        return {
            **self.peer.names(request.adapter),
            **asked,
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def text(self, choice: Mapping[str, Any]) -> str:
        """The text of one choice of an event; may be empty."""
        text = choice["delta"].get("content") if self.endpoint == "chat" else choice["text"]
        return text or ""
