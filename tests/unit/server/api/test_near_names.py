"""Which name is suggested for one that does not exist."""

import time

import pytest

from server.access.key import ApiKey
from server.api.http.near_names import near_name

NAMES = ["demo", "acme/billing", "acme/support", "legal", "legal-de", "Translate"]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("Legal", "legal"),
        ("lgeal", "legal"),
        ("legal_de", "legal-de"),
        ("legal@9", "legal"),
        ("billing", "acme/billing"),
        ("acme/biling", "acme/billing"),
        ("translate", "Translate"),
        ("weather", None),
        ("", None),
        ("x" * 300, None),
    ],
)
def test_the_nearest_name(name: str, near: str | None) -> None:
    assert near_name(name, NAMES) == near


def test_a_name_that_a_key_does_not_see_is_not_suggested() -> None:
    key = ApiKey("1", "acme", frozenset({"infer"}), ("acme/*",))
    assert near_name("legal", [name for name in NAMES if key.sees(name)]) is None


def test_thousands_of_names_take_no_time() -> None:
    names = [f"customer-{index:06}" for index in range(20_000)]
    started = time.process_time()
    assert near_name("customer-01234x", names) is not None
    assert time.process_time() - started < 0.5
