"""One server with the demo model for all clients: a process of its own, as users have it."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the internet for prices when imported
os.environ["OPENAI_API_KEY"] = "none"  # lm-eval and some defaults of others look for one

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("SERVER_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
"""The Python that has the server."""


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the server, e.g. ``http://127.0.0.1:40001``; ``SERVER_URL`` names one that runs already."""
    if running := os.environ.get("SERVER_URL"):
        yield running
        return
    folder = tmp_path_factory.mktemp("served")
    command = [PYTHON, "tests/clients/serve_demo.py", str(folder)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)
    try:
        yield _address(process)
    finally:
        process.terminate()
        process.communicate(timeout=60)


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("curl "):  # printed when it is ready, with the address in it
            return "http://" + line.split("http://")[1].split("/")[0]
    raise AssertionError("the server ended before it served")


@pytest.fixture(scope="session")
def url(server: str) -> str:
    """What clients call the base URL."""
    return f"{server}/v1"


@pytest.fixture(params=["smollm2-135m-instruct", "red"])
def model(request: pytest.FixtureRequest) -> str:
    """The base, then an adapter."""
    name: str = request.param
    return name
