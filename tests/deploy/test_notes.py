"""The notes that Helm prints after an installation: their commands work when they are pasted."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from tests.api.live import running, tiny_service
from tests.deploy.chart import CHART, run_helm
from tests.deploy.values import CASES, KEYS, POOL, Values

KUBECTL = """\
#!/bin/sh
# A cluster, as far as the notes need one: a port that is forwarded until that is ended.
echo "$@" >> "$LOG"
case "$*" in *port-forward*) exec python3 "$FORWARD" ;; esac
"""
FORWARD = """\
import asyncio, os

async def pump(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()

async def forward(reader, writer):
    to, back = await asyncio.open_connection("127.0.0.1", int(os.environ["SERVER"]))
    await asyncio.gather(pump(reader, back), pump(to, writer))

async def main():
    await (await asyncio.start_server(forward, "127.0.0.1", int(os.environ["PORT"]))).serve_forever()

asyncio.run(main())
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
    (tmp_path / "forward.py").write_text(FORWARD)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    logged = {"LOG": str(tmp_path / "log"), "FORWARD": str(tmp_path / "forward.py")}
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    with running(tiny_service(tmp_path)) as live:
        script = commands(notes(KEYS)).replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        ended = subprocess.run(
            ["bash", "-e"],
            input=script,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PATH": path, **logged, "SERVER": str(live.http.base_url.port), "PORT": str(port)},
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
    scraped: Values = {**KEYS, "serviceMonitor": {"enabled": True, "keySecret": "metrics-key"}}
    assert "networkPolicy.from lets in this namespace alone: add Prometheus" in notes(scraped)
    assert "add the gateway" in notes({**POOL, "networkPolicy": {}})
    named = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    for policy in ({"from": named}, {"enabled": False}):
        assert "WARNING" not in notes({**scraped, "networkPolicy": policy})
