"""The data folders of the replicas of one machine."""

from pathlib import Path

from server.ray.replica import own_folder


def test_each_replica_has_the_first_folder_that_is_free(tmp_path: Path) -> None:
    with own_folder(tmp_path) as first:
        with own_folder(tmp_path) as second:
            assert [first, second] == [tmp_path / "0", tmp_path / "1"]
        with own_folder(tmp_path) as again:
            assert again == second, "a replica that replaces another finds its copies"
