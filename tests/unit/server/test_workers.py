"""WorkerProcess: what it answers for a worker that ends, is stopped, or does not start."""

import signal
from time import monotonic

import pytest

from server.errors import EngineError
from server.workers.process import WorkerProcess

TEMPLATES = "server.text.template_worker"


def test_a_stopped_worker_is_given_up_also_while_a_request_is_sent() -> None:
    """The request is larger than a pipe holds."""
    worker = WorkerProcess(TEMPLATES, patience=30)
    worker.start().send_signal(signal.SIGSTOP)
    worker._patience, begin = 0.2, monotonic()
    assert worker.ask({"template": "x" * 1_000_000, "variables": {}}) == (None, -signal.SIGKILL)
    assert monotonic() - begin < 10
    worker._patience = 30
    assert worker.ask({"template": "{{ 1 }}", "variables": {}}) == ({"text": "1"}, 0)
    worker.close()


def test_a_worker_that_does_not_start_is_an_error() -> None:
    worker = WorkerProcess("server.workers.worker", patience=30)  # it has no `main`
    with pytest.raises(EngineError, match="does not start"):
        worker.ask({})
    worker.close()
