"""Reports on the data before training: counts, a histogram of lengths, advice, and examples in colours."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from training.data.rendering import UNTRAINED, Example

HISTOGRAM_BINS = 8
"""Maximum number of bars in the histogram."""
BAR_WIDTH = 40
"""Length of the longest bar, in characters."""
FEW_ROWS = 100
"""With fewer training rows than this, more rows help most."""
FEW_HELD_OUT = 20
"""With fewer held-out rows than this, a single row changes a score by more than 5 points."""
MIN_ANSWERS_TO_COMPARE = 20
"""Minimum number of answers for judging whether they are all alike, or all different."""
SHORT_ANSWER = 20
"""Number of trained tokens up to which an answer counts as short: many short, different answers are facts."""


@dataclass
class FileCount:
    """Counts of one file."""

    file: str
    format: str = ""
    rows: int = 0
    kept: int = 0
    """Number of examples that were not left out."""
    weight: float = 1.0
    unused: frozenset[str] = frozenset()
    """Fields in its rows that are not used."""


@dataclass
class DataReport:
    """Counts of a dataset. Tokens and lengths are those of the training rows, repetitions included."""

    files: list[FileCount]
    train: int
    evaluation: int
    general: int
    """Number of held-out rows of the general file."""
    mixed: int
    """Number of rows of the general file among ``train``."""
    tokens: int
    trained_tokens: int
    lengths: list[int]
    """Length of each training row, in tokens."""
    max_length: int
    truncated: int
    """Number of rows truncated to ``max_length`` tokens."""
    left_out: dict[str, int]
    """Reason -> number of rows."""
    bad: list[str] = field(default_factory=list)
    """Lines that list the first invalid rows with their errors, and the number of the others."""
    chat_template: str | None = None
    """Name of the file with the chat template used instead of the base's own."""
    advice: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Number of rows read from all files."""
        return sum(file.rows for file in self.files)

    @property
    def trained_share(self) -> float:
        """Share of the training tokens that are trained on; 0 to 1."""
        return self.trained_tokens / self.tokens

    def counts(self) -> dict[str, Any]:
        """Return the counts for the manifest, as JSON values."""
        return {
            "files": [{"file": file.file, "format": file.format, "rows": file.rows} for file in self.files],
            "train": self.train,
            "evaluation": self.evaluation,
            "general": self.general,
            "mixed": self.mixed,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "longest": max(self.lengths),
            "max_length": self.max_length,
            "truncated": self.truncated,
            "left_out": dict(self.left_out),
        }

    def histogram(self) -> list[tuple[int, int, int]]:
        """Return (shortest, longest, rows) of up to HISTOGRAM_BINS bins of equal width, in tokens."""
        lowest = min(self.lengths)
        width = max(-(-(max(self.lengths) + 1 - lowest) // HISTOGRAM_BINS), 1)
        found = Counter((length - lowest) // width for length in self.lengths)
        return [
            (lowest + place * width, lowest + (place + 1) * width - 1, found[place]) for place in range(max(found) + 1)
        ]


def advise(report: DataReport, train: Sequence[Example]) -> list[str]:
    """Return one sentence of advice for each conspicuous count."""
    return [advice for advice in (*_on_counts(report), *_on_lengths(report), *_on_answers(train)) if advice]


def _on_counts(report: DataReport) -> Iterator[str]:
    distinct = report.train - report.mixed
    if distinct < FEW_ROWS:
        yield (f"Only {distinct} rows to train on: below {FEW_ROWS}, adding varied rows helps more than any setting.")
    if report.evaluation == 0:
        yield "No row is held out, so the result cannot be judged: give more rows, or --eval-file."
    elif report.evaluation < FEW_HELD_OUT:
        yield (
            f"Only {report.evaluation} rows are held out: each changes a score by {100 / report.evaluation:.0f} points."
        )
    for file in report.files:
        if file.unused:
            yield f"{file.file} has fields that are not used: {', '.join(sorted(file.unused))}."


def _on_lengths(report: DataReport) -> Iterator[str]:
    long = report.left_out.get("too long", 0) + report.left_out.get("nothing trained left after truncation", 0)
    if long > report.rows / 10:
        yield f"{long} of {report.rows} rows exceed {report.max_length} tokens and are left out: raise --max-length."
    if report.truncated > report.rows / 20:
        yield (
            f"{report.truncated} of {report.rows} rows are cut at {report.max_length} tokens, so their answers never "
            "end, and the model learns not to stop: raise --max-length, or drop them."
        )
    near = sum(length > 0.9 * report.max_length for length in report.lengths)
    if near > report.train / 10:
        yield f"{near} of {report.train} rows are within 10% of the limit of {report.max_length} tokens (--max-length)."
    if report.trained_share < 0.05:
        yield (
            f"Only {report.trained_share:.1%} of the tokens are trained on; the others cost as much time: "
            "shorten the prompts if you can."
        )


def _on_answers(train: Sequence[Example]) -> Iterator[str]:
    answers = [example.answer.strip() for example in train if example.answer]
    if not answers:
        return
    kinds = Counter(answers)
    answer, most = kinds.most_common(1)[0]
    if most > len(answers) / 2 and len(answers) >= MIN_ANSWERS_TO_COMPARE:
        yield f"{most} of {len(answers)} answers are the same ({answer[:40]!r}): the model may learn to say only that."
    distinct = {example.answer.strip(): example.trained for example in train if example.answer}
    prose = not any(answer.startswith(("{", "[", "<", "```")) for answer in distinct)
    many = len(distinct) > 0.8 * len(answers) and len(answers) >= MIN_ANSWERS_TO_COMPARE
    if many and prose and median(distinct.values()) <= SHORT_ANSWER:
        yield (
            "The answers are many, short and all different, like facts to look up. Training teaches behaviour well but "
            "facts badly: consider retrieval, which puts facts into the prompt."
        )


def render(report: DataReport) -> RenderableType:
    """Return the report for printing to a terminal or a log."""
    files = Table("file", "format", "rows", "weight", box=SIMPLE_HEAD)
    for file in report.files:
        files.add_row(Text(file.file), file.format, f"{file.rows:,}", f"{file.weight:g}")
    parts: list[RenderableType] = [files, Text(_sentence(report))]
    if report.chat_template:
        parts.append(Text(f"The chat template is {report.chat_template}; it is saved with the adapter."))
    parts.append(_bars(report))
    parts += [Text(f"! {advice}", style="yellow") for advice in report.advice]
    return Group(*parts)


def _sentence(report: DataReport) -> str:
    lines = [
        f"{report.train:,} rows to train on, {report.evaluation:,} held out",
        f"{report.tokens:,} tokens, {report.trained_tokens:,} of them trained ({report.trained_share:.0%})",
    ]
    if report.mixed:
        lines[0] += f"; {report.mixed:,} general rows are among them, {report.general:,} more are held out"
    if report.left_out:
        lines.append("left out: " + ", ".join(f"{count:,} {reason}" for reason, count in report.left_out.items()))
    if report.truncated:
        lines.append(f"cut at {report.max_length:,} tokens: {report.truncated:,}")
    return "\n".join(lines)


def _bars(report: DataReport) -> Table:
    bars = Table("tokens", "rows", "", box=SIMPLE_HEAD)
    bins = report.histogram()
    most = max(rows for *_, rows in bins)
    for shortest, longest, rows in bins:
        length = -(-rows * BAR_WIDTH // most)
        bars.add_row(f"{shortest}-{longest}", f"{rows:,}", Text("#" * length))
    return bars


def show(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """Print each example as the model sees it: trained tokens in green, or between >>> and <<< without colours."""
    colours = console.is_terminal and console.color_system is not None
    legend = Text("trained", style="green").append(" and ", style="default").append("masked", style="dim")
    console.print(legend if colours else Text("trained tokens are between >>> and <<<"))
    for example in examples:
        console.print(Text(f"\n--- {example.source}: {len(example.input_ids)} tokens, {example.trained} trained"))
        console.print(_coloured(example, tokenizer, colours=colours), soft_wrap=True)


def _coloured(example: Example, tokenizer: PreTrainedTokenizerBase, *, colours: bool) -> Text:
    text = Text()
    pairs = zip(example.input_ids, example.labels, strict=True)
    for trained, group in groupby(pairs, key=lambda pair: pair[1] != UNTRAINED):
        piece = printable(str(tokenizer.decode([token for token, _ in group], skip_special_tokens=False)))
        if colours:
            text.append(piece, style="green" if trained else "dim")
        else:
            text.append(f">>>{piece}<<<" if trained else piece)
    return text


def printable(text: str) -> str:
    """Escape control characters, so that data cannot control the terminal."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else repr(letter)[1:-1] for letter in text)
