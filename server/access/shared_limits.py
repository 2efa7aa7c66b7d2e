"""SharedLimits: holds keys to their limits on all servers that share a database.

In any ``t`` seconds all servers together admit what a single one would in ``t`` and
:data:`~server.access.key_share.AHEAD_SECONDS`. What a request needs is taken from the database, for all requests of a
moment in one transaction. A busy key, with :data:`~server.access.key_share.BUSY` requests in a second, gets ahead what
it has used in that, so that most of its requests wait for nothing. What is not used of that in time is lost, and comes
back as the bucket refills; the last half of a bucket is never taken ahead.

Parallel requests never exceed their limit. The database hears of those that have ended every half second, or at once if
half of the limit is in use. A request asks again before it is refused because of those of other servers.

While the database does not answer, each server counts by itself, with the :class:`~server.access.limits.Limiter` that
every request passes first.

For one event loop; only the transactions run on other threads.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from uuid import uuid4

from adapters.errors import AdapterError
from server.access.key import ApiKey
from server.access.key_share import KeyShare, Waiting
from server.access.limit_table import HOLD_SECONDS, Answer, Ask, LimitTable, Refusal, Want
from server.access.limits import Limiter

_log = logging.getLogger(__name__)

EXCHANGE_SECONDS = 0.5
"""Seconds between two exchanges with the database, while there is anything to tell it that does not hurry."""
WAIT_SECONDS = 1.0
"""Seconds that a request waits for the database, before this server counts by itself."""
SILENT_SECONDS = 2.0
"""Seconds without an exchange after one that has failed, so that requests do not wait for it."""
AGAIN_SECONDS = (0.1, EXCHANGE_SECONDS)
"""When a request asks again for a place that others have: they may not have told yet that it is free."""


class SharedLimits:
    """The shares of this server in the limits of keys. ``steady`` returns seconds, and never goes backwards."""

    def __init__(self, table: LimitTable, limiter: Limiter, steady: Callable[[], float]) -> None:
        self._table = table
        self._limiter = limiter
        self._steady = steady
        self._server = uuid4().hex
        self._shares: dict[str, KeyShare] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._renewed = 0.0
        self._silent_until = 0.0
        """Until then the database is not waited for."""
        self._failing = False

    def __len__(self) -> int:
        """Return the number of keys of which this server has a share."""
        return len(self._shares)

    def request(self, key: ApiKey) -> "SharedRequest | None":
        """Return a new request of a key; None if nothing that it is limited in is shared here."""
        limits = key.limits
        if limits.requests_per_minute is limits.tokens_per_minute is limits.parallel_requests is None:
            return None
        share = self._shares.setdefault(key.id, KeyShare(key))
        share.key = key
        return SharedRequest(self, share)

    def close(self) -> None:
        """Give back what can be given back. Call it when no request is left; if it fails, the places expire."""
        with suppress(AdapterError):
            self._table.leave(self._server)

    def now(self) -> float:
        """Return the time in seconds."""
        return self._steady()

    def hurry(self, *, urgent: bool) -> None:
        """Exchange with the database: at once if ``urgent``, or within :data:`EXCHANGE_SECONDS`."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())
        if urgent:
            self._wake.set()

    def note_refusal(self, key: ApiKey) -> None:
        """Look soon whether other servers have given something back: this one has refused a request by what it knew."""
        if (share := self._shares.get(key.id)) is not None:
            share.refused = True
            self.hurry(urgent=False)

    async def take(self, share: KeyShare, want: Want) -> bool:
        """Take from the database what a request needs; return False if it does not answer. Raises RateLimited."""
        share.asking += 1
        try:
            decided = await self._decide(share, want)
            for seconds in AGAIN_SECONDS:
                if isinstance(decided, bool) or decided.limit != "parallel_requests" or not share.others:
                    break
                await asyncio.sleep(seconds)
                decided = await self._decide(share, want)
        finally:
            share.asking -= 1
        if isinstance(decided, bool):
            return decided
        self.note_refusal(share.key)
        if decided.limit == "parallel_requests":
            raise self._limiter.too_many(share.key, int(decided.there))
        raise self._limiter.too_fast(share.key, decided.limit, decided.there, decided.needed, decided.wait)

    async def _decide(self, share: KeyShare, want: Want) -> Refusal | bool:
        """Wait for the database's decision; False if it does not answer."""
        if self.now() < self._silent_until:
            return False
        waiting = Waiting(want, asyncio.get_running_loop().create_future())
        share.waiting.append(waiting)
        self.hurry(urgent=True)
        try:
            await asyncio.wait((waiting.decided,), timeout=WAIT_SECONDS)
        except asyncio.CancelledError:
            share.abandon(waiting)
            raise
        if waiting.decided.done():
            return waiting.decided.result()
        share.abandon(waiting)
        self._fail(f"the registry's database has not answered for {WAIT_SECONDS:g} s")
        return False

    async def _run(self) -> None:
        """Exchange until this server has no share of any key."""
        due = self.now() + EXCHANGE_SECONDS
        while self._shares:
            with suppress(TimeoutError):
                async with asyncio.timeout(max(due - self.now(), 0)):
                    await self._wake.wait()
            self._wake.clear()
            regular = self.now() >= due
            shares = [
                each for each in self._shares.values() if each.waiting or each.tight or (regular and each.pending)
            ]
            await self._exchange(shares, free=regular)
            if regular:
                now = self.now()
                due = now + EXCHANGE_SECONDS
                self._shares = {id_: share for id_, share in self._shares.items() if not share.over(now)}
        self._task = None

    async def _exchange(self, shares: list[KeyShare], *, free: bool) -> None:
        """Tell the database of these keys, and give what it answers to those that wait."""
        now = self.now()
        holding = [each for each in self._shares.values() if each.claimed]
        renew = bool(holding) and now - self._renewed > HOLD_SECONDS / 3
        if now < self._silent_until or not (shares or renew):
            return
        asked = [share.ask(now, free=free) for share in shares]
        try:
            answers, kept = await asyncio.to_thread(self._transact, [ask for ask, _ in asked], renew)
        except AdapterError as error:
            self._fail(str(error))
        except Exception:
            _log.exception("Limits could not be exchanged with the database")  # those that wait must go on
            self._fail("see above")
        else:
            self._answered(lost=renew and kept < len(holding))
            for share, (_, waiting), answer in zip(shares, asked, answers, strict=True):
                self._limiter.adopt(share.key.id, *share.apply(answer, waiting, self.now()))
            return
        for _, waiting in asked:
            for each in waiting:
                if not each.decided.done():
                    each.decided.set_result(False)

    def _transact(self, asks: list[Ask], renew: bool) -> tuple[list[Answer], int]:
        """Exchange on another thread. Returns also of how many keys the parallel requests were renewed."""
        kept = self._table.renew(self._server) if renew else 0
        if renew:
            self._renewed = self.now()
        return (self._table.exchange(self._server, asks) if asks else []), kept

    def _fail(self, reason: str) -> None:
        """Count alone for a while."""
        if not self._failing:
            _log.error("Limits of keys are counted by this server alone: %s", reason)
        self._failing = True
        self._silent_until = self.now() + SILENT_SECONDS

    def _answered(self, *, lost: bool) -> None:
        """Count together again. ``lost``: this server was silent for so long that others took it for dead."""
        if self._failing:
            _log.warning("Limits of keys are counted by all servers together again")
        if self._failing or lost:
            for share in self._shares.values():
                share.refused = True  # so that the database hears of all that this server has
        self._failing = False


