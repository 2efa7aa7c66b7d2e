"""The front door: one command line. Each command imports its own part, so that help is instant.

What is imported up here is imported before Ctrl-C is silent: as little as can be.
"""

import os
import sys
from collections.abc import Sequence

from bases import interrupts

USAGE = """\
usage: manylora COMMAND [OPTIONS]

  serve     serve a base model and its adapters over HTTP
  doctor    what this machine can do, and what would go wrong
  adapters  list, push, activate and remove the adapters of a running server
  train     make an adapter from a file of examples, judge it, publish it
  export    write a base and an adapter as plain weights
  bench     measure a running server, of this kind or another, over HTTP

`manylora COMMAND --help` lists the options. Those of serve and doctor may also stand in the environment, e.g.
MANYLORA_PORT=8001, and the server that adapters talks to in MANYLORA_URL, with its key in MANYLORA_API_KEY.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 for a failure, 2 for a bad option, 130 for Ctrl-C.

    Without ``argv`` it is that of the process, whose Ctrl-C is silent from here to its end, and whose libraries draw
    progress bars on a terminal only.
    """
    if argv is None:
        interrupts.end_silently()
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    from bases.errors import ConfigError, ManyloraError
    from bases.openmp import SERVING, TRAINING, wait_briefly

    words = list(sys.argv[1:] if argv is None else argv)
    command, options = (words[0], words[1:]) if words else ("--help", [])
    wait_briefly(TRAINING if command in {"train", "export"} else SERVING)
    try:
        match command:
            case "serve":
                return serve(options)
            case "doctor":
                return doctor(options)
            case "adapters":
                return adapters(options)
            case "train":
                return train(options)
            case "export":
                return export(options)
            case "bench":
                return bench(options)
            case "-h" | "--help" | "help":
                print(USAGE, end="")
                return 0
            case "-V" | "--version":
                from importlib.metadata import version

                print(f"manylora {version('manylora')}")
                return 0
        raise ConfigError(f"there is no command {command!r}; see manylora --help")
    except ManyloraError as error:
        for line in str(error).splitlines():
            print(f"manylora: {line}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return interrupts.STATUS


def serve(options: Sequence[str]) -> int:
    """``manylora serve``: until it is told to stop."""
    from server.config import read_settings

    settings = read_settings(options)
    from server.api.serve import serve as run

    with interrupts.raised():
        run(settings)
    return 0


def doctor(options: Sequence[str]) -> int:
    """``manylora doctor``, with the options one would serve with; status 1 if something would go wrong."""
    from server.config import read_settings

    settings = read_settings(options, command="doctor")
    from server.doctor import examine

    with interrupts.raised():
        return 1 if examine(settings) else 0


def adapters(options: Sequence[str]) -> int:
    """``manylora adapters``, over HTTP."""
    from adapters.cli.commands import run

    with interrupts.raised():
        return run(options)


def train(options: Sequence[str]) -> int:
    """``manylora train``; status 3 where the adapter was not good enough to be published."""
    from training.commands import run_train

    with interrupts.raised(), interrupts.ends_raised():
        return run_train(options)


def export(options: Sequence[str]) -> int:
    """``manylora export``."""
    from training.commands import run_export

    with interrupts.raised(), interrupts.ends_raised():
        return run_export(options)


def bench(options: Sequence[str]) -> int:
    """``manylora bench``, also ``bench compare``."""
    from loadtests.commands import run

    with interrupts.raised():
        return run(options)


if __name__ == "__main__":
    sys.exit(main())
