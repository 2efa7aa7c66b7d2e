"""Archives: an adapter's files come out, other files are left out unread; all else is refused, in little memory.

Nothing outside the folder is touched. What trainers leave in a folder is in ``test_trainers.py``, what attackers send
in ``test_hostile_archives.py``.
"""

import gzip
import shutil
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.format.archive import AROUND_BYTES, max_bytes
from adapters.format.files import CONFIG, MAX_FILES, MAX_JSON_BYTES, ORIGIN, WEIGHTS
from adapters.format.selection import MAX_NAMED, Selection
from tests.unit.adapters.archives import FORMATS, GOOD, LIMIT, Bench, entry, tar, tar_of, zip_of


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.parametrize("pack", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("folder", ["", "./", "legal/", "./legal/", "a-" + "ü" * 60 + "/"])
def test_unpacked_files_equal_packed_files(
    bench: Bench, pack: Callable[[dict[str, bytes]], bytes], folder: str
) -> None:
    files = GOOD | {ORIGIN: b"{}"}
    selection = bench.unpack(pack({folder + name: content for name, content in files.items()}))
    assert selection == Selection(folder.removeprefix("./").rstrip("/"))
    assert bench.files() == files


@pytest.mark.parametrize("pack", FORMATS.values(), ids=FORMATS)
def test_other_files_are_ignored_and_named(bench: Bench, pack: Callable[[dict[str, bytes]], bytes]) -> None:
    """Of any size, anywhere in the archive, and in its order."""
    others = {
        "legal/notes.md": b"# legal",
        "legal/checkpoint-500/optimizer.pt": bytes(LIMIT * 3),
        "legal/tokenizer.json": bytes(MAX_JSON_BYTES + 1),
        "legal/._adapter_config.json": b"\0\5\x16\7",
        "__MACOSX/legal/._adapter_model.safetensors": b"\0\5\x16\7",
        f"__MACOSX/{CONFIG}": b"of no adapter",
        f"__MACOSX/{WEIGHTS}": b"of no adapter",
        ".DS_Store": b"",
        "legal/a\n\x1b": b"",
        f"legal/{CONFIG.upper()}": b"",
    }
    files = {"legal/" + name: content for name, content in GOOD.items()}
    selection = bench.unpack(pack({**dict(list(others.items())[:3]), **files, **dict(list(others.items())[3:])}))
    ignored = tuple(path.replace("\n", "?").replace("\x1b", "?") for path in others)
    assert selection == Selection("legal", ignored, len(others))
    assert bench.files() == GOOD


@pytest.mark.parametrize("pack", FORMATS.values(), ids=FORMATS)
def test_the_adapter_nearest_the_top_is_taken(bench: Bench, pack: Callable[[dict[str, bytes]], bytes]) -> None:
    """Wherever the other copies are in the archive; these are named."""
    copies = {f"run/{folder}/{name}": b"other" for folder in ("german", "checkpoint-1/x") for name in GOOD}
    mine = {f"run/{name}": content for name, content in GOOD.items()}
    for files in (copies | mine, mine | copies):
        selection = bench.unpack(pack(files))
        assert selection == Selection("run", tuple(copies), 4, ("run/german", "run/checkpoint-1/x"))
        assert bench.files() == GOOD


@pytest.mark.parametrize("pack", FORMATS.values(), ids=FORMATS)
def test_an_adapter_anywhere_is_found_if_it_is_the_only_one(
    bench: Bench, pack: Callable[[dict[str, bytes]], bytes]
) -> None:
    files = {f"out/run/checkpoint-500/{name}": content for name, content in GOOD.items()}
    above = {f"out/{CONFIG}": b"written before training", f"out/run/{ORIGIN}": b"{}"}
    selection = bench.unpack(pack(above | files))
    assert (selection.folder, selection.ignored) == ("out/run/checkpoint-500", tuple(above))
    assert bench.files() == GOOD


@pytest.mark.parametrize("pack", FORMATS.values(), ids=FORMATS)
def test_several_adapters_are_refused(bench: Bench, pack: Callable[[dict[str, bytes]], bytes]) -> None:
    files = {f"run/checkpoint-{step}/{name}": b"" for step in range(12) for name in GOOD}
    refusal = bench.refused(pack(files), "there are 12 adapters in it: run/checkpoint-0, run/checkpoint-1, ")
    assert refusal.reason.endswith("run/checkpoint-9 and 2 more; send one at a time")
    assert bench.files() == {}


def test_weights_without_a_config_are_refused(bench: Bench) -> None:
    """A copy further down may be an older one."""
    copy = {f"checkpoint-1/{name}": b"old" for name in GOOD}
    assert bench.refused(tar_of({WEIGHTS: b"new", **copy}), "is missing").file == CONFIG
    pickle = bench.refused(tar_of({"adapter_model.bin": b"new", CONFIG: b"{}", **copy}), "is a pickle")
    assert pickle.file == "adapter_model.bin"


def test_at_most_max_named_ignored_files_are_named(bench: Bench) -> None:
    """And all are counted."""
    many = {f"runs/{index}.json": b"{}" for index in range(MAX_FILES - 2)}
    for pack in (tar_of, zip_of):
        selection = bench.unpack(pack(many | GOOD))
        assert (len(selection.ignored), selection.ignored_count) == (MAX_NAMED, MAX_FILES - 2)


@pytest.mark.parametrize("arguments", [["-C", "legal", "."], ["-C", ".", "legal"], ["-C", ".", "./legal"]])
@pytest.mark.parametrize("format", ["gnu", "pax", "v7", "ustar"])
def test_archive_of_the_tar_command(bench: Bench, tmp_path: Path, arguments: list[str], format: str) -> None:
    folder = tmp_path / "staging" / "legal"
    folder.mkdir()
    for name, content in GOOD.items():
        (folder / name).write_bytes(content)
    command = ["tar", f"--format={format}", "-czf", "-", *arguments]
    packed = subprocess.run(command, cwd=folder.parent, check=True, capture_output=True).stdout
    shutil.rmtree(folder)
    assert bench.unpack(packed) == Selection("" if arguments[1] == "legal" else "legal")
    assert bench.files() == GOOD


def test_zip_with_folder_entries(bench: Bench) -> None:
    files = {"legal/": b"", **{f"legal/{name}": content for name, content in GOOD.items()}}
    assert bench.unpack(zip_of(files)) == Selection("legal")
    assert bench.files() == GOOD


@pytest.mark.parametrize("pack", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (f"/{CONFIG}", "is not a relative path"),
        (f"../{CONFIG}", "leads out of its folder"),
        (f"legal/../{CONFIG}", "leads out of its folder"),
        (f"..\\{CONFIG}", "is not a relative path"),
        (f"C:{CONFIG}", "is not a relative path"),
        ("../training_args.bin", "leads out of its folder"),
        ("C:\\checkpoint\\optimizer.pt", "is not a relative path"),
        ("../" + "x\n\x1b" * 20, "leads out of its folder"),
        ("x" * 1025, "more than 1024 characters"),
    ],
    ids=repr,
)
def test_refused_members(bench: Bench, pack: Callable[[dict[str, bytes]], bytes], name: str, reason: str) -> None:
    if pack is FORMATS["ustar"] and len(name) > 1000:
        return  # the format cannot hold such a long name
    refusal = bench.refused(pack({WEIGHTS: b"x", name: b"{}"}), reason)
    assert refusal.file is not None
    assert refusal.file.isprintable()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tarfile.SYMTYPE, "is a link"),
        (tarfile.LNKTYPE, "is a link"),
        (tarfile.CHRTYPE, "is a device or FIFO"),
        (tarfile.BLKTYPE, "is a device or FIFO"),
        (tarfile.FIFOTYPE, "is a device or FIFO"),
        (tarfile.GNUTYPE_SPARSE, "is a sparse file"),
        (b"Z", "is of an unusual kind"),
    ],
)
@pytest.mark.parametrize("name", [CONFIG, "checkpoint-500/latest"])
def test_refused_member_types_in_a_tar(bench: Bench, kind: bytes, reason: str, name: str) -> None:
    files = [entry(*item) for item in GOOD.items()]
    refusal = bench.refused(tar(*files, entry(name, b"", type=kind, linkname="/etc/passwd")), reason)
    assert refusal.file == name
    assert bench.files() == {}