class SharedRequest:
    """One request of a key. Close it in all cases; closing it twice does no harm."""

    def __init__(self, shared: SharedLimits, share: KeyShare) -> None:
        self._shared = shared
        self._share = share
        self._requests = 0
        """Taken from the shared limit."""
        self._tokens = 0.0
        """The same."""
        self._inside = False
        self._settled = False

    async def enter(self) -> None:
        """Take the request itself, and a place among the parallel ones. Raises RateLimited."""
        share, limits = self._share, self._share.limits
        counted = limits.requests_per_minute is not None
        missing = counted and share.requests.draw(1, self._shared.now()) > 0
        wanting = limits.parallel_requests is not None and share.running >= share.claimed
        share.running += not wanting
        answered = True
        if missing or wanting:
            try:
                answered = await self._shared.take(share, Want(requests=int(missing), place=wanting))
            except BaseException:
                share.running -= not wanting
                share.requests.unused += counted and not missing
                raise
            share.running += wanting and not answered  # else its place was counted with the answer
        self._inside = True
        self._requests = int(counted and (answered or not missing))

    async def reserve(self, estimate: int) -> None:
        """Take the estimated tokens. Raises RateLimited."""
        capacity, tokens = self._share.limits.tokens_per_minute, self._share.tokens
        if capacity is None:
            return
        missing = tokens.draw(estimate, self._shared.now())
        found = self._tokens = estimate - missing
        if missing:
            least = max(min(estimate, capacity) - found, 0)
            if await self._shared.take(self._share, Want(tokens=missing, least=least)):
                self._tokens = estimate

    def settle(self, used: int) -> None:
        """Replace what was taken by what was used. Only the first call counts."""
        if not self._settled:
            self._settled = True
            if self._share.limits.tokens_per_minute is not None and self._tokens != used:
                self._share.tokens.unused += self._tokens - used
                self._shared.hurry(urgent=False)

    def close(self, *, uncounted: bool) -> None:
        """Let the key's next request run; ``uncounted``: as if this had never been admitted."""
        if self._inside:
            self._inside = False
            self.settle(0)
            self._share.running -= 1
            self._share.requests.unused += self._requests * uncounted
            self._shared.hurry(urgent=self._share.tight)
