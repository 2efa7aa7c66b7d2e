"""What a key does not see does not exist for it: in lists, answers, errors and metrics."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.access.key_spec import KeySpec
from tests.adapter_folders import CONFIG, WEIGHTS
from tests.api.access.conftest import Keyed, client
from tests.api.live import request, running, tiny_service

QUESTION = [{"role": "user", "content": "Why?"}]


@pytest.fixture
def aliases(keyed: Keyed) -> Iterator[Keyed]:
    """With aliases: ``prod`` of ``red``, ``secret`` of ``green`` and ``team/blue``, ``team/mine`` of ``team/blue``."""
    targets = {"prod": ["red"], "secret": ["green", "team/blue"], "team/mine": ["team/blue"]}
    admin = keyed["admin"]
    for name, adapters in targets.items():
        body = {"targets": [{"adapter": adapter} for adapter in adapters]}
        admin.put(f"/v1/aliases/{name}", json=body).raise_for_status()
    yield keyed
    for name in targets:
        admin.delete(f"/v1/aliases/{name}")


def ids(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [item["id"] for item in response.json()["data"]]


def complete(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post("/v1/completions", json=request(max_tokens=2, **fields))


def test_lists(aliases: Keyed) -> None:
    admin, team, none = aliases["admin"], aliases["team"], aliases["none"]
    assert ids(admin.get("/v1/models")) == ["tiny", "green", "prod", "red", "secret", "team/blue", "team/mine"]
    assert ids(team.get("/v1/models")) == ["tiny", "prod", "team/blue", "team/mine"]
    assert ids(team.get("/v1/models?versions=true")) == ["tiny", "prod", "team/blue", "team/blue@1", "team/mine"]
    assert ids(none.get("/v1/models")) == ["tiny"]
    assert ids(team.get("/v1/adapters")) == ["team/blue"]
    assert ids(none.get("/v1/adapters")) == []
    assert ids(team.get("/v1/aliases")) == ["prod", "team/mine"]
    (card,) = team.get("/v1/adapters").json()["data"]
    assert card["aliases"] == ["team/mine"]
    assert admin.get("/v1/adapters/team/blue").json()["aliases"] == ["secret", "team/mine"]
    usage = {name: aliases[name].get("/v1/adapters").json()["store"]["bytes"] for name in ("admin", "team", "none")}
    assert usage["admin"] > usage["team"] == card["size_bytes"] > usage["none"] == 0


def test_pages_skip_what_is_not_seen(aliases: Keyed) -> None:
    team = aliases["team"]
    first = team.get("/v1/models", params={"limit": 2}).json()
    assert ([each["id"] for each in first["data"]], first["has_more"]) == (["tiny", "prod"], True)
    second = team.get("/v1/models", params={"limit": 2, "after": "prod"}).json()
    assert ([each["id"] for each in second["data"]], second["has_more"]) == (["team/blue", "team/mine"], False)
    assert ids(team.get("/v1/adapters", params={"after": "green"})) == ["team/blue"]


def test_long_lists_are_searched_to_their_end(keyed: Keyed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.access.view.BATCH", 1)
    assert ids(keyed["team"].get("/v1/adapters")) == ["team/blue"]
    assert ids(keyed["team"].get("/v1/models")) == ["tiny", "team/blue"]
    assert keyed["team"].get("/v1/adapters", params={"limit": 1}).json()["has_more"] is False


def test_every_key_may_use_the_base(keyed: Keyed) -> None:
    for name in ("admin", "infer", "team", "none"):
        assert complete(keyed[name]).status_code == 200
        assert complete(keyed[name], model="tiny").status_code == 200
        assert keyed[name].get("/v1/models/tiny").status_code == 200


def test_what_is_seen_can_be_used(aliases: Keyed) -> None:
    team = aliases["team"]
    assert complete(team, adapter="team/blue").status_code == 200
    assert complete(team, model="team/blue@1").status_code == 200
    for name in ("red", "green", "secret", "red@1"):
        for fields in ({"model": name}, {"adapter": name}, {"adapter": [{"name": "team/blue"}, {"name": name}]}):
            assert complete(team, **fields).status_code == 404
            assert complete(aliases["none"], **fields).status_code == 404
    assert complete(aliases["none"], adapter="team/blue").status_code == 404


def test_an_alias_that_is_seen_serves_what_is_not_without_naming_it(aliases: Keyed) -> None:
    team, admin = aliases["team"], aliases["admin"]
    fields = {"adapter": [{"name": "prod", "weight": 0.5}, {"name": "team/blue", "weight": 0.5}], "explain": True}
    response = complete(team, **fields)
    assert response.status_code == 200
    assert [(each["name"], each.get("alias")) for each in response.json()["adapter"]] == [
        ("prod", "prod"),
        ("team/blue@1", None),
    ]
    mine = aliases.live.service.registry.version("team/blue").content
    assert response.headers["x-manylora-adapter"] == f"prod;team/blue@1={mine}"
    assert [each.get("id") for each in response.json()["adapter"]] == [None, mine]
    hidden = ("red", aliases.live.service.registry.version("red").content)
    assert not [secret for secret in hidden if secret in response.text + str(response.headers)]
    assert response.json()["choices"] == complete(admin, **fields).json()["choices"]
    assert complete(admin, **fields).json()["adapter"][0]["name"] == "red@1"
    with team.stream("POST", "/v1/chat/completions", json={"messages": QUESTION, "model": "prod", "stream": True,
                                                          "max_tokens": 2}) as stream:  # fmt: skip
        seen = stream.read().decode() + str(stream.headers)
        assert not [secret for secret in hidden if secret in seen]
    for path in ("/v1/aliases/prod", "/v1/models/prod", "/v1/models", "/v1/adapters", "/v1/usage", "/metrics"):
        assert hidden[1] not in team.get(path).text
    assert "red" not in team.get("/v1/usage").text
    assert team.get("/v1/aliases/prod").json()["targets"] == []
    assert [each["adapter"] for each in team.get("/v1/aliases/team/mine").json()["targets"]] == ["team/blue"]
    assert "red" not in team.get("/v1/models/prod").text


def test_an_alias_that_is_not_seen_is_not_named_by_a_conflict(aliases: Keyed) -> None:
    admin, team = aliases["admin"], aliases["team"]
    admin.delete("/v1/aliases/team/mine").raise_for_status()
    for path in ("/v1/adapters/team/blue", "/v1/unload_lora_adapter"):
        response = team.delete(path) if "adapters/" in path else team.post(path, json={"lora_name": "team/blue"})
        assert response.status_code == 409
        assert "secret" not in response.text
        assert "a name that this API key does not see" in response.text
    assert "secret" in admin.delete("/v1/adapters/team/blue").text


def files(folder: Path) -> list[tuple[str, tuple[str, bytes]]]:
    return [("file", (name, (folder / name).read_bytes())) for name in (CONFIG, WEIGHTS)]


def test_names_are_registered_only_where_the_key_sees_them(keyed: Keyed, folders: Mapping[str, Path]) -> None:
    team, live = keyed["team"], keyed.live
    before = live.registered()
    for name in ("red", "elsewhere/x"):
        attempts = [
            team.post("/v1/adapters", json={"name": name, "path": "spare"}),
            team.post("/v1/adapters", json={"name": name, "path": "no/such/folder"}),
            team.post("/v1/adapters", data={"name": name}, files=files(folders["spare"])),
            team.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "spare"}),
            team.put(f"/v1/aliases/{name}", json={"targets": [{"adapter": "team/blue"}]}),
        ]
        for response in attempts:
            assert response.status_code == 403, response.text
            assert f"This API key may not use the name `{name}`." in response.text
    hidden = team.put("/v1/aliases/team/x", json={"targets": [{"adapter": "red"}]})
    absent = team.put("/v1/aliases/team/x", json={"targets": [{"adapter": "rad"}]})
    assert hidden.status_code == absent.status_code == 404
    assert hidden.text.replace("red", "rad") == absent.text
    assert live.registered() == before
    made = team.post("/v1/adapters", json={"name": "team/new", "path": "spare"})
    assert made.status_code == 201
    assert complete(team, adapter="team/new").status_code == 200
    cased = team.post("/v1/adapters", json={"name": "TEAM/blue", "path": "spare"})
    assert (cased.status_code, "differs from 'team/blue'" in cased.text) == (400, True)
    assert team.delete("/v1/adapters/team/new").status_code == 200


def test_a_name_that_differs_in_case_from_one_that_is_not_seen(keyed: Keyed) -> None:
    store = keyed.live.service.keyring.store
    stored, secret = store.add(KeySpec(name="cased", scopes=["adapters"], adapters=["TEAM/*"]))
    with client(keyed.live, secret) as http:
        response = http.post("/v1/adapters", json={"name": "TEAM/blue", "path": "spare"})
    store.revoke(stored.key.id)
    assert response.status_code == 400
    assert "team/blue" not in response.text


def test_metrics(aliases: Keyed) -> None:
    admin, team, metrics = aliases["admin"], aliases["team"], aliases["metrics"]
    for name in ("prod", "secret", "team/mine"):
        assert complete(admin, adapter=name, user="x").status_code == 200
    assert complete(admin, adapter="red").status_code == 200
    every, seen = metrics.get("/metrics").text, team.get("/metrics").text
    assert 'alias="prod"' in every
    assert re.search(r'running_lora_adapters="[^"]*red', every)
    assert 'alias="team/mine",outcome="ok",version="team/blue@1"' in seen
    assert re.search(r'running_lora_adapters="team/blue"', seen)
    for name in ("red", "green", "secret"):
        assert not re.search(rf'[",]{name}[@",]', seen)
    families = {line.split()[2] for line in every.splitlines() if line.startswith("# TYPE")}
    assert families == {line.split()[2] for line in seen.splitlines() if line.startswith("# TYPE")}


def test_refused_folders(tmp_path: Path) -> None:
    for name in ("team-bad", "other-bad"):
        (tmp_path / "watched" / name).mkdir(parents=True)
        (tmp_path / "watched" / name / CONFIG).write_text("{}")
        (tmp_path / "watched" / name / WEIGHTS).write_text("")
    service = tiny_service(tmp_path, adapter_dir=tmp_path / "watched")
    _, secret = service.keyring.store.add(KeySpec(name="team", adapters=["team-*"]))
    _, admin = service.keyring.store.add(KeySpec(name="admin", scopes=["admin"]))
    service.watched_folder.scan(1e12)
    with running(service) as live:
        lists = []
        for each in (secret, admin):
            with client(live, each) as http:
                lists.append({refused["name"] for refused in http.get("/v1/adapters").json()["refused"]})
    assert lists == [{"team-bad"}, {"team-bad", "other-bad"}]


CALLS: list[tuple[str, str, dict[str, Any] | None]] = [
    ("GET", "/v1/models/{}", None),
    ("GET", "/v1/adapters/{}", None),
    ("GET", "/v1/aliases/{}", None),
    ("DELETE", "/v1/adapters/{}", None),
    ("DELETE", "/v1/aliases/{}", None),
    ("POST", "/v1/adapters/{}/activate", {"version": 1}),
    ("POST", "/v1/adapters/{}/pin", {"pinned": True}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "{}"}),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "{}", "lora_path": "spare"}),
    ("PUT", "/v1/aliases/team/x", {"targets": [{"adapter": "{}"}]}),
    ("POST", "/v1/completions", {"prompt": "x", "max_tokens": 1, "adapter": "{}"}),
    ("POST", "/v1/completions", {"prompt": "x", "max_tokens": 1, "model": "{}"}),
    ("POST", "/v1/completions", {"prompt": "x", "adapter": [{"name": "team/blue"}, {"name": "{}"}]}),
    ("POST", "/v1/completions", {"prompt": "x", "model": "{}", "adapter": "team/blue"}),
    ("POST", "/v1/chat/completions", {"messages": QUESTION, "max_tokens": 1, "adapter": "{}"}),
    ("POST", "/v1/responses", {"input": "x", "model": "{}"}),
    ("POST", "/v1/messages", {"messages": QUESTION, "max_tokens": 1, "model": "{}"}),
    ("POST", "/v1/messages/count_tokens", {"messages": QUESTION, "model": "{}"}),
    ("POST", "/v1/embeddings", {"input": "x", "model": "{}"}),
    ("POST", "/v1/score", {"prompt": "x", "continuations": ["y"], "model": "{}"}),
    ("POST", "/tokenize", {"prompt": "x", "model": "{}"}),
    ("POST", "/tokenize", {"messages": QUESTION, "model": "{}"}),
    ("POST", "/detokenize", {"tokens": [1], "model": "{}"}),
]
"""Everything that takes a name."""


def filled(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: filled(each, name) for key, each in value.items()}
    if isinstance(value, list):
        return [filled(each, name) for each in value]
    return value.replace("{}", name) if isinstance(value, str) else value


@given(
    call=st.sampled_from(CALLS),
    name=st.sampled_from([("red", "rad"), ("green", "groan"), ("secret", "sacred")]),
    pattern=st.one_of(
        st.sampled_from(["{}", "{}@1", "{}@2", "{}@0", "{}@x", "{}@", "{}@1@1", "{}/", "{} ", "./{}", "{}%00"]),
        st.text("@/1.-_%", max_size=3).map("{}".__add__),
    ),
    upper=st.booleans(),
    expected=st.sampled_from([{}, {"if-match": '"0"'}, {"if-match": '"1"'}, {"if-match": '"7"'}]),
)
@settings(max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_a_name_that_is_not_seen_is_answered_like_an_unknown_one(
    aliases: Keyed,
    call: tuple[str, str, dict[str, Any] | None],
    name: tuple[str, str],
    pattern: str,
    upper: bool,
    expected: dict[str, str],
) -> None:
    method, path, body = call
    answers = []
    for each in name:
        word = pattern.replace("{}", each.upper() if upper else each)
        fields = {} if body is None else {"json": filled(body, word)}
        response = aliases["team"].request(method, path.replace("{}", word), headers=expected, **fields)
        assert response.status_code in (400, 403, 404, 405, 412), response.text
        kept = {key: value for key, value in response.headers.items() if key not in ("date", "x-request-id")}
        kept.pop("content-length")
        answers.append((response.status_code, kept, re.sub(each, "NAME", response.text, flags=re.IGNORECASE)))
    assert answers[0] == answers[1]
