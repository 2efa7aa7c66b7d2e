"""A server of the tiny base that the tests train on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bases.base import load_base
from server.api.startup import open_service
from server.config import Settings
from tests.api.live import Live, running
from training.settings import TrainSettings


@contextmanager
def serving(settings: TrainSettings, root: Path, **changes: Any) -> Iterator[Live]:
    """Serve the base of ``settings`` from the data folder ``root``; ``changes`` are fields of the server's settings."""
    given = {"model": settings.model, "data": root, "device": "cpu", "dtype": settings.dtype}
    small = {"kv_memory_gib": 0.01, "threads": 1}
    options = Settings(**{**given, **small, **changes})
    with running(open_service(load_base(options.base), options)) as live:
        yield live


def address(live: Live) -> str:
    return str(live.http.base_url)
