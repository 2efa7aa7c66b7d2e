"""Training: runs of the trainer itself, live and finished, side by side, and data looked at before a run."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from playwright.sync_api import expect
from rich.console import Console

from server.access.key_spec import KeySpec
from tests.api.live import Live, running, tiny_service
from tests.page.axe import grave
from tests.page.conftest import Visit, look_again
from tests.training.tiny_run import tiny_settings
from training.run.job import Job


def _train(root: Path, name: str, **more: Any) -> Path:
    """Run the trainer, where a server with its data in ``root`` looks for it. Returns the run's folder."""
    out = root / "data" / "trained" / name
    given = {
        **{"name": name, "out": out, "quantization": "none", "eval_share": 0.25, "eval_steps": 4, "judge_rows": 2},
        **{"judge_tokens": 24, "max_loss_ratio": "off", **more},
    }
    Job(tiny_settings(root, **given), Console(file=io.StringIO())).run()
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with two finished runs: ``team/legal``, which the gate refused, and ``small``, which passed."""
    root = tmp_path_factory.mktemp("trained")
    _train(root, "team/legal", min_exact_match=1.0)
    _train(root, "small", r=2)
    with running(tiny_service(root)) as live:
        yield live


def test_runs_from_the_list_to_side_by_side(visit: Visit, trained: Live) -> None:
    page = visit("training", url=str(trained.http.base_url))
    rows = page.get_by_role("region", name="Runs on disk").get_by_role("row")
    expect(rows.filter(has_text="team/legal")).to_contain_text("refused by the gate")
    expect(rows.filter(has_text="small")).to_contain_text("passed")
    page.keyboard.press("/")
    page.keyboard.type("leg")
    expect(rows).to_have_count(2)

    page.get_by_role("link", name="team/legal").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("team/legal")
    judgement = page.get_by_role("region", name="The gate refused it")
    expect(judgement.get_by_role("listitem")).to_contain_text("exact match")
    expect(judgement.get_by_role("row", name="answers that match exactly")).to_contain_text("at least 100%")
    expect(page.get_by_role("figure", name="Loss")).to_be_visible()
    samples = page.get_by_role("region", name="Answers before and after").get_by_role("article")
    expect(samples).to_have_count(2)
    expect(samples.first).to_contain_text("It is ")
    expect(page.get_by_role("region", name="Data")).to_contain_text("18 rows to train on, 6 held out")
    settings = page.get_by_role("region", name="Settings")
    expect(settings.get_by_role("row", name="r 4", exact=True)).to_be_visible()
    expect(settings).to_contain_text(re.compile("Not set: .*early stopping, eval file"))
    expect(settings.get_by_role("row", name="eval file")).to_have_count(0)
    assert grave(page) == []

    page.get_by_role("link", name="All runs").click()
    for name in ("team/legal", "small"):
        page.get_by_label(f"Lay {name} side by side with others").press("Space")
    page.get_by_role("button", name="Lay 2 side by side").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("2 runs side by side")
    page.reload()
    held_out = page.get_by_role("figure", name="Held-out loss")
    expect(held_out.get_by_role("row").first).to_contain_text("team/legal")
    settings = page.get_by_role("region", name="Settings")
    expect(settings.get_by_role("row", name="r 4 2", exact=True)).to_be_visible()
    expect(settings.get_by_role("row", name="max steps")).to_have_count(0)
    settings.get_by_label("also those that agree").check()
    expect(settings.get_by_role("row", name="max steps 8 8")).to_be_visible()
    assert grave(page) == []


def test_a_run_is_watched_while_it_goes_on(visit: Visit, trained: Live) -> None:
    root = trained.service.settings.data_dir / "trained"
    working = root / "going.training"
    working.mkdir()
    log = working / "training.jsonl"
    started = next(line for line in (root / "small" / "training.jsonl").read_text().splitlines() if "started" in line)
    log.write_text(f"{started}\n")
    try:
        with FileLock(working / "lock"):
            page = visit("training/going", url=str(trained.http.base_url))
            state = page.get_by_role("main").get_by_role("status").first
            expect(state).to_have_text("running")
            expect(page.get_by_role("main")).to_contain_text("No step has ended yet")
            with log.open("a") as file:
                for step in (1, 2, 3):
                    print(json.dumps({"time": 2e9 + step, "step": step, "loss": 3.5 - step}), file=file)
            look_again(page)
            expect(page.get_by_role("main")).to_contain_text("3 of 8 steps")
            expect(page.get_by_role("figure", name="Loss").get_by_role("row").last).to_contain_text("0.5")
        look_again(page)
        expect(state).to_have_text("interrupted")
        expect(page.get_by_role("main")).to_contain_text("--resume")
    finally:
        shutil.rmtree(working)
    look_again(page)
    expect(page.get_by_role("alert")).to_contain_text("going")


def test_a_server_without_runs_and_a_key_without_the_scope(visit: Visit, live: Live, tmp_path: Path) -> None:
    page = visit("training")
    expect(page.get_by_role("region", name="Runs on disk")).to_contain_text("No run is on this server's disk yet")
    service = tiny_service(tmp_path)
    secret = service.keyring.store.add(KeySpec(name="app", scopes=["infer"]))[1]
    with running(service) as keyed:
        page = visit("training", url=str(keyed.http.base_url))
        page.get_by_label("API key").fill(secret)
        page.get_by_role("button", name="Continue").click()
        expect(page.get_by_role("main")).to_contain_text("The key app lacks the scope train")


def test_a_file_is_looked_at_before_a_run(visit: Visit, live: Live, tmp_path: Path) -> None:
    page = visit("training")
    data = page.get_by_role("region", name="Look at data before training")
    rows = tmp_path / "my rows.jsonl"
    good = [{"prompt": f"What is {n}?", "completion": "<img src=x onerror=alert(1)>"} for n in range(12)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in good) + '{"prompt": 1}\n')
    with page.expect_file_chooser() as chooser:
        data.get_by_role("button", name="Choose a file").press("Enter")
    chooser.value.set_files(rows)

    report = data.get_by_role("region", name="Report on the data")
    expect(report).to_contain_text("completion")
    expect(report).to_contain_text("Rows that cannot be trained on")
    expect(report).to_contain_text("my rows.jsonl:13")
    expect(report.get_by_role("table").get_by_role("row")).not_to_have_count(0)
    seen = data.get_by_role("article")
    expect(seen).to_have_count(11)  # one of twelve is held out
    # Shown as text, whatever it is; a script that ran would fail the test as a violation of the policy.
    learned = seen.first.locator("mark")
    expect(learned).to_contain_text("<img src=x onerror=alert(1)>")
    expect(learned).not_to_contain_text("What is")

    command = data.get_by_label("Command")
    url, folder = str(live.http.base_url), live.service.settings.data_dir.resolve()
    written = f"manylora train 'my rows.jsonl' --name my-rows --data-dir {folder} --publish {url}"
    expect(command).to_have_text(written)
    data.get_by_label("Data folder of the server").fill("")
    data.get_by_label("Adapter's name").fill("team/numbers")
    data.get_by_label("Rank").fill("8")
    data.get_by_label("Leave out rows").check()
    data.get_by_label("Publish to this server").uncheck()
    expect(command).to_have_text("manylora train 'my rows.jsonl' --name team/numbers --skip-bad -r 8")
    data.get_by_label("Share held out").fill("0.5")
    data.get_by_label("Share held out").press("Enter")
    expect(report).to_contain_text(re.compile(r"held out\s*6"))
    expect(command).to_contain_text("--eval-share 0.5")
    data.get_by_label("Adapter's name").fill("a b")
    expect(data).to_contain_text("begins with a letter or digit")
    assert grave(page) == []

    data.get_by_label("Format").select_option("chat")
    expect(page.get_by_role("alert")).to_contain_text("no row is left to train on; left out: 13 bad")
    expect(data.get_by_role("article")).to_have_count(0)
    data.get_by_role("button", name="Close").click()
    drop = "(group) => { const files = new DataTransfer(); files.items.add(new File(['x'], 'rows.txt')); "
    drop += "group.dispatchEvent(new DragEvent('drop', {dataTransfer: files, bubbles: true, cancelable: true})) }"
    data.get_by_role("group", name="File of examples").evaluate(drop)
    expect(page.get_by_role("alert")).to_contain_text("rows.txt is none of the kinds that can be read")
