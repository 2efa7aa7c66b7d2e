"""FairQueue: the waiting sequences, and whose turn it is: a virtual token counter.

After Y. Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), Algorithm 2, with weights. Each tenant
has a counter of what it was served, divided by its weight, and the next sequence is one of the waiting tenant with the
least counter. A tenant of which nothing waited is lifted to the least counter of those that wait, or that of the last
one that did: nobody saves up service. Within a tenant, the same holds for its adaptations: each is a flow.

Within a flow, sequences that were preempted come first, then those that are due first: a point of priority is worth a
second of waiting. Between the flows of a tenant, priority comes before the counters, but a sequence that has waited for
as many seconds as its priority is behind the most urgent one's counts as urgent, too. So none starves.

Unlike in the paper, a prompt is computed in chunks, and charged chunk by chunk. Tokens found in the prefix cache, and
those computed again after a preemption, are free.
"""

from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, KeysView
from itertools import chain, count
from math import inf
from typing import Generic, TypeVar

from adapters.format.spec import AdapterId
from server.engine.sequence import Adaptation, Sequence

PROMPT_TOKEN = 1.0
"""Charge for a token of a prompt, w_p in the paper."""
ANSWER_TOKEN = 2.0
"""Charge for a token of an answer, w_q in the paper."""
MIN_ACCOUNTS = 64
"""Accounts that are kept without a look at which of them matter."""

Rank = tuple[float, ...]


class Account:
    """What a tenant, or a flow of it, was served."""

    def __init__(self) -> None:
        self.counter = 0.0
        self.unfinished = 0
        """Its sequences that have not ended."""


K = TypeVar("K", bound=Hashable)
A = TypeVar("A", bound=Account)


class Accounts(Generic[K, A]):
    """Those who share the server, or a tenant's part of it. ``make`` makes the account of a new one."""

    def __init__(self, make: Callable[[K], A]) -> None:
        self.waiting: dict[K, A] = {}
        """Those of which something waits."""
        self._make = make
        self._all: dict[K, A] = {}
        self._last: Account = Account()
        """The last one of which nothing waits any more."""
        self._limit = MIN_ACCOUNTS

    def enter(self, key: K, *, lift: bool) -> A:
        """Return an account of which something waits from now on; ``lift`` its counter if nothing did."""
        account = self.waiting.get(key)
        if account is None:
            account = self._all.get(key) or self._make(key)
            account.counter = max(account.counter, self._floor if lift else 0.0)
            self._all[key] = self.waiting[key] = account
            self._prune()
        return account

    def leave(self, key: K) -> None:
        """Note that nothing waits any more of an account."""
        self._last = self.waiting.pop(key)

    @property
    def _floor(self) -> float:
        return min((account.counter for account in self.waiting.values()), default=self._last.counter)

    def _prune(self) -> None:
        """Forget accounts that would be the same if they were new: idle ones that would be lifted anyway."""
        if len(self._all) > self._limit:
            floor = self._floor
            kept = (a for a in self._all.items() if a[0] in self.waiting or a[1].unfinished or a[1].counter > floor)
            self._all = dict(kept)
            self._limit = max(2 * len(self._all), MIN_ACCOUNTS)


class Flow(Account):
    """A tenant's sequences of one adaptation."""

    def __init__(self, tenant: "Tenant", adaptation: Adaptation) -> None:
        super().__init__()
        self.tenant = tenant
        self.adaptation = adaptation
        self.adapters = frozenset(adapter.id for adapter in adaptation)
        self.waiting: list[Sequence] = []
        self.turn = 0
        """Who began to wait first comes first if all else is equal."""

    @property
    def head(self) -> Sequence:
        """The next one of the waiting sequences."""
        return self.waiting[0]

    @property
    def ripe_at(self) -> float:
        """When its head has waited for as long as its priority is behind the most urgent one of the tenant."""
        return self.head.due - self.tenant.urgent

    def place(self, now: float) -> Rank:
        """The lower, the earlier is its head's turn among the tenant's. Time changes it only at :attr:`ripe_at`."""
        head = self.waiting[0]
        due = head.due
        ripe = due - self.tenant.urgent <= now
        return not head.preemptions, -inf if ripe else due, self.counter, due, self.turn

    def rank(self, now: float) -> Rank:
        """The lower, the earlier is its head's turn."""
        return *self.tenant.place, *self.place(now)


