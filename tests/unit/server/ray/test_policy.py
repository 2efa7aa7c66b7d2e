"""Which replica serves a request, without any replica."""

import random
from collections import Counter

import pytest

from server.ray.policy import SPILL_REQUESTS, Place, Policy, weight

POLICY = Policy()
CONTENTS = [f"content-{number}" for number in range(2000)]


def places(count: int, load: int = 0) -> list[Place]:
    return [Place(f"replica-{number}", load) for number in range(count)]


def homes(of: list[Place]) -> dict[str, str]:
    return {content: POLICY.rank([content], of)[0].id for content in CONTENTS}


def test_a_request_goes_to_the_device_before_the_host_before_its_home() -> None:
    home, *others = POLICY.rank(["a"], places(5))
    device, host = Place(others[-1].id, 3, {"a", "b"}), Place(others[0].id, 2, {"b"}, {"a", "b"})
    ranked = POLICY.rank(["a"], [host, *others[1:-1], home, device])
    assert ranked == [device, host, home, *others[1:-1]]


def test_a_mix_goes_where_most_of_it_is() -> None:
    one, both, none = Place("one", 0, {"a"}), Place("both", 5, {"a"}, {"b"}), Place("none", 0)
    assert POLICY.rank(["a", "b"], [none, one, both])[:2] == [both, one]


def test_a_request_for_the_base_goes_to_the_fewest_requests() -> None:
    ranked = POLICY.rank([], [Place("a", 2), Place("b", 1), Place("c", 3)])
    assert [place.id for place in ranked] == ["b", "a", "c"]
    ties = Counter(POLICY.rank([], places(4), salt=str(number))[0].id for number in range(400))
    assert min(ties.values()) > 60, "requests at the same time are spread"


def test_homes_are_even_and_the_same_everywhere() -> None:
    counts = Counter(homes(places(10)).values())
    assert len(counts) == 10
    assert max(counts.values()) < 1.25 * len(CONTENTS) / 10
    assert homes(places(10)) == homes(random.Random(1).sample(places(10), 10))
    assert weight("content", "replica") == pytest.approx(0.8639790530840123), "other processes compute the same"


def test_only_the_adapters_of_a_dead_replica_move_and_to_all_others() -> None:
    before, after = homes(places(10)), homes(places(10)[1:])
    moved = {content for content in CONTENTS if before[content] != after[content]}
    assert moved == {content for content in CONTENTS if before[content] == "replica-0"}
    assert len({after[content] for content in moved}) == 9


def test_an_overloaded_replica_spills_over_always_to_the_same_one() -> None:
    first, second, *others = POLICY.rank(["a"], places(4, load=20))
    holder = Place(first.id, 40, {"a"})
    ranked = POLICY.rank(["a"], [holder, *others, second])
    assert ranked[0] == second
    assert ranked[-1] == holder
    assert POLICY.rank(["a"], [Place(first.id, 24, {"a"}), *others, second])[0].id == first.id, "it is not overloaded"


def test_a_few_requests_are_no_overload() -> None:
    busy = Place("busy", SPILL_REQUESTS - 1, {"a"})
    assert POLICY.rank(["a"], [Place("idle", 0), busy])[0] == busy
    assert POLICY.rank(["a"], [Place("idle", 0), Place("busy", SPILL_REQUESTS, {"a"})])[0].id == "idle"


def test_one_popular_adapter_has_few_copies_and_no_replica_has_much_more_than_the_others() -> None:
    load, holders, draw = Counter({place.id: 0 for place in places(20)}), Counter[str](), random.Random(3)
    contents = ["hot"] * 300 + CONTENTS[:300]
    draw.shuffle(contents)
    for content in contents:
        chosen = POLICY.rank(
            [content], [Place(id_, count, {"hot"} & {holders[id_] and "hot"}) for id_, count in load.items()]
        )
        load[chosen[0].id] += 1
        holders[chosen[0].id] += content == "hot"
    assert max(load.values()) <= 1.3 * sum(load.values()) / len(load) + 1
    assert sum(count > 0 for count in holders.values()) <= 16


def test_half_a_surrogate_has_a_home() -> None:
    assert len(POLICY.rank(["\ud800://x"], places(3))) == 3


def test_where_all_replicas_are_busy_alike_somebody_still_serves() -> None:
    assert len(POLICY.rank(["a"], places(3, load=500))) == 3
    assert POLICY.rank(["a"], []) == []
