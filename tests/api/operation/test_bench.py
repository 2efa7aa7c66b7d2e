"""``manylora bench`` from end to end, against a real server."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from adapters.format.files import FILES
from loadtests.drive.registration import AdapterRegistrar
from loadtests.errors import ServerUnusable
from loadtests.workload.adapters import AdapterGenerator, ModelShape
from manylora import main
from tests.api.live import Live, running, tiny_service

Run = Callable[..., tuple[int, str, str]]
"""Words after ``manylora bench`` -> exit status, stdout, stderr."""
LENGTHS = ("--prompt-tokens", "3", "--output-tokens", "6")
BRIEF = ("--repeats", "1", "--requests", "8")


@pytest.fixture
def config(live: Live, tmp_path: Path) -> Path:
    """The tiny base's config.json."""
    file = tmp_path / "config.json"
    file.write_text(live.service.base.model.config.to_json_string())
    return file


@pytest.fixture
def bench(live: Live, config: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a small benchmark of the shared server."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        made = () if "--registered" in words else ("--config", str(config), "--ranks", "2,4")
        lengths = () if "--trace" in words else LENGTHS
        status = main(["bench", "--url", str(live.http.base_url), *made, *lengths, *BRIEF, *map(str, words)])
        return status, *capsys.readouterr()

    return run


def test_bench_suite_writes_every_report(
    bench: Run, live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, page = tmp_path / "run.json", tmp_path / "run.html"
    thresholds = ("--fail-if", "failed>0", "--fail-if", "zipf/fairness<0.01", "--fail-if", "fairness<0.01")
    words = ("--adapters", "base,distinct@3,zipf:1@4", "--arrivals", "closed:3,gamma:40:0.5", "--html", page)
    status, out, err = bench(*words, "--json", file, *thresholds)
    assert status == 0, err
    record = json.loads(file.read_text())
    assert [work["name"] for work in record["workloads"]] == [
        "base closed:3", "base gamma:40:0.5", "distinct@3 closed:3", "distinct@3 gamma:40:0.5", "zipf:1@4 closed:3",
        "zipf:1@4 gamma:40:0.5",
    ]  # fmt: skip
    for work in record["workloads"]:
        figures = work["figures"]
        assert (work["failed"], figures["output_tokens"]) == (0, 6)
        assert figures["output_tokens_per_s"] * figures["seconds"] == pytest.approx(8 * 6)
        assert 0 < figures["ttft_p50_ms"] <= figures["e2e_p50_ms"]
        (run,) = work["rounds"]
        assert {len(one["gaps"]) for one in run["requests"]} <= set(range(6))
        under_way = sum(one["e2e"] for one in run["requests"]) / run["seconds"]
        assert figures["in_flight_mean"] == pytest.approx(under_way, rel=1e-3)
        assert work["warmed"] == work["wanted"]
    assert {one["adapter"] for one in record["workloads"][2]["adapters"]} == {"bench-000", "bench-001", "bench-002"}
    assert "zipf:1@4 closed:3" in out
    assert "0 of" in out
    assert page.read_text().count("<svg xmlns") == 3 + 2 * 2 + 4 * 3
    assert live.http.get("/v1/adapters/bench-000").status_code == 404, "an adapter was left behind"
    assert main(["bench", "compare", str(file), str(shutil.copy(file, tmp_path / "again.json"))]) == 0
    assert "1.00x" in capsys.readouterr().out


def test_bench_of_conversations_from_a_trace(bench: Run, tmp_path: Path) -> None:
    trace, file = tmp_path / "trace.jsonl", tmp_path / "run.json"
    rows = [(3, 5, 0.0, "a"), (2, 3, 0.05, None), (4, 2, 0.1, "b")]
    names = ("prompt_tokens", "output_tokens", "arrival", "adapter")
    trace.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))
    words = ("--endpoint", "chat", "--trace", trace, "--adapters", "trace", "--arrivals", "trace", "--requests", "3")
    status, _, err = bench(*words, "--json", file)
    assert status == 0, err
    (run,) = json.loads(file.read_text())["workloads"][0]["rounds"]
    assert [(one["adapter"], one["output_tokens"]) for one in run["requests"]] == [
        ("bench-000", 5), (None, 3), ("bench-001", 2),
    ]  # fmt: skip
    assert [one["started"] for one in run["requests"]] == pytest.approx([0.0, 0.05, 0.1], abs=0.04)


