"""Log lines of all libraries in one format: a JSON object each, or text for people.

structlog formats what the standard library's loggers are given, fields (``extra``) included. Whatever a client may have
put into a name, a header or a path, a record is one line; the lines of a traceback are indented, or inside the object.
"""

import json
import logging
import sys
from typing import Literal, TextIO

from structlog.dev import ConsoleRenderer, plain_traceback
from structlog.processors import JSONRenderer, TimeStamper, format_exc_info
from structlog.stdlib import ExtraAdder, ProcessorFormatter, add_log_level, add_logger_name
from structlog.typing import EventDict, Processor, WrappedLogger

FIRST = ("timestamp", "level", "logger", "event")
"""Fields that every object begins with."""

TELLTALES = ("httpx", "httpx2", "httpcore", "httpcore2", "urllib3", "botocore", "aiobotocore", "s3fs", "gcsfs")
"""Libraries that log what they ask for: addresses that are signed, and at debug level headers with keys."""


def set_up_logs(level: str, style: Literal["auto", "json", "text"], stream: TextIO | None = None) -> None:
    """Log to ``stream``, by default stderr. ``auto`` is text on a terminal, else JSON."""
    stream = stream or sys.stderr
    json_lines = style == "json" or (style == "auto" and not stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(make_formatter(json_lines=json_lines, colors=stream.isatty()))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(True)
    for library in ("alembic", *TELLTALES):
        logging.getLogger(library).setLevel(logging.WARNING)


def make_formatter(*, json_lines: bool, colors: bool = False) -> logging.Formatter:
    """Return the formatter of all log records. ``colors``: of text for people."""
    shared: list[Processor] = [
        add_log_level,
        add_logger_name,
        ExtraAdder(),
        _without_colors,
        TimeStamper(fmt="iso", utc=True),
        format_exc_info,
    ]
    ends: list[Processor]
    if json_lines:
        ends = [_in_order, JSONRenderer(serializer=json.dumps, default=str)]
    else:
        ends = [_on_one_line, ConsoleRenderer(colors=colors, pad_event_to=0, exception_formatter=plain_traceback)]
    return ProcessorFormatter(foreign_pre_chain=shared, processors=[ProcessorFormatter.remove_processors_meta, *ends])


def _without_colors(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    event.pop("color_message", None)  # uvicorn's second form of the same text
    return event


def _in_order(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    return {**{name: event[name] for name in FIRST if name in event}, **event}


def _on_one_line(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Escape what would begin a line, or change a terminal; indent the lines of a traceback."""
    traceback = event.pop("exception", None)
    plain = {name: _escaped(value) for name, value in event.items()}
    if traceback is not None:
        plain["exception"] = "\n".join(f"    {_escaped(line)}" for line in str(traceback).splitlines())
    return plain


def _escaped(value: object) -> object:
    """Return a value whose text has no character that is not printable. A list is shown as Python would."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)
    return value
