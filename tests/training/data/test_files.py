"""Reading rows of each file type; errors name the place."""

import json
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from training.data.conversation import DataError
from training.data.files import read_rows

ROWS = [{"text": 'one, "quoted"'}, {"text": "two\nlines"}, {"text": "drei größer 三"}]


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_each_kind_gives_the_same_rows(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(row) for row in ROWS)
    files = [
        write(tmp_path, "a.jsonl", lines),
        write(tmp_path, "b.json", json.dumps(ROWS, indent=1)),
        write(tmp_path, "c.json", lines + "\n"),
        write(tmp_path, "d.csv", 'text\n"one, ""quoted"""\n"two\nlines"\ndrei größer 三\n'),
        tmp_path / "e.parquet",
    ]
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), files[-1])
    for path in files:
        assert list(read_rows(path)) == list(enumerate(ROWS, start=1)), path.name


def test_the_number_is_the_line_where_lines_are_rows(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '\n{"text": "a"}\n  \n{"text": "b"}\n')
    assert [number for number, _ in read_rows(path)] == [2, 4]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_byte_order_mark_is_not_text(tmp_path: Path, name: str) -> None:
    content = "text\nhi\n" if name.endswith("csv") else '{"text": "hi"}\n'
    assert list(read_rows(write(tmp_path, name, b"\xef\xbb\xbf" + content.encode()))) == [(1, {"text": "hi"})]


@given(st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20), min_size=1, max_size=3), max_size=6))
def test_json_lines_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]) -> None:
    content = "".join(json.dumps(row, ensure_ascii=len(row) > 1) + "\n" for row in [{"first": "row"}, *rows])
    path = write(tmp_path_factory.mktemp("rows"), "a.jsonl", content.encode(errors="surrogatepass"))
    assert [row for _, row in read_rows(path)] == [{"first": "row"}, *rows]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": }\n', r"a\.jsonl:2: invalid JSON: .* at column 10$"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"a\.jsonl:2: a row must be a JSON object, not an array$"),
        ("a.jsonl", "null\n", r"a\.jsonl:1: a row must be a JSON object, not null$"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8: byte 11 is 0xff$"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: invalid JSON: "),
        ("a.jsonl", '{"n": ' + "1" * 5000 + "}", r"a\.jsonl:1: invalid JSON: "),
        ("a.jsonl", "", "the file has no rows"),
        ("a.jsonl", "\n\n", "the file has no rows"),
        ("a.json", "[]", "the file has no rows"),
        ("a.json", '[{"text": "a"},\n {"text" "b"}]', r"a\.json: invalid JSON: .* at line 2, column 10$"),
        ("a.json", '[{"text": "a"}, 3]', r"a\.json:2: a row must be a JSON object, not a number$"),
        ("a.csv", "text\n", "the file has no rows"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv:2: the row and the header have different numbers of fields$"),
        ("a.csv", "a,b\n1,2,3\n", r"a\.csv:1: the row and the header have different numbers of fields$"),
        ("a.csv", 'a,b\n1,"2\n', r"a\.csv:1: invalid CSV"),
        ("a.csv", "a,b,a\n1,2,3\n", r"a\.csv: the header names 'a' more than once$"),
        ("a.csv", b"a,b\n1,\xe9\n", r"a\.csv, line 2: not UTF-8: byte 3 is 0xe9$"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet: unreadable Parquet"),
        ("a.parquet", b"", r"a\.parquet: unreadable Parquet"),
        ("a.txt", "text", r"the name of a data file must end in one of \.jsonl, \.json, \.csv, \.parquet$"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes | str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        list(read_rows(write(tmp_path, name, content)))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: No such file"):
        list(read_rows(tmp_path / "none.jsonl"))


def test_a_long_field_of_a_csv(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text\n" + "x" * 200_000 + "\n")
    assert len(next(read_rows(path))[1]["text"]) == 200_000


TIME = pyarrow.timestamp("ns")
ODD: dict[str, pyarrow.Array] = {
    "a key twice": pyarrow.array([[], [("k", 1), ("k", 2)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    "nanoseconds": pyarrow.array([0, 123456789012345679, 0], TIME),
    "a date beyond Python's": pyarrow.array([0, 2**30, 0], pyarrow.date32()),
    "text that is not UTF-8": pyarrow.array([b"", b"\xff", b""]).view(pyarrow.string()),
}


@pytest.mark.parametrize("kind", ODD)
def test_parquet_value_that_python_cannot_represent(tmp_path: Path, kind: str) -> None:
    """Only that row fails; the others are read."""
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "odd": ODD[kind]}), path)
    refused: list[DataError] = []
    assert [number for number, _ in read_rows(path, refused.append)] == [1, 3]
    (error,) = refused
    assert str(error).startswith(f"{path}:2: a value cannot be read: ")


def test_duplicate_column_names(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="names 'text' more than once"):
        list(read_rows(tmp_path / "a.parquet"))
