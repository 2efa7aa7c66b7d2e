"""``manylora train`` and ``manylora export`` as a user runs them: from rows to answers, and what failures leave."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from markdown_it import MarkdownIt
from rich.console import Console
from transformers import AutoModelForCausalLM

from manylora import main
from tests.api.live import Live, running, tiny_service, unchanged, wait_for
from tests.tiny import tiny_model
from tests.training.rows import question, write_rows
from tests.training.tiny_run import tiny_settings
from tests.training.tiny_server import address, serving
from training.data.data_report import printable
from training.run.job import Job
from training.run.run_folder import RunFolder

ROOT = Path(__file__).parents[3]
Run = Callable[..., tuple[int, str, str]]
"""Words -> exit status, stdout, stderr."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, its cache, and rows."""
    root = tmp_path_factory.mktemp("commands")
    tiny_settings(root)
    return root


@pytest.fixture(scope="module")
def live(root: Path) -> Iterator[Live]:
    with serving(tiny_settings(root), root / "served") as live:
        yield live


@pytest.fixture
def train(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a short training; ``words`` come after the options that make it short, and win."""

    def run(*words: object, data: Path = root / "rows.jsonl") -> tuple[int, str, str]:
        short = {
            "name": "tiny", "model": root / "base", "data-dir": root / "data", "out": tmp_path / "adapter",
            "device": "cpu", "dtype": "fp32", "report-to": "none", "max-steps": 8, "batch-size": 2, "judge-tokens": 32,
        }  # fmt: skip
        given = [text for name, value in short.items() if f"--{name}" not in words for text in (f"--{name}", value)]
        capsys.readouterr()
        status = main(["train", str(data), *map(str, [*given, *words])])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def export(root: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["export", *map(str, words), "--data-dir", str(root / "data")])
        return status, *capsys.readouterr()

    return run


def test_train_publish_and_generate(live: Live, train: Run, tmp_path: Path) -> None:
    status, said, errors = train("--publish", address(live), "--alias", "prod", "--name", "first")
    assert status == 0, errors
    assert errors == "", "bars and such: nothing here is a terminal"
    assert not any(ord(letter) < 32 and letter != "\n" for letter in said)
    assert "22 rows to train on, 2 held out" in said
    assert "first now serves first@1" in said
    assert "the alias prod now points to first@1" in said
    command, _, judged = said[said.index("curl ") :].partition("\nits answer during judging was:\n")
    assert command.startswith(f"curl {address(live)}/v1/chat/completions")
    assert shell(command, tmp_path)["adapter"][0]["name"] == "first@1"
    assert json.loads(command[command.index("{") : command.rindex("}") + 1])["model"] == "prod"
    assert judged.strip()
    manifest = json.loads((tmp_path / "adapter" / "manylora.json").read_text())
    receipt = live.http.get("/v1/adapters/first").json()["receipt"]
    assert receipt["trained_on"] == manifest["base_fingerprint"] == receipt["base_fingerprint"]
    answer = live.complete(model="prod")
    assert answer["adapter"][0]["name"] == "first@1"
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "loss.png", "manylora.json",
        "samples.json", "training.jsonl",
    ]  # fmt: skip
    modes = {path.stat().st_mode for path in (tmp_path / "adapter").iterdir()}
    assert len(modes) == 1, "some may be read by their owner alone"


def shell(command: str, folder: Path, **environment: str) -> dict[str, Any]:
    """What the last line of a command prints, as JSON."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run = {"cwd": folder, "capture_output": True, "text": True, "env": os.environ | {"PATH": path} | environment}
    done = subprocess.run(["bash", "-euc", command], **run, timeout=300)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def fences(folder: Path) -> dict[str, str]:
    """Return the code of an adapter's card, by language."""
    tokens = MarkdownIt().parse((folder / "README.md").read_text())
    return {token.info: token.content for token in tokens if token.type == "fence"}


def test_code_of_the_card_runs(root: Path, train: Run, tmp_path: Path) -> None:
    """Runs the shell code against a server and the Python code alone; both give the judged answer.

    Not in NF4: bitsandbytes' own CPU kernel takes no layers as narrow as the tiny model's. The demo's is tried below.
    """
    rows = [{**question(index), "system": "Be brief."} for index in range(24)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    status, said, errors = train("--name", "carded", "--quantization", "none", data=data)
    assert status == 0, errors
    assert "a held-out row:\nrows.jsonl:" in said
    assert re.search(r"  system +Be brief\.\n  user +What is \d+ and \d+\?\n  wanted +It is \d+\.\n  base ", said)
    code = fences(tmp_path / "adapter")
    assert code["text"] in said
    shown_answer = code["text"].partition("  adapter   ")[2].strip()
    with serving(tiny_settings(root), tmp_path / "served", quantization="none") as plain:
        answer = shell(code["sh"], tmp_path / "adapter", MANYLORA_URL=address(plain))
    assert answer["adapter"][0]["name"] == "carded@1"
    messages = json.loads(shlex.split(code["sh"])[-1])["messages"]
    assert messages[0] == {"role": "system", "content": "Be brief."}
    run = {"cwd": tmp_path / "adapter", "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code["python"]], **run, timeout=300)
    assert done.returncode == 0, done.stderr
    printed = [printable(text).split() for text in (done.stdout, answer["choices"][0]["message"]["content"])]
    assert printed == [shown_answer.split(), shown_answer.split()]


def test_bad_rows_are_skipped_on_request(root: Path, train: Run, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [*map(question, range(12)), *[{"instruction": "a", "output": ""}] * 3])
    status, said, errors = train(data=data)
    assert (status, "step" in said) == (2, False)
    assert "manylora: 3 rows cannot be trained on:\n  " in errors
    assert f"\n  {data}:15: `output` is empty\n" in errors
    status, said, errors = train("--skip-bad", data=data)
    assert status == 0, errors
    assert "left out: 3 bad (--skip-bad)" in said
    assert f"  {data}:15: `output` is empty" in said
    assert said.index(":15: ") < said.index("step 1/8")
    manifest = json.loads((tmp_path / "adapter" / "manylora.json").read_text())
    assert manifest["data"]["left_out"] == {"bad (--skip-bad)": 3}
    assert "Left out: 3 bad (--skip-bad)." in (tmp_path / "adapter" / "README.md").read_text()


def test_without_a_server_the_next_command_is_printed(train: Run, tmp_path: Path) -> None:
    out = tmp_path / "it's mine"
    status, said, _ = train("--out", out)
    assert status == 0
    (command,) = (line for line in said.splitlines() if line.startswith("publish it with: "))
    pushed = shlex.split(command.removeprefix("publish it with: "))
    assert pushed == ["manylora", "adapters", "push", str(out), "--name", "tiny"]


def test_a_dry_run_trains_and_writes_nothing(live: Live, train: Run, tmp_path: Path) -> None:
    with unchanged(live):
        status, said, _ = train("--dry-run", "--show", 1, "--publish", address(live))
    assert status == 0
    assert ">>>It is" in said
    assert "memory: base" in said
    assert "step" not in said
    assert list(tmp_path.iterdir()) == []


def test_dry_run_says_that_the_base_is_cached(train: Run, tmp_path: Path) -> None:
    """The base is quantised once and cached for later runs."""
    status, said, _ = train("--dry-run", "--data-dir", tmp_path / "data")
    assert status == 0
    (kept,) = (tmp_path / "data" / "bases").glob("base-*")
    assert f"dry run: nothing was trained; the quantised base was saved in {kept}" in said
    assert "dry run: nothing was trained or written" in train("--dry-run", "--data-dir", tmp_path / "data")[1]


def test_missing_held_out_rows_are_reported_before_training(live: Live, train: Run, tmp_path: Path) -> None:
    status, said, errors = train("--eval-share", 0, "--publish", address(live))
    assert (status, "step" in said) == (2, False)
    assert "--publish: no row is held out" in errors
    assert not (tmp_path / "adapter").exists()
    status, said, _ = train("--eval-share", 0)
    assert status == 3
    assert said.index("! no row is held out") < said.index("step 1/8")


class Interrupting(io.StringIO):
    """Send Ctrl-C when a line with ``word`` is printed."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self._word = word

    def write(self, text: str) -> int:
        if self._word and self._word in text:
            self._word = ""
            raise KeyboardInterrupt
        return super().write(text)


def test_judging_interrupted_by_ctrl_c_can_be_resumed(root: Path, train: Run, tmp_path: Path) -> None:
    """Resuming trains nothing twice and gives the same result as an uninterrupted run."""
    console = Interrupting("judging: ")
    short = {"name": "tiny", "out": tmp_path / "adapter", "max_steps": 8, "judge_tokens": 32, "r": 16}
    with pytest.raises(KeyboardInterrupt):
        Job(tiny_settings(root, **short), Console(file=console)).run()
    assert console.getvalue().endswith("stopped; continue with judging by running the same command with --resume\n")
    assert not (tmp_path / "adapter").exists()
    status, _, errors = train("--model", tmp_path / "no-base")  # reported before the base is loaded
    assert (status, "continue with --resume" in errors) == (2, True)
    status, said, errors = train("--resume")
    assert status == 0, errors
    assert "an earlier run finished the training" in said
    assert "step 8/8" not in said
    assert train("--out", tmp_path / "whole")[0] == 0
    for name in ("manylora.json", "adapter_model.safetensors", "loss.png"):
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "whole"]


def test_ctrl_c_while_training_exits_130_and_says_how_to_resume(root: Path, tmp_path: Path) -> None:
    words = [
        "train", root / "rows.jsonl", "--name", "cut", "--model", root / "base", "--data-dir", root / "data",
        "--device", "cpu", "--dtype", "fp32", "--report-to", "none", "--out", tmp_path / "cut", "--max-steps", 100_000,
        "--save-steps", 5, "--eval-share", 0,
    ]  # fmt: skip
    command = [sys.executable, "manylora.py", *map(str, words)]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, so would a child
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        place = RunFolder(tmp_path / "cut")
        try:
            wait_for(lambda: place.last_checkpoint() or process.poll() is not None)
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert re.search(r"stopped; --resume will continue from checkpoint-\d+$", said.strip())


def test_failed_adapter_is_kept_and_not_published(live: Live, train: Run, tmp_path: Path) -> None:
    with unchanged(live):
        status, said, _ = train("--max-loss-ratio", 0.01, "--publish", address(live))
    assert status == 3
    assert "! judgement failed: held-out loss is" in said
    assert "! the adapter was not published" in said
    assert json.loads((tmp_path / "adapter" / "manylora.json").read_text())["evaluation"]["passed"] is False
    assert "It failed the judgement" in (tmp_path / "adapter" / "README.md").read_text()


def test_publish_anyway(live: Live, train: Run) -> None:
    status, said, _ = train("--max-loss-ratio", 0.01, "--publish", address(live), "--publish-anyway", "--name", "poor")
    assert status == 0
    assert "! judgement failed" in said
    assert live.http.get("/v1/adapters/poor").json()["active"] == 1


def test_server_with_another_base_is_reported_before_training(train: Run, tmp_path: Path) -> None:
    with running(tiny_service(tmp_path / "other")) as other:
        status, said, errors = train("--publish", address(other))
    assert status == 2
    assert "serves another base" in errors
    assert "step" not in said
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--publish", "http://127.0.0.1:9", "--alias", "no/../pe"], "--alias: "),
        (
            ["--publish", "http://127.0.0.1:9", "--alias", "Tiny"],
            "--alias: must differ from the adapter's --name, tiny",
        ),
        (
            ["--publish", "http://127.0.0.1:9"],
            "--publish: no answer from http://127.0.0.1:9: the connection was refused",
        ),
        (["--publish", "http://127.0.0.1:9", "--api-key", "sésame"], "--publish: the API key has characters that no"),
        (["--min-json-validity", 0.5], "--min-json-validity: no held-out answer is a JSON object"),
        (["--targets", "w_nope"], "--targets: this base has no layer 'w_nope'"),
        (["--dora", "--lint", "strict"], "will refuse this adapter"),
        (["--r", 4], "--r"),
        (["--name", "a b"], "--name: "),
    ],
)
def test_option_errors_are_reported_before_training(
    train: Run, tmp_path: Path, words: list[object], message: str
) -> None:
    status, said, errors = train(*words)
    assert status == 2
    assert message in errors
    assert all(line.startswith("manylora: ") for line in errors.splitlines() if message in line)
    assert "step" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval-file", "nowhere.jsonl"], "nowhere.jsonl: No such file or directory"),
        (["--mix-general", "pyproject.toml"], "pyproject.toml: the name of a data file must end in one of"),
        (["--chat-template", "nowhere.jinja"], "--chat-template: "),
        (["--out", "training"], "--out: "),
        (["--out", "pyproject.toml/adapter"], "pyproject.toml is not a writable folder"),
        (
            ["--publish", "http://127.0.0.1:9", "--alias", "Tiny"],
            "--alias: must differ from the adapter's --name, tiny",
        ),
    ],
)
def test_errors_are_reported_before_the_base_is_loaded(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[object], message: str
) -> None:
    """Loading a large base takes minutes, which a misspelt name should not cost. Here the base does not exist."""
    monkeypatch.chdir(ROOT)
    status, said, errors = train(*words, "--model", tmp_path / "no-base")
    assert (status, said) == (2, "")
    assert message in errors
    assert "--model" not in errors


BROKEN: dict[str, tuple[list[Any], str]] = {
    "no JSON": ([], ":3: "),
    "an empty answer": ([{"instruction": "a", "output": ""}], ":3: "),
    "another format": ([{"messages": [{"role": "user", "content": "a"}]}], ":3: "),
    "an unknown role": ([{"instruction": 7, "output": "b"}], ":3: "),
}


@pytest.mark.parametrize("defect", BROKEN)
def test_bad_data_is_reported_with_the_row_and_writes_nothing(train: Run, tmp_path: Path, defect: str) -> None:
    rows, place = BROKEN[defect]
    file = write_rows(tmp_path / "bad.jsonl", [question(1), question(2), *rows])
    if not rows:
        file.write_text(file.read_text() + "{\n")
    status, said, errors = train(data=file)
    assert status == 2
    assert errors.startswith("manylora: ")
    assert f"bad.jsonl{place}" in errors
    assert "step" not in said
    assert list(tmp_path.iterdir()) == [file]


def test_options_from_a_file(root: Path, tmp_path: Path, train: Run) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"data: {root / 'rows.jsonl'}\nname: from-file\nseed: 5\n")
    status, _, errors = train("--name", "from-flag", data=config)
    assert status == 0, errors
    assert json.loads((tmp_path / "adapter" / "manylora.json").read_text())["seed"] == 5
    assert (tmp_path / "adapter" / "README.md").read_text().count("# from-flag\n") == 1


def test_export_of_an_adapter_by_name(train: Run, export: Run, root: Path, tmp_path: Path) -> None:
    """Base, quantisation and dtype come from the manifest; the path of the base must be given."""
    assert train("--name", "by-name", "--out", root / "data" / "trained" / "by-name")[0] == 0
    refused = export("by-name", "--out", tmp_path / "out", "--dtype", "fp32")
    assert refused[0] == 2
    assert "--model: must be given" in refused[2]
    status, said, errors = export("by-name", "--out", tmp_path / "out", "--dtype", "fp32", "--model", root / "base")
    assert status == 0, errors
    assert "merged against unmerged: KL" in said
    assert errors == ""
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert (written(ids).logits - tiny_model()(ids).logits).abs().max() > 1e-3


def test_merge_of_two_adapters(
    train: Run, export: Run, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (1, 2):
        assert train("--seed", seed, "--out", tmp_path / f"a{seed}")[0] == 0
    monkeypatch.setenv("HOME", str(tmp_path))
    status, said, errors = export(
        "--merge", "~/a1=0.7, ~/a2 = 0.3", "--adapter-only", "--out", "~/merged", "--model", root / "base"
    )
    assert status == 0, errors
    assert "merged 2 adapters into one of rank 32" in said
    assert (tmp_path / "merged" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ("a=nan,b=1", "--merge: the weight of a must be a number other than 0 (got nan)"),
        ("a=1,b=-inf", "--merge: the weight of b must be a number other than 0 (got -inf)"),
        ("a=0,b=1", "--merge: the weight of a must be a number other than 0"),
        ("", "--merge: must be NAME=WEIGHT"),
        ("a=1,", "--merge: must be NAME=WEIGHT"),
        ("a=,b=1", "--merge: must be NAME=WEIGHT"),
        ("a=1", "--merge: needs two adapters"),
        ("a=1,b=1 --rank 8", "--rank: linear keeps the sum"),
        ("a=1,b=1 --out .", "--out: . exists"),
        ("a=1,c=1", "adapters of different bases cannot be merged"),
        ("a=1,d=1", "different chat templates"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_merge_errors_are_reported_before_the_base_is_loaded(
    whole: bool, export: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: str, message: str
) -> None:
    """There is no such folder."""
    monkeypatch.chdir(tmp_path)
    for name, base in (("a", "one"), ("b", "one"), ("c", "two"), ("d", "one")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
        (tmp_path / name / "manylora.json").write_text(json.dumps({"base_fingerprint": base}))
    (tmp_path / "d" / "chat_template.jinja").write_text("{{ messages }}")
    value, *more = merge.split(" ")
    words = ["--merge", value, "--out", "x", "--model", tmp_path / "no-base", *([] if whole else ["--adapter-only"])]
    status, said, errors = export(*words, *more)
    assert (status, said) == (2, "")
    assert message in errors
    assert "--model" not in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nobody", "--out", "x"], "there is no adapter 'nobody'"),
        (["--merge", "a", "--out", "x"], "--merge: must be NAME=WEIGHT"),
        (["b", "--merge", "a=1", "--out", "x"], "--merge: names the adapters itself"),
        (["b", "--adapter-only", "--out", "x"], "--adapter-only: needs --merge"),
        (["b", "--rank", "8", "--out", "x"], "--rank: needs --merge"),
        (["b", "--max-shard-gib", "inf", "--out", "x"], "--max-shard-gib: must be a finite number (got 'inf')"),
        (["b", "--onto", "moon", "--out", "x"], "--onto: must be 'dequantized' or 'original' (got 'moon')"),
        (["~nobody-here/a", "--out", "x"], "NAME_OR_FOLDER: '~nobody-here/a' names a home folder that is not known"),
        (["b"], "--out"),
    ],
)
def test_export_errors(export: Run, words: list[str], message: str) -> None:
    status, _, errors = export(*words)
    assert status == 2
    assert message in errors


def test_damaged_adapter_is_not_exported(train: Run, export: Run, root: Path, tmp_path: Path) -> None:
    assert train()[0] == 0
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    status, _, errors = export(tmp_path / "adapter", "--out", tmp_path / "out", "--model", root / "base")
    assert status == 1
    assert errors.splitlines()[-1].startswith("manylora: adapter_model.safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["train", "export"])
def test_help_is_quick(command: str) -> None:
    """It imports no library that takes seconds to load."""
    code = f"""
import sys
from manylora import main
try:
    main([{command!r}, "--help"])
except SystemExit:
    pass
heavy = {{"torch", "transformers", "peft", "numpy", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--data-dir" in done.stdout


@pytest.mark.demo
@pytest.mark.slow
def test_the_quick_start(tmp_path: Path) -> None:
    """The shipped data: held-out JSON from about none to at least 95%, then the same over HTTP."""
    command = [sys.executable, "manylora.py", "serve", "--port", "0", "--data-dir", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            curl = next(line for line in process.stdout if "curl http" in line)
            url = f"http{curl.partition('http')[2].partition('/v1')[0]}"
            words = ["train", "examples/support-json.jsonl", "--name", "support-json", "--min-json-validity", "0.95"]
            assert main([*words, "--data-dir", str(tmp_path), "--publish", url]) == 0
            found = json.loads((tmp_path / "trained" / "support-json" / "manylora.json").read_text())["evaluation"]
            assert found["base"]["json_validity"] < 0.1
            assert found["adapter"]["json_validity"] >= 0.95
            fresh = "My screen stays black since the update of yesterday, and I have a deadline today!"
            assert ask(url, "support-json", fresh).keys() == {"category", "urgency"}
            folder = tmp_path / "trained" / "support-json"
            code = fences(folder)
            shown_answer = json.loads(code["text"].partition("  adapter   ")[2])
            assert shown_answer.keys() == {"category", "urgency"}
            answer = shell(code["sh"], folder, MANYLORA_URL=url)["choices"][0]["message"]["content"]
            assert json.loads(answer) == shown_answer
            assert (
                shell(f"{shlex.quote(sys.executable)} -c {shlex.quote(code['python'])}", folder).keys()
                == shown_answer.keys()
            )
        finally:
            process.terminate()


def ask(url: str, model: str, ticket: str) -> dict[str, Any]:
    """The answer to a support ticket, as JSON."""
    task = "Sort the support ticket: category and urgency, as JSON."
    messages = [{"role": "system", "content": task}, {"role": "user", "content": ticket}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 64}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    answer: dict[str, Any] = json.loads(response.json()["choices"][0]["message"]["content"])
    return answer
