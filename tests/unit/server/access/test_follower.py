"""Follower: it survives every failure, and an outage is one line of the log."""

import logging
from threading import Event

import pytest

from adapters.errors import RegistryUnavailable
from server.follower import Follower


def test_an_outage_is_logged_once_and_an_error_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    away = RegistryUnavailable("away")
    outcomes = [away, away, None, away, ValueError("odd"), None]
    done = Event()

    def refresh() -> None:
        if not outcomes:
            done.set()
        elif (outcome := outcomes.pop(0)) is not None:
            raise outcome

    follower = Follower("words", refresh, 0.001, "The last words hold", logging.getLogger("test"))
    follower.start()
    assert done.wait(10)
    follower.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"The last words hold: {away}",
        f"The last words hold: {away}",
        "could not read the words; will try again",
    ]
