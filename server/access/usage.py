"""UsageLedger: counts what keys use, in memory, and writes it to the database every half second.

After kill -9 at most what came after the last write is lost, also of requests that were still running: each write takes
the tokens that they have computed so far. While the database cannot be reached, counts are kept, and written once it
can: a batch has a number, so that one whose acknowledgement was lost is not written twice.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, date, datetime, timedelta
from uuid import uuid4

from adapters.errors import AdapterError, RegistryUnavailable
from server.access.key import ApiKey
from server.access.limit_table import LimitTable
from server.access.limits import Admission, Limiter
from server.access.shared_limits import SharedLimits, SharedRequest
from server.access.usage_table import Batch, Counts, Place, Tokens, UsageTable
from server.errors import RateLimited

log = logging.getLogger(__name__)

FLUSH_SECONDS = 0.5
"""Seconds between two writes."""
MAX_PLACES = 20_000
"""Counts kept in memory, each of a key, an adapter and a day. Beyond them, new adapters count as :data:`OTHER`."""
OTHER = "other"
"""Not the name of a version, which has an ``@``."""
WAIT_SECONDS = 5.0
"""Maximum seconds that a request waits for a write to end, before it looks into the database itself."""
FORGET_SECONDS = 60.0
"""Seconds without a request of a key after which the tokens of its month are not followed any more."""

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """Return the time in UTC."""
    return datetime.now(UTC)


class Meter:
    """One request of a key, from its admission to its end. For the event loop; the ledger reads it from its thread."""

    def __init__(
        self, ledger: "UsageLedger", key: ApiKey, admission: Admission, shared: SharedRequest | None = None
    ) -> None:
        self.key = key
        self.adapter = ""
        self.counted: Tokens | None = None
        """What the ledger has counted of it so far; None if it has not counted the request."""
        self.live = 0
        """Tokens of this month that the ledger has counted of it."""
        self._ledger = ledger
        self._admission = admission
        self._shared = shared
        """None if the request is counted by this server alone."""
        self._read: Callable[[], Tokens] | None = None

    async def enter(self) -> None:
        """Count this on all servers. Call it first. Raises RateLimited, and then this is closed."""
        if self._shared is not None:
            try:
                await self._shared.enter()
            except BaseException:
                self._admission.refused = True
                self.close()
                raise

    async def reserve(self, prompt_tokens: int, answers: int = 0, max_tokens: int | None = 0) -> None:
        """See :meth:`Admission.reserve`. Waits for the database at most, if other servers share it."""
        try:
            estimate = self._admission.reserve(prompt_tokens, answers, max_tokens)
            if self._shared is not None:
                await self._shared.reserve(estimate)
        except RateLimited:
            self._admission.refused = True
            self._ledger.note_refusal(self.key)
            raise

    def begin(self, adapter: str, read: Callable[[], Tokens]) -> None:
        """Count this as a request. ``read`` returns the tokens that were computed so far; any thread may call it."""
        self.adapter, self._read = adapter, read
        self._ledger.begin(self)

    def end(self) -> None:
        """Count what was computed, for good. Idempotent; only what has begun is counted."""
        if self._read is not None:
            used = self._ledger.end(self)
            self._admission.settle(used)
            if self._shared is not None:
                self._shared.settle(used)
            self._read = None

    def close(self) -> None:
        """End it, and let the key's next request run. Idempotent."""
        self.end()
        self._admission.close()
        if self._shared is not None:
            self._shared.close(uncounted=self._admission.refused)

    def progress(self) -> Tokens:
        """Return the tokens that were computed since the ledger has counted them, each at least 0."""
        assert self._read is not None, "it runs"
        before = self.counted or Tokens()
        return Tokens(*(max(now - then, 0) for now, then in zip(self._read(), before, strict=True)))


METER: ContextVar[Meter] = ContextVar("METER")
"""That of the request which is served. Only those that generate have one."""


