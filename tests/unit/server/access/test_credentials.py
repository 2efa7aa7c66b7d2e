"""Secrets: what is kept of them, and how they are found again."""

import hmac
import math

import pytest

from server.access.credentials import PREFIX, SHOWN, Credential, CredentialIndex, digest_of, new_secret
from server.access.key import ALL_SCOPES, ANONYMOUS, NOBODY, ApiKey

ALICE, BOB = (ApiKey(name, name, frozenset({"infer"})) for name in ("alice", "bob"))


def test_secrets_have_256_random_bits() -> None:
    secrets = {new_secret() for _ in range(1000)}
    assert len(secrets) == 1000
    for secret in secrets:
        assert secret.startswith(PREFIX)
        assert math.floor(len(secret.removeprefix(PREFIX)) * 6) >= 256
        assert len(secret) - SHOWN == 37


def test_a_secret_is_found_by_its_digest_until_it_ends() -> None:
    index = CredentialIndex([Credential(digest_of("a"), ALICE), Credential(digest_of("b"), BOB, 100.0)])
    assert index.find(digest_of("a"), 1e12) is ALICE
    assert index.find(digest_of("b"), 99.9) is BOB
    assert index.find(digest_of("b"), 100.0) is None
    assert index.find(digest_of("c"), 0.0) is None
    assert CredentialIndex().find(digest_of("a"), 0.0) is None


def test_digests_are_compared_in_constant_time_and_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[str, str]] = []

    def compare(one: str, other: str) -> bool:
        compared.append((one, other))
        return compare_digest(one, other)

    compare_digest = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare)
    digest = digest_of("a")
    index = CredentialIndex([Credential(digest, ALICE), Credential(digest[:-1] + "x", BOB)])
    assert index.find(digest, 0.0) is ALICE
    assert compared == [(digest, digest), (digest[:-1] + "x", digest)], "both, although the first is the one"


def test_a_digest_is_not_printed() -> None:
    assert digest_of("a") not in repr(Credential(digest_of("a"), ALICE))


@pytest.mark.parametrize(
    ("adapters", "name", "seen"),
    [
        (None, "legal", True),
        ((), "legal", False),
        (("legal",), "legal", True),
        (("legal",), "legal2", False),
        (("legal",), "lega", False),
        (("legal",), "Legal", False),
        (("acme/*",), "acme/x", True),
        (("acme/*",), "acme/x/y", True),
        (("acme/*",), "acme", False),
        (("acme/*",), "acme/", True),
        (("acme/*",), "xacme/x", False),
        (("acme*",), "acme", True),
        (("*",), "legal", True),
        (("a", "b"), "b", True),
    ],
)
def test_which_names_a_key_sees(adapters: tuple[str, ...] | None, name: str, seen: bool) -> None:
    assert ApiKey("x", "x", frozenset({"infer"}), adapters).sees(name) is seen


def test_scopes() -> None:
    assert ALICE.may("infer")
    assert not ALICE.may("admin")
    assert all(ApiKey("x", "x", frozenset({"admin"})).may(scope) for scope in ALL_SCOPES)
    assert all(ANONYMOUS.may(scope) for scope in ALL_SCOPES)
    assert not any(NOBODY.may(scope) for scope in ALL_SCOPES)
