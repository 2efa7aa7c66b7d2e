"""Training's settings: flags, one YAML file, and one clear line for each bad value."""

import subprocess
import sys
from pathlib import Path

import pytest

from bases.errors import ConfigError
from training.publish.manifest import recorded_settings
from training.settings import TrainSettings, read_settings


def yaml(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    settings = read_settings(["rows.jsonl", "--name", "team/legal"])
    assert settings.data == ("rows.jsonl",)
    assert (settings.r, settings.lora_alpha, settings.dropout, settings.targets) == (16, 32.0, 0.05, "all-linear")
    assert settings.folder == tmp_path / "manylora" / "trained" / "team/legal"
    assert (settings.base.model, settings.base.data_dir) == ("demo", tmp_path / "manylora")


def test_the_folder_of_the_server_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server with that variable, in an image for one, has the base quantised there and shows the runs of there."""
    monkeypatch.setenv("MANYLORA_DATA_DIR", str(tmp_path))
    assert read_settings(["rows.jsonl", "--name", "legal"]).folder == tmp_path / "trained" / "legal"
    elsewhere = read_settings(["rows.jsonl", "--name", "legal", "--data-dir", str(tmp_path / "own")])
    assert elsewhere.base.data_dir == tmp_path / "own"


def test_flags_and_files_of_data() -> None:
    flags = "a.jsonl b.csv=2.5 --name x -r 8 --packing --max-loss-ratio off --report-to none --targets q_proj,v_proj"
    settings = read_settings([*flags.split(), "--no-gradient-checkpointing"])
    assert settings.data == ("a.jsonl", "b.csv=2.5")
    assert (settings.r, settings.packing, settings.max_loss_ratio, settings.report_to) == (8, True, None, "none")
    assert (settings.targets, settings.gradient_checkpointing) == ("q_proj,v_proj", False)


def test_a_flag_wins_over_the_file(tmp_path: Path) -> None:
    text = "data: rows.jsonl\nname: from-file\nr: 8\nlearning_rate: 1e-4\nmax-length: 99\ntargets: [q_proj, o_proj]\n"
    settings = read_settings([yaml(tmp_path / "c.yaml", text), "-r", "4"])
    assert (settings.data, settings.name, settings.r) == (("rows.jsonl",), "from-file", 4)
    assert (settings.learning_rate, settings.max_length, settings.targets) == (1e-4, 99, "q_proj,o_proj")


def test_data_on_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = yaml(tmp_path / "c.yml", "data: [a.jsonl, b.jsonl]\nname: x\n")
    assert read_settings([path]).data == ("a.jsonl", "b.jsonl")
    assert read_settings([path, "c.jsonl"]).data == ("c.jsonl",)


def test_home_folder_is_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "data: [~/a.jsonl, ~/b.jsonl=2, c~.jsonl]\nname: x\nout: ~/out\ndata-dir: ~/data\neval_file: ~/e.jsonl\n"
    yaml(tmp_path / "c.yaml", text)
    settings = read_settings(["~/c.yaml", "--mix-general=~/m.jsonl"])
    assert settings.data == (f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl=2", "c~.jsonl")
    found = [settings.out, settings.data_dir, settings.eval_file, settings.mix_general]
    assert found == [tmp_path / "out", tmp_path / "data", tmp_path / "e.jsonl", tmp_path / "m.jsonl"]
    with pytest.raises(ConfigError, match=r"^DATA: '~nobody-here/a.jsonl' names a home folder that is not known$"):
        read_settings(["~nobody-here/a.jsonl", "--name", "x"])


def test_key_comes_from_the_environment_and_is_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYLORA_API_KEY", "sesame")
    settings = TrainSettings(data=("a.jsonl",), name="x")
    assert settings.api_key.get_secret_value() == "sesame"
    assert "sesame" not in f"{settings!r} {settings.model_dump_json()}"
    assert "api_key" not in recorded_settings(settings)
    given = read_settings(["a.jsonl", "--name", "x", "--api-key", "open"])
    assert given.api_key.get_secret_value() == "open"
    monkeypatch.setenv("MANYLORA_API_KEY", "")
    assert TrainSettings(data=("a.jsonl",), name="x").api_key is None


def test_the_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAME", "host-7")
    monkeypatch.setenv("R", "2")
    assert TrainSettings(data=("a.jsonl",), name="x").r == 16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("-r 0", r"^-r: must be at least 1 \(got '0'\)$"),
        ("-r two", r"^-r: must be a whole number \(got 'two'\)$"),
        ("--dropout 1", r"^--dropout: must be less than 1 \(got '1'\)$"),
        ("--learning-rate nan", r"^--learning-rate: must be a finite number"),
        ("--schedule steps", r"^--schedule: must be 'cosine', 'linear' or 'constant' \(got 'steps'\)$"),
        ("--publish server:8000", r"^--publish: must begin with http:// or https:// \(got 'server:8000'\)$"),
        ("--alias live", "^--alias: needs --publish$"),
        ("--publish-anyway", "^--publish-anyway: needs --publish$"),
        ("--name a@2", "^--name: 'a@2' cannot name an adapter: @ is for versions"),
        ("--eval-file=", "^--eval-file: must not be empty$"),
        ("--bogus 1", "^--bogus: there is no such option; see --help$"),
    ],
)
def test_a_bad_flag_is_one_line_that_names_it(flags: str, message: str) -> None:
    name = [] if "--name" in flags else ["--name", "x"]
    with pytest.raises(ConfigError, match=message):
        read_settings(["rows.jsonl", *name, *flags.split()])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("r: 0", r"c.yaml: r: must be at least 1 \(got 0\)$"),
        ("lr: 1", "c.yaml: lr: there is no such option$"),
        ("name: on", "c.yaml: name: must be a string"),
        ("r: 4\nr: 8", "c.yaml: r: is given twice$"),
        ("max-steps: 4\nmax_steps: 8", "c.yaml: max_steps: is given twice$"),
        ("- r", "c.yaml: must hold options, one `name: value` a line$"),
        ("r: [", "c.yaml: while parsing"),
    ],
)
def test_a_bad_line_of_the_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings([yaml(tmp_path / "c.yaml", text), "a.jsonl"])


@pytest.mark.parametrize("off", ["off", "'off'", "null"])
def test_the_loss_ratio_is_off_in_the_file_too(tmp_path: Path, off: str) -> None:
    text = f"data: rows.jsonl\nname: x\nmax_loss_ratio: {off}\n"
    assert read_settings([yaml(tmp_path / "c.yaml", text)]).max_loss_ratio is None


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings([yaml(tmp_path / "c.yaml", "r: 0\nname: x"), "a.jsonl", "--epochs", "-1"])
    assert [line.partition(": must")[0] for line in str(caught.value).splitlines()] == [
        f"{tmp_path / 'c.yaml'}: r",
        "--epochs",
    ]


def test_missing_option_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^--name: is missing$"):
        read_settings(["rows.jsonl"])
    with pytest.raises(ConfigError, match="DATA"):
        read_settings([])


def test_a_missing_file_of_options_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_settings([str(tmp_path / "none.yaml")])
    with pytest.raises(ConfigError, match="one file of options at most"):
        read_settings(["a.yaml", "b.yaml"])


def test_help_needs_no_torch() -> None:
    code = "import sys, training.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
