"""The notes that Helm prints after an installation: their commands work when they are pasted."""

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from tests.api.live import running, tiny_service
from tests.deploy.chart import CHART, run_helm
from tests.deploy.values import CASES, KEYS, Values

KUBECTL = """\
#!/bin/sh
# A cluster, as far as the notes need one: a port that is forwarded already.
echo "$@" >> "$LOG"
case "$*" in *port-forward*) exec sleep 60 ;; esac
"""


def notes(values: Values) -> str:
    """What ``helm install`` prints, without a cluster."""
    ended = run_helm(*("install", "manylora", str(CHART), "--namespace", "models", "--dry-run=client"), values=values)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.partition("\nNOTES:\n")[2]


def commands(text: str) -> str:
    """The indented lines of the notes."""
    return dedent("\n".join(line for line in text.splitlines() if line.startswith("    ") or not line.strip()))


@pytest.mark.parametrize("case", CASES)
def test_the_commands_are_shell(case: str) -> None:
    script = commands(notes(CASES[case]))
    assert "rollout status" in script
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_commands_work(tmp_path: Path) -> None:
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    with running(tiny_service(tmp_path)) as live:
        script = commands(notes(KEYS)).replace("127.0.0.1:8000", f"127.0.0.1:{live.http.base_url.port}")
        ended = subprocess.run(
            ["bash", "-e"],
            input=script,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PATH": path, "LOG": str(tmp_path / "log")},
        )
    assert ended.returncode == 0, ended.stderr
    assert '"text_completion"' in ended.stdout
    asked = (tmp_path / "log").read_text().splitlines()
    assert asked == [
        "--namespace models rollout status statefulset/manylora --timeout 1800s",
        "--namespace models port-forward service/manylora 8000:80",
    ]


def test_warnings_of_what_is_risky() -> None:
    assert "WARNING" not in notes(KEYS)
    assert "is lost with its pod" in notes({**KEYS, "persistence": {"enabled": False}})
    assert "whoever reaches the service" in notes({"settings": {"allow_anonymous": True}})
    assert "401 from /metrics" in notes({**KEYS, "serviceMonitor": {"enabled": True}})
