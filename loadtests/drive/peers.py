"""The kinds of servers that can be measured: how a request names an adapter, and how an answer says who served it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loadtests.workload.workload import Request

PeerName = Literal["manylora", "vllm", "llamacpp"]
EndpointName = Literal["completions", "chat"]


@dataclass(frozen=True, slots=True)
class Manylora:
    """A request has ``adapter`` beside ``model``. Each event lists the adapters that served it."""

    base: str

    def names(self, adapter: str | None) -> Mapping[str, object]:
        """Return the fields of a request that select an adapter; None selects the base."""
        return {"model": self.base, "adapter": adapter}

    def served(self, event: Mapping[str, Any]) -> str | None:
        """Return the adapter or base that an event comes from; None if this kind of server does not say."""
        adapters = event.get("adapter") or []
        # The name has the version, as in `bench-000@2`.
        return str(adapters[0]["name"]).partition("@")[0] if adapters else str(event["model"])


@dataclass(frozen=True, slots=True)
class Vllm:
    """A request selects an adapter as its ``model``."""

    base: str

    def names(self, adapter: str | None) -> Mapping[str, object]:
        return {"model": adapter or self.base}

    def served(self, event: Mapping[str, Any]) -> str | None:
        return str(event["model"])


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """A request selects adapters by the ids they got when the server started. Answers do not say who served them."""

    base: str
    numbers: Mapping[str, int]

    def names(self, adapter: str | None) -> Mapping[str, object]:
        # An empty list disables all adapters for this request.
        applied = [] if adapter is None else [{"id": self.numbers[adapter], "scale": 1.0}]
        return {"model": self.base, "lora": applied}

    def served(self, event: Mapping[str, Any]) -> str | None:
        return None


Peer = Manylora | Vllm | LlamaCpp


@dataclass(frozen=True, slots=True)
class Target:
    """The server under test and the endpoint that requests go to."""

    peer: Peer
    endpoint: EndpointName

    @property
    def path(self) -> str:
        """The endpoint's path, relative to the server's address, which may have a path of its own."""
        return "v1/chat/completions" if self.endpoint == "chat" else "v1/completions"

    def body(self, request: Request) -> dict[str, object]:
        """Return the JSON body of a streaming request: greedy, with exactly ``output_tokens`` tokens."""
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
        """Return the text of one choice of an event; may be empty."""
        text = choice["delta"].get("content") if self.endpoint == "chat" else choice["text"]
        return text or ""
