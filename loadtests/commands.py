"""``manylora bench`` on the command line.

Exit status 0; 1 where requests failed, a threshold was missed or the server could not be measured; 2 for a bad option;
130 after Ctrl-C, SIGTERM or SIGHUP.
"""

import os
import sys

import typer
from rich.console import Console

from bases import interrupts
from bases.command_line import APP, Given, command
from loadtests.bench import Bench
from loadtests.drive.progress import Display
from loadtests.errors import BadOption
from loadtests.report import table as report
from loadtests.report.compare import compare
from loadtests.report.record import Record, read_record, write_record
from loadtests.settings import BenchSettings, CompareSettings, make_bench
from loadtests.workload import arrivals, mixes


def run_bench(given: Given) -> int:
    """Measure. Returns 1 if requests failed or a threshold was missed."""
    with interrupts.raised():
        return _bench(make_bench(given))


def run_compare(given: Given) -> int:
    """Compare runs."""
    with interrupts.raised():
        return _compare(CompareSettings(**given))


HELP = f"""Measure a server over HTTP: every mix of adapters under every kind of arrivals.

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
    record = Bench(settings, settings.workloads(), display).run()
    if settings.json_file:
        write_record(record, settings.json_file)
    if settings.html:
        from loadtests.report.page import run_page

        settings.html.write_text(run_page(record), encoding="utf-8")
    _show(f"\n{report.printed(report.table(record), settings.table)}\n({report.NOTE})")
    for line in report.remarks(record):
        display.say(line)
    for verdict in record["thresholds"]:
        display.say(report.judged(verdict))
    failed = any(work["failed"] for work in record["workloads"]) or bool(record["server"]["left_behind"])
    return 1 if failed or not all(verdict["met"] for verdict in record["thresholds"]) else 0


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
    """On stdout; a reader who has gone, such as ``head``, has seen enough."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python would try once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _labelled(settings: CompareSettings) -> dict[str, Record]:
    """Records by their files' names, or whole paths where two names are the same."""
    names = [path.stem for path in settings.files]
    labels = names if len(set(names)) == len(names) else [str(path) for path in settings.files]
    if len(set(labels)) < len(labels):
        raise BadOption("FILES: one is given twice; two different runs are needed")
    return {label: read_record(path) for label, path in zip(labels, settings.files, strict=True)}


def _check_writable(settings: BenchSettings | CompareSettings) -> None:
    """Before an hour of work, not after it."""
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
        raise BadOption(f"--html: would replace {taken.pop()}, which is to be compared")
