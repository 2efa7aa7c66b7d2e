"""Metrics, thresholds, records, tables, pages and comparisons of load tests."""

import copy
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_rgb

from loadtests.drive.client import Timing
from loadtests.drive.rounds import Failure, Round
from loadtests.errors import BadOption
from loadtests.report import table as report
from loadtests.report.compare import compare
from loadtests.report.fairness import adapter_stats, jain
from loadtests.report.metrics import METRICS, WorkloadMetrics, round_metrics, workload_metrics
from loadtests.report.page import compare_page, run_page
from loadtests.report.plots import COLOURS, FAILURE, distributions, legend, over_time, throughput
from loadtests.report.record import WANTED, Record, WorkloadResult, make_record, read_record, write_record
from loadtests.report.thresholds import check_thresholds, parse_threshold
from loadtests.workload.arrivals import ClosedLoop
from loadtests.workload.lengths import Fixed
from loadtests.workload.mixes import parse_mix
from loadtests.workload.workload import Workload

NAN = float("nan")


def timing(started: float, *arrivals: float, adapter: str | None = None, tokens: int | None = None) -> Timing:
    return Timing(adapter, started, arrivals, arrivals[-1], 10, 0, len(arrivals) if tokens is None else tokens)


def round_(seconds: float, *items: Timing | Failure, **fields: Any) -> Round:
    timings = tuple(item for item in items if isinstance(item, Timing))
    failures = tuple(item for item in items if isinstance(item, Failure))
    return Round(0.0, seconds, 0.25, timings, failures, **fields)


FAILED = Failure("a", 0.0, 1.0, "status 500")


# --- metrics


def test_metrics_of_a_round() -> None:
    run = round_(2.0, timing(0.0, 0.1, 0.2, 0.4), timing(0.5, 0.8, 0.9, 1.4, tokens=6), FAILED, in_flight=2)
    values = round_metrics(run, 1.5)
    expected = {
        "requests_per_s": 1.0,
        "output_tokens_per_s": 4.5,
        "total_tokens_per_s": 14.5,
        "ttft_p50_ms": 200.0,
        "ttft_mean_ms": 200.0,
        "ttft_p95_ms": 290.0,
        "tpot_p50_ms": (150 + 600 / 5) / 2,
        "gap_p50_ms": 150.0,
        "e2e_mean_ms": 650.0,
        "failed": 1.0,
        "asked_rate": 1.5,
        "sent_rate": 2 / 0.5,
        "prompt_tokens": 10.0,
        "tokens_per_event": 9 / 6,
        "client_cpu": 0.125,
        "in_flight_most": 2.0,
        "in_flight_mean": (0.4 + 0.9 + 1.0) / 2,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert values.keys() == METRICS.keys()


def test_metrics_are_medians_over_rounds_and_count_the_failures_of_the_warm_up() -> None:
    quick = round_(1.0, timing(0.0, 0.1, 0.2, 0.3), timing(0.0, 0.3, 0.4, 0.5))
    slow = round_(2.0, timing(0.0, 0.2, 0.4, 0.6), timing(0.0, 0.4, 0.6, 0.8))
    slowest = round_(3.0, timing(0.0, 1.0, 1.3, 1.6), FAILED)
    row = workload_metrics("base", [slow, slowest, quick], NAN, warm_up=round_(1.0, FAILED))
    assert row.values["output_tokens_per_s"] == pytest.approx(3.0)
    assert row.spread["output_tokens_per_s"] == pytest.approx((6 - 1) / 3)
    assert row.values["ttft_p50_ms"] == pytest.approx(300)
    assert row.requests == 7
    assert row.failures == {"status 500": 1, "in the warm-up: status 500": 1}
    assert row.values["failed"] == 2, "of three rounds and the warm-up, not a median"


def test_a_round_without_answers_leaves_no_latency() -> None:
    row = workload_metrics("base", [round_(1.0, FAILED), round_(1.0, timing(0.0, 0.1))], NAN)
    assert math.isnan(row.values["ttft_p50_ms"]), "the failed round was left out"
    assert row.values["failed"] == 1


# --- fairness


def test_jains_index_is_one_for_equals_and_a_share_for_one() -> None:
    assert jain([3.0, 3.0, 3.0]) == pytest.approx(1)
    assert jain([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([1.0, 2.0, 3.0]) == pytest.approx(36 / (3 * 14))
    assert math.isnan(jain([]))
    assert math.isnan(jain([0.0]))


def test_a_starved_adapter_is_the_worst_and_lowers_fairness() -> None:
    run = round_(2.0, timing(0.0, 1.0, 2.0, adapter="b"), timing(0.0, 0.5, 1.0, adapter="c"), FAILED, timing(0.0, 1.0))
    found = adapter_stats([run])
    assert [(one.adapter, one.speed, one.failed) for one in found] == [("a", 0, 1), ("b", 1, 0), ("c", 2, 0)]
    assert round_metrics(run, NAN)["fairness"] == pytest.approx(9 / (3 * 5))
    assert round_metrics(run, NAN)["worst_adapter_ratio"] == 0


# --- thresholds


def judged(text: str, mix: str, **values: float) -> list[bool]:
    """Return whether a closed loop of 4 clients with these metrics meets a threshold; empty if it does not apply."""
    work = Workload(parse_mix(mix, 2), ClosedLoop(4), Fixed(8), Fixed(3))
    figures = {**dict.fromkeys(METRICS, NAN), **values}
    row = WorkloadMetrics(work.name, figures, {}, requests=1, failures=Counter(), adapters=[])
    return [verdict.met for verdict in check_thresholds([parse_threshold(text)], [(work, row)])]


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("ttft_p95_ms>500", True),
        ("ttft_p95_ms>=500", False),
        (" ttft_p95_ms > 499.5 ", False),
        ("ttft_p95_ms<1", True),
        ("base/ttft_p95_ms>1", False),
        ("base closed:4/ttft_p95_ms>1", False),
        ("ttft_p50_ms>1", False),
    ],
)
def test_a_threshold_is_missed_if_it_holds_or_nothing_was_measured(text: str, met: bool) -> None:
    assert judged(text, "base", ttft_p95_ms=500.0) == [met]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("zipf", True),
        ("zipf:1", True),
        ("zipf:1@16", True),
        ("zipf:1@16 closed:4", True),
        ("zip", False),
        ("zipf:1@1", False),
        ("zipf:1@16 closed", False),
    ],
)
def test_a_threshold_names_a_workload_by_whole_words(name: str, meant: bool) -> None:
    assert judged(f"{name}/failed>0", "zipf:1@16", failed=1.0) == [False] * meant


