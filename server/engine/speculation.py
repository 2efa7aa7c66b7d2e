"""Speculation: how many tokens to draft for each sequence of a step, so that the step gives more tokens a second.

A drafted token is a row more in the step. It is accepted if the token sampled before it is the same; all drafts after a
rejected one are lost. So a draft pays if its chance of acceptance is larger than its share of the step's time times the
tokens that the step gives. Both are measured as steps run: chances for each adaptation, by the length of the match that
a draft continues; times by the number of sequences. Sequences that nothing can be drafted for cost a look into a table.

Only for a forward pass whose rows have the same bits at any number of rows: then answers do not depend on any of this.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from itertools import takewhile
from statistics import median

from server.engine.prompt_lookup import MAX_LENGTH, PromptLookup
from server.engine.sequence import Adaptation, Batch, Chunk, Sequence

MAX_DRAFTS = 15
"""Drafts of a sequence in a step: with its last token they fill a tile of the CPU kernels."""
MAX_ROWS = MAX_DRAFTS + 1
"""Rows of a step that a single sequence can use."""
MAX_ADAPTATIONS = 1024
"""Adaptations whose chances are kept, the least recently used are dropped first."""
PROBE_SHARE = 0.005
"""Share of the time that may go to drafts that are not expected to pay, to notice when they would."""
PLAIN_STEPS = 9
"""Last steps without drafts, whose median time is what steps with drafts are compared with."""
MIN_PLAIN_STEPS = 3
"""Steps without drafts at a number of sequences before any are drafted."""
MAX_DRAFTED_STEPS = 32
"""Steps with drafts, after which one without them is run to compare with."""
FIXED_COST = 9
"""Assumed time of a step besides that of its rows, in rows, until it is measured."""
FIRST_ROWS = 8
"""Measured rows that the assumption weighs as much as."""
FIRST_CHANCES = (0.4, 0.6, 0.8)
"""Assumed chances of acceptance after matches of 2 to 3, 4 to 7, and 8 tokens."""


@dataclass
class Acceptance:
    """How likely an adaptation's drafts are accepted: exponential averages."""

    chances: list[float] = field(default_factory=lambda: list(FIRST_CHANCES))
    """That a draft is accepted if those before it are, by :func:`_length_class`."""
    skipped: list[int] = field(default_factory=lambda: [0] * len(FIRST_CHANCES))
    """Matches of each class since one of them was last drafted from."""

    def record(self, length: int, accepted: int, *, rejected: bool) -> None:
        """Take in one sequence's drafts in a step, which continued a match of ``length`` tokens."""
        for ahead in range(accepted + rejected):
            at = _length_class(length + ahead)
            self.chances[at] += 0.1 * ((ahead < accepted) - self.chances[at])


@dataclass
class StepCosts:
    """The time of steps of one number of sequences, and what drafted rows add to it."""

    sequences: int
    plain: deque[float] = field(default_factory=lambda: deque(maxlen=PLAIN_STEPS))
    """Seconds of the last steps without drafts."""
    drafted_steps: int = 0
    """Since the last one without drafts."""
    since_drafts: int = 0
    """Steps since the last one with drafts."""
    _added: float = field(init=False)
    _rows: float = FIRST_ROWS

    def __post_init__(self) -> None:
        self._added = FIRST_ROWS / (FIXED_COST + self.sequences)

    @property
    def row(self) -> float:
        """What a drafted row adds to a step, as a share of the step without drafts."""
        return self._added / self._rows

    @property
    def comparable(self) -> bool:
        """Whether there are recent steps without drafts."""
        return len(self.plain) >= MIN_PLAIN_STEPS and self.drafted_steps < MAX_DRAFTED_STEPS

    def record(self, drafted: int, seconds: float) -> None:
        """Take in a step with ``drafted`` drafts of all its sequences."""
        if not drafted:
            self.plain.append(seconds)
            self.drafted_steps = 0
            self.since_drafts += 1
            return
        self.drafted_steps += 1
        self.since_drafts = 0
        if not self.plain:
            return
        added = seconds / median(self.plain) - 1
        # A row costs no less than nothing, and no more than a step of its own: what else was measured is other load.
        self._added = 0.95 * self._added + min(max(added, 0.0), drafted)
        self._rows = 0.95 * self._rows + drafted