def test_bench_counts_and_reports_failures(bench: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    status, out, err = bench("--adapters", "base", "--arrivals", "closed:2", "--output-tokens", "1000", "--json", file)
    assert status == 1
    (work,) = json.loads(file.read_text())["workloads"]
    assert work["failed"] == 8, "the warm-up is short enough"
    assert "This model's maximum context length" in err
    assert "8 of 10" in out


def test_a_missed_threshold_is_status_1(bench: Run) -> None:
    words = ("--adapters", "base", "--arrivals", "closed:2", "--fail-if", "output_tokens_per_s>0")
    status, _, err = bench(*words)
    assert status == 1
    assert "MISSED: fail if output_tokens_per_s>0" in err


def test_bench_option_errors_come_before_any_request(bench: Run, live: Live, tmp_path: Path) -> None:
    sampled = live.sampled()
    for words, complaint in {
        ("--fail-if", "ttft_p95>5"): "no metric 'ttft_p95'",
        ("--json", tmp_path / "nowhere" / "x.json"): "--json: there is no folder",
        ("--adapters", "zipf:one"): "is not a mix",
        ("--fail-if", "late_p99_ms>5", "--arrivals", "closed:2"): "only open loops have that metric",
    }.items():
        status, _, err = bench(*words)
        assert (status, complaint in err) == (2, True), err
    assert live.sampled() == sampled


def test_bench_does_not_touch_foreign_adapters(
    bench: Run, live: Live, folders: Mapping[str, Path], config: Path
) -> None:
    spare = folders["spare"]
    files = [("file", (name, (spare / name).read_bytes())) for name in FILES if (spare / name).exists()]
    live.http.post("/v1/adapters", data={"name": "bench-001"}, files=files).raise_for_status()
    try:
        status, _, err = bench("--adapters", "distinct@2", "--arrivals", "closed:2")
        assert (status, "already has an adapter bench-001" in err) == (1, True), err
        status, _, err = bench("--adapters", "distinct@2", "--arrivals", "closed:2", "--registered")
        assert (status, "the server lacks 1 adapters, e.g. bench-000" in err) == (1, True), err
        assert live.http.get("/v1/adapters/bench-001").status_code == 200
    finally:
        live.http.delete("/v1/adapters/bench-001").raise_for_status()


def test_refused_registration_leaves_no_bench_adapters(bench: Run, live: Live) -> None:
    status, _, err = bench("--adapters", "distinct@3", "--ranks", "64")  # the third, after two were registered
    assert (status, "the server refused adapter bench-002: status 422" in err) == (1, True), err


def test_bench_registers_by_path_and_by_vllm_routes(bench: Run, live: Live, folders: Mapping[str, Path]) -> None:
    root = folders["red"].parent / "bench"
    for peer in ("manylora", "vllm"):
        words = ("--peer", peer, "--adapter-folder", root, "--adapters", "uniform@3", "--arrivals", "closed:2")
        status, _, err = bench(*words)
        assert status == 0, err


@pytest.fixture
def stocked(tmp_path: Path) -> Iterator[Live]:
    """A server that already has adapters with the benchmark's names."""
    (tmp_path / "root").mkdir()
    with running(tiny_service(tmp_path, adapter_root=tmp_path / "root")) as live:
        yield live


def test_bench_keeps_adapters_that_it_did_not_register(
    stocked: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    config.write_text(stocked.service.base.model.config.to_json_string())
    folder = AdapterGenerator(ModelShape.read(config), ranks=(2,)).write(tmp_path / "root", 0)
    stocked.http.post("/v1/adapters", json={"name": "bench-000", "path": str(folder)}).raise_for_status()
    url = str(stocked.http.base_url)
    words = ["--url", url, *BRIEF, *LENGTHS, "--adapters", "single", "--arrivals", "closed:1", "--registered"]
    assert main(["bench", *words, "--peer", "vllm"]) == 0, capsys.readouterr().err
    assert stocked.http.get("/v1/adapters/bench-000").status_code == 200


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (
            ("--url", "http://127.0.0.1:1"),
            1,
            "http://127.0.0.1:1: connection refused: no server listens there; "
            "start the server, or give its address with --url",
        ),
        (("--spawn", "false"), 1, "the server ended with status 1"),
        (("--spawn", "no-such-command"), 1, "--spawn: no-such-command: there is no such command"),
        (("--spawn", "x", "--peer", "vllm"), 2, "--spawn starts a manylora server"),
        (("compare", "a.json"), 2, "FILES: give two or more, as `manylora bench --json FILE` writes them (got 1)"),
        (("compare",), 2, "FILES: give two or more, as `manylora bench --json FILE` writes them (got 0)"),
        (("compare", "a.json", "b.json", "--htm", "x"), 2, "--htm: there is no such option; did you mean --html?"),
        (
            ("compare", "a.json", "b.json"),
            2,
            "a.json: there is no such file; give a file that `manylora bench --json FILE` wrote",
        ),
        (("--spawn", "serve '"), 2, "--spawn: has an unclosed quotation mark"),
    ],
)
def test_bench_errors_are_one_line(
    words: tuple[str, ...], status: int, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words]) == status
    captured = capsys.readouterr()
    assert reason in captured.err
    assert "Traceback" not in captured.err


def test_bench_keeps_results_if_cleanup_fails(
    bench: Run, live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, remove = tmp_path / "run.json", AdapterRegistrar.remove

    async def refused(client: AdapterRegistrar, name: str) -> None:
        if name == "bench-001":
            raise ServerUnusable("the server is busy")
        await remove(client, name)

    monkeypatch.setattr(AdapterRegistrar, "remove", refused)
    status, out, err = bench("--adapters", "distinct@2", "--arrivals", "closed:2", "--json", file)
    assert status == 1
    assert "distinct@2 closed:2" in out
    assert "bench-001 was not removed: the server is busy" in err
    assert json.loads(file.read_text())["workloads"][0]["failed"] == 0
    assert live.http.delete("/v1/adapters/bench-001").is_success
    assert live.http.get("/v1/adapters/bench-000").status_code == 404


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_unwritable_output_is_reported_first(bench: Run, tmp_path: Path, option: str) -> None:
    status, _, err = bench("--adapters", "base", option, tmp_path)
    assert status == 2
    assert f"{option}: {tmp_path} cannot be written" in err


def test_one_file_for_two_outputs_is_refused(bench: Run, tmp_path: Path) -> None:
    status, _, err = bench("--adapters", "base", "--json", tmp_path / "a", "--html", tmp_path / "a")
    assert status == 2
    assert "both would be written to" in err
