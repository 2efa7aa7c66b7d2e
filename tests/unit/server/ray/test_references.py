"""What a request names, read without checking it."""

import json

import pytest

from server.ray.references import References, of_body, of_path


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ({"model": "legal"}, ["legal"]),
        ({"model": "base", "adapter": "legal@2"}, ["legal@2"]),
        ({"model": "base", "adapter": None}, ["base"]),
        ({"model": "legal", "adapter": []}, []),
        ({"adapter": [{"name": "a", "weight": 0.3}, {"name": "b", "weight": -0.7}]}, ["b", "a"]),
        ({"adapter": [{"name": "a"}, {"name": "a", "weight": 2}]}, ["a"]),
        ({"adapter": ["a", 3, {"name": 4}, {"name": "b", "weight": "much"}]}, ["a", "b"]),
        ({"adapter": {"name": "a"}}, []),
        ({"prompt": "no name"}, []),
        ([{"model": "legal"}], []),
    ],
)
def test_names_come_from_adapter_or_else_from_model_heaviest_first(body: object, names: list[str]) -> None:
    assert of_body(json.dumps(body).encode()) == References(tuple(names))


def test_the_user_decides_what_an_alias_means() -> None:
    assert of_body(b'{"model": "prod", "user": "ada"}') == References(("prod",), "ada")
    assert of_body(b'{"model": "prod", "user": ""}').user is None
    assert of_body(b'{"model": "prod", "user": 7}').user is None


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe{", b"[" * 100_000, b'{"model": 1e999}'])
def test_what_cannot_be_read_names_nothing(body: bytes) -> None:
    assert of_body(body) == References()


def test_a_path_names_an_adapter() -> None:
    assert of_path("/v1/adapters/team/red").names == ("team/red",)
    assert of_path("/v1/adapters/red/pin").names == ("red",)
    assert of_path("/v1/adapters").names == ()
    assert of_path("/v1/models/red").names == ()
