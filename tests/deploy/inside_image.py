"""Runs inside an image, in the place of its entrypoint: starts the server as the image would, and says what is wrong.

``image.sh try`` gives it to the image's Python, as root's file system is read-only. Its argument is the target of the
Dockerfile that the image was built for: one that trains must train, too, and serve what it trained.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

TARGET = sys.argv[1]
URL = "http://127.0.0.1:8000"
KEY = {"authorization": f"Bearer {os.environ['MANYLORA_API_KEYS']}", "content-type": "application/json"}
QUESTION = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
    "max_tokens": 24,
}


def is_writable(folder: str) -> bool:
    """Whether a file can be made there."""
    try:
        (Path(folder) / "probe").write_text("")
        (Path(folder) / "probe").unlink()
    except OSError:
        return False
    return True


def check_surroundings() -> None:
    """Who we are, what can be written, and what is not there."""
    assert (os.getuid(), os.getgid()) == (10001, 10001)
    writable = [folder for folder in ("/", "/opt/manylora", "/usr", "/etc", "/data", "/tmp") if is_writable(folder)]
    assert writable == ["/data", "/tmp"], writable
    assert [name for name in ("cc", "gcc", "clang") if shutil.which(name)] == []
    assert (importlib.util.find_spec("peft") is not None) == (TARGET == "train"), "only training needs it"
    assert not Path("/etc/pip.conf").exists(), "the secret of the build"
    components = json.loads(Path("/opt/manylora/sbom.cdx.json").read_text())["components"]
    assert {"manylora", "torch", "transformers"} <= {component["name"] for component in components}
    say(f"SBOM: {len(components)} components")


def wait_until_ready(server: "subprocess.Popen[bytes]") -> None:
    """Poll until the server is ready."""
    began = time.monotonic()
    while True:
        assert server.poll() is None, f"it ended with status {server.returncode}"
        try:
            urllib.request.urlopen(f"{URL}/readyz", timeout=2).close()
        except (urllib.error.URLError, OSError):
            assert time.monotonic() - began < 600
            time.sleep(0.2)
        else:
            say(f"ready after {time.monotonic() - began:.1f} s")
            return


def open_page() -> None:
    """Fetch the page as a browser does, and every file that its document names."""
    request = urllib.request.Request(f"{URL}/", headers={"accept": "text/html"})
    with urllib.request.urlopen(request, timeout=10) as response:
        document = response.read().decode()
    named = re.findall(r'(?:src|href)="[./]*(assets/[^"]+)"', document)
    assert {name.rpartition(".")[2] for name in named} >= {"js", "css"}, document
    for name in named:
        with urllib.request.urlopen(f"{URL}/{name}", timeout=10) as response:
            assert len(response.read()) > 100, name
    say(f"page: {len(named)} files")


def ask(model: str | None = None) -> str:
    """The answer of an adapter to a question, or of the base."""
    body = QUESTION if model is None else {**QUESTION, "model": model}
    request = urllib.request.Request(f"{URL}/v1/chat/completions", json.dumps(body).encode(), KEY)
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: str = json.load(response)["choices"][0]["message"]["content"]
    return answer


def train() -> None:
    """Train an adapter for a few steps, publish it to the server, and ask it."""
    rows = Path("/tmp/rows.jsonl")
    rows.write_text("".join(f'{{"instruction": "Add 1 to {n}.", "output": "{n + 1}"}}\n' for n in range(20)))
    options = f"--name adds --max-steps 4 --judge-rows 1 --judge-tokens 8 --max-loss-ratio off --publish {URL}".split()
    key = {"MANYLORA_API_KEY": os.environ["MANYLORA_API_KEYS"]}
    subprocess.run(["manylora", "train", rows, *options], cwd="/data", env=os.environ | key, check=True)
    assert Path("/data/trained/adds").is_dir(), "where the server looks for runs to show"
    say(f"answer of the adapter: {ask('adds')}")


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


check_surroundings()
server = subprocess.Popen(["manylora", "serve", "--host", "0.0.0.0"], cwd="/data")
try:
    wait_until_ready(server)
    open_page()
    answer = ask()
    say(f"answer: {answer}")
    assert "Paris" in answer
    if TARGET == "train":
        train()
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
finally:
    server.kill()
say(f"the image does what {TARGET} promises")