def test_a_threshold_skips_workloads_without_the_metric() -> None:
    assert judged("fairness<0.9", "base") == judged("late_p99_ms>5", "base") == []
    assert judged("fairness<0.9", "single") == [False], "it could have been measured"


# --- records, tables, pages


def result(mix: str = "distinct", rate: float = 1.0) -> WorkloadResult:
    work = Workload(parse_mix(mix, 2), ClosedLoop(2), Fixed(8), Fixed(3))
    one, two = ("bench-000", "bench-001") if work.adapters else (None, None)
    rounds = [
        round_(
            1.0,
            timing(0.0, 0.1 / rate, 0.2 / rate, 0.3 / rate, adapter=one),
            timing(0.0, 0.2 / rate, 0.3 / rate, 0.4 / rate, adapter=two),
            Failure(two, 0.4, 0.5, "status 500: <b>&"),
        )
        for _ in range(2)
    ]
    return WorkloadResult(work, rounds, workload_metrics(work.name, rounds, work.rate))


def recorded(*results: WorkloadResult, seed: int = 0) -> Record:
    about = {
        "version": "0",
        "started": "then",
        "finished": "later",
        "machine": {"cores": 2, "processor": "Xeon"},
        "server": {"peer": "manylora", "url": "http://here", "base": "tiny", "version": None},
        "settings": {},
    }
    verdicts = check_thresholds([parse_threshold("failed>0")], [(one.work, one.metrics) for one in results])
    return make_record(results, verdicts, {"seed": seed}, about)


def test_a_record_is_json_that_can_be_read_again(tmp_path: Path) -> None:
    record = recorded(result(), result("base"))
    write_record(record, tmp_path / "run.json")
    again = read_record(tmp_path / "run.json")
    assert again == json.loads(json.dumps(record, allow_nan=False))
    (work, base) = again["workloads"]
    assert (work["failed"], work["requests"]) == (2, 6)
    assert work["failures"] == {"status 500: <b>&": 2}
    assert work["figures"]["asked_rate"] is None, "a closed loop asks for no rate"
    request = work["rounds"][0]["requests"][0]
    assert (request["ttft"], request["gaps"]) == (pytest.approx(0.1), pytest.approx([0.1, 0.1]))
    assert (work["wanted"], base["wanted"]) == (2, 0)
    assert base["asked"]["adapters"] == "base"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", f"is not JSON, or is cut short: line 1, column 2; {WANTED}"),
        (b"", f"is not JSON, or is cut short: line 1, column 1; {WANTED}"),
        (b"\xc3(", f"is not JSON: it is not UTF-8 text; {WANTED}"),
        (b"[]", f"is JSON, but not of manylora bench; {WANTED}"),
        (b'{"kind": 3}', f"is JSON, but not of manylora bench; {WANTED}"),
        (
            b'{"kind": "manylora-bench", "schema": 99}',
            "was written by a version of manylora with another record format",
        ),
        (b'{"kind": "manylora-bench", "schema": 1}', "is damaged: `version` is missing; measure again"),
        (b"[" * 100_000, f"is nested too deeply; {WANTED}"),
    ],
)
def test_what_is_no_record_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(BadOption) as caught:
        read_record(tmp_path / "x.json")
    assert str(caught.value).startswith(f"{tmp_path / 'x.json'}: {reason}")


