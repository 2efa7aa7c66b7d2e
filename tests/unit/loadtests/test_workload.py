"""Workloads of load tests: the same for a seed, with the distributions that were asked for."""

import json
import random
from base64 import b64encode
from collections import Counter
from itertools import pairwise
from math import exp, log, sqrt
from pathlib import Path
from statistics import fmean, pstdev

import pytest

from loadtests.errors import BadOption
from loadtests.settings import BenchSettings, read_bench
from loadtests.workload.arrivals import ClosedLoop, GammaArrivals, parse_arrivals
from loadtests.workload.lengths import Fixed, Lognormal, parse_lengths
from loadtests.workload.mixes import parse_mix
from loadtests.workload.trace import read_trace
from loadtests.workload.workload import Request, Workload, draw, draw_warm_up

MIXES = ("base", "single", "identical", "distinct", "uniform", "zipf:1", "hot")
MANY = 20_000


def asked(mix: str, requests: int, count: int = 16, arrivals: str = "closed:16", seed: int = 0) -> list[Request]:
    work = Workload(parse_mix(mix, count), parse_arrivals(arrivals), Fixed(8), Fixed(4))
    return draw(work, seed, "0", requests)


def shares(mix: str, count: int) -> dict[str | None, float]:
    counted = Counter(request.adapter for request in asked(mix, MANY, count))
    return {adapter: times / MANY for adapter, times in counted.items()}


# --- mixes


@pytest.mark.parametrize("mix", MIXES)
def test_same_seed_same_work_other_seed_other_prompts(mix: str) -> None:
    work = Workload(parse_mix(mix, 16), GammaArrivals(4, 0.5), Lognormal(64, 0.5, 16, 200), Fixed(4))
    drawn = draw(work, 0, "0")
    assert drawn == draw(work, 0, "0")
    everything = [*drawn, *draw(work, 0, "1"), *draw_warm_up(work, 0), *draw(work, 1, "0")]
    beginnings = {" ".join(request.prompt.split()[:8]) for request in everything}
    assert len(beginnings) == len(everything), "two prompts begin alike, so a prompt cache would help"


def test_base_and_single_ask_for_none_and_one() -> None:
    assert shares("base", 16) == {None: 1.0}
    assert shares("single", 16) == {"bench-000": 1.0}
    assert shares("identical", 16) == {"bench-000": 1.0}


def test_distinct_clients_never_share_an_adapter() -> None:
    requests = asked("distinct", 64)
    for turn in range(4):
        assert len({request.adapter for request in requests[16 * turn : 16 * turn + 16]}) == 16
    assert len({request.adapter for request in requests[3::16]}) == 1, "a client changes its adapter"


def test_uniform_asks_for_each_alike() -> None:
    found = shares("uniform", 10)
    assert len(found) == 10
    # 0.1 give or take 5 standard deviations of sqrt(0.1 * 0.9 / MANY).
    assert all(abs(share - 0.1) < 5 * sqrt(0.09 / MANY) for share in found.values())


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_zipf_asks_in_proportion_to_a_power_of_the_rank(alpha: float) -> None:
    found = shares(f"zipf:{alpha}", 64)
    total = sum(rank**-alpha for rank in range(1, 65))
    for rank in (1, 2, 10):
        expected = rank**-alpha / total
        assert abs(found[f"bench-{rank - 1:03d}"] - expected) < 5 * sqrt(expected / MANY)


def test_hot_and_cold_get_their_shares() -> None:
    found = shares("hot:0.8:2", 10)
    assert abs(found["bench-000"] - 0.4) < 0.02
    assert abs(found["bench-001"] - 0.4) < 0.02
    assert abs(found["bench-009"] - 0.2 / 8) < 0.01


def test_a_mix_may_say_how_many_adapters() -> None:
    assert parse_mix("zipf:1.0@64", 16) == parse_mix("zipf:1", 64) == parse_mix("zipf", 64)
    assert str(parse_mix("zipf:1.0@64", 16)) == "zipf:1@64"
    assert str(parse_mix("distinct", 16)) == "distinct@16"


@pytest.mark.parametrize(
    "text", ["", "many", "zipf:x", "zipf:-1", "zipf:nan", "hot:1", "hot:0.9:16", "base@3", "single@2"]
)
def test_a_mistyped_mix_is_refused(text: str) -> None:
    with pytest.raises(BadOption, match="is not a mix"):
        parse_mix(text, 16)