def test_sparse_file_in_pax_format(bench: Bench) -> None:
    sparse = entry(CONFIG, b"{}", pax_headers={"GNU.sparse.map": "0,2", "GNU.sparse.size": str(1 << 40)})
    bench.refused(tar(sparse), "is a sparse file")


@pytest.mark.parametrize("mode", [0o120777, 0o020644, 0o010644, 0o060644, 0o140644])
def test_refused_member_types_in_a_zip(bench: Bench, mode: int) -> None:
    bench.refused(zip_of({CONFIG: b"/etc/passwd"}, external_attr=mode << 16), "is a link or a device")
    bench.refused(zip_of({"notes.md": b"/etc/passwd"}, external_attr=mode << 16), "is a link or a device")


def test_zip_folder_with_the_mode_of_a_file(bench: Bench) -> None:
    bench.refused(zip_of({"legal/": b""}, external_attr=0o100644 << 16), "is a link or a device")


def test_duplicate_member_in_a_tar(bench: Bench) -> None:
    weights = entry(WEIGHTS, b"x")
    bench.refused(tar(weights, entry(CONFIG, b"1"), entry(f"./{CONFIG}", b"2")), "occurs twice")
    assert bench.refused(tar(weights, weights, entry(CONFIG, b"1")), "occurs twice").file == WEIGHTS


def test_duplicate_member_in_a_zip(bench: Bench) -> None:
    bench.refused(zip_of({WEIGHTS: b"x", CONFIG: b"1", f"./{CONFIG}": b"2"}), "occurs twice")


