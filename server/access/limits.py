"""Limits of keys: requests and tokens in a minute, requests at once, tokens in a month.

Counted here is what this server admits. Servers that share a database also ask that for what they admit together: for
requests and tokens in a minute and requests at once see :mod:`server.access.shared_limits`, for the tokens of a month
:mod:`server.access.usage`.

A minute is a bucket, as at OpenAI: full at first, refilled evenly, so that after a pause a key may use a whole minute's
amount at once, and in any ``t`` seconds at most ``limit * (1 + t / 60)``.

The tokens of a request are known when it has ended. At its admission an estimate is taken: its prompt and, for each
answer, ``max_tokens``, or :data:`UNSTATED_ANSWER` if it does not say. The difference is settled when it ends. An
estimate above the limit needs a full bucket and no more, so that it is not refused for ever; what it takes beyond is a
debt, which delays the requests that follow. Only a prompt that is longer than the limit is refused for good.

Nothing here waits, looks at a clock of its own, or is safe to use from several threads.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, get_args

from server.access.key import ApiKey, KeyLimits
from server.errors import QuotaUsedUp, RateLimited

LimitName = Literal["requests_per_minute", "tokens_per_minute", "parallel_requests", "tokens_per_month"]
"""As in :class:`~server.access.key.KeyLimits`."""
PerMinute = Literal["requests_per_minute", "tokens_per_minute"]
_SHOWN: Mapping[PerMinute, str] = {
    "requests_per_minute": "requests per min (RPM)",
    "tokens_per_minute": "tokens per min (TPM)",
}
MINUTE = 60.0
UNSTATED_ANSWER = 256
"""Tokens estimated for an answer without ``max_tokens``. Most are shorter than the rest of the context, by far."""
ROUNDING = 1e-6
"""Units that may be missing: after the wait that a bucket asked for, rounding must not ask for another."""
BUSY_SECONDS = 1.0
"""When to try again if that depends on the end of other requests."""


class Bucket:
    """``capacity`` units a minute, of which up to ``capacity`` can be used at once. Times are seconds of any clock."""

    def __init__(self, capacity: int, now: float, used: float = 0.0) -> None:
        self.capacity = capacity
        self._level = capacity - used
        """Units at ``_updated``. Below 0: more was used than there was."""
        self._updated = now

    def level(self, now: float) -> float:
        """Return how many units there are. A clock that goes backwards adds none."""
        since = max(now - self._updated, 0.0)
        return min(self._level + since * self.capacity / MINUTE, float(self.capacity))

    def take(self, units: float, now: float) -> None:
        """Use ``units``, also those that are not there; give them back if negative, up to the capacity."""
        self._level = min(self.level(now) - units, float(self.capacity))
        self._updated = max(now, self._updated)

    def wait(self, units: float, now: float) -> float:
        """Return the seconds until there are ``units``, 0 if there are. ``units``: at most the capacity."""
        missing = units - self.level(now)
        return missing * MINUTE / self.capacity if missing > ROUNDING else 0.0

    def adopt(self, level: float, now: float) -> None:
        """Take over how many units there are from somebody who knows better."""
        self._level = min(level, float(self.capacity))
        self._updated = max(now, self._updated)

    def resize(self, capacity: int, now: float) -> None:
        """Change the capacity. What was used stays used."""
        used = self.capacity - self.level(now)
        self.capacity, self._level, self._updated = capacity, capacity - used, max(now, self._updated)


@dataclass(slots=True)
class KeyState:
    """What a key has used, and what its running requests may still use."""

    limits: KeyLimits
    requests: Bucket | None
    tokens: Bucket | None
    running: int = 0
    reserved: int = 0
    """Estimated tokens of the running requests."""

    def adapt(self, limits: KeyLimits, now: float) -> None:
        """Take over the limits of the key, which may have changed."""
        if limits == self.limits:
            return
        self.limits = limits
        self.requests = _resized(self.requests, limits.requests_per_minute, now)
        self.tokens = _resized(self.tokens, limits.tokens_per_minute, now)

    def idle(self, now: float) -> bool:
        """Whether a new state would be the same."""
        full = all(bucket is None or bucket.wait(bucket.capacity, now) == 0 for bucket in (self.requests, self.tokens))
        return full and not self.running


class Budget(Protocol):
    """Where the tokens of a month are counted."""

    def spent(self, key: str) -> int:
        """Return the tokens that a key (by id) has used this month, without those of requests that run here."""
        ...

    def month_left(self) -> float:
        """Return the seconds to the end of the month."""
        ...


Refusal = TypeVar("Refusal", bound=RateLimited)


class Limiter:
    """The state of all limited keys. ``clock`` returns seconds, and never goes backwards."""

    def __init__(self, clock: Callable[[], float], budget: Budget) -> None:
        self._clock = clock
        self._budget = budget
        self._states: dict[str, KeyState] = {}
        self.refused: dict[LimitName, int] = dict.fromkeys(get_args(LimitName), 0)
        """How many requests each limit has refused."""

    def __len__(self) -> int:
        """Return the number of keys whose use is remembered."""
        return len(self._states)

    def admit(self, key: ApiKey) -> "Admission":
        """Count a new request of ``key``. Raises RateLimited or QuotaUsedUp, and then counts nothing."""
        now = self._clock()
        state = self._state(key, now)
        self._check_budget(key, 0)
        parallel = key.limits.parallel_requests
        if parallel is not None and state.running >= parallel:
            raise self.too_many(key, state.running)
        if state.requests is not None:
            if wait := state.requests.wait(1, now):
                raise self.too_fast(key, "requests_per_minute", state.requests.level(now), 1, wait)
            state.requests.take(1, now)
        state.running += 1
        return Admission(self, key, state)

    def reserve(self, key: ApiKey, state: KeyState, prompt: int, estimate: int) -> None:
        """Take the estimate of a request, ``prompt`` of it being its prompt's tokens.

        Raises RateLimited or QuotaUsedUp, and then takes nothing.
        """
        now, tokens = self._clock(), state.tokens
        if tokens is not None and prompt > tokens.capacity:
            refusal = RateLimited(
                f"Request too large for the key `{key.name}` on tokens per min (TPM): limit {tokens.capacity}, "
                f"requested {prompt} in the prompt. It must be shorter to be served.",
                None,
            )
            raise self._counted("tokens_per_minute", refusal)
        self._check_budget(key, state.reserved)
        if tokens is not None:
            needed = min(estimate, tokens.capacity)
            if wait := tokens.wait(needed, now):
                raise self.too_fast(key, "tokens_per_minute", tokens.level(now), needed, wait)
            tokens.take(estimate, now)
        state.reserved += estimate

    def too_many(self, key: ApiKey, running: int) -> RateLimited:
        """Return the refusal of a request of a key that has too many at once, and count it."""
        message = (
            f"Rate limit reached for the key `{key.name}` on parallel requests: limit {key.limits.parallel_requests}, "
            f"running {running}. Please try again when one has ended."
        )
        return self._counted("parallel_requests", RateLimited(message, BUSY_SECONDS))

    def too_fast(self, key: ApiKey, limit: PerMinute, level: float, needed: float, wait: float) -> RateLimited:
        """Return the refusal of a request that needs more than the ``level`` of a bucket, and count it."""
        capacity = getattr(key.limits, limit)
        message = (
            f"Rate limit reached for the key `{key.name}` on {_SHOWN[limit]}: limit {capacity}, used "
            f"{capacity - math.floor(level + ROUNDING)}, requested {needed:.0f}. Please try again in {duration(wait)}."
        )
        return self._counted(limit, RateLimited(message, wait))

    def adopt(self, key: str, requests: float | None, tokens: float | None) -> None:
        """Take over the levels that a key (by id) has on all servers together. None: as it is."""
        state, now = self._states.get(key), self._clock()
        if state is None:
            return
        for bucket, level in ((state.requests, requests), (state.tokens, tokens)):
            if bucket is not None and level is not None:
                bucket.adopt(level, now)

    def headers(self, key: ApiKey) -> Mapping[str, str]:
        """Return OpenAI's ``x-ratelimit-*`` headers of a key; none for what is not limited."""
        now = self._clock()
        state = self._states.get(key.id) or _new_state(key.limits, now)
        state.adapt(key.limits, now)
        found: dict[str, str] = {}
        for name, bucket in (("requests", state.requests), ("tokens", state.tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = str(bucket.capacity)
                found[f"x-ratelimit-remaining-{name}"] = str(max(math.floor(bucket.level(now) + ROUNDING), 0))
                found[f"x-ratelimit-reset-{name}"] = duration(bucket.wait(bucket.capacity, now))
        return found

    def settle(self, state: KeyState, estimate: int, used: int) -> None:
        """Replace an estimate by what was used."""
        state.reserved -= estimate
        if state.tokens is not None:
            state.tokens.take(used - estimate, self._clock())

    def end(self, state: KeyState, *, uncounted: bool) -> None:
        """End a request; ``uncounted``: as if it had never been admitted."""
        state.running -= 1
        if uncounted and state.requests is not None:
            state.requests.take(-1, self._clock())

    def _check_budget(self, key: ApiKey, reserved: int) -> None:
        """Raise QuotaUsedUp if no token of the month is left, and RateLimited if running requests may use all."""
        budget = key.limits.tokens_per_month
        if budget is None:
            return
        spent = self._budget.spent(key.id)
        if spent >= budget:
            message = f"The key `{key.name}` has used up its tokens of this month (UTC): {spent} of {budget}."
            raise self._counted("tokens_per_month", QuotaUsedUp(message, self._budget.month_left()))
        if spent + reserved >= budget:
            refusal = RateLimited(
                f"Rate limit reached for the key `{key.name}` on tokens per month: limit {budget}, used {spent}, "
                f"reserved by running requests {reserved}. Please try again when one has ended.",
                BUSY_SECONDS,
            )
            raise self._counted("tokens_per_month", refusal)

    def _counted(self, limit: LimitName, refusal: Refusal) -> Refusal:
        """Count a refusal, which is about to be raised."""
        self.refused[limit] += 1
        return refusal

    def _state(self, key: ApiKey, now: float) -> KeyState:
        state = self._states.get(key.id)
        if state is None:
            # Keys come and go: forget those whose state says nothing.
            for id_ in [id_ for id_, each in self._states.items() if each.idle(now)]:
                del self._states[id_]
            state = self._states[key.id] = _new_state(key.limits, now)
        state.adapt(key.limits, now)
        return state


class Admission:
    """One admitted request of a key. Close it in all cases; closing it twice does no harm."""

    def __init__(self, limiter: Limiter, key: ApiKey, state: KeyState) -> None:
        self._limiter = limiter
        self._key = key
        self._state = state
        self._estimate = 0
        self.refused = False
        """Whether the request counts for nothing."""
        self._settled = False
        self._closed = False

    def reserve(self, prompt_tokens: int, answers: int, max_tokens: int | None) -> int:
        """Take the estimate of a request with this many answers of up to ``max_tokens`` each, and return it.

        Call it once at most. Raises RateLimited or QuotaUsedUp; then the request counts for nothing.
        """
        estimate = prompt_tokens + answers * (UNSTATED_ANSWER if max_tokens is None else max_tokens)
        try:
            self._limiter.reserve(self._key, self._state, prompt_tokens, estimate)
        except RateLimited:
            self.refused = True
            raise
        self._estimate = estimate
        return estimate

    def settle(self, used: int) -> None:
        """Say how many tokens the request has used, when it has ended. Only the first call counts."""
        if not self._settled:
            self._settled = True
            self._limiter.settle(self._state, self._estimate, used)

    def close(self) -> None:
        """Let the next request run. A request that was never settled has used nothing."""
        if not self._closed:
            self._closed = True
            self.settle(0)
            self._limiter.end(self._state, uncounted=self.refused)


def duration(seconds: float) -> str:
    """Format seconds as OpenAI's headers do: ``6m0s``, ``8.64s``, ``120ms``. Rounded up to milliseconds."""
    milliseconds = math.ceil(round(seconds * 1000, 6))
    if milliseconds == 0:
        return "0s"
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    larger = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{larger}{rest / 1000:g}s"


def limited(limits: KeyLimits) -> bool:
    """Whether there is any limit."""
    return limits != KeyLimits()


def _new_state(limits: KeyLimits, now: float) -> KeyState:
    return KeyState(
        limits, _resized(None, limits.requests_per_minute, now), _resized(None, limits.tokens_per_minute, now)
    )


def _resized(bucket: Bucket | None, capacity: int | None, now: float) -> Bucket | None:
    if capacity is None:
        return None
    if bucket is None:
        return Bucket(capacity, now)
    bucket.resize(capacity, now)
    return bucket