class Drafting:
    """The drafts of one step, sequence by sequence."""

    def __init__(self, sequences: int, costs: StepCosts) -> None:
        self._tokens = float(sequences)
        """Tokens that the step is expected to give."""
        self._time = 1.0
        """Its time, as a share of that without drafts."""
        self._row = costs.row
        self._probe_after = sequences * costs.row / PROBE_SHARE
        self._probe = costs.since_drafts >= self._probe_after

    @property
    def pays(self) -> bool:
        """Whether drafts can pay, if all are accepted; or are to be measured again."""
        return self._row * self._tokens < 1 or self._probe

    def count(self, acceptance: Acceptance, length: int, most: int) -> int:
        """How many drafts pay for a sequence with a match of ``length`` tokens; sometimes 1 if none does."""
        found, at = self._count(acceptance, length, most), _length_class(length)
        if not found and most > 0 and (self._probe or acceptance.skipped[at] >= self._probe_after):
            found = 1
        acceptance.skipped[at] = 0 if found else acceptance.skipped[at] + 1
        return found

    def _count(self, acceptance: Acceptance, length: int, most: int) -> int:
        chance = 1.0
        for count in range(most):
            chance *= acceptance.chances[_length_class(length + count)]
            if chance * self._time <= self._row * self._tokens:
                return count
            self._tokens += chance
            self._time += self._row
        return most


class Speculation:
    """Decides what is drafted, and measures what comes of it. For one thread."""

    def __init__(self, *, active: bool = True) -> None:
        """``active``: whether anything is drafted."""
        self.active = active
        self.drafted = 0
        """Tokens drafted so far."""
        self.accepted = 0
        """Of those, the ones that were sampled, too."""
        self._acceptance: OrderedDict[Adaptation, Acceptance] = OrderedDict()
        self._costs: dict[int, StepCosts] = {}
        self._lookups: dict[Sequence, PromptLookup] = {}
        self._matched: dict[Sequence, int] = {}
        """Length of the match that was last drafted from."""

    def draft(self, chunks: list[Chunk], rows: int, room: Callable[[Sequence], int]) -> list[Chunk]:
        """Return the chunks with drafts where that pays, at most ``rows`` rows, and up to position ``room``.

        If a prompt is among them, nothing is drafted: that would delay its first token.
        """
        if not self.active or not all(map(_decodes, chunks)):
            return chunks
        costs = self._costs_of(len(chunks))
        drafting = Drafting(len(chunks), costs)
        if not costs.comparable or not drafting.pays:
            return chunks
        spare = rows - len(chunks)
        drafted = []
        for chunk in chunks:
            sampling = chunk.sequence.sampling
            left = sampling.max_tokens - chunk.sequence.output_length - 1 if sampling.speculation else 0
            most = min(MAX_DRAFTS, spare, left, room(chunk.sequence) - chunk.end)
            drafts = self._draft(chunk.sequence, drafting, most) if most > 0 else ()
            spare -= len(drafts)
            drafted.append(replace(chunk, length=1 + len(drafts), drafts=drafts) if drafts else chunk)
        return drafted

    def _costs_of(self, sequences: int) -> StepCosts:
        if sequences not in self._costs:
            self._costs[sequences] = StepCosts(sequences)
        return self._costs[sequences]

    def _draft(self, sequence: Sequence, drafting: Drafting, most: int) -> tuple[int, ...]:
        lookup = self._lookups.get(sequence)
        if lookup is None:
            lookup = self._lookups[sequence] = PromptLookup(sequence.tokens)
        match = lookup.find()
        if match is None:
            return ()
        self._matched[sequence] = match.length
        return lookup.draft(match, drafting.count(self.acceptance(sequence.adaptation), match.length, most))

    def acceptance(self, adaptation: Adaptation) -> Acceptance:
        """How likely the drafts of an adaptation are accepted."""
        found = self._acceptance.setdefault(adaptation, Acceptance())
        self._acceptance.move_to_end(adaptation)
        if len(self._acceptance) > MAX_ADAPTATIONS:
            self._acceptance.popitem(last=False)
        return found

    def record(self, chunk: Chunk, sampled: Seq[int | None]) -> int:
        """Compare the drafts of a chunk with the tokens sampled in their places. Returns how many are accepted."""
        same = (token == draft for token, draft in zip(sampled, chunk.drafts, strict=False))
        accepted = sum(1 for _ in takewhile(bool, same))
        self.acceptance(chunk.sequence.adaptation).record(
            self._matched[chunk.sequence], accepted, rejected=accepted < len(chunk.drafts)
        )
        self.drafted += len(chunk.drafts)
        self.accepted += accepted
        return accepted

    def record_step(self, batch: Batch, seconds: float) -> None:
        """Take in how long a step took."""
        if self.active and all(map(_decodes, batch.chunks)):
            drafted = sum(len(chunk.drafts) for chunk in batch.chunks)
            self._costs_of(len(batch.chunks)).record(drafted, seconds)

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept of a sequence that has ended."""
        self._lookups.pop(sequence, None)
        self._matched.pop(sequence, None)


def _decodes(chunk: Chunk) -> bool:
    """Whether a chunk is one token that samples, with drafts or without."""
    return chunk.samples and chunk.length == 1 + len(chunk.drafts)


def _length_class(length: int) -> int:
    return min(length, MAX_LENGTH).bit_length() - 2