@pytest.mark.parametrize("flag", [0x1, 0x40])
def test_encrypted_zip(bench: Bench, flag: int) -> None:
    data = zip_of({CONFIG: b"{}"})
    place = data.index(b"PK\1\2") + 8
    bench.refused(data[:place] + struct.pack("<H", flag) + data[place + 2 :], "is encrypted")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_unsupported_zip_compression(bench: Bench, method: int) -> None:
    bench.refused(zip_of({WEIGHTS: b"x", CONFIG: b"{}"}, method), "is compressed by another method")


@pytest.mark.parametrize("pack", FORMATS.values(), ids=FORMATS)
def test_file_larger_than_allowed(bench: Bench, pack: Callable[[dict[str, bytes]], bytes]) -> None:
    large_weights, large_config = GOOD | {WEIGHTS: bytes(LIMIT + 1)}, GOOD | {CONFIG: bytes(MAX_JSON_BYTES + 1)}
    assert bench.refused(pack(large_weights), "is larger than 200000 bytes").file == WEIGHTS
    assert bench.refused(pack(large_config), "is larger than").file == CONFIG


@pytest.mark.parametrize("size", [0, 5, 900])
def test_zip_with_a_wrong_size(bench: Bench, size: int) -> None:
    data = zip_of({CONFIG: b"1234567890", WEIGHTS: b"x"}, zipfile.ZIP_STORED)
    place = data.index(b"PK\1\2") + 20
    bench.refused(data[:place] + struct.pack("<II", size, size) + data[place + 8 :], "damaged|cut short")
    bench.refused(data[: place + 4] + struct.pack("<I", size) + data[place + 8 :], "damaged|cut short")


def test_tar_with_a_wrong_size(bench: Bench) -> None:
    data = bytearray(tar_of({CONFIG: b"{}", WEIGHTS: b"x" * 600}))
    info = tarfile.TarInfo(CONFIG)
    for size, reason in ((1 << 33, "cut short"), (3_000_000, "cut short"), (-512, "size below zero")):
        info.size = size
        bench.refused(info.tobuf(tarfile.GNU_FORMAT) + data[512:], reason)


def test_too_many_members(bench: Bench) -> None:
    folders = [entry("legal", type=tarfile.DIRTYPE)] * (MAX_FILES + 1)
    bench.refused(tar(*folders), "more than 4096 files and folders: pack only the adapter's own files: adapter_config")
    bench.refused(zip_of({str(index): b"" for index in range(MAX_FILES + 1)}), "more than 4096 files and folders")


def test_zip_directory_too_large(bench: Bench) -> None:
    bench.refused(zip_of({**GOOD, **{f"{number:0200}": b"" for number in range(MAX_FILES)}}), "pack only the adapter's")


def test_member_name_with_a_nul(bench: Bench) -> None:
    name = CONFIG.encode()
    data = zip_of({CONFIG: b"{}"}).replace(name, name[:-5] + b"\0json")
    bench.refused(data, "is not a relative path|damaged")


@pytest.mark.parametrize("pack", FORMATS.values(), ids=FORMATS)
def test_truncated_archive(bench: Bench, pack: Callable[[dict[str, bytes]], bytes]) -> None:
    data = pack(GOOD)
    whole = len(data.rstrip(b"\0")) if data[:2] not in (b"PK", b"\x1f\x8b") else len(data)
    for length in [*range(0, 600, 7), *range(600, whole, 9973), whole - 1, whole]:
        if length < len(data):
            bench.refused(data[:length], "cut short|damaged")


@pytest.mark.parametrize("pack", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("change", [lambda data: data + data, lambda data: data + b"x", lambda data: b"x" + data])
def test_archive_followed_by_another(
    bench: Bench, pack: Callable[[dict[str, bytes]], bytes], change: Callable[[bytes], bytes]
) -> None:
    bench.refused(change(pack(GOOD)), "goes on after its end|bytes before or after|damaged")


def test_bytes_before_a_zip(bench: Bench) -> None:
    bench.refused(b"PK\3\4 and something else" + zip_of(GOOD), "bytes before or after")


@pytest.mark.parametrize("data", [b"", b"PK", b"\x1f\x8b", b"Rar!\x1a\x07", b"{}" * 1000, bytes(1024), b"\xff" * 5000])
def test_not_an_archive(bench: Bench, data: bytes) -> None:
    """tarfile sees an empty archive in zeros, and so does tar."""
    bench.refused(data, "is missing" if data == bytes(1024) else "damaged|cut short")


def test_largest_adapter_fits_with_one_training_checkpoint() -> None:
    """Its weights again and two moments of an optimizer, and four times the largest tokenizer."""
    assert max_bytes(1 << 30) >= (4 << 30) + 4 * 40_000_000
    assert AROUND_BYTES < 1 << 30


def test_a_gzip_with_a_wrong_checksum(bench: Bench) -> None:
    data = gzip.compress(tar_of(GOOD))
    bench.refused(data[:-8] + struct.pack("<I", zlib.crc32(b"")) + data[-4:], "damaged")
