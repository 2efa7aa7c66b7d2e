"""KeyShare: what one server has of the limits of a key that several servers share."""

import asyncio
from dataclasses import dataclass, field

from server.access.key import ApiKey, KeyLimits
from server.access.limit_table import Answer, Ask, Refusal, Want

AHEAD_SECONDS = 3.0
"""How long what was taken ahead can be used."""
BUSY = 8
"""Requests in a second from which on a server takes ahead. With fewer it would lose as much as it would save."""


@dataclass(slots=True)
class Supply:
    """Units of one limit that this server has taken and not used."""

    ahead: float = 0.0
    until: float = 0.0
    """When ``ahead`` is lost."""
    unused: float = 0.0
    """To be given back; less than 0: to be taken, because more was used."""
    _since: float = 0.0
    _spent: float = 0.0
    """In the second from ``_since`` on."""
    _draws: int = 0
    """How often, in that second."""
    _before: float = 0.0
    """In the second before; 0 if it was not often."""

    def draw(self, units: float, now: float) -> float:
        """Use up to ``units`` of what was taken ahead; return how many are missing."""
        self._turn(now)
        self._spent += units
        self._draws += 1
        found = min(units, self.left(now))
        self.ahead -= found
        return units - found

    def left(self, now: float) -> float:
        """Return what is left of what was taken ahead."""
        return self.ahead if now < self.until else 0.0

    def recent(self, now: float) -> float:
        """Return what a busy key has used in the last whole second; 0 if it is not busy.

        A burst that has just begun says nothing of what follows.
        """
        self._turn(now)
        return self._before

    def fill(self, ahead: float, now: float) -> None:
        """Add what was taken ahead."""
        if ahead:
            self.ahead, self.until = self.left(now) + ahead, now + AHEAD_SECONDS

    def _turn(self, now: float) -> None:
        if (passed := now - self._since) >= 1:
            self._before = self._spent if passed < 2 and self._draws >= BUSY else 0.0
            self._since, self._spent, self._draws = now, 0.0, 0


@dataclass(slots=True, eq=False)
class Waiting:
    """A want of a request that waits for the database."""

    want: Want
    decided: "asyncio.Future[Refusal | bool]"
    """True: it has got what it needs. False: the database does not answer."""


@dataclass(slots=True)
class KeyShare:
    """What this server has of the limits of a key."""

    key: ApiKey
    requests: Supply = field(default_factory=Supply)
    tokens: Supply = field(default_factory=Supply)
    running: int = 0
    """Its parallel requests here."""
    claimed: int = 0
    """Those that this server may have, by the database."""
    others: int = 0
    """Those that other servers might have, when this one has last asked."""
    refused: bool = False
    """Whether a request was refused since: others may have given something back."""
    waiting: list[Waiting] = field(default_factory=list)
    asking: int = 0
    """Requests that wait for the database, or to ask it again."""

    @property
    def limits(self) -> KeyLimits:
        """The key's."""
        return self.key.limits

    @property
    def used_places(self) -> int:
        """Parallel requests here that are limited."""
        return 0 if self.limits.parallel_requests is None else self.running

    @property
    def tight(self) -> bool:
        """Whether other servers might want what is free here."""
        limit = self.limits.parallel_requests
        return limit is not None and self.claimed > self.running and 2 * (self.claimed + self.others) >= limit

    @property
    def pending(self) -> bool:
        """Whether there is something that the database should know, or that this server should."""
        unused = self.requests.unused or self.tokens.unused
        return bool(self.waiting or unused) or self.refused or self.claimed != self.used_places

    def over(self, now: float) -> bool:
        """Whether nothing is left to remember."""
        ahead = self.requests.left(now) or self.tokens.left(now)
        return not (self.running or self.asking or self.pending or ahead)

    def ask(self, now: float, *, free: bool) -> tuple[Ask, list[Waiting]]:
        """Return what to ask the database, and who waits for it. ``free``: give up the places that are not in use."""
        had = self.claimed
        if free or self.tight:
            self.claimed = self.used_places
        waiting, self.waiting, self.refused = self.waiting, [], False
        unused = self.requests.unused, self.tokens.unused
        self.requests.unused = self.tokens.unused = 0.0
        recent = self.requests.recent(now), self.tokens.recent(now)
        places = None if self.limits.parallel_requests is None and not had else max(self.claimed, self.used_places)
        return Ask(self.key.id, self.limits, [each.want for each in waiting], *unused, places, *recent), waiting

    def apply(self, answer: Answer, waiting: list[Waiting], now: float) -> tuple[float | None, float | None]:
        """Take over an answer; return the levels that the buckets of the limiter should have."""
        self.claimed, self.others = answer.claimed, answer.others
        self.requests.fill(answer.ahead_requests, now)
        self.tokens.fill(answer.ahead_tokens, now)
        # The limiter has counted these, too: those that ask meanwhile, and those that it will give back.
        counted = [each.want for each in self.waiting]
        for each, refusal in zip(waiting, answer.refusals, strict=True):
            if refusal is not None:
                counted.append(each.want)
            elif each.decided.cancelled():
                self.undo(each.want)
            else:
                self.running += each.want.place
            if not each.decided.cancelled():
                each.decided.set_result(True if refusal is None else refusal)
        requests, tokens = answer.requests, answer.tokens
        if requests is not None:
            requests += self.requests.left(now) + self.requests.unused - sum(want.requests for want in counted)
        if tokens is not None:
            tokens += self.tokens.left(now) + self.tokens.unused - sum(want.tokens for want in counted)
        return requests, tokens

    def undo(self, want: Want) -> None:
        """Give back what a request has got that will not use it, without its place."""
        self.requests.unused += want.requests
        self.tokens.unused += want.tokens

    def abandon(self, waiting: Waiting) -> None:
        """Forget a want whose request does not wait any more."""
        if waiting in self.waiting:
            self.waiting.remove(waiting)
        elif not waiting.decided.done():
            waiting.decided.cancel()
        elif waiting.decided.result() is True:
            self.running -= waiting.want.place
            self.undo(waiting.want)
