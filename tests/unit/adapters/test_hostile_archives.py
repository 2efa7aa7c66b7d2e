"""Malicious archives are refused or give only an adapter's files, and take little memory."""

import gzip
import io
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import AdapterRejected
from adapters.format import archive
from adapters.format.archive import MAX_TAR_HEADER_BYTES, unpack
from adapters.format.files import CONFIG, FILES, WEIGHTS
from tests.unit.adapters.archives import FORMATS, GOOD, LIMIT, MIB, Bench, entry, tar, tar_of, zip_of

SMALL = 16 * MIB
"""A smaller AROUND_BYTES for the decompression bombs: the real one makes slow tests."""


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def pax_bomb() -> bytes:
    return tar(entry(CONFIG, b"{}", pax_headers={"comment": "x" * 50 * MIB}))


def long_name_bomb() -> bytes:
    return tar(entry("x" * 50 * MIB, b"{}"), format=tarfile.GNU_FORMAT)


def long_name_chain() -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 512
    return (info.tobuf(tarfile.GNU_FORMAT) + b"x".ljust(512, b"\0")) * 3000


def directory_bomb() -> bytes:
    return zip_of({f"{index:0100}": b"" for index in range(20_000)})


def extra_bomb() -> bytes:
    extra = b"\xfe\xca" + struct.pack("<H", 65_000) + bytes(65_000)
    return zip_of({str(index): b"" for index in range(500)}, extra=extra)


def endless_tail() -> bytes:
    return tar_of(GOOD) + bytes(100 * MIB)


def endless_readme() -> bytes:
    return tar_of({"README.md": bytes(100 * MIB)})


def zip_bomb() -> bytes:
    data = zip_of({WEIGHTS: bytes(100 * MIB), CONFIG: b"{}"})
    place = data.index(b"PK\1\2") + 24
    return data[:place] + struct.pack("<I", 1000) + data[place + 4 :]


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "pax header": (pax_bomb, f"header larger than {MAX_TAR_HEADER_BYTES}"),
    "long name": (long_name_bomb, f"header larger than {MAX_TAR_HEADER_BYTES}"),
    "long names": (long_name_chain, f"header larger than {MAX_TAR_HEADER_BYTES}"),
    "zip directory": (directory_bomb, "directory larger than"),
    "zip extra fields": (extra_bomb, "directory larger than"),
    "tail": (endless_tail, f"more than {SMALL + 4 * LIMIT} bytes"),
    "left out": (endless_readme, f"more than {SMALL + 4 * LIMIT} bytes"),
    "weights": (lambda: tar_of({CONFIG: b"{}", WEIGHTS: bytes(10 * MIB)}), "is larger than"),
    "zip": (zip_bomb, "damaged"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_decompression_bombs_take_little_memory(bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "AROUND_BYTES", SMALL)
    make, reason = BOMBS[name]
    data = make()
    refused_in_little_memory(bench, data, reason)
    if data[:2] != b"PK":
        refused_in_little_memory(bench, gzip.compress(data, 1), reason)


def refused_in_little_memory(bench: Bench, data: bytes, reason: str) -> None:
    for path in bench.staging.iterdir():
        path.unlink()
    bench.archive.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(AdapterRejected, match=reason):
            unpack(bench.archive, bench.staging, LIMIT)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * MIB
    assert sum(path.stat().st_size for path in bench.staging.iterdir()) <= LIMIT


NAMES = st.one_of(
    st.sampled_from([*FILES, "README.md", "", ".", "..", "/", "\\", "C:", "legal", "\0", "\udc80", "..."]),
    st.text(max_size=5),
)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
TYPES = st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, b"x"])


@given(st.lists(st.tuples(PATHS, st.binary(max_size=600), TYPES, PATHS), max_size=5), st.booleans())
def test_hostile_tars(members: list[tuple[str, bytes, bytes, str]], packed: bool) -> None:
    data = tar(*[entry(path, content, type=kind, linkname=link) for path, content, kind, link in members])
    any_outcome(gzip.compress(data, 1) if packed else data)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@given(st.lists(st.tuples(PATHS.filter(lambda path: "\udc80" not in path), st.binary(max_size=600)), max_size=5))
def test_hostile_zips(members: list[tuple[str, bytes]]) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for path, content in members:
            archive.writestr(zipfile.ZipInfo(path), content)
    any_outcome(file.getvalue())


@given(
    st.sampled_from(list(FORMATS)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6),
)
def test_damaged_archives(format: str, changes: list[tuple[float, bytes]]) -> None:
    data = bytearray(FORMATS[format]({"a/" + CONFIG: b"{}", "a/" + WEIGHTS: bytes(range(256)), "a/README.md": b""}))
    for place, change in changes:
        start = int(place * len(data))
        data[start : start + len(change)] = change
    any_outcome(bytes(data))


def any_outcome(data: bytes) -> None:
    """Accepted or refused, with only the adapter's files in the folder, and nothing outside changed."""
    with TemporaryDirectory() as root:
        bench = Bench(Path(root))
        with suppress(AdapterRejected):
            bench.unpack(data)
            assert {CONFIG, WEIGHTS} <= bench.files().keys()
