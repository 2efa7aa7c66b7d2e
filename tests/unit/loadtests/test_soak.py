"""What a soak makes of its samples and answers."""

import pytest

from bases.command_line import parse
from loadtests.errors import BadOption
from loadtests.soak.settings import SoakSettings
from loadtests.soak.verdict import growth, left_over, violations
from loadtests.soak.watch import MIB, Sample
from loadtests.soak.world import World
from loadtests.workload.adapters import AdapterGenerator

IDLE = {
    "running": 0, "waiting": 0, "kv_blocks": 0, "kv_blocks_total": 100, "device_adapters": 2, "device_slots": 4,
    "files": 30, "threads": 20, "failed_steps": 0, "healthy": 1, "resident_bytes": 500 * MIB,
}  # fmt: skip
SETTINGS = SoakSettings(spare_files=5, spare_threads=5, memory_growth_mib=64)


def sample(at: float = 0, **changes: float) -> Sample:
    return Sample(at, {**IDLE, **changes})


def found(*loaded: Sample, **after: float) -> list[str]:
    """Return what is violated after these samples under load."""
    return violations(SETTINGS, sample(), loaded, sample(**after), growth(loaded, 0))


def test_nothing_is_violated() -> None:
    loaded = [sample(at, running=3, kv_blocks=50, resident_bytes=(500 + at) * MIB) for at in range(20)]
    assert found(*loaded, files=35, threads=25) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"running": 1}, "running: 1 at the end, when nothing is asked"),
        ({"waiting": 2}, "waiting: 2 at the end, when nothing is asked"),
        ({"kv_blocks": 3}, "kv_blocks: 3 at the end, when nothing is asked"),
        ({"files": 36}, "files: 36 at the end, 30 before the soak; --spare-files allows 5 more"),
        ({"threads": 26}, "threads: 26 at the end, 20 before the soak; --spare-threads allows 5 more"),
        ({"failed_steps": 1}, "failed steps: 1, 0 before the soak"),
        ({"healthy": 0}, "the server says that it is not healthy"),
    ],
)
def test_what_is_left_at_the_end(changes: dict[str, float], said: str) -> None:
    assert found(**changes) == [said]


def test_more_than_there_is() -> None:
    (said,) = found(sample(kv_blocks=100), sample(kv_blocks=101))
    assert said == "kv_blocks: 101, more than the 100 that there are"


def test_growth_after_the_warm_up() -> None:
    rising = [sample(at, resident_bytes=at * 10 * MIB, children_bytes=at * MIB) for at in range(100)]
    grown = growth(rising, warm_up=50)
    assert grown is not None
    assert grown.mib == pytest.approx(440)  # from the median of 50 to 59 to that of 90 to 99
    assert grown.mib_per_hour == pytest.approx(11 * 3600)
    assert found(*rising)[0].startswith("memory grew by 880 MiB after the warm-up")
    flat = [sample(at, resident_bytes=(at * 10 if at < 50 else 500) * MIB) for at in range(100)]
    level = growth(flat, warm_up=50)
    assert level is not None
    assert level.mib == 0
    assert growth(flat, warm_up=98) is None


def test_clients_of_chosen_kinds() -> None:
    words = parse(SoakSettings, ["--only", "key,roll-back"], "soak")
    assert SoakSettings(**words).only == ("key", "roll-back")
    with pytest.raises(BadOption, match="--only"):
        SoakSettings(**parse(SoakSettings, ["--only", "keys"], "soak"))


def test_adapters_that_are_left() -> None:
    before = sample(adapters=1, adapter_versions=2, store_bytes=10)
    assert left_over(before, sample(adapters=1, adapter_versions=2, store_bytes=10)) == []
    assert left_over(before, sample(adapters=2, adapter_versions=2, store_bytes=11)) == [
        "adapters: 2 left, 1 before", "store_bytes: 11 left, 10 before",
    ]  # fmt: skip


def test_answers_are_those_of_the_content_alone() -> None:
    world = World(AdapterGenerator(), 1, 8, answers={("", "The moons of"): " Mars", ("f00", "The moons of"): " Rome"})
    served = [{"id": "f00", "name": "soak/x@3"}]
    assert world.wrong("The moons of", served, " Rome") is None
    assert world.wrong("The moons of", [], " Mars") is None
    assert world.wrong("The moons of", served, " Mars") == (
        "soak/x@3 to 'The moons of': ' Mars', but alone it said ' Rome'"
    )
    assert world.wrong("The names of", served, "anything") is None  # not compared
