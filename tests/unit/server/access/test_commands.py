"""``manylora keys``, on a folder that no server uses."""

import json
import re
import time
from contextlib import closing
from pathlib import Path

import pytest

import manylora
from server.access.key_file import GivenKeys
from server.access.key_store import KeyStore
from server.access.keyring import Keyring
from server.database import open_database
from server.errors import UnknownKey


class Cli:
    """Runs ``manylora keys`` on one folder."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys

    def run(self, *words: str, status: int = 0) -> tuple[str, str]:
        """Return what it prints on stdout and stderr; assert its exit status."""
        found = manylora.main(["keys", *words, "--data-dir", str(self.folder)])
        out, err = self._capsys.readouterr()
        assert found == status, (out, err)
        return out, err

    def name_of(self, secret: str) -> str | None:
        with closing(open_database(self.folder, None)) as database:
            key = Keyring(KeyStore(database), GivenKeys(None, {})).find(secret)
        return None if key is None else key.name


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    for name in ("DATA_DIR", "DATA", "DATABASE_URL"):
        monkeypatch.delenv(f"MANYLORA_{name}", raising=False)
    return Cli(tmp_path / "new" / "folder", capsys)


def test_add_prints_the_secret_and_nothing_else_on_stdout(cli: Cli) -> None:
    out, err = cli.run("add", "alice")
    assert re.fullmatch(r"sk-ml-[\w-]{43}\n", out)
    assert out.strip() not in err
    assert "its secret is not shown again" in err
    assert cli.name_of(out.strip()) == "alice"


def test_all_options(cli: Cli) -> None:
    words = "--scope infer,metrics --scope adapters --adapter acme/* --adapter prod --expires 30d --rpm 60 --tpm 1000"
    more = "--parallel 4 --tokens-per-month 1000000 --weight 2.5 --json"
    out, _ = cli.run("add", "acme", *words.split(), *more.split())
    made = json.loads(out)
    assert made["secret"].startswith(made["prefix"])
    assert (made["scopes"], made["adapters"]) == (["adapters", "infer", "metrics"], ["acme/*", "prod"])
    assert made["limits"] == {
        "requests_per_minute": 60,
        "tokens_per_minute": 1000,
        "parallel_requests": 4,
        "tokens_per_month": 1000000,
    }
    assert made["weight"] == 2.5
    assert made["expires"] - time.time() == pytest.approx(30 * 86400, abs=60)
    assert json.loads(cli.run("add", "base", "--base-only", "--json")[0])["adapters"] == []
    assert json.loads(cli.run("add", "day", "--expires", "2100-01-31", "--json")[0])["expires"] == 4105036800


def test_list(cli: Cli) -> None:
    assert "every request is served" in cli.run("list")[1]
    secret = cli.run("add", "alice", "--adapter", "acme/*", "--rpm", "60")[0].strip()
    out, _ = cli.run("list")
    head, line = out.splitlines()
    row = dict(zip(head.split("\t"), line.split("\t"), strict=True))
    assert (row["name"], row["scopes"], row["adapters"], row["limits"]) == ("alice", "infer", "acme/*", "60 rpm")
    assert (row["secret"], row["state"]) == (f"{secret[:12]}...", "valid")
    assert secret not in out
    cli.run("revoke", row["id"])
    out, err = cli.run("list")
    assert len(out.splitlines()) == 1
    assert "every key is revoked" in err
    assert "revoked 2" in cli.run("list", "--all")[0]
    (shown,) = json.loads(cli.run("list", "--all", "--json")[0])["data"]
    assert shown["revoked"] is not None
    assert "digest" not in shown


def test_revoke_and_rotate(cli: Cli) -> None:
    first = cli.run("add", "alice")[0].strip()
    out, err = cli.run("rotate", "alice", "--overlap", "1h")
    second = out.strip()
    assert "the old secret is accepted for 1h" in err
    assert "old secret until" in cli.run("list")[0]
    assert cli.name_of(first) == cli.name_of(second) == "alice"
    third = cli.run("rotate", "alice")[0].strip()
    assert (cli.name_of(first), cli.name_of(second), cli.name_of(third)) == (None, None, "alice")
    assert re.fullmatch(r"revoked alice \(key_[0-9a-f]{16}\)\n", cli.run("revoke", "alice")[0])
    assert cli.name_of(third) is None
    for command in ("revoke", "rotate"):
        assert cli.run(command, "alice", status=UnknownKey.exit_status)[1] == "manylora: There is no key `alice`.\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a b"], "must be 1 to 64 letters, digits and . _ @ -"),
        (["a", "--scope", "root"], "must be 'infer', 'adapters', 'train', 'metrics' or 'admin'"),
        (["a", "--adapter", "*x"], "must be the name of an adapter or an alias"),
        (["a", "--scope", "admin", "--adapter", "x"], "a key with the scope admin sees all adapters"),
        (["a", "--adapter", "x", "--base-only"], "give one of --adapter and --base-only"),
        (["a", "--expires", "soon"], "'soon' is neither a duration, as 30d, nor a date"),
        (["a", "--expires", "2020-01-01"], "2020-01-01 is in the past"),
        (["a", "--expires", "999999999w"], "is not a duration"),
        (["a", "--rpm", "0"], "must be at least 1"),
        (["a", "--weight", "0"], "must be more than 0"),
    ],
)
def test_bad_options_are_one_line(cli: Cli, words: list[str], message: str) -> None:
    out, err = cli.run("add", *words, status=2)
    assert out == ""
    assert len(err.splitlines()) == 1
    assert message in err
    assert "every request is served" in cli.run("list")[1], "no key was made"


def test_a_taken_name(cli: Cli) -> None:
    cli.run("add", "a")
    assert "A key named `a` exists" in cli.run("add", "a", status=1)[1]