class Tenant(Account):
    """Who shares the server with others: an API key, or all requests without one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = 1.0
        self.turn = 0
        """Who began to wait last comes first if counters are equal: it was lifted to that of the others."""
        self.flows: Accounts[Adaptation, Flow] = Accounts(lambda adaptation: Flow(self, adaptation))
        self.priorities: Counter[int] = Counter()
        """Waiting sequences by priority."""
        self.urgent = 0
        """The least priority of those that wait."""

    @property
    def place(self) -> Rank:
        """The lower, the earlier is its turn."""
        return self.counter, self.turn

    def count(self, priority: int, change: int) -> bool:
        """Count a sequence that waits, or one that does not any more. Returns whether ``urgent`` is another one now."""
        self.priorities[priority] += change
        if not self.priorities[priority]:
            del self.priorities[priority]
        before, self.urgent = self.urgent, min(self.priorities, default=0)
        return self.urgent != before


class FairQueue:
    """The waiting sequences, and the accounts of all unfinished ones. Probes are not charged, and come first."""

    def __init__(self) -> None:
        self.probes: deque[Sequence] = deque()
        """Waiting probes, in order."""
        self.users: dict[AdapterId, set[Flow]] = {}
        """Adapter -> the waiting flows that use it."""
        self._adapters: frozenset[AdapterId] | None = None
        """The keys of ``users``; None if they have changed."""
        self._tenants: Accounts[str, Tenant] = Accounts(lambda _: Tenant())
        self._flow_of: dict[Sequence, Flow] = {}
        """Of each unfinished sequence."""
        self._waiting = 0
        self._turns = count()
        self._changed: set[Flow] = set()
        self._charged: tuple[set[Tenant], set[Flow]] = (set(), set())

    def __len__(self) -> int:
        return self._waiting + len(self.probes)

    def __iter__(self) -> Iterator[Sequence]:
        """Iterate over all that wait: probes, then flow by flow."""
        flows = (flow for tenant in self._tenants.waiting.values() for flow in tenant.flows.waiting.values())
        return chain(self.probes, (sequence for flow in flows for sequence in flow.waiting))

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence, or one that was preempted."""
        if sequence.probe:
            self.probes.append(sequence)
            return
        waited = sequence.tenant in self._tenants.waiting
        lift = not sequence.preemptions  # else it did not come back, but was made to wait
        tenant = self._tenants.enter(sequence.tenant, lift=lift)
        if not waited:
            tenant.turn = -next(self._turns)
        tenant.weight = sequence.weight
        flow = tenant.flows.enter(sequence.adaptation, lift=lift)
        if sequence not in self._flow_of:
            self._flow_of[sequence] = flow
            flow.unfinished += 1
            tenant.unfinished += 1
        if not flow.waiting:
            flow.turn = next(self._turns)
            for adapter in flow.adapters:
                self.users.setdefault(adapter, set()).add(flow)
            self._adapters = None
        insort(flow.waiting, sequence, key=_turn)
        self._waiting += 1
        self._note(flow, sequence.priority, 1)

    def remove(self, sequence: Sequence) -> None:
        """Take a waiting sequence out, because it starts or ends."""
        if sequence.probe:
            self.probes.remove(sequence)
            return
        flow = self._flow_of[sequence]
        flow.waiting.remove(sequence)
        self._waiting -= 1
        self._note(flow, sequence.priority, -1)
        if not flow.waiting:
            for adapter in flow.adapters:
                self.users[adapter].discard(flow)
                if not self.users[adapter]:
                    del self.users[adapter]
            self._adapters = None
            flow.tenant.flows.leave(sequence.adaptation)
            if not flow.tenant.flows.waiting:
                self._tenants.leave(sequence.tenant)

    def _note(self, flow: Flow, priority: int, change: int) -> None:
        """Note that a sequence of a flow waits, or does not any more."""
        self._changed.add(flow)
        if flow.tenant.count(priority, change):
            self._changed.update(flow.tenant.flows.waiting.values())

    def take_changed(self) -> set[Flow]:
        """Return the flows whose sequences or ranks, but for their counters, have changed since the last call."""
        changed, self._changed = self._changed, set()
        return changed

    def take_charged(self) -> tuple[set[Tenant], set[Flow]]:
        """Return the tenants and flows of which something waited when they were charged since the last call."""
        charged, self._charged = self._charged, (set(), set())
        return charged

    def forget(self, sequence: Sequence) -> None:
        """Close the account of a sequence that has ended."""
        flow = self._flow_of.pop(sequence, None)
        if flow is not None:
            flow.unfinished -= 1
            flow.tenant.unfinished -= 1

    def is_waiting(self, sequence: Sequence) -> bool:
        """Whether a sequence waits."""
        if sequence.probe:
            return sequence in self.probes
        flow = self._flow_of.get(sequence)
        return flow is not None and sequence in flow.waiting

    def charge(self, sequence: Sequence, tokens: float) -> None:
        """Charge virtual tokens to the accounts of a sequence."""
        flow = self._flow_of.get(sequence)
        if flow is None:
            return  # it is a probe
        tenant = flow.tenant
        flow.counter += tokens
        tenant.counter += tokens / tenant.weight
        if tenant.flows.waiting:
            self._charged[0].add(tenant)
        if flow.waiting:
            self._charged[1].add(flow)

    def served(self, sequence: Sequence) -> float:
        """What the tenant of an unfinished sequence was served so far, by its weight."""
        return self._flow_of[sequence].tenant.counter

    def served_after_prompt(self, sequence: Sequence) -> float:
        """What it will have been served once all tokens of the sequence are computed. The least one's come first.

        So a short prompt does not wait for a long one, and a long one only for as much as it has itself.
        """
        tenant = self._flow_of[sequence].tenant
        return tenant.counter + PROMPT_TOKEN * (len(sequence.tokens) - sequence.computed) / tenant.weight

    @property
    def tenants(self) -> KeysView[str]:
        """Tenants of which a sequence waits."""
        return self._tenants.waiting.keys()

    @property
    def adapters(self) -> frozenset[AdapterId]:
        """Adapters of all that wait."""
        if self._adapters is None:
            self._adapters = frozenset(self.users)
        if not self.probes:
            return self._adapters
        return self._adapters.union(adapter.id for probe in self.probes for adapter in probe.adaptation)

    def check(self, running: Iterable[Sequence]) -> None:
        """Assert that exactly the unfinished sequences have accounts, ``running`` and waiting ones."""
        waiting = [sequence for sequence in self if not sequence.probe]
        assert len(waiting) == self._waiting
        unfinished = {*waiting, *(sequence for sequence in running if not sequence.probe)}
        assert unfinished == self._flow_of.keys()
        counted = Counter(flow.tenant for flow in self._flow_of.values())
        assert all(tenant.unfinished == number for tenant, number in counted.items())
        assert all(tenant.flows.waiting for tenant in self._tenants.waiting.values())
        flows = {self._flow_of[sequence] for sequence in waiting}
        assert {(id_, flow) for id_, flows in self.users.items() for flow in flows} == {
            (id_, flow) for flow in flows for id_ in flow.adapters
        }


def find_holder(
    sequence: Sequence, need: int, running: list[Sequence], held: Callable[[Sequence], int]
) -> Sequence | None:
    """Return a running sequence to preempt for a waiting one, which needs ``need`` of what is ``held``, or None.

    It is the last of those whose tenant, by weight, still holds as much afterwards as that of ``sequence`` will. So two
    tenants never take the same from each other in turn.
    """
    holds: Counter[str] = Counter()
    for each in running:
        holds[each.tenant] += held(each)
    wanted = (holds[sequence.tenant] + need) / sequence.weight
    for each in reversed(running):
        if each.tenant != sequence.tenant and (holds[each.tenant] - held(each)) / each.weight >= wanted:
            return each
    return None


def _turn(sequence: Sequence) -> tuple[bool, float]:
    """The order of a flow's sequences."""
    return not sequence.preemptions, sequence.due
