"""``/v1/models``."""

import asyncio
import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from server.api.http.pagination import CHUNK, JsonObject, list_response
from tests.api.live import Live

NAMES = ["tiny", "green", "green@1", "moving", "moving@{0}", "moving@{1}", "prod", "red", "red@1", "team/blue"]
NAMES += ["team/blue@1"]
VERSIONS = {"versions": "true"}


@pytest.fixture
def names(live: Live, folders: Mapping[str, Path]) -> Iterator[list[str]]:
    """All ids, with an adapter of two versions and an alias among them."""
    numbers = [live.service.registry.register_folder("moving", folders[n]).version.number for n in ("spare", "red")]
    live.http.put("/v1/aliases/prod", json={"targets": [{"adapter": "moving"}]})
    yield [name.format(*numbers) for name in NAMES]
    live.http.delete("/v1/aliases/prod")
    live.http.delete("/v1/adapters/moving")


def ids(live: Live, **query: Any) -> list[str]:
    return [card["id"] for card in live.http.get("/v1/models", params=query).json()["data"]]


def test_models_lists_what_people_pick_from(live: Live, names: list[str]) -> None:
    """The base, adapters and aliases, each once; versions on request."""
    assert ids(live) == ["tiny", "green", "moving", "prod", "red", "team/blue"]
    assert ids(live, versions="false") == ids(live)
    for card in live.http.get("/v1/models").json()["data"]:
        assert live.http.get(f"/v1/models/{card['id']}").json() == card
    refused = live.http.get("/v1/models", params={"versions": "all"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "versions")


def test_models_lists_every_servable_name(live: Live, names: list[str]) -> None:
    answer = live.http.get("/v1/models", params=VERSIONS).json()
    assert (answer["object"], answer["has_more"]) == ("list", False)
    base, *others = answer["data"]
    assert (base["id"], base["root"], base["parent"], base["max_model_len"]) == ("tiny", "tiny", None, 256)
    assert [card["id"] for card in answer["data"]] == names
    for card in others:
        assert set(card) == {"id", "object", "created", "owned_by", "root", "parent", "max_model_len"}
        assert card["parent"] == "tiny"
        root = "prod" if card["id"] == "prod" else live.service.registry.version(card["id"]).content
        assert card["root"] == root
        assert live.http.get(f"/v1/models/{card['id']}").json() == card
        assert live.complete(model=card["id"], max_tokens=1)["model"] == card["id"]
    assert str(live.service.settings.data_dir) not in live.http.get("/v1/models").text


@pytest.mark.parametrize("versions", ["true", "false"])
@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_pages(live: Live, names: list[str], limit: int, versions: str) -> None:
    whole = ids(live, versions=versions)
    seen: list[str] = []
    more = True
    while more:
        query: dict[str, Any] = {"limit": limit, "versions": versions, **({"after": seen[-1]} if seen else {})}
        page = live.http.get("/v1/models", params=query).json()
        seen += [card["id"] for card in page["data"]]
        more = page["has_more"]
    assert seen == whole
    assert ids(live, versions=versions, after=names[-1]) == []
    assert ids(live, versions=versions, after="") == whole


def test_the_sdk_lists_and_finds_models(live: Live) -> None:
    with OpenAI(base_url=f"{live.http.base_url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny", "green", "red", "team/blue"]
        every = client.models.list(extra_query=VERSIONS)
        assert [model.id for model in every] == ["tiny", "green", "green@1", "red", "red@1", "team/blue", "team/blue@1"]
        assert client.models.retrieve("tiny").owned_by == "manylora"
        assert client.models.retrieve("team/blue").id == "team/blue"


def test_long_list_does_not_block_other_requests() -> None:
    """Others get a turn after each piece."""
    total, turns, asked = 10 * CHUNK + 3, 0, []

    def cards(after: str | None, count: int) -> list[JsonObject]:
        asked.append(turns)
        start = 0 if after is None else int(after) + 1
        return [{"id": str(i)} for i in range(start, min(start + count, total))]

    async def read() -> bytes:
        nonlocal turns
        pieces = list_response(cards, None, None).body_iterator.__aiter__()
        reading = asyncio.ensure_future(_joined(pieces))
        while not reading.done():
            await asyncio.sleep(0)
            turns += 1
        return reading.result()

    answer = json.loads(asyncio.run(read()))
    assert [card["id"] for card in answer["data"]] == [str(i) for i in range(total)]
    assert answer["has_more"] is False
    assert len(asked) == 11
    assert all(before < after for before, after in pairwise(asked))


async def _joined(pieces: Any) -> bytes:
    return b"".join([piece async for piece in pieces])
