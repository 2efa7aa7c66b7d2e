"""Builds the dataset of a run from files: the examples to train on, the held-out ones, and general ones.

Steps, in order: read, render, check the length, drop duplicates, hold rows out, drop held-out rows from training,
repeat files by weight, mix in general rows. The report counts every row that is left out. All files are read before an
invalid row raises, so that all invalid rows are reported at once.
"""

import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from bases.errors import ConfigError
from training.data.conversation import Conversation, DataError, OnRowError
from training.data.data_report import DataReport, FileCount, advise
from training.data.files import check_file
from training.data.formats import AUTO, read_conversations
from training.data.rendering import Example, Renderer
from training.data.row_errors import LEFT_OUT, RowErrors
from training.progress_bar import Say
from training.settings import TrainSettings

BATCH = 1000
"""Number of rows that are rendered and encoded at a time."""
PROGRESS_EVERY = 10_000
"""Number of rows between two lines of progress."""
DEFAULT_MAX_LENGTH = 1024
"""Default of ``--max-length`` in tokens, unless the model's context is shorter."""
MIN_ROWS_TO_SPLIT = 10
"""With fewer rows than this none is held out: a single one would prove nothing, and all are needed for training."""


@dataclass(frozen=True)
class Dataset:
    """The examples of a training run."""

    train: list[Example]
    """Training examples, repeated by their files' weights, with the mixed-in general rows."""
    evaluation: list[Example]
    """Held-out examples; none of them is in ``train``."""
    general: list[Example]
    """Held-out examples of the general file, for measuring forgetting."""
    report: DataReport
    data_hash: str
    """SHA-256 in hexadecimal of the ids and labels of ``train``, with repetitions, in any order."""
    max_length: int
    """Maximum length of a row, in tokens."""
    chat_template: str | None
    """The chat template used instead of the tokenizer's own, if any; it is saved with the adapter."""
    end_of_turn: int | None
    """The token that ends an answer in a chat; None without a chat template."""


def build_dataset(
    settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, max_model_len: int, say: Say = lambda _: None
) -> Dataset:
    """Read and prepare the data that ``settings`` name; ``say`` gets progress. Raises ConfigError or DataError."""
    template = _read_template(settings.chat_template)
    renderer = Renderer(tokenizer, template)
    reader = _Reader(renderer, _max_length(settings.max_length, max_model_len), settings.too_long, say)
    weights = _weights(settings)
    pool = reader.unique(example for path in weights for example in reader.read(path, settings.format, weights[path]))
    train, evaluation = _hold_out(settings, reader, pool)
    general_rows = _read_general(settings, reader, known=[*pool, *evaluation])
    if settings.skip_bad:
        reader.counts[LEFT_OUT] += reader.bad.count
    else:
        reader.bad.check()
    if not train:
        raise DataError(_nothing_left(reader))
    train = _repeat(train, weights, settings.seed)
    if not train:
        raise ConfigError("DATA: the files' weights leave no row to train on")
    general, mixed = _general(settings, general_rows, len(train))
    train += mixed
    report = _report(settings, reader, train, evaluation, general, mixed)
    return Dataset(
        train, evaluation, general, report, data_hash(train), reader.max_length, template, renderer.end_of_turn
    )


def check_files(settings: TrainSettings) -> None:
    """Check, before the base is loaded, that the files can be read. Raises ConfigError or DataError."""
    _read_template(settings.chat_template)
    for path in (*_weights(settings), settings.eval_file, settings.mix_general):
        if path is not None:
            check_file(path)


def data_hash(examples: Iterable[Example]) -> str:
    """Return a SHA-256, in hexadecimal, that does not depend on the order of the examples."""
    return hashlib.sha256(b"".join(sorted(example.digest for example in examples))).hexdigest()


