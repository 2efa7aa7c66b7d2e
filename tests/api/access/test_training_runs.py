"""``/v1/training/runs`` asks for the scope ``train``, and shows a key the runs whose names it sees."""

import shutil
from pathlib import Path

from server.access.key_spec import KeySpec
from tests.api.access.callers import caller
from tests.api.access.conftest import client
from tests.api.live import Live

RUNS = "/v1/training/runs"


def test_a_key_sees_the_runs_of_its_names(guarded: Live) -> None:
    for name in ("team/red", "other"):
        shutil.copytree(guarded.content("red"), guarded.service.settings.data_dir / "trained" / name)
    secret = guarded.service.keyring.store.add(KeySpec(name="team", scopes=["train"], adapters=["team/*"]))[1]
    with caller(guarded, "train") as every, caller(guarded, "infer") as other, client(guarded, secret) as team:
        assert {run["id"] for run in every.http.get(RUNS).json()["data"]} == {"team/red", "other"}
        assert [run["id"] for run in team.get(RUNS).json()["data"]] == ["team/red"]
        assert team.get(f"{RUNS}/team/red").status_code == 200
        hidden, unknown = (team.get(f"{RUNS}/{name}").json()["error"] for name in ("other", "nobody"))
        assert hidden["code"] == unknown["code"] == "run_not_found"
        assert other.http.get(RUNS).status_code == 403


def test_a_card_has_samples_only_for_keys_that_train_or_manage(guarded: Live, tmp_path: Path) -> None:
    folder = tmp_path / "legal"
    shutil.copytree(guarded.content("red"), folder)
    (folder / "README.md").write_text("# legal")
    (folder / "samples.json").write_text('[{"wanted": "a held-out row"}]')
    files = [("file", (file.name, file.read_bytes())) for file in folder.iterdir() if file.is_file()]
    with caller(guarded, "adapters") as manager, caller(guarded, "train") as trainer:
        assert manager.http.post("/v1/adapters", data={"name": "legal"}, files=files).status_code == 201
        for each in (manager, trainer):
            assert each.http.get("/v1/adapters/legal?include=card").json()["card"]["samples"]
        with caller(guarded, "infer") as asker, caller(guarded, "metrics") as watcher:
            for each in (asker, watcher):
                answer = each.http.get("/v1/adapters/legal?include=card")
                assert "held-out" not in answer.text
                assert answer.json()["card"]["markdown"] == "# legal"
        assert manager.http.delete("/v1/adapters/legal").status_code == 200
