"""``manylora bench`` on the command line.

Exit status: 0; 1 if requests failed, a threshold was missed or the server could not be measured; 2 for a bad option;
130 after Ctrl-C, SIGTERM or SIGHUP.
"""

import os
import sys

import typer
from rich.console import Console

from bases import interrupts
from bases.command_line import APP, Given, command
from loadtests.benchmark import Benchmark
from loadtests.drive.progress import Display
from loadtests.errors import BadOption
from loadtests.report import table as report
from loadtests.report.compare import compare
from loadtests.report.record import Record, read_record, write_record
from loadtests.settings import BenchSettings, CompareSettings, make_bench
from loadtests.workload import arrivals, mixes


def run_bench(given: Given) -> int:
    """Run a benchmark. Returns 1 if requests failed, a threshold was missed or adapters could not be removed."""
    with interrupts.sigint_raises():
        return _bench(make_bench(given))


def run_compare(given: Given) -> int:
    """Compare records of benchmarks. Returns 0."""
    with interrupts.sigint_raises():
        return _compare(CompareSettings(**given))


HELP = f"""Measure a server over HTTP: every mix of adapters with every kind of arrivals.

Adapters: {mixes.FORMS}.

Arrivals: {arrivals.FORMS}.

Example: manylora bench --adapters base,zipf:1@64 --arrivals closed:16 --html run.html
"""
bench = typer.Typer(invoke_without_command=True, **APP)
bench.callback()(command(BenchSettings, run_bench, HELP))
bench.command("compare")(command(CompareSettings, run_compare, CompareSettings.__doc__ or ""))


def _bench(settings: BenchSettings) -> int:
    _check_writable(settings)
    display = Display(Console(stderr=True))
    record = Benchmark(settings, settings.workloads(), display).run()
    if settings.json_file:
        write_record(record, settings.json_file)
    if settings.html:
        from loadtests.report.page import run_page

        settings.html.write_text(run_page(record), encoding="utf-8")
    _show(f"\n{report.printed(report.table(record), settings.table)}\n({report.NOTE})")
    for line in report.remarks(record):
        display.say(line)
    for checked in record["thresholds"]:
        display.say(report.threshold_line(checked))
    failed = any(work["failed"] for work in record["workloads"]) or bool(record["server"]["left_behind"])
    return 1 if failed or not all(checked["met"] for checked in record["thresholds"]) else 0


def _compare(settings: CompareSettings) -> int:
    _check_writable(settings)
    comparison = compare(_labelled(settings), settings.force)
    for table in comparison.tables():
        _show(f"{report.printed(table, settings.table)}\n")
    for line in comparison.remarks:
        print(line, file=sys.stderr)
    if settings.html:
        from loadtests.report.page import compare_page

        settings.html.write_text(compare_page(comparison), encoding="utf-8")
    return 0


def _show(text: str) -> None:
    """Print on stdout. A reader that has closed the pipe, such as ``head``, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Otherwise Python would fail again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _labelled(settings: CompareSettings) -> dict[str, Record]:
    """Read the records, by the stems of their files, or by whole paths if two stems are equal."""
    names = [path.stem for path in settings.files]
    labels = names if len(set(names)) == len(names) else [str(path) for path in settings.files]
    if len(set(labels)) < len(labels):
        raise BadOption("FILES: the same file is given twice; give the records of different runs")
    return {label: read_record(path) for label, path in zip(labels, settings.files, strict=True)}


def _check_writable(settings: BenchSettings | CompareSettings) -> None:
    """Raise BadOption for an output file that cannot be written: at the start, not after an hour of work."""
    outputs = {"--html": settings.html, "--json": getattr(settings, "json_file", None)}
    for option, path in outputs.items():
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise BadOption(f"{option}: there is no folder {path.absolute().parent}")
        if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            raise BadOption(f"{option}: {path} cannot be written")
    given = [path.absolute() for path in outputs.values() if path]
    if len(set(given)) < len(given):
        raise BadOption(f"--html, --json: both would be written to {given[0]}")
    if taken := {path.absolute() for path in getattr(settings, "files", ())} & set(given):
        raise BadOption(f"--html: would overwrite {taken.pop()}, which is one of FILES")
