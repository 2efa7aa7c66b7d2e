"""Refusals: requests that the server refuses before they are requests, and so before the application sees them."""

import logging

from server.metrics.metrics import Metrics

log = logging.getLogger(__name__)


class Refusals:
    """Counts and logs heads that are no HTTP, too large or too late, as the application does with requests."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def note(self, status: int, reason: str, request_id: str, client: str | None) -> None:
        """Note one that was answered with ``status``. Nothing of what the client sent is logged."""
        self._metrics.responded("", None, status)
        fields = {"request_id": request_id, "status": status, "client": client}
        known = {name: value for name, value in fields.items() if value is not None}
        log.info("Refused before it was a request, %d: %s", status, reason, extra=known)