# --- warming up


def warmed(mix: str, count: int | None = None, arrivals: str = "closed:2") -> list[str | None]:
    work = Workload(parse_mix(mix, 16), parse_arrivals(arrivals), Fixed(8), Fixed(40))
    requests = draw_warm_up(work, 0, count)
    assert {(request.at, request.output_tokens) for request in requests} == {(None, 16)}
    return [request.adapter for request in requests]


@pytest.mark.parametrize("mix", ["distinct@20", "uniform@20", "zipf:1@20", "hot:0.9:2@20"])
def test_every_adapter_is_warmed_up_the_most_popular_last(mix: str) -> None:
    assert warmed(mix) == [f"bench-{number:03d}" for number in reversed(range(20))]


def test_only_popular_adapters_are_warmed_up() -> None:
    assert warmed("identical@20") == ["bench-000"] * 2
    assert warmed("base") == [None] * 2
    assert warmed("zipf:1@2000")[-1] == "bench-000"
    assert set(warmed("zipf:1@2000")) == {f"bench-{number:03d}" for number in range(64)}
    assert set(warmed("zipf:1@2000", 100)) == {f"bench-{number:03d}" for number in range(100)}
    assert len(warmed("distinct@3", arrivals="poisson:2")) == 16


def test_a_traces_adapters_are_warmed(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    names = ("legal", None, "legal", "sales")
    rows = [{"prompt_tokens": 3, "output_tokens": 2, "arrival": 1, "adapter": name} for name in names]
    file.write_text("\n".join(map(json.dumps, rows)))
    words = ["--trace", str(file), "--adapters", "trace", "--arrivals", "trace,closed:1"]
    for work in read_bench(words).workloads():
        assert {one.adapter for one in draw_warm_up(work, 0)} == {"bench-000", None, "bench-001"}
    (few, _) = read_bench([*words, "--requests", "2"]).workloads()
    assert {one.adapter for one in draw_warm_up(few, 0)} == {"bench-000", None}


# --- arrivals


@pytest.mark.parametrize(("text", "variation"), [("poisson:5", 1.0), ("gamma:5:0.25", 2.0), ("gamma:5:4", 0.5)])
def test_gaps_have_the_mean_and_the_variation_that_are_asked(text: str, variation: float) -> None:
    process = parse_arrivals(text)
    assert isinstance(process, GammaArrivals)
    offsets = process.offsets(random.Random(1), MANY)
    gaps = [later - sooner for sooner, later in pairwise(offsets)]
    assert fmean(gaps) == pytest.approx(0.2)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(variation, rel=0.08)
    assert offsets[0] == 0
    assert offsets == process.offsets(random.Random(1), MANY) != process.offsets(random.Random(2), MANY)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("text", ["poisson:4", "gamma:4:0.25"])
def test_a_short_round_has_the_rate_that_is_asked(text: str, seed: int) -> None:
    requests = asked("base", 9, arrivals=text, seed=seed)
    assert requests[-1].at == pytest.approx(8 / 4)
    assert [one.at for one in asked("base", 1, arrivals=text, seed=seed)] == [0]


def test_constant_arrivals_are_even_and_closed_loops_have_none() -> None:
    assert [request.at for request in asked("base", 4, arrivals="constant:2")] == [0, 0.5, 1, 1.5]
    assert {request.at for request in asked("base", 4)} == {None}


@pytest.mark.parametrize("text", ["", "closed:2.5", "poisson", "gamma:1", "x:1"])
def test_mistyped_arrivals_are_refused(text: str) -> None:
    with pytest.raises(BadOption, match="is not a kind of arrivals"):
        parse_arrivals(text)


# --- lengths


def test_lognormal_lengths_have_their_median_and_spread_and_stay_inside() -> None:
    rng = random.Random(0)
    lengths = [Lognormal(200, 0.5, 1, 100_000).draw(rng) for _ in range(MANY)]
    assert fmean(map(log, lengths)) == pytest.approx(log(200), abs=5 * 0.5 / sqrt(MANY))
    assert pstdev(map(log, lengths)) == pytest.approx(0.5, rel=0.03)
    clipped = [Lognormal(200, 1.0, 50, 400).draw(rng) for _ in range(MANY)]
    assert (min(clipped), max(clipped)) == (50, 400)
    assert sorted(clipped)[MANY // 2] == pytest.approx(200, rel=0.05)


def test_a_lognormal_without_limits_has_some() -> None:
    assert parse_lengths("lognormal:100:0.5") == Lognormal(100, 0.5, 1, 800)
    assert parse_lengths("128") == Fixed(128)


@pytest.mark.parametrize(
    "text",
    ["", "0", "1.5", "lognormal", "lognormal:9", "lognormal:9:1:10:20", "lognormal:9:-1", "lognormal:inf:1"],
)
def test_mistyped_lengths_are_refused(text: str) -> None:
    with pytest.raises(BadOption, match="length"):
        parse_lengths(text)


def test_prompts_are_as_long_as_drawn() -> None:
    work = Workload(parse_mix("base", 1), ClosedLoop(4), Lognormal(64, 0.5, 16, 200), Fixed(4), requests=50)
    words = [len(request.prompt.split()) for request in draw(work, 0, "0")]
    assert len(set(words)) > 10
    assert fmean(words) == pytest.approx(64 * exp(0.125), rel=0.3)


# --- prefixes


def prefixed(option: str) -> list[Request]:
    words = "--adapters distinct@2 --arrivals closed:2 --requests 200 --prompt-tokens 40 --shared-prefix"
    (work,) = read_bench([*words.split(), option]).workloads()
    requests = draw(work, 0, "0")
    assert {len(request.prompt.split()) for request in requests} == {40}, "the prefix is not among the prompt's tokens"
    return requests


def beginnings(requests: list[Request]) -> Counter[str]:
    return Counter(" ".join(request.prompt.split()[:16]) for request in requests)


def test_prefixes_are_shared_by_all_or_by_an_adapters_own() -> None:
    assert len(beginnings(prefixed("global:16"))) == 1
    by_adapter = {
        name: beginnings([request for request in prefixed("adapter:16") if request.adapter == name])
        for name in ("bench-000", "bench-001")
    }
    assert [len(found) for found in by_adapter.values()] == [1, 1]
    assert by_adapter["bench-000"] != by_adapter["bench-001"]


def test_a_share_of_the_prompts_has_the_prefix() -> None:
    ((_, times),) = beginnings(prefixed("global:16:0.5")).most_common(1)
    assert 70 < times < 130


def test_a_prompt_is_never_only_its_prefix() -> None:
    prompts = [request.prompt for request in prefixed("global:100")]
    assert len(set(prompts)) > 50


# --- traces


def test_a_trace_says_lengths_times_and_adapters(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(
        '{"prompt_tokens": 7, "output_tokens": 3, "arrival": 100.5, "adapter": "legal"}\n\n'
        '{"prompt_tokens": 9, "output_tokens": 2, "arrival": 101, "adapter": null}\n'
        '{"prompt_tokens": 5, "output_tokens": 1, "arrival": 102.5, "adapter": "legal"}\n'
    )
    (work,) = read_bench(["--trace", str(file), "--adapters", "trace", "--arrivals", "trace"]).workloads()
    requests = draw(work, 0, "0")
    assert [(len(request.prompt.split()), request.output_tokens) for request in requests] == [(7, 3), (9, 2), (5, 1)]
    assert [request.at for request in requests] == [0, 0.5, 2]
    assert [request.adapter for request in requests] == ["bench-000", None, "bench-000"]
    assert (work.adapters, work.rate) == (1, 1.0)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is not JSON, or is cut short, at column 2"),
        ("[]", "JSON object"),
        ('{"prompt_tokens": 1}', "`output_tokens` must be a whole number"),
        ('{"prompt_tokens": true, "output_tokens": 1}', "`prompt_tokens` must be"),
        ('{"prompt_tokens": 1, "output_tokens": 1, "adapter": 3}', "`adapter` must be a name"),
        ('{"prompt_tokens": 1, "output_tokens": 1, "at": 3}', "unknown field `at`"),
        ('{"prompt_tokens": 1, "output_tokens": 1}', "`arrival` must be in every line"),
        ('{"prompt_tokens": 1, "output_tokens": 1, "arrival": 0.5}', "before that of the previous line"),
        (f'{{"prompt_tokens": 1, "output_tokens": 1, "arrival": 1{"0" * 400}}}', "`arrival` must be a number"),
        ('{"prompt_tokens": 1, "output_tokens": 1, "arrival": 1e9}', "`arrival`, .*must be from 0 to 604,800.0"),
        ('{"prompt_tokens": 1000000000, "output_tokens": 1}', "`prompt_tokens` must be from 1 to 1,000,000"),
        ("[" * 100_000, "is nested too deeply"),
    ],
)
def test_a_bad_line_of_a_trace_is_named(line: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(f'{{"prompt_tokens": 1, "output_tokens": 1, "arrival": 1}}\n{line}\n')
    with pytest.raises(BadOption, match=rf"trace\.jsonl:2: .*{reason}"):
        read_trace(file)


def test_a_name_may_have_what_ends_a_line_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"prompt_tokens": 1, "output_tokens": 1, "adapter": "a\u2028b"}\r\n', encoding="utf-8")
    assert read_trace(file).adapters == 1


# --- options


def test_every_mix_meets_every_kind_of_arrivals() -> None:
    settings = read_bench(["--adapters", "base,zipf:1@64", "--arrivals", "closed:4", "--arrivals", "poisson:2"])
    workloads = settings.workloads()
    assert [work.name for work in workloads] == [
        "base closed:4", "base poisson:2", "zipf:1@64 closed:4", "zipf:1@64 poisson:2",
    ]  # fmt: skip
    assert [work.total for work in workloads[:2]] == [8, 40]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--count", "0"], "--count: must be at least 1"),
        (["--adapters", "many"], "--adapters: 'many' is not a mix"),
        (["--arrivals", "trace"], "'base trace' needs --trace"),
        (["--url", "here"], "--url: must be http://HOST"),
        (["--url", "http://"], "--url: must be http://HOST"),
        (["--url", "http://a b"], "--url: must be http://HOST"),
        (["--url", "http://me:s3cret@host:port"], "--url: is not a URL"),
        (["--url", "http://host:99999"], "--url: is not a URL: Port out of range"),
        (["--url", "http://[::1"], "--url: is not a URL"),
        (["--url", "http://a..b"], "--url: is not a URL"),
        (["--url", "http://host/v1?key=s3cret"], "--url: must not have a query"),
        (["--url", "http://me@host", "--api-key", "s3cret"], "--url has a user name, so --api-key"),
        (["--count", "1000000000"], "--count: must be at most 100,000"),
        (["--adapters", "uniform@1000000000"], "--adapters: 'uniform@1000000000': adapters must be from 1 to 100,000"),
        (["--adapters", "uniform@0"], "--adapters: 'uniform@0': adapters must be from 1"),
        (["--arrivals", "closed:0"], "--arrivals: 'closed:0': clients must be from 1"),
        (["--arrivals", "closed:1000000000"], "--arrivals: 'closed:1000000000': clients must be from 1 to 10,000"),
        (["--arrivals", "constant:1e-9"], "--arrivals: .*the rate, per second, must be from 0.001 to"),
        (["--arrivals", "poisson:inf"], "--arrivals: .*the rate"),
        (["--arrivals", "poisson:nan"], "--arrivals: .*the rate"),
        (["--arrivals", "gamma:1:1e-300"], "--arrivals: .*the shape must be from 0.1"),
        (["--arrivals", "poisson:9000"], "--arrivals: 'base poisson:9000': requests of a round .* to 100,000"),
        (["--prompt-tokens", "1000000000"], "--prompt-tokens: '1000000000': a length must be from 1 to 1,000,000"),
        (["--prompt-tokens", "99999", "--requests", "99999"], "--prompt-tokens: .*tokens of all prompts of a round"),
        (["--output-tokens", "lognormal:10:1e308"], "--output-tokens: .*sigma must be from 0.0 to 10.0"),
        (["--output-tokens", "lognormal:10:1:1:1000000000"], "--output-tokens: .*the greatest length must be"),
        (["--shared-prefix", "global:1000000000"], "TOKENS from 1 to 1,000,000"),
        (["--ranks", "1000000000"], "--ranks: a rank must be from 1 to 1,024"),
        (["--timeout", "1e300"], "--timeout: must be at most 86,400"),
        (["--repeats", "1000000000"], "--repeats: "),
        (["--seed", "9" * 4000], "--seed: .{1,400}$"),
        (["--spawn", "x", "--url", "http://host"], "--url has no effect with --spawn"),
        (["--spawn", "x", "--adapter-folder", "."], "--adapter-folder has no effect with --spawn"),
        (["--registered", "--ranks", "8"], "--ranks has no effect with --registered"),
        (["--registered", "--adapter-seed", "8"], "--adapter-seed has no effect with --registered"),
        (["--peer", "llamacpp", "--targets", "qv"], "--targets has no effect with --peer llamacpp"),
        (["--peer", "vllm", "--config", "x"], "--config has no effect with --peer vllm"),
        (["--trace", "x", "--prompt-tokens", "8"], "--prompt-tokens has no effect with --trace"),
        (["--requests", "8", "--requests-per-client", "8"], "--requests-per-client has no effect with --requests"),
        (["--nonsense"], "^--nonsense: there is no such option; see --help$"),
        (["--api-kay", "s3cret"], "^--api-kay: there is no such option; did you mean --api-key.$"),
        (["--api-kay=s3cret"], "^--api-kay: there is no such option; did you mean --api-key.$"),
        (["s3cret", "--nonsense"], "^--nonsense: there is no such option"),
        (["compare.json"], "^there is no option or command 'compare.json'; options begin with --$"),
        (["--jsn", "x"], "^--jsn: there is no such option; did you mean --json.$"),
        (["--count"], "^--count: needs a value$"),
        (["--count", "x"], "^--count: must be a whole number .got 'x'.$"),
        (["--timeout", "x"], "^--timeout: must be a finite number .got 'x'.$"),
        (["--timeout", "0"], "^--timeout: must be more than 0"),
        (["--registered=perhaps"], "^--registered: takes no value$"),
        (["--peer", "sglang"], "^--peer: must be 'manylora', 'vllm' or 'llamacpp' .got 'sglang'.$"),
        (["--ranks", "x"], "^--ranks: must be a whole number .got 'x'.$"),
        (["--config", "/nowhere.json"], "^--config: /nowhere.json: there is no such file$"),
        (["--trace", "/"], "^--trace: /: is a folder, not a file$"),
        (["--shared-prefix", "some:9"], "--shared-prefix: 'some:9'"),
        (["--adapters", "base,base"], "is given twice"),
        (["--fail-if", "ttft_p90_ms>5"], "no metric 'ttft_p90_ms'; similar ones are ttft_p"),
        (["--fail-if", "ttft_p95_ms=5"], "is not .WORKLOAD/.METRIC>LIMIT"),
        (["--fail-if", "ttft_p95_ms>soon"], "'soon' is not a number"),
        (["--fail-if", "zipf/failed>0"], "no workload is called 'zipf'"),
        (["--fail-if", "ttft_p95_ms>inf"], "'inf' is not a number"),
        (["--fail-if", "bas/failed>0"], "no workload is called 'bas'"),
        (["--fail-if", "fairness<0.9"], "only workloads with adapters have that metric"),
        (["--adapters", "base,zipf", "--fail-if", "base/fairness<0.9"], "only workloads with adapters have"),
        (["--arrivals", "closed:1", "--fail-if", "late_p99_ms>9"], "only open loops have that metric"),
    ],
)
def test_bad_options_are_named(words: list[str], complaint: str) -> None:
    with pytest.raises(BadOption, match=complaint) as caught:
        parse(words)
    assert "s3cret" not in str(caught.value)


def test_a_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYLORA_API_KEY", "s3cret")
    settings = read_bench([])
    assert settings.headers == {"Authorization": "Bearer s3cret"}
    assert "s3cret" not in repr(settings)
    with pytest.raises(BadOption, match=r"--api-key: .*not allowed in an HTTP header$"):
        read_bench(["--api-key", "two\nlines"])


def test_the_address_keeps_its_path_and_loses_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MANYLORA_API_KEY", raising=False)
    settings = read_bench(["--url", "http://me:s3cret@host:81/models/one"])
    assert str(settings.address) == "http://host:81/models/one/"
    assert settings.headers == {"Authorization": f"Basic {b64encode(b'me:s3cret').decode()}"}


def parse(words: list[str]) -> BenchSettings:
    settings = read_bench(["--adapters", "base", *words] if "--adapters" not in words else words)
    settings.thresholds(settings.workloads())
    settings.adapter_setup(None)
    return settings
