"""``manylora adapters`` against a running server."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest

from adapters.cli import client
from manylora import main
from tests.adapter_folders import DEFECTS, write_adapter
from tests.api.live import ADAPTERS, Live, running, tiny_service, wait_for

ROOT = Path(__file__).parents[3]
Run = Callable[..., tuple[int, str, str]]
"""Words -> exit status, stdout, stderr."""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run a command; none of the three streams is a terminal."""
    for name in ("MANYLORA_URL", "MANYLORA_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["adapters", *map(str, words)])
        return status, *capsys.readouterr()

    with Path(os.devnull).open() as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        yield run


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses, so that its versions start at 1."""
    return str(request.function.__name__)


@pytest.fixture
def ask(live: Live, name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run a command on the shared server; ``name`` and its alias ``prod`` are removed after the test."""
    monkeypatch.setenv("MANYLORA_URL", str(live.http.base_url))
    yield run
    live.http.delete("/v1/aliases/prod")
    live.http.delete(f"/v1/adapters/{name}")


def table(text: str) -> list[dict[str, str]]:
    """Return the first table of tab-separated output."""
    header, *rows = (line.split("\t") for line in text.partition("\n\n")[0].splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_push_generate_and_remove(live: Live, ask: Run, name: str, folders: Mapping[str, Path]) -> None:
    assert ask("push", folders["spare"], "--name", name) == (0, f"registered {name}@1; {name} means {name}@1\n", "")
    assert (
        ask("push", folders["red"], "--name", name, "--no-activate")[1]
        == f"registered {name}@2; {name} means {name}@1\n"
    )
    again = ask("push", folders["spare"], "--name", name)
    assert again[:2] == (0, f"{name}@1 has this content already; {name} means {name}@1\n")
    assert live.text(adapter=f"{name}@2") == live.text(adapter="red") != live.text(adapter=name)
    assert ask("activate", name, "2")[:2] == (0, f"{name} means {name}@2\n")
    assert live.text(adapter=name) == live.text(adapter="red")
    assert ask("activate", f"{name}@1")[:2] == (0, f"{name} means {name}@1\n")
    assert ask("rm", f"{name}@2", "--yes")[:2] == (0, f"removed {name}@2\n")
    assert ask("rm", name, "--yes")[:2] == (0, f"removed {name}\n")
    assert live.http.get(f"/v1/adapters/{name}").status_code == 404


def test_default_name_is_the_folders(
    live: Live, ask: Run, name: str, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(folders["spare"], tmp_path / name)
    assert ask("push", copy, "--pin", "--alias", "prod") == (
        0,
        f"registered {name}@1; {name} means {name}@1\nprod means {name}@1\n",
        "",
    )
    assert live.http.get(f"/v1/adapters/{name}").json()["pinned"] is True
    answer = live.complete(adapter="prod")["adapter"][0]
    assert (answer["name"], answer["alias"]) == (f"{name}@1", "prod")


def test_other_adapters_in_a_folder_are_reported(
    live: Live, ask: Run, name: str, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["spare"], tmp_path / "both")
    shutil.copytree(folders["red"], folder / "german")
    status, said, _ = ask("push", folder, "--name", name)
    first, second = said.splitlines()
    assert (status, first) == (0, f"registered {name}@1; {name} means {name}@1")
    assert second == f"taken from the top of {folder}; left out, the other adapters in it: german"
    shown = {row["field"]: row["value"] for row in table(ask("show", name)[1])}
    assert (shown["receipt.taken_from"], shown["receipt.other_adapters"]) == (".", "german")
    assert {"README.md", "german/README.md"} <= set(shown["receipt.ignored_files"].split(", "))


def test_lists_in_pages_and_as_json(live: Live, ask: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAGE", 1)
    status, text, _ = ask("list")
    rows = {row["name"]: row for row in table(text)}
    assert (status, sorted(rows)) == (0, sorted(ADAPTERS))
    assert (rows["green"]["version"], rows["green"]["rank"], rows["green"]["status"]) == ("1", "8", "ready")
    listed = json.loads(ask("list", "--json")[1])
    assert [card["id"] for card in listed["data"]] == sorted(ADAPTERS)
    assert listed["store"] == live.http.get("/v1/adapters").json()["store"]


def test_shows_an_adapter_and_a_version_with_receipts(
    live: Live, ask: Run, name: str, folders: Mapping[str, Path]
) -> None:
    ask("push", folders["spare"], "--name", name)
    ask("push", folders["red"], "--name", name)
    of_adapter = {row["field"]: row["value"] for row in table(ask("show", name)[1])}
    of_version = {row["field"]: row["value"] for row in table(ask("show", f"{name}@1")[1])}
    assert (of_adapter["id"], of_version["id"]) == (name, f"{name}@1")
    assert of_adapter["content"] == live.http.get("/v1/adapters/red").json()["content"] != of_version["content"]
    assert any(field.startswith("receipt.") for field in of_version)
    versions = table(ask("show", name)[1].partition("\n\n")[2])
    assert [row["content"] for row in versions] == [of_version["content"], of_adapter["content"]]
    assert json.loads(ask("show", name, "--json")[1]) == live.http.get(f"/v1/adapters/{name}").json()


def test_a_table_fits_a_terminal_of_80_columns(
    live: Live, ask: Run, name: str, folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask("push", folders["spare"], "--name", name)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    card = live.http.get(f"/v1/adapters/{name}").json()
    shown = ask("show", name)[1]
    told = {line.split()[0]: line.split(maxsplit=1)[1].strip() for line in shown.splitlines() if len(line.split()) > 1}
    day = datetime.fromtimestamp(card["created"], UTC)
    assert told["content"] == f"{card['content'][:12]}\u2026"
    assert told["receipt.base_fingerprint"] == f"{card['receipt']['base_fingerprint'][:12]}\u2026"
    assert told["created"] == f"{day:%Y-%m-%d %H:%M:%S} UTC"
    assert told["receipt.checked"].endswith(" UTC")
    assert told["receipt.probe.kl"] == f"{card['receipt']['probe']['kl']:.4g}"
    assert told["size"] == "2.8 kB"
    (version,) = [line.split() for line in shown.splitlines() if line.split()[:1] == ["1"]]
    assert version == ["1", *f"{day:%Y-%m-%d %H:%M}".split(), "3", "2.8", "kB", "device", "ready", told["content"]]
    for words in (["list"], ["show", name], ["show", f"{name}@1"]):
        plain = re.sub(r"\x1b\[[0-9;]*m", "", ask(*words)[1])
        assert max(map(len, plain.splitlines())) <= 80, words


def test_push_as_json(live: Live, ask: Run, name: str, folders: Mapping[str, Path]) -> None:
    for new in (True, False):
        pushed = json.loads(ask("push", folders["spare"], "--name", name, "--alias", "prod", "--json")[1])
        assert (pushed["id"], pushed["version"], pushed["new"]) == (name, 1, new)
    assert live.http.get("/v1/aliases/prod").json()["targets"][0]["adapter"] == f"{name}@1"


def test_an_empty_list_says_so_and_what_to_do(ask: Run, run: Run, tmp_path: Path) -> None:
    assert ask("alias", "list")[1:] == (
        "alias\ttarget\tweight\tserves\n",
        "there are no aliases; make one with: manylora adapters alias set ALIAS NAME\n",
    )
    with running(tiny_service(tmp_path)) as empty:
        status, out, told = run("list", "--url", empty.http.base_url)
    assert (status, out.splitlines()[1:]) == (0, ["", "stored: 0 bytes"])
    assert told == "no adapters are registered; upload one with: manylora adapters push DIR --name NAME\n"


def test_pin_and_unpin(live: Live, ask: Run, name: str, folders: Mapping[str, Path]) -> None:
    ask("push", folders["spare"], "--name", name)
    assert ask("pin", name)[:2] == (0, f"{name} is pinned\n")
    assert live.http.get(f"/v1/adapters/{name}").json()["pinned"] is True
    assert ask("pin", name, "--off")[:2] == (0, f"{name} is not pinned\n")
    assert live.http.get(f"/v1/adapters/{name}").json()["pinned"] is False


def test_aliases(live: Live, ask: Run, name: str, folders: Mapping[str, Path]) -> None:
    ask("push", folders["spare"], "--name", name)
    assert ask("alias", "set", "prod", f"{name}@1=90", "red=10")[0] == 0
    rows = [(row["alias"], row["target"], row["weight"], row["serves"]) for row in table(ask("alias", "list")[1])]
    assert set(rows) == {("prod", f"{name}@1", "90", f"{name}@1"), ("prod", "red", "10", "red@1")}
    status, _, told = ask("rm", name, "--yes")
    assert (status, "prod" in told, told.count("\n")) == (1, True, 1)
    assert ask("alias", "rm", "prod")[:2] == (0, "removed prod\n")
    assert live.http.get("/v1/aliases/prod").status_code == 404


@pytest.mark.parametrize("spoiled", ["a_shape", "nan", "no_config", "pickle", "alpha_zero"])
def test_a_refusal_is_one_line_with_its_place(live: Live, ask: Run, name: str, tmp_path: Path, spoiled: str) -> None:
    defect = DEFECTS[spoiled]
    folder = write_adapter(tmp_path / "defect", live.service.base.layout)
    defect.spoil(folder)
    status, out, told = ask("push", folder, "--name", name)
    assert (status, out, told.count("\n")) == (1, "", 1)
    assert told.startswith("manylora: ")
    for part in (defect.file, defect.tensor or "", defect.reason):
        assert part in told
    assert live.http.get(f"/v1/adapters/{name}").status_code == 404


def test_unknown_names(ask: Run, name: str) -> None:
    for words in (
        ["show", name],
        ["activate", "red", "9"],
        ["pin", name],
        ["rm", f"{name}@7", "-y"],
        ["alias", "rm", "x"],
    ):
        status, out, told = ask(*words)
        assert (status, out, told.count("\n")) == (1, "", 1), words
        assert "does not exist" in told
        assert "404" in told


def test_rm_without_a_terminal_needs_yes(live: Live, ask: Run) -> None:
    status, _, told = ask("rm", "red")
    assert (status, "--yes" in told) == (2, True)
    assert live.http.get("/v1/adapters/red").status_code == 200


@pytest.mark.parametrize(("reply", "status"), [("n\n", 1), ("\n", 1), ("y\n", 0)])
def test_rm_asks_for_confirmation(
    live: Live,
    ask: Run,
    name: str,
    folders: Mapping[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    reply: str,
    status: int,
) -> None:
    ask("push", folders["spare"], "--name", name)
    ask("push", folders["red"], "--name", name)
    person, terminal = os.openpty()
    os.write(person, reply.encode())
    with os.fdopen(terminal) as stdin, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        done, _, told = ask("rm", name)
    os.close(person)
    assert (done, f"Remove {name} and its 2 versions?" in told) == (status, True)
    assert (live.http.get(f"/v1/adapters/{name}").status_code == 404) is (status == 0)


def test_url_before_or_after_the_command(live: Live, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(live.http.base_url)
    monkeypatch.setenv("MANYLORA_URL", "http://127.0.0.1:9")
    assert run("--url", url, "list")[0] == run("list", "--url", url)[0] == 0
    status, _, told = run("list")
    assert (status, told.startswith("manylora: no answer from http://127.0.0.1:9: ")) == (1, True)


def test_api_key_from_the_environment(live: Live, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """This server needs no key; an invalid one shows that the key is used."""
    assert run("--api-key", "sesame", "list", "--url", live.http.base_url)[0] == 0
    monkeypatch.setenv("MANYLORA_API_KEY", "s\u00e9same")
    status, _, told = run("list", "--url", live.http.base_url)
    assert (status, "the API key has characters that no header can carry" in told, "same" in told) == (2, True, False)


@pytest.mark.parametrize(
    "words",
    [
        ["lisst"],
        ["list", "--jsn"],
        ["push", "/nowhere"],
        ["push", "/", "--name", "a,b"],
        ["push", "/", "--name", "legal", "--alias", "a,b"],
        ["activate", "legal"],
        ["activate", "legal@1", "2"],
        ["activate", "legal", "0"],
        ["show", "legal@one"],
        ["alias", "set", "prod"],
        ["alias", "set", "prod", "legal=0"],
        ["alias", "set", "prod", "legal=nan"],
        ["alias", "set", "prod", "legal=many"],
        ["--url", "ftp://x", "list"],
        ["--url", "", "list"],
        ["list", "--url", ""],
    ],
    ids=" ".join,
)
def test_usage_errors_exit_with_2(run: Run, words: list[str]) -> None:
    status, out, told = run(*words)
    assert (status, out) == (2, "")
    assert told


def test_reasons_are_not_printed_as_markup(
    run: Run, tmp_path: Path, folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """rich would remove a shape in brackets."""
    watched = tmp_path / "watched"
    watched.mkdir()
    service = tiny_service(tmp_path, adapter_dir=watched)
    defect = DEFECTS["a_shape"]
    defect.spoil(write_adapter(watched / "bad", service.base.layout))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "300")
    with running(service) as live:
        wait_for(lambda: live.http.get("/v1/adapters").json()["refused"])
        status, out, _ = run("list", "--url", live.http.base_url)
    assert (status, "\t" in out) == (0, False)
    assert "refused in the watched folder" in out
    assert defect.reason in out


def test_help_is_quick() -> None:
    """It imports no library that takes seconds to load."""
    command = [sys.executable, "-X", "importtime", "manylora.py", "adapters", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "push" in done.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "fastapi", "sqlalchemy", "numpy"}


def test_unknown_fields_can_be_allowed(live: Live, ask: Run, name: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "odd", live.service.base.layout, shift=0.5)
    status, _, told = ask("push", folder, "--name", name)
    assert (status, "shift: is not known" in told, "--allow-unknown-fields" in told) == (1, True, True)
    assert ask("push", folder, "--name", name, "--allow-unknown-fields")[0] == 0
    assert live.http.get(f"/v1/adapters/{name}").json()["receipt"]["unknown_fields_allowed"] == ["shift"]
