"""Every file of a folder gets the mode that the umask gives new ones."""

import os
import stat
from pathlib import Path

from bases.file_modes import apply_umask


def test_modes_are_set_recursively_but_not_on_links(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    (folder / "below").mkdir(parents=True)
    for file in (folder / "a", folder / "below" / "b", outside):
        file.touch(0o600)
    (folder / "link").symlink_to(outside)
    before = os.umask(0o027)
    try:
        apply_umask(folder)
    finally:
        os.umask(before)
    assert [stat.S_IMODE((folder / name).stat().st_mode) for name in ("a", "below/b")] == [0o640, 0o640]
    assert stat.S_IMODE(outside.stat().st_mode) == 0o600
    assert sorted(path.name for path in folder.iterdir()) == ["a", "below", "link"]


def test_leftovers_of_a_killed_process_are_harmless(tmp_path: Path) -> None:
    (tmp_path / ".mode").touch(0o600)
    (tmp_path / "a").touch(0o600)
    apply_umask(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    (tmp_path / "new").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "new").stat().st_mode
