"""TemplateProcess: renders chat templates of uploads in a process that cannot do harm.

jinja's sandbox keeps a template from Python's internals, but not from looping for ever or filling the memory, and a
thread cannot be stopped. A process can: the kernel ends it when its half second of CPU time is over.
"""

import signal
from collections import OrderedDict
from collections.abc import Mapping
from hashlib import sha256
from threading import Lock
from typing import Any

from server.text.template_environment import TemplateFailure
from server.text.template_worker import CPU_SECONDS
from server.workers.process import WorkerProcess

MAX_WAIT = 30.0
"""Seconds after which a process that uses no CPU time is given up: the machine is overloaded, or it is stopped."""
MAX_REFUSED = 4096
"""Templates that are remembered because they took too long."""


class TemplateProcess:
    """Renders templates, one after the other. Starts its process with the first one. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._worker = WorkerProcess("server.text.template_worker", patience=MAX_WAIT)
        self._refused: OrderedDict[bytes, str] = OrderedDict()
        """Digests of templates that took too long, or ended the process -> the reason."""

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """Return what the template writes. Raises TemplateFailure with the reason if it does not within its limits.

        A template that exceeds the time is not tried again: it would take a core for half a second with each request.
        """
        digest = sha256(source.encode(errors="surrogatepass")).digest()
        with self._lock:
            if digest in self._refused:
                raise TemplateFailure(self._refused[digest], fatal=True)
            request = {"template": source, "variables": dict(variables)}
            answer, status = self._worker.ask(request)
            if answer is None and status != -signal.SIGPROF:
                answer, status = self._worker.ask(request)  # something else may have ended the process
            if answer is None:
                raise TemplateFailure(self._refuse(digest, status), fatal=True)
        if "failure" in answer:
            raise TemplateFailure(answer["failure"], fatal=answer["fatal"])
        text: str = answer["text"]
        return text

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._worker.close()

    def _refuse(self, digest: bytes, status: int) -> str:
        """Remember and return why a template with which the process ended is refused."""
        slow = status in (-signal.SIGPROF, -signal.SIGKILL)
        reason = (
            f"it takes longer than {CPU_SECONDS:g} s of CPU time" if slow else "it ends the process that renders it"
        )
        self._refused[digest] = reason
        if len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)
        return reason
