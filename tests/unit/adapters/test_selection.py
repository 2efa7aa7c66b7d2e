"""Selecting an adapter among many files, and recognising foreign formats."""

import os
from pathlib import Path

import pytest

from adapters.errors import AdapterRejected
from adapters.format.files import CONFIG, MAX_FILES, ORIGIN, WEIGHTS, listing
from adapters.format.selection import MAX_NAMED, Selection, select, select_in_folder
from tests.trainers import FORMATS, TRAINERS, Output


def make(folder: Path, files: tuple[str, ...]) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("tool", TRAINERS)
def test_selects_the_adapter_in_a_trainers_folder(tool: str) -> None:
    output = TRAINERS[tool]
    expected = Selection(output.adapter, output.beside(), len(output.beside()), output.others)
    assert select(output.files) == expected


@pytest.mark.parametrize("format", FORMATS)
def test_foreign_formats_are_named_with_the_way_to_convert(format: str, tmp_path: Path) -> None:
    files, file, reason = FORMATS[format]
    for look in (lambda: select(files), lambda: select_in_folder(make(tmp_path, files))):
        with pytest.raises(AdapterRejected) as refusal:
            look()
        assert (refusal.value.file, reason in refusal.value.reason) == (file, True), refusal.value


@pytest.mark.parametrize("format", FORMATS)
def test_peft_weights_win_over_foreign_formats(format: str) -> None:
    assert select({*FORMATS[format][0], CONFIG, WEIGHTS}).folder == ""
    with pytest.raises(AdapterRejected, match=f"^{CONFIG}: is missing$"):
        select({*FORMATS[format][0], WEIGHTS} - {CONFIG})


def test_adapters_only_in_subfolders_are_refused(tmp_path: Path) -> None:
    """The caller gives a path on this machine, so it can give the right one."""
    make(tmp_path / "run", (f"checkpoint-1/{CONFIG}", f"checkpoint-1/{WEIGHTS}", CONFIG))
    with pytest.raises(AdapterRejected, match=r"^run: holds no adapter itself, but checkpoint-1 in it does: "):
        select_in_folder(tmp_path / "run")
    make(tmp_path / "run", (f"checkpoint-2/{CONFIG}", f"checkpoint-2/{WEIGHTS}"))
    with pytest.raises(AdapterRejected, match=r"^there are 2 adapters in it: checkpoint-1, checkpoint-2; send one"):
        select_in_folder(tmp_path / "run")
    make(tmp_path / "run", (WEIGHTS, ORIGIN))
    assert select_in_folder(tmp_path / "run").others == ("checkpoint-1", "checkpoint-2")


def test_a_large_folder_is_not_listed_to_its_end(tmp_path: Path) -> None:
    make(tmp_path, ("zz", *(f"{index}/x" for index in range(MAX_FILES)), CONFIG, WEIGHTS))
    assert len(listing(tmp_path)) == MAX_FILES
    selection = select_in_folder(tmp_path)
    assert (len(selection.ignored), selection.ignored_count) == (MAX_NAMED, MAX_FILES - 2)


def test_nothing_behind_a_link_is_listed(tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", ("secret",))
    folder = make(tmp_path / "legal", (CONFIG, "notes.txt"))
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere" / "secret")
    os.mkfifo(folder / "pipe")
    assert select_in_folder(folder).ignored == ("notes.txt", "pipe")


def test_file_names_that_are_not_utf8_are_printable(tmp_path: Path) -> None:
    folder = make(tmp_path, (CONFIG, WEIGHTS))
    (Path(os.fsdecode(os.fsencode(folder) + b"/\xff\n"))).touch()
    assert select_in_folder(folder).ignored == ("??",)


HOSTILE = "a\n\x1b[31m\udcff"
"""A folder's name with a line break, a terminal escape sequence, and a byte that is not UTF-8."""


def test_folder_names_are_printed_without_control_characters() -> None:
    assert select({f"{HOSTILE}/{CONFIG}", f"{HOSTILE}/{WEIGHTS}"}).receipt()["taken_from"] == "a??[31m?"


@pytest.mark.parametrize(("there", "missing"), [(CONFIG, WEIGHTS), (WEIGHTS, CONFIG)])
def test_missing_files_are_printed_without_control_characters(there: str, missing: str) -> None:
    with pytest.raises(AdapterRejected) as refusal:
        select({f"{HOSTILE}/{there}"})
    assert refusal.value.file == f"a??[31m?/{missing}"


def test_macosx_folder_is_ignored() -> None:
    files = Output((f"__MACOSX/{CONFIG}", f"__MACOSX/{WEIGHTS}", f"a/{CONFIG}", f"a/{WEIGHTS}"), "a")
    assert select(files.files) == Selection("a", files.files[:2], 2)
