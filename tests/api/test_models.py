"""``/v1/models``."""

from openai import OpenAI

from tests.api.live import Live


def test_the_base_and_its_adapters(live: Live) -> None:
    answer = live.http.get("/v1/models").json()
    assert answer["object"] == "list"
    assert answer["has_more"] is False
    base, *adapters = answer["data"]
    assert (base["id"], base["root"], base["parent"], base["max_model_len"]) == ("tiny", "tiny", None, 256)
    assert [card["id"] for card in adapters] == ["green", "red", "team/blue"]
    for card in adapters:
        assert set(card) == {"id", "object", "created", "owned_by", "root", "parent", "max_model_len"}
        assert card["parent"] == "tiny"
        assert card["root"] == live.service.registry.get(card["id"]).spec.id
    assert str(live.service.settings.data) not in live.http.get("/v1/models").text


def test_pages(live: Live) -> None:
    seen: list[str] = []
    more = True
    while more:
        query = {"limit": 2, "after": seen[-1]} if seen else {"limit": 2}
        page = live.http.get("/v1/models", params=query).json()
        seen += [card["id"] for card in page["data"]]
        more = page["has_more"]
    assert seen == ["tiny", "green", "red", "team/blue"]
    assert live.http.get("/v1/models", params={"after": "team/blue"}).json()["data"] == []


def test_the_sdk_lists_and_finds_models(live: Live) -> None:
    with OpenAI(base_url=f"{live.http.base_url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny", "green", "red", "team/blue"]
        assert client.models.retrieve("tiny").owned_by == "manylora"
        assert client.models.retrieve("team/blue").id == "team/blue"
