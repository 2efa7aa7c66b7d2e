"""From files to the examples that are trained, held out, and kept against forgetting.

In this order: read, render, mind the length, drop duplicates, hold rows out, drop from training what is held out,
repeat by weight, mix in general rows. Every row that falls out is counted in the report. All files are read before a
bad row ends it, so that all of them are told at once.
"""

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from training.settings import TrainSettings

BATCH = 1000
"""Rows rendered and encoded at a time."""
PROGRESS_EVERY = 10_000
"""Rows between two lines of progress."""
DEFAULT_MAX_LENGTH = 1024
"""Tokens a row may have unless told otherwise, or the model's context where that is less."""
MIN_ROWS_TO_SPLIT = 10
"""Rows below which none is held out: one alone would judge nothing, and every one is needed."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Dataset:
    """What a training run gets."""

    train: list[Example]
    """Repeated by the files' weights, general rows among them."""
    evaluation: list[Example]
    """Held out; none of them occurs in ``train``."""
    general: list[Example]
    """Rows of the general file that are not trained on, for measuring what was forgotten."""
    report: DataReport
    data_hash: str
    """SHA-256, in hexadecimal, over ids and labels of ``train``; their order does not matter, their number does."""
    max_length: int
    """Tokens, of the longest row possible."""
    chat_template: str | None
    """The template that was used instead of the tokenizer's own, and must travel with the adapter."""
    end_of_turn: int | None
    """The token that was trained to end an answer in a chat; None without a chat template."""


def build_dataset(
    settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, max_model_len: int, say: Say = lambda _: None
) -> Dataset:
    """All that ``settings`` say about data, done. ``say`` gets a line now and then. Raises ConfigError or DataError."""
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
        raise DataError(f"no row is left to train on; left out: {_reasons(reader.counts) or 'none'}")
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
    """Whether the files can be read, before the base is opened, which takes longer. Raises ConfigError or DataError."""
    _read_template(settings.chat_template)
    for path in (*_weights(settings), settings.eval_file, settings.mix_general):
        if path is not None:
            check_file(path)


def data_hash(examples: Iterable[Example]) -> str:
    """The same for the same rows in any order."""
    return hashlib.sha256(b"".join(sorted(example.digest for example in examples))).hexdigest()


@dataclass
class _Reader:
    """Files to examples no longer than ``max_length``, counting what becomes of the rows."""

    renderer: Renderer
    max_length: int
    too_long: str
    say: Say
    counts: Counter[str] = field(default_factory=Counter)
    """Reason a row was left out or cut -> rows."""
    files: list[FileCount] = field(default_factory=list)
    bad: RowErrors = field(default_factory=RowErrors)

    def read(self, path: Path, format: str, weight: float = 1.0) -> Iterator[Example]:
        """The examples of one file, after which it is in ``files``."""
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
        """Each example once, and none of ``known``."""
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
        """The example, cut or not, or None where it is left out."""
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
    """How often each file's rows are trained on."""
    weights = dict(_split_weight(name) for name in settings.data)
    if len(weights) < len(settings.data):
        raise ConfigError("DATA: a file is named twice; give it a weight instead")
    return weights


def _split_weight(name: str) -> tuple[Path, float]:
    """``rows.jsonl=2.5`` as path and weight; a file's own name may have an equals sign, too."""
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
    """(train, evaluation): a given file's rows, or a share of the pool's; no row of the same tokens is trained."""
    if settings.eval_file is None:
        pool, evaluation = _split(pool, settings.eval_share, settings.seed)
    else:
        evaluation = reader.unique(reader.read(settings.eval_file, settings.format))
    held_out = {tuple(example.input_ids) for example in evaluation}
    train = [example for example in pool if tuple(example.input_ids) not in held_out]
    reader.counts["also in the evaluation rows"] += len(pool) - len(train)
    return train, evaluation


def _split(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(most, ``share`` of them), both in order; at least one where there are FEWEST and a share is wanted."""
    if share == 0 or len(examples) < MIN_ROWS_TO_SPLIT:
        return examples, []
    # A row may make several examples, which belong on one side.
    rows = list(dict.fromkeys(example.source for example in examples))
    wanted = min(max(round(share * len(rows)), 1), len(rows) - 1)
    chosen = {rows[place] for place in random.Random(f"{seed}-split").sample(range(len(rows)), wanted)}
    kept = [example for example in examples if example.source not in chosen]
    return kept, [example for example in examples if example.source in chosen]


def _repeat(examples: list[Example], weights: dict[Path, float], seed: int) -> list[Example]:
    """Each file's rows as often as its weight says; of a fraction, a random choice of them."""
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
    """(held out, mixed in) of the general rows: so many that they are ``mix_share`` of all that is trained.

    Rows are not repeated for it: too few are an error.
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


def _reasons(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)


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
