"""``manylora serve``, ``manylora doctor`` and ``manylora fetch``."""

import typer

from bases import interrupts
from bases.command_line import Given, single_command
from server.config import Settings, make_settings


def run_serve(given: Given) -> int:
    """Serve until SIGINT or SIGTERM. Raises ConfigError and BaseRejected."""
    settings = make_settings(given, Settings)
    from server.api.serve import serve

    with interrupts.sigint_raises():
        serve(settings)
    return 0


def run_doctor(given: Given) -> int:
    """Examine the machine. Returns 1 if there are problems."""
    settings = make_settings(given, Settings)
    from server.doctor import examine

    with interrupts.sigint_raises():
        return 1 if examine(settings) else 0


def run_fetch(given: Given) -> int:
    """Download and quantise the base. Raises ConfigError and BaseRejected."""
    settings = make_settings(given, Settings)
    from bases.base import fetch_base

    with interrupts.sigint_raises():
        folder = fetch_base(settings.base, lambda line: typer.echo(line, err=True))
    typer.echo(folder)
    return 0


serve = single_command(Settings, run_serve)
doctor = single_command(
    Settings,
    run_doctor,
    "Check this machine, and whether serve would start with these options. Exits with 1 if not.\n\n"
    "Example: manylora doctor --model ./my-model",
)
fetch = single_command(
    Settings,
    run_fetch,
    "Download and quantise the base that serve would serve with these options, so that serve starts at once and "
    "without a network. Prints the folder.\n\n"
    "Example: manylora fetch --model org/model --data-dir /data",
)
