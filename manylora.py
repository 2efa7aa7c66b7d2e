"""The command line: ``manylora COMMAND``. A command is imported when it is named, so that help is instant.

Import as little as possible at the top: until :func:`main` runs, Ctrl-C is not silent.
"""

import os
import sys
from collections.abc import Sequence

from bases import interrupts

TYPE_CHECKING = False  # typing would take its time

if TYPE_CHECKING:
    from typing import Any

    import typer

HELP = """\
Serve many LoRA adapters from one frozen 4-bit base model.

"manylora COMMAND --help" lists the options of a command.
"""
COMMANDS = {
    "serve": ("server.api.commands", None, "Serve a base model and its adapters over HTTP."),
    "ray": ("server.ray.commands", "ray", "Serve with several replicas, on one machine or more, with Ray Serve."),
    "doctor": ("server.api.commands", None, "Check this machine, and whether serve would start with the same options."),
    "fetch": ("server.api.commands", None, "Download and quantise the base that serve would serve."),
    "adapters": ("adapters.cli.commands", None, "List, push, activate and remove the adapters of a running server."),
    "chat": ("adapters.cli.chat.commands", None, "Talk with a running server: its base, its adapters, side by side."),
    "keys": ("server.access.commands", None, "Add, list, rotate and revoke API keys."),
    "usage": ("adapters.cli.usage", None, "Show what keys have used: requests and tokens by adapter and day."),
    "audit": ("adapters.cli.usage", None, "Show who has changed which adapter, alias or key."),
    "top": ("adapters.cli.top.commands", None, "Watch a running server: requests, adapters, memory, latency."),
    "train": ("training.commands", "train", "Train an adapter on a file of examples, judge it, publish it."),
    "export": ("training.commands", "train", "Write a base with an adapter as merged weights."),
    "bench": ("loadtests.commands", "bench", "Measure a running server over HTTP."),
}
"""Command -> the module that has a typer app of that name, the extra that it needs, its line in ``manylora --help``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Return 0, 1 for a failure, 2 for a bad option, 130 for Ctrl-C, or the command's own status.

    Without ``argv``, use the arguments of the process, make its Ctrl-C silent from here to its end, and let libraries
    draw progress bars on a terminal only.
    """
    if argv is None:
        interrupts.exit_on_sigint()
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    from bases.openmp import SERVING_SPINS, TRAINING_SPINS, set_spin_count

    set_spin_count(TRAINING_SPINS if words[0] in {"train", "export"} else SERVING_SPINS)
    import typer

    from bases.command_line import usage_error
    from bases.errors import ManyloraError

    try:
        status = build()(words, prog_name="manylora", standalone_mode=False)
    except ManyloraError as error:
        return fail(error.terminal_lines(), error.exit_status)
    except typer.TyperException as error:
        return fail([usage_error(error)], 2)
    except typer.Abort:
        return fail(["stopped; nothing was changed"], 1)
    except KeyboardInterrupt:
        return interrupts.STATUS
    return status if isinstance(status, int) else 0


def fail(lines: Sequence[str], status: int) -> int:
    """Print an error, whose indented lines belong to the line above, and return the exit status."""
    for line in lines:
        print(line if line.startswith(" ") else f"manylora: {line}", file=sys.stderr)
    return status


def build() -> "typer.Typer":
    """The typer app, whose commands have their help only until they are named."""
    from importlib import import_module

    import typer
    from typer.core import TyperGroup

    from bases.command_line import plain_help
    from bases.extras import require

    class Commands(TyperGroup):
        def __init__(self, *args: "Any", **options: "Any") -> None:
            super().__init__(*args, **options)
            plain_help(self)

        def resolve_command(self, ctx: "Any", args: list[str]) -> "Any":
            name, _, rest = super().resolve_command(ctx, args)
            assert name is not None
            module, extra, _ = COMMANDS[name]
            if extra is not None:
                require(extra, name)
            return name, plain_help(typer.main.get_command(getattr(import_module(module), name))), rest

        def invoke(self, ctx: "Any") -> "Any":
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:  # typer would print an empty line
                raise typer.Exit(interrupts.STATUS) from None

    app = typer.Typer(
        cls=Commands,
        help=HELP,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name, (_, _, text) in COMMANDS.items():
        app.command(name, help=text)(lambda: None)

    @app.callback()
    def options(
        version: bool = typer.Option(
            False,
            "--version",
            "-V",
            callback=_print_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ) -> None:
        pass

    return app


def _print_version(wanted: bool) -> None:
    from importlib.metadata import version

    import typer

    if wanted:
        print(f"manylora {version('manylora')}")
        raise typer.Exit


if __name__ == "__main__":
    sys.exit(main())