@dataclass
class _Reader:
    """Reads files into examples of at most ``max_length`` tokens, and counts the rows left out."""

    renderer: Renderer
    max_length: int
    too_long: str
    say: Say
    counts: Counter[str] = field(default_factory=Counter)
    """Reason for leaving a row out or truncating it -> number of rows."""
    files: list[FileCount] = field(default_factory=list)
    bad: RowErrors = field(default_factory=RowErrors)

    def read(self, path: Path, format: str, weight: float = 1.0) -> Iterator[Example]:
        """Yield the examples of one file, then append its counts to ``files``."""
        count = FileCount(path.name, weight=weight)
        rows = self._rows(path, format, count)
        while batch := list(islice(rows, BATCH)):
            for example in self.renderer.render_all(batch, self.bad.add):
                try:
                    fitted = self._fit(example)
                except DataError as error:
                    self.bad.add(error)
                    continue
                if fitted is not None:
                    count.kept += 1
                    yield fitted
        self.files.append(count)

    def unique(self, examples: Iterable[Example], known: Iterable[Example] = ()) -> list[Example]:
        """Return each example once, without those in ``known``; count the duplicates."""
        seen = {example.digest for example in known}
        kept = []
        for example in examples:
            if example.digest in seen:
                self.counts["duplicate"] += 1
            else:
                seen.add(example.digest)
                kept.append(example)
        return kept

    def _rows(self, path: Path, format: str, count: FileCount) -> Iterator[Conversation]:
        on_error = self._on_error(count)
        for conversation, count.format, unused in read_conversations(path, format, on_error):
            count.rows += 1
            count.unused |= unused
            if count.rows % PROGRESS_EVERY == 0:
                self.say(f"{path.name}: {count.rows:,} rows read")
            yield conversation

    def _on_error(self, count: FileCount) -> OnRowError:
        def on_error(error: DataError) -> None:
            count.rows += 1
            self.bad.add(error)

        return on_error

    def _fit(self, example: Example) -> Example | None:
        """Return the example, truncated if necessary, or None if it is left out. Raises DataError."""
        length = len(example.input_ids)
        if length <= self.max_length:
            return _trained(example)
        if self.too_long == "fail":
            reason = f"it has {length} tokens, more than --max-length {self.max_length}"
            raise DataError(f"{reason} (see --too-long)", example.source)
        if self.too_long == "drop":
            self.counts["too long"] += 1
            return None
        cut = example.cut(self.max_length)
        self.counts["truncated" if cut.trained else "nothing trained left after truncation"] += 1
        return cut if cut.trained else None


def _trained(example: Example) -> Example:
    if example.trained == 0:
        raise DataError("there is no token to train on", example.source)
    return example


def _max_length(wanted: int | None, context: int) -> int:
    if wanted is not None and not 2 <= wanted <= context:
        raise ConfigError(f"--max-length: must be 2 to {context}, the context of this model (got {wanted})")
    return wanted or min(DEFAULT_MAX_LENGTH, context)


def _weights(settings: TrainSettings) -> dict[Path, float]:
    """Return the files to train on with their weights: how often each file's rows are used."""
    weights = dict(_split_weight(name) for name in settings.data)
    if len(weights) < len(settings.data):
        raise ConfigError("DATA: a file is named twice; to use its rows more often, give it a weight (FILE=2)")
    return weights


def _split_weight(name: str) -> tuple[Path, float]:
    """Split ``rows.jsonl=2.5`` into path and weight; a file's own name may contain an equals sign."""
    stem, equals, said = name.rpartition("=")
    if not equals or Path(name).exists():
        return Path(name), 1.0
    try:
        weight = float(said)
    except ValueError:
        weight = math.nan
    if not (weight > 0 and math.isfinite(weight)):
        raise ConfigError(f"DATA: the weight in {name!r} must be a number above 0")
    return Path(stem), weight


