"""What a training run leaves for people to look at: its log, the answers before and after, the card.

The trainer writes these files; servers keep and show them. None is part of an adapter's content: they change neither
its identity nor what it does, and one that is missing, too large or damaged is no reason to refuse the adapter.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from adapters.errors import AdapterRejected
from adapters.format.files import MAX_JSON_BYTES, ORIGIN, parse_object

LOG = "training.jsonl"
"""One JSON object a line, each with ``time``: events, the figures of each step, evaluations."""
SAMPLES = "samples.json"
"""A list of held-out rows with the answers of base and adapter."""
CARD = "README.md"

WORKING = ".training"
"""A run that is to make the folder ``NAME`` works in ``NAME.training``."""
LOCK = "lock"
"""Held while a run goes on, in the folder where it works."""
REQUEST = "request.json"
"""The settings and rows of a run, in the folder where it works."""
ADAPTER = "adapter"
"""Folder of the trained adapter until it is judged, in the folder where its run works."""

MAX_BYTES: Mapping[str, int] = {CARD: 256 << 10, LOG: 8 << 20, SAMPLES: 4 << 20}
"""File -> maximum size that is kept and read."""
SHOWN = tuple(MAX_BYTES)
RECORDS = "records"
"""Folder in a stored content with the records of the names that it has come under, each in :func:`record_folder`."""
HEAD_BYTES = 1 << 20
"""Of a longer log, this much of its beginning is read, and the rest of :data:`MAX_BYTES` from its end."""
MAX_NESTING = 64
"""Maximum depth of JSON that is shown."""
MAX_INTEGER = 1 << 63
MAX_STEP = 1 << 53
MAX_TIME = 1e11
"""Unix times are below this."""
MAX_POINTS = 2000
"""Maximum number of points of a curve; of more, only some are kept, evenly spread."""

Point = tuple[int, float]
"""Step, value."""


@dataclass
class TrainingLog:
    """A run's log as far as it is written."""

    started: dict[str, Any] = field(default_factory=dict)
    """The last event ``started``: settings, data, base."""
    first_time: float | None = None
    """Unix time of the first line."""
    last_time: float | None = None
    event: str | None = None
    """The last event: ``started``, ``judging``, ``failed`` or ``finished``."""
    reason: str | None = None
    """Why the run failed."""
    loss: list[Point] = field(default_factory=list)
    evaluation: list[Point] = field(default_factory=list)
    learning_rate: list[Point] = field(default_factory=list)
    skipped_lines: int = 0
    """Number of lines that the trainer cannot have written."""
    skipped_bytes: int = 0
    """Number of bytes in the middle of a long log that were not read."""

    @property
    def step(self) -> int:
        """The last step that has ended."""
        return max((points[-1][0] for points in (self.loss, self.evaluation) if points), default=0)

    def curves(self) -> dict[str, list[Point]]:
        """Return the points of each curve, thinned out if there are many."""
        named = {"loss": self.loss, "evaluation": self.evaluation, "learning_rate": self.learning_rate}
        return {name: _thinned(points) for name, points in named.items()}

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line. Raises ValueError, TypeError or KeyError for one that the trainer has not written."""
        time = _number(line["time"], MAX_TIME)
        if "event" in line:
            self._add_event(line)
        else:
            self._add_figures(line)
        self.first_time = time if self.first_time is None else self.first_time
        self.last_time = time

    def _add_figures(self, line: Mapping[str, Any]) -> None:
        step = int(_number(line["step"], MAX_STEP))
        curves = (("loss", self.loss), ("eval_loss", self.evaluation), ("learning_rate", self.learning_rate))
        found = [(points, _number(line[name])) for name, points in curves if name in line]
        for points, value in found:
            # A resumed run repeats steps, also where the event that says so was not read.
            while points and points[-1][0] >= step:
                points.pop()
            points.append((step, value))

    def _add_event(self, line: Mapping[str, Any]) -> None:
        event, reason = line["event"], line.get("reason")
        if not isinstance(event, str) or not isinstance(reason, str | None):
            raise TypeError("an event and its reason are texts")
        if event == "started":
            step = int(_number(line["step"], MAX_STEP))
            self.started = dict(line)
            # A resumed run repeats the steps after its checkpoint.
            for points in (self.loss, self.evaluation, self.learning_rate):
                points[:] = [point for point in points if point[0] <= step]
        self.event, self.reason = event, reason


def record_folder(name: str) -> str:
    """Return where the record of a content is kept that has come under ``name``, relative to the content.

    Whoever has the same weights under another name has not seen this record.
    """
    return f"{RECORDS}/{hashlib.sha256(name.encode()).hexdigest()}"


def read_log(folder: Path) -> TrainingLog | None:
    """Return the log in ``folder``; None if there is no file that can be read.

    Leaves out a line that is being written, lines that the trainer has not written, and the middle of a long log; the
    log says how much that is.
    """
    file = open_plain(folder, LOG)
    if file is None:
        return None
    log = TrainingLog()
    try:
        with file:
            pieces = _pieces(file, MAX_BYTES[LOG])
    except OSError:
        return None
    log.skipped_bytes = pieces[1]
    for line in pieces[0]:
        try:
            log.add(_shown_json(line.decode()))
        except (ValueError, TypeError, KeyError, RecursionError, AttributeError):
            log.skipped_lines += 1
    return log


def _pieces(file: BinaryIO, limit: int) -> tuple[list[bytes], int]:
    """Return whole lines of at most ``limit`` bytes, and how many bytes in the middle of the file are not in them."""
    size = os.fstat(file.fileno()).st_size
    if size <= limit:
        return _whole_lines(file.read(size)), 0
    head = file.read(HEAD_BYTES)
    head = head[: head.rfind(b"\n") + 1]
    first = size - (limit - HEAD_BYTES)
    file.seek(first - 1)
    tail = file.read(size - first + 1)
    # Up to the first end of a line, which may be the byte before, it is the rest of a line.
    start = tail.find(b"\n") + 1 or len(tail)
    return _whole_lines(head) + _whole_lines(tail[start:]), first - 1 + start - len(head)


def _whole_lines(data: bytes) -> list[bytes]:
    return data.split(b"\n")[:-1]


def read_samples(folder: Path) -> list[Any] | None:
    """Return the samples in ``folder``; None if there are none that can be read."""
    found = _parsed(read_bounded(folder, SAMPLES), _shown_json)
    return found if isinstance(found, list) else None


def read_card(folder: Path) -> str | None:
    """Return the card in ``folder``, in Markdown that anybody may have written; None if there is none."""
    found = _parsed(read_bounded(folder, CARD), str)
    return found if isinstance(found, str) else None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of the adapter in ``folder``; None if there is none, or it is no JSON as others read it."""
    data = _read(open_plain(folder, ORIGIN, MAX_JSON_BYTES), MAX_JSON_BYTES)
    try:
        found = None if data is None else parse_object(data, ORIGIN)
        _check(found)
    except (AdapterRejected, ValueError):
        return None
    return found


