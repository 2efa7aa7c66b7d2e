"""``GET /v1/whoami``: what a key allows, as the server itself says it."""

import pytest

from server.access.key import ALL_SCOPES
from tests.api.access.callers import caller
from tests.api.access.conftest import KEYS, Keyed
from tests.api.live import Live


def test_without_keys_everybody_may_do_everything(live: Live) -> None:
    found = live.http.get("/v1/whoami").json()
    assert (found["object"], found["keys"], found["id"], found["name"]) == ("whoami", False, "", "anonymous")
    assert (set(found["scopes"]), found["adapters"], found["expires"]) == (ALL_SCOPES, None, None)
    assert set(found["limits"].values()) == {None}
    version = live.http.get("/version").json()
    server = found["server"]
    assert (server["version"], server["base_fingerprint"]) == (version["version"], version["base_fingerprint"])
    assert (server["base"], server["max_rank"], server["max_body_bytes"]) == ("tiny", 16, 2**18)
    assert server["max_model_len"] == live.http.get("/v1/models/tiny").json()["max_model_len"]
    assert {"chat", "register_path"} <= set(found["features"])
    assert "register_source" not in found["features"]  # without --allow-source
    settings = live.service.settings
    assert (server["model"], server["data_dir"]) == (settings.model, str(settings.data_dir.resolve()))


@pytest.mark.parametrize("name", KEYS)
def test_a_key_is_told_what_it_allows(keyed: Keyed, name: str) -> None:
    found = keyed[name].get("/v1/whoami").json()
    assert (found["keys"], found["name"]) == (True, name)
    assert found["id"].startswith("key_")
    allowed = ALL_SCOPES if name == "admin" else set(KEYS[name]["scopes"])
    assert set(found["scopes"]) == allowed
    assert found["adapters"] == KEYS[name].get("adapters")
    # Paths of the server's machine are for those who run it.
    of_the_machine = {found["server"]["model"], found["server"]["data_dir"]}
    assert (None in of_the_machine, len(of_the_machine)) == ((False, 2) if name == "admin" else (True, 1))


def test_limits_are_those_of_the_key(guarded: Live) -> None:
    with caller(guarded, "infer", requests_per_minute=7) as limited:
        assert limited.http.get("/v1/whoami").json()["limits"]["requests_per_minute"] == 7


def test_without_a_key_nothing_is_told(keyed: Keyed) -> None:
    assert keyed["nobody"].get("/v1/whoami").status_code == 401