def _read_template(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template: {error}") from None


def _hold_out(settings: TrainSettings, reader: _Reader, pool: list[Example]) -> tuple[list[Example], list[Example]]:
    """Return (train, evaluation). The held-out rows are those of ``--eval-file`` or a share of ``pool``.

    Rows with the same tokens as a held-out one are dropped from training.
    """
    if settings.eval_file is None:
        pool, evaluation = _split(pool, settings.eval_share, settings.seed)
    else:
        evaluation = reader.unique(reader.read(settings.eval_file, settings.format))
    held_out = {tuple(example.input_ids) for example in evaluation}
    train = [example for example in pool if tuple(example.input_ids) not in held_out]
    reader.counts["also in the evaluation rows"] += len(pool) - len(train)
    return train, evaluation


def _split(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Return (rest, ``share`` of the rows), both in order; the second is empty below MIN_ROWS_TO_SPLIT rows."""
    if share == 0 or len(examples) < MIN_ROWS_TO_SPLIT:
        return examples, []
    # The examples of one row must be on the same side.
    rows = list(dict.fromkeys(example.source for example in examples))
    wanted = min(max(round(share * len(rows)), 1), len(rows) - 1)
    chosen = {rows[place] for place in random.Random(f"{seed}-split").sample(range(len(rows)), wanted)}
    kept = [example for example in examples if example.source not in chosen]
    return kept, [example for example in examples if example.source in chosen]


def _repeat(examples: list[Example], weights: dict[Path, float], seed: int) -> list[Example]:
    """Repeat each file's rows by its weight; for a fractional part, add a random sample of them."""
    repeated = []
    for path, weight in weights.items():
        rows = [example for example in examples if example.source.rpartition(":")[0] == str(path)]
        more = round((weight % 1) * len(rows))
        repeated += rows * int(weight) + random.Random(f"{seed}-{path.name}").sample(rows, more)
    return repeated


def _read_general(settings: TrainSettings, reader: _Reader, known: Sequence[Example]) -> list[Example]:
    if settings.mix_general is None:
        return []
    return reader.unique(reader.read(settings.mix_general, AUTO), known=known)


def _general(settings: TrainSettings, rows: list[Example], trained: int) -> tuple[list[Example], list[Example]]:
    """Return (held-out, mixed-in) general rows; the latter make up ``mix_share`` of all training rows.

    Raises DataError if there are too few: general rows are not repeated.
    """
    if settings.mix_general is None:
        return [], []
    rows, held_out = _split(rows, settings.eval_share, settings.seed)
    wanted = round(trained * settings.mix_share / (1 - settings.mix_share))
    if wanted > len(rows):
        most = len(rows) / (len(rows) + trained)
        raise DataError(
            f"--mix-general: a share of {settings.mix_share:g} needs {wanted} rows, and {settings.mix_general.name} "
            f"has {len(rows)} to train on; give more, or --mix-share {math.floor(most * 100) / 100:g}"
        )
    return held_out, random.Random(f"{settings.seed}-general").sample(rows, wanted)


def _nothing_left(reader: _Reader) -> str:
    """Return why no row is left to train on, with the first invalid rows."""
    # Not "--skip-bad": it is set, and who reads this on the server's page has no such option.
    reasons = {"bad" if reason == LEFT_OUT else reason: count for reason, count in reader.counts.items() if count}
    left_out = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    said = f"no row is left to train on; left out: {left_out or 'none'}"
    return "\n  ".join([said, *reader.bad.lines()])


def _report(
    settings: TrainSettings,
    reader: _Reader,
    train: Sequence[Example],
    evaluation: Sequence[Example],
    general: Sequence[Example],
    mixed: Sequence[Example],
) -> DataReport:
    lengths = [len(example.input_ids) for example in train]
    left_out = {reason: count for reason, count in reader.counts.items() if count and reason != "truncated"}
    report = DataReport(
        files=reader.files,
        train=len(train),
        evaluation=len(evaluation),
        general=len(general),
        mixed=len(mixed),
        tokens=sum(lengths),
        trained_tokens=sum(example.trained for example in train),
        lengths=lengths,
        max_length=reader.max_length,
        truncated=reader.counts["truncated"],
        left_out=left_out,
        bad=reader.bad.lines(),
        chat_template=None if settings.chat_template is None else settings.chat_template.name,
    )
    report.advice += advise(report, train)
    return report