class UsageLedger:
    """Counts by key, adapter and day, and the limits of keys. A thread writes the counts to ``table``.

    Times are UTC, by ``clock``. ``steady`` never goes backwards, in seconds.
    """

    def __init__(
        self,
        table: UsageTable,
        steady: Callable[[], float],
        clock: Clock = utc_now,
        limits: LimitTable | None = None,
    ) -> None:
        """``limits``: those of all servers; None if there is no other."""
        self.limiter = Limiter(steady, self)
        self.shared = None if limits is None else SharedLimits(limits, self.limiter, steady)
        self.table = table
        self._steady = steady
        self._clock = clock
        self._writer = uuid4().hex
        self._lock = threading.Lock()
        """Held for moments, by the event loop, too."""
        self._running: set[Meter] = set()
        self._counts: dict[Place, Counts] = {}
        """Not in a batch yet."""
        self._batch: Batch = {}
        """What is being written, or could not be."""
        self._number = 1
        """Of the batch."""
        self._month = _month(clock())
        self._spent: dict[str, int] = {}
        """Tokens of this month by key id, for keys with a budget: those in the database, and those not written yet."""
        self._asked: dict[str, float] = {}
        """When each of these keys has last had a request, by the steady clock."""
        self._live: dict[str, int] = {}
        """Tokens of this month of requests that still run, by key id."""
        self._flushing = threading.Lock()
        self._failing = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # Requests

    def prepared(self, key: ApiKey) -> bool:
        """Whether the key's tokens of this month are known, or do not matter. If not, call :meth:`prepare`."""
        if key.limits.tokens_per_month is None:
            return True
        self._asked[key.id] = self._steady()
        return key.id in self._spent and self._month == _month(self._clock())

    def prepare(self, key: ApiKey) -> None:
        """Read the tokens that the key has used this month. Queries the database; raises RegistryUnavailable."""
        with self._no_write():
            with self._lock:
                self._turn_month()
                month = self._month
            found = self.table.month_tokens([key.id], month)
            with self._lock:
                if month == self._month:
                    self._spent[key.id] = found.get(key.id, 0) + self._unwritten(key.id)
                    self._asked[key.id] = self._steady()

    def open(self, key: ApiKey) -> Meter:
        """Admit a request of a key on this server. Raises RateLimited or QuotaUsedUp."""
        try:
            admission = self.limiter.admit(key)
        except RateLimited:
            self.note_refusal(key)
            raise
        return Meter(self, key, admission, None if self.shared is None else self.shared.request(key))

    def note_refusal(self, key: ApiKey) -> None:
        """Remember that a request of a key was refused by what this server knew of the others."""
        if self.shared is not None:
            self.shared.note_refusal(key)

    def spent(self, key: str) -> int:
        """Return the tokens that a key has used this month, without those of requests that run here."""
        with self._lock:
            return self._spent.get(key, 0) - self._live.get(key, 0)

    def month_left(self) -> float:
        """Return the seconds to the end of the month."""
        now = self._clock()
        following = (now.replace(day=1, hour=0, minute=0, second=0, microsecond=0) + timedelta(days=32)).replace(day=1)
        return (following - now).total_seconds()

    def begin(self, meter: Meter) -> None:
        """Count a request from now on."""
        with self._lock:
            self._running.add(meter)

    def end(self, meter: Meter) -> int:
        """Count what a request has computed to its end; return the tokens in all."""
        with self._lock:
            self._running.discard(meter)
            self._count(meter)
            assert meter.counted is not None
            left = self._live.pop(meter.key.id, 0) - meter.live
            if left:
                self._live[meter.key.id] = left
            return meter.counted.prompt + meter.counted.output

    # Writing

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread, and write what is left. If that fails, the log has what is lost."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self.flush()
            self.table.forget(self._writer)
            if self.shared is not None:
                self.shared.close()
        except AdapterError as error:
            with self._lock:
                lost = [*self._batch.items(), *self._counts.items()]
            log.error("Usage could not be written at the end, and is lost: %s (%s)", error, lost)

    def flush(self) -> None:
        """Write all counts so far. Raises RegistryUnavailable or StoreFull; then they are kept."""
        with self._no_write():
            self._flush()

    @contextmanager
    def _no_write(self) -> Iterator[None]:
        """Wait for the end of a write. Raises RegistryUnavailable if that takes too long."""
        if not self._flushing.acquire(timeout=WAIT_SECONDS):
            raise RegistryUnavailable("the registry's database is busy; try again later")
        try:
            yield
        finally:
            self._flushing.release()

    def _run(self) -> None:
        while not self._stop.wait(FLUSH_SECONDS):
            try:
                with self._flushing:
                    self._flush()
                    self._read_months()
            except AdapterError as error:
                if not self._failing:
                    log.error("Usage cannot be written, and is kept in memory until it can: %s", error)
                self._failing = True
            except Exception:
                log.exception("Writing usage failed; will try again")  # the thread must survive
            else:
                if self._failing:
                    log.warning("Usage can be written again")
                self._failing = False

    def _flush(self) -> None:
        """Write the batch that could not be written before, if there is one, then what has come since."""
        if self._batch:
            self._write()
        if self._take():
            self._write()

    def _write(self) -> None:
        self.table.write(self._writer, self._number, self._batch)
        with self._lock:
            self._batch = {}
            self._number += 1

    def _take(self) -> bool:
        """Make a batch of what has come; return whether there is anything."""
        with self._lock:
            for meter in self._running:
                self._count(meter)
            self._batch, self._counts = self._counts, {}
            return bool(self._batch)

    def _read_months(self) -> None:
        """Read what other servers have added to the tokens of keys with a budget."""
        with self._lock:
            self._turn_month()
            self._forget_keys()
            keys, month = list(self._spent), self._month
        if not keys:
            return
        found = self.table.month_tokens(keys, month)
        with self._lock:
            if month == self._month:
                self._spent.update({key: found.get(key, 0) + self._unwritten(key) for key in keys})

    # With the lock held

    def _count(self, meter: Meter) -> None:
        """Add what a request has computed since it was last counted."""
        new = meter.progress()
        first = meter.counted is None
        if not first and not any(new):
            return
        meter.counted = Tokens(*map(sum, zip(meter.counted or Tokens(), new, strict=True)))
        key = meter.key.id
        place = Place(key, meter.adapter, self._clock().date())
        if place not in self._counts and len(self._counts) >= MAX_PLACES:
            place = place._replace(adapter=OTHER)
        self._counts.setdefault(place, Counts()).add(int(first), new)
        if _month(self._clock()) == self._month:
            tokens = new.prompt + new.output
            meter.live += tokens
            self._live[key] = self._live.get(key, 0) + tokens
            if key in self._spent:
                self._spent[key] += tokens

    def _unwritten(self, key: str) -> int:
        """Return the tokens of this month that are not in the database yet. Nothing is being written meanwhile."""
        counts = [*self._counts.items(), *self._batch.items()]
        return sum(each.tokens for place, each in counts if place.key == key and place.day >= self._month)

    def _turn_month(self) -> None:
        """At the beginning of a month, nothing is spent."""
        month = _month(self._clock())
        if month != self._month:
            self._month = month
            self._spent = dict.fromkeys(self._spent, 0)
            self._live.clear()
            for meter in self._running:
                meter.live = 0

    def _forget_keys(self) -> None:
        """Forget what keys have spent that have not asked for a while: their next request reads it again."""
        now = self._steady()
        for key in [key for key, asked in list(self._asked.items()) if now - asked > FORGET_SECONDS]:
            del self._asked[key]
            self._spent.pop(key, None)


def _month(moment: datetime) -> date:
    """Return the first day of the month."""
    return moment.date().replace(day=1)