def open_plain(folder: Path, name: str, limit: int | None = None) -> BinaryIO | None:
    """Open a file; None if it is a link or no regular file, larger than ``limit``, or cannot be read."""
    try:
        # Opening a FIFO would block; a link could lead anywhere.
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or (limit is not None and found.st_size > limit):
        os.close(descriptor)
        return None
    return os.fdopen(descriptor, "rb")


def open_bounded(folder: Path, name: str) -> BinaryIO | None:
    """Open a file of a record; None if it is no regular file, too large, or cannot be read."""
    return open_plain(folder, name, MAX_BYTES[name])


def read_bounded(folder: Path, name: str) -> bytes | None:
    """Return the bytes of a file of a record; None as :func:`open_bounded` does."""
    return _read(open_bounded(folder, name), MAX_BYTES[name])


def _read(file: BinaryIO | None, limit: int) -> bytes | None:
    if file is None:
        return None
    try:
        with file:
            return file.read(limit)
    except OSError:
        return None


def present_shown(folder: Path) -> tuple[str, ...]:
    """Return the names of the files of a record that ``folder`` has."""
    found = []
    for name in SHOWN:
        file = open_bounded(folder, name)
        if file is not None:
            file.close()
            found.append(name)
    return tuple(found)


def copy_shown(folder: Path, to: Path) -> None:
    """Copy the files of a record that ``folder`` has into another folder, which has none."""
    for name in SHOWN:
        data = read_bounded(folder, name)
        if data is not None:
            (to / name).write_bytes(data)


def _parsed(data: bytes | None, parse: Callable[[str], Any]) -> Any:
    try:
        return None if data is None else parse(data.decode())
    except (ValueError, RecursionError):
        return None


def _shown_json(text: str) -> Any:
    """Parse JSON that can be written again. Raises ValueError or RecursionError."""
    found = json.loads(text, parse_constant=_refuse)
    _check(found)
    return found


def _check(value: object) -> None:
    """Raise ValueError for what other programs cannot read: infinity, huge integers, and JSON that is nested deeply."""
    level = [value]
    for _ in range(MAX_NESTING):
        below: list[object] = []
        for each in level:
            if isinstance(each, dict):
                below.extend(each.values())
            elif isinstance(each, list):
                below.extend(each)
            elif isinstance(each, float) and not math.isfinite(each):
                raise ValueError("a number is not finite")
            elif isinstance(each, int) and not -MAX_INTEGER < each < MAX_INTEGER:
                raise ValueError("a number is too large")
        level = below
    if level:
        raise ValueError("it is nested too deeply")


def _number(value: object, limit: float | None = None) -> float:
    """Return a finite number; at least 0 and below ``limit`` if there is one. Raises ValueError or TypeError."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError("it is no number")
    number = float(value)
    if not math.isfinite(number) or (limit is not None and not 0 <= number < limit):
        raise ValueError("the number is out of range")
    return number


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _thinned(points: list[Point]) -> list[Point]:
    if len(points) <= MAX_POINTS:
        return points
    return list(_spread(points))


def _spread(points: list[Point]) -> Iterator[Point]:
    last = len(points) - 1
    for place in range(MAX_POINTS):
        yield points[place * last // (MAX_POINTS - 1)]
