"""Rows of a file: JSON Lines, JSON, CSV or Parquet."""

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from training.conversation import DataError

Row = tuple[int, dict[str, Any]]
"""A row and its number from 1: the line in JSON Lines, else the record (a CSV's header is not counted)."""


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, one at a time (of a JSON array all at once).

    Which kind of file it is, its ending says; a ``.json`` may hold one array or a line for each row. Raises DataError.
    """
    read = _reader(path)
    try:
        with path.open("rb") as file:
            row = 0
            for row, record in read(path, file):
                yield row, record
    except OSError as error:
        raise DataError(error.strerror or str(error), str(path)) from None
    if row == 0:
        raise DataError("there are no rows in it", str(path))


def check_file(path: Path) -> None:
    """Raises DataError where :func:`read_rows` could not begin."""
    _reader(path)
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(error.strerror or str(error), str(path)) from None


def _reader(path: Path) -> Callable[[Path, BinaryIO], Iterator[Row]]:
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(f"a data file's name ends in one of {', '.join(_READERS)}", str(path))
    return read


def _json_lines(path: Path, file: BinaryIO) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        text = _decode(line, f"{path}:{number}").removeprefix("\ufeff" if number == 1 else "")
        if text.strip():
            yield number, _record(_parse(text, f"{path}:{number}"), f"{path}:{number}")


def _json(path: Path, file: BinaryIO) -> Iterator[Row]:
    if not _begins_with_bracket(file):
        yield from _json_lines(path, file)
        return
    text = _decode(file.read(), str(path)).removeprefix("\ufeff")
    for number, value in enumerate(_parse(text, str(path)), start=1):
        yield number, _record(value, f"{path}:{number}")


def _begins_with_bracket(file: BinaryIO) -> bool:
    """Whether the first character that is no space opens an array; the file is at its beginning afterwards."""
    first = b""
    for line in file:
        if first := line.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]:
            break
    file.seek(0)
    return first == b"["


def _csv(path: Path, file: BinaryIO) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    lines = (_decode(line, f"{path}, line {number}") for number, line in enumerate(file, start=1))
    reader = csv.DictReader(_without_mark(lines), strict=True)
    number = 0
    try:
        _check_header(reader.fieldnames or [], path)
        for number, record in enumerate(reader, start=1):
            if None in record or None in record.values():
                raise DataError("it has not as many fields as the header", f"{path}:{number}")
            yield number, record
    except csv.Error as error:
        raise DataError(f"no valid CSV: {error}", f"{path}:{number + 1}") from None


def _without_mark(lines: Iterator[str]) -> Iterator[str]:
    for first in lines:
        yield first.removeprefix("\ufeff")
        break
    yield from lines


def _check_header(names: Any, path: Path) -> None:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise DataError(f"its header names {', '.join(map(repr, twice))} more than once", str(path))


def _parquet(path: Path, file: BinaryIO) -> Iterator[Row]:
    try:
        import pyarrow  # type: ignore[import-untyped, unused-ignore]
        from pyarrow import parquet  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise DataError("reading Parquet needs pyarrow: pip install pyarrow", str(path)) from None
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=1000):
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except pyarrow.ArrowException as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"no readable Parquet after row {number}: {reason}", str(path)) from None


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
        raise DataError(f"no valid JSON: {error.msg} at {line}column {error.colno}", source) from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"no valid JSON: {str(error).partition(';')[0]}", source) from None


def _record(value: Any, source: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"a row is a JSON object, not {_KINDS.get(type(value), 'null')}", source)
    return value


_KINDS = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "true or false"}
_READERS: Mapping[str, Callable[[Path, BinaryIO], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