def test_a_missing_record_is_described(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no.json", "there is no such file"), (tmp_path, "is a folder, not a file")):
        with pytest.raises(BadOption) as caught:
            read_record(path)
        assert str(caught.value) == f"{path}: {reason}; {WANTED}"


@pytest.mark.parametrize("field", ["name", "asked", "figures", "spread", "rounds", "failed"])
def test_what_a_record_lacks_is_named(field: str, tmp_path: Path) -> None:
    record = json.loads(json.dumps(recorded(result())))
    del record["workloads"][0][field]
    (tmp_path / "x.json").write_text(json.dumps(record))
    with pytest.raises(BadOption, match=rf"x\.json: is damaged: `workloads\.0\.{field}` is missing; measure again"):
        read_record(tmp_path / "x.json")


def test_tables_line_up_and_show_failures() -> None:
    lines = report.table(recorded(result(), result("base")))
    assert len({len(line) for line in report.aligned(lines).splitlines()}) == 1
    assert "2 of 6" in report.aligned(lines)
    assert report.markdown(lines).splitlines()[1].startswith("| --- | ---:")
    assert [report.number(value) for value in (None, NAN, 0.0, 0.0000123, 0.01234, 1.5, 31.69, 1234.5)] == [
        "-", "-", "0", "0.0000123", "0.0123", "1.50", "31.7", "1,234",
    ]  # fmt: skip


def test_remarks_name_what_distorts_metrics() -> None:
    record = recorded(result())
    values = {"tokens_per_event": 2.0, "cached_tokens": 64.0, "client_cpu": 0.9, "late_p99_ms": 80.0}
    values |= {"asked_rate": 4.0, "sent_rate": 4.0, "in_flight_mean": 1.25, "in_flight_most": 3.0}
    record["workloads"][0]["figures"] |= values
    told = "\n".join(report.remarks(record))
    for expected in (
        "failed, 2 times: status 500", "2.00 tokens per event", "64 prompt tokens", "90%", "late, p99 80",
        "1.25 requests in flight on average, 3.00 at most", "2 of 2 adapters were not warmed up",
    ):  # fmt: skip
        assert expected in told


PLOT = "<svg xmlns"
"""Start of a plot on a page. Samples in a legend start differently."""


def test_a_page_has_everything_in_it() -> None:
    page = run_page(recorded(result(), result("base")))
    assert page.count(PLOT) == 3 + 3 + 2, "three distributions, three plots of the adapters' work and two of the base's"
    assert "status 500: &lt;b&gt;&amp;" in page
    assert "<b>" not in page
    assert "MISSED" in page
    assert not any(word in page for word in ("<script", "src=", "<link", "@import", "url(http", 'href="http'))


def test_bars_have_the_adapters_names_and_the_base_has_none() -> None:
    work, base = recorded(result(), result("base"))["workloads"]
    *_, bars = over_time(work)
    assert "bench-000" in bars
    assert "bench-001" in bars
    assert len(over_time(base)) == 2, "empty axes"


def test_of_many_adapters_the_slowest_and_the_quickest_are_named() -> None:
    (work,) = recorded(result())["workloads"]
    work["adapters"] = [{"adapter": f"bench-{number:03}", "speed": float(number)} for number in range(40)]
    *_, bars = over_time(work)
    named = [number for number in range(40) if f"bench-{number:03}" in bars]
    assert named == [*range(8), *range(32, 40)]
    assert "slowest and quickest 8 of 40" in bars


def test_plots_are_for_light_and_dark_pages_and_nothing_lies_over_curves() -> None:
    curves = {f"work {number}": work for number, work in enumerate(recorded(result(), result("base"))["workloads"])}
    for plot in [*distributions(curves), *over_time(curves["work 0"])]:
        assert "currentColor" in plot
        assert not any(fixed in plot for fixed in ("#000000", "#ffffff", "fill: black")), "of one kind of page alone"
        assert "legend" not in plot
    for background in ("#ffffff", "#15181d"):
        for colour in (*COLOURS, FAILURE):
            assert contrast(colour, background) >= 3, "WCAG 2.1, 1.4.11: graphics"


def contrast(one: str, other: str) -> float:
    """Return WCAG 2.1's contrast ratio of two colours, 1 to 21."""
    darker, lighter = sorted(map(luminance, (one, other)))
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("count", [1, 10, 11, 60])
def test_no_two_curves_look_alike(count: int) -> None:
    labels = [f"curve {number}" for number in range(count)]
    assert [label for label, _ in legend(labels)] == labels
    assert len({style for _, style in legend(labels)}) == count


def test_throughput_over_time_keeps_all_tokens() -> None:
    answered = [{"started": 0.0, "ttft": 0.5, "e2e": 1.5, "output_tokens": 30}]
    answered += [{"started": 1.0, "ttft": 0.25, "e2e": 0.25, "output_tokens": 1}]
    times, rate = throughput(answered, 2.0)
    assert rate.sum() * (times[1] - times[0]) == pytest.approx(31, rel=1e-3)
    assert rate[(times > 0.6) & (times < 1.2)] == pytest.approx(30)


# --- compare


def pair(**changes: Any) -> Mapping[str, Record]:
    return {"one": recorded(result()), "two": recorded(result(rate=2.0), **changes)}


def test_runs_of_the_same_workloads_are_compared() -> None:
    comparison = compare(pair(), force=False)
    (runs, (header, *rows)) = comparison.tables()
    assert runs[1:] == [[label, "manylora", "-", "tiny", "0", "then"] for label in ("one", "two")]
    assert header == ["distinct@2 closed:2", "one", "spread", "two", "spread", "ratio"]
    ttft = next(row for row in rows if row[0] == METRICS["ttft_p50_ms"].title)
    assert ttft[1:] == ["150", "0%", "75.0", "0%", "0.50x"]
    assert any("FAILED" in line for line in comparison.remarks)
    assert compare_page(comparison).count(PLOT) == 3


def test_what_no_run_has_is_no_row() -> None:
    comparison = compare({"one": recorded(result("base")), "two": recorded(result("base"))}, force=False)
    assert METRICS["fairness"].title in [row[0] for row in compare(pair(), force=False).tables()[1]]
    for record in comparison.rows["base closed:2"].values():
        record["figures"]["fairness"] = None
    assert METRICS["fairness"].title not in [row[0] for row in comparison.tables()[1]]


def test_other_servers_are_compared_and_named() -> None:
    records = copy.deepcopy(dict(pair()))
    records["two"]["server"] |= {"peer": "vllm", "base": "big", "version": "0.32"}
    records["two"]["version"] = "1"
    del records["two"]["workloads"][0]["figures"]["fairness"]
    comparison = compare(records, force=False)
    assert comparison.tables()[0][2] == ["two", "vllm", "0.32", "big", "1", "then"]
    assert comparison.tables()[1][-1][-3:] == ["-", "0%", "-"]
    for line in (
        "the server's peer is vllm, in one manylora", "the server's version is 0.32, in one unknown",
        "the server's base is big, in one tiny", "measured by version 1, one by 0",
    ):  # fmt: skip
        assert f"two: {line}" in comparison.remarks


def test_a_closed_pipe_is_no_failure(tmp_path: Path) -> None:
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file in files:
        write_record(recorded(result()), file)
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "manylora", "bench", "compare", *map(str, files)]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, "BrokenPipe" in done.stderr) == (0, False), done.stderr


def test_other_workloads_are_refused_or_marked() -> None:
    with pytest.raises(BadOption, match="two: seed is 7, in one 0"):
        compare(pair(seed=7), force=False)
    assert "DIFFERENT WORKLOADS: two: seed is 7, in one 0" in compare(pair(seed=7), force=True).remarks
    records = dict(pair())
    records["two"] = copy.deepcopy(records["two"])
    records["two"]["workloads"][0]["asked"]["requests"] = 9
    with pytest.raises(BadOption, match="two, distinct@2 closed:2: requests is 9, in one 8"):
        compare(records, force=False)


def test_what_only_one_run_has_is_named_and_nothing_in_common_is_refused() -> None:
    more = {"one": recorded(result()), "two": recorded(result(), result("base"))}
    comparison = compare(more, force=False)
    assert list(comparison.rows) == ["distinct@2 closed:2"]
    assert "two: not in all runs: base closed:2" in comparison.remarks
    with pytest.raises(BadOption, match="no workload in common"):
        compare({"one": recorded(result()), "two": recorded(result("base"))}, force=False)
