"""Reads the rows of JSON Lines, JSON, CSV and Parquet files."""

import codecs
import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from training.data.conversation import DataError, OnRowError, raise_error

Row = tuple[int, dict[str, Any]]
"""(number, row). Numbers start at 1: the line in JSON Lines, else the record, without a CSV's header."""
_Unread = tuple[int, Callable[[], dict[str, Any]]]
"""(number, function that parses the row and raises DataError if it is invalid)."""


def read_rows(path: Path, on_error: OnRowError = raise_error) -> Iterator[Row]:
    """Yield the rows of a file, one at a time; a JSON array is read as a whole.

    The suffix gives the kind of file; a ``.json`` may hold one array or one row per line. Calls ``on_error`` for each
    row that cannot be read. Raises DataError if the rest of the file cannot be read.
    """
    read = _reader(path)
    try:
        with path.open("rb") as file:
            row = 0
            for row, get in read(path, file):
                try:
                    record = get()
                except DataError as error:
                    on_error(error)
                else:
                    yield row, record
    except OSError as error:
        raise DataError(error.strerror or str(error), str(path)) from None
    if row == 0:
        raise DataError("the file has no rows", str(path))


def check_file(path: Path) -> None:
    """Raise DataError if :func:`read_rows` could not open the file."""
    _reader(path)
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(error.strerror or str(error), str(path)) from None


def _reader(path: Path) -> Callable[[Path, BinaryIO], Iterator[_Unread]]:
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(f"the name of a data file must end in one of {', '.join(_READERS)}", str(path))
    return read


def _json_lines(path: Path, file: BinaryIO) -> Iterator[_Unread]:
    for number, line in enumerate(file, start=1):
        line = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"")
        if line.strip():
            yield number, partial(_line, line, f"{path}:{number}")


def _line(line: bytes, source: str) -> dict[str, Any]:
    return _record(_parse(_decode(line, source), source), source)


def _json(path: Path, file: BinaryIO) -> Iterator[_Unread]:
    if not _begins_with_bracket(file):
        yield from _json_lines(path, file)
        return
    text = _decode(file.read(), str(path)).removeprefix("\ufeff")
    for number, value in enumerate(_parse(text, str(path)), start=1):
        yield number, partial(_record, value, f"{path}:{number}")


def _begins_with_bracket(file: BinaryIO) -> bool:
    """Return whether the first character that is not white space is a bracket; rewind the file."""
    first = b""
    for line in file:
        if first := line.removeprefix(codecs.BOM_UTF8).lstrip()[:1]:
            break
    file.seek(0)
    return first == b"["


def _csv(path: Path, file: BinaryIO) -> Iterator[_Unread]:
    csv.field_size_limit(sys.maxsize)
    lines = (_decode(line, f"{path}, line {number}") for number, line in enumerate(file, start=1))
    reader = csv.DictReader(_without_byte_order_mark(lines), strict=True)
    number = 0
    try:
        _check_header(reader.fieldnames or [], path)
        for number, record in enumerate(reader, start=1):
            yield number, partial(_check_complete, record, f"{path}:{number}")
    except csv.Error as error:
        raise DataError(f"invalid CSV: {error}", f"{path}:{number + 1}") from None


def _check_complete(record: dict[str, Any], source: str) -> dict[str, Any]:
    if None in record or None in record.values():
        raise DataError("the row and the header have different numbers of fields", source)
    return record


def _without_byte_order_mark(lines: Iterator[str]) -> Iterator[str]:
    for first in lines:
        yield first.removeprefix("\ufeff")
        break
    yield from lines


def _check_header(names: Any, path: Path) -> None:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise DataError(f"the header names {', '.join(map(repr, twice))} more than once", str(path))


def _parquet(path: Path, file: BinaryIO) -> Iterator[_Unread]:
    try:
        import pyarrow  # type: ignore[import-untyped, unused-ignore]
        from pyarrow import parquet  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise DataError('reading Parquet needs pyarrow; run: pip install "manylora[train]"', str(path)) from None
    number = 0
    try:
        opened = parquet.ParquetFile(file)
        _check_header(opened.schema_arrow.names, path)
        for batch in opened.iter_batches(batch_size=1000):
            for index in range(batch.num_rows):
                number += 1
                yield number, partial(_parquet_row, batch.slice(index, 1), f"{path}:{number}")
    except pyarrow.ArrowException as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"unreadable Parquet after row {number}: {reason}", str(path)) from None


def _parquet_row(row: Any, source: str) -> dict[str, Any]:
    """Convert a batch of one row to Python. Raises DataError for dates out of Python's range and duplicate keys."""
    try:
        record: dict[str, Any] = row.to_pylist(maps_as_pydicts="strict")[0]
    except (ValueError, KeyError, ArithmeticError) as error:
        raise DataError(f"a value cannot be read: {error}", source) from None
    return record


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: byte {error.start + 1} is 0x{data[error.start]:02x}", source) from None


def _parse(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.rstrip("\r\n") else ""
        raise DataError(f"invalid JSON: {error.msg} at {line}column {error.colno}", source) from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"invalid JSON: {str(error).partition(';')[0]}", source) from None


def _record(value: Any, source: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"a row must be a JSON object, not {_KINDS.get(type(value), 'null')}", source)
    return value


_KINDS = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "true or false"}
_READERS: Mapping[str, Callable[[Path, BinaryIO], Iterator[_Unread]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
