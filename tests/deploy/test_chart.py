"""The Helm chart: what it renders fits Kubernetes, the server's own options, and the policies of a careful cluster."""

import json
import os
from functools import cache
from typing import Any

import pytest
import yaml

from bases.command_line import parse
from manylora import COMMANDS
from server.config import read_settings
from tests.deploy.chart import CHART, ROOT, Manifest, Rendered, name, refusal, render, run_helm, schema_errors
from tests.deploy.values import CASES, KEYS, POOL, SHARED, Values, matrix
from training.settings import TrainSettings

VERSIONS = ("1.29", "1.33", "1.37")
"""The oldest that the chart allows, one between, and the newest that there are schemas of."""
FOREIGN = {"ServiceMonitor", "PrometheusRule", "ScaledObject", "InferencePool", "HTTPRoute"}
"""Kinds that are no part of Kubernetes."""


@cache
def rendered(case: str) -> Rendered:
    return render(CASES[case])


each_case = pytest.mark.parametrize("case", CASES)


def check_schemas(found: Rendered, versions: tuple[str, ...]) -> None:
    for manifest in found.manifests:
        if manifest["kind"] not in FOREIGN:
            for version in versions:
                errors = schema_errors(manifest, version)
                assert not errors, f"{manifest['kind']} {name(manifest)}, {version}: {errors}"


# Kubernetes


@each_case
def test_lint(case: str) -> None:
    ended = run_helm("lint", "--strict", str(CHART), values=CASES[case])
    assert ended.returncode == 0, ended.stdout


@each_case
def test_manifests_fit_the_strict_schemas(case: str) -> None:
    check_schemas(rendered(case), VERSIONS)


@pytest.mark.slow
def test_all_combinations_fit_the_strict_schemas() -> None:
    for values in matrix():
        found = render(values)
        check_schemas(found, VERSIONS)
        check_policies(found)


def test_the_schemas_are_strict() -> None:
    manifest = json.loads(json.dumps(rendered("one server").workload))
    manifest["spec"]["template"]["spec"]["containers"][0]["redinessProbe"] = {}
    assert all(schema_errors(manifest, version) for version in VERSIONS)


@each_case
def test_labels_and_names_are_valid(case: str) -> None:
    names = [(each["kind"], name(each)) for each in rendered(case).manifests]
    assert len(set(names)) == len(names)
    for manifest in rendered(case).manifests:
        assert len(name(manifest)) <= 63
        assert manifest["metadata"]["namespace"] == "models"
        assert all(len(value) <= 63 for value in manifest["metadata"]["labels"].values())


@each_case
def test_selectors_find_the_servers_and_nothing_else(case: str) -> None:
    found = rendered(case)
    labels = found.workload["spec"]["template"]["metadata"]["labels"]
    selectors = [found.workload["spec"]["selector"]["matchLabels"]]
    selectors += [each["spec"]["selector"] for each in found.all("Service") if not name(each).endswith("-picker")]
    selectors += [each["spec"]["selector"]["matchLabels"] for each in found.all("PodDisruptionBudget")]
    selectors += [each["spec"]["podSelector"]["matchLabels"] for each in found.all("NetworkPolicy")]
    selectors += [each["spec"]["selector"]["matchLabels"] for each in found.all("InferencePool")]
    others = [each["spec"]["template"]["metadata"]["labels"] for each in found.all("Job")]
    others += [
        each["spec"]["template"]["metadata"]["labels"] for each in found.all("Deployment") if each is not found.workload
    ]
    for selector in selectors:
        assert selector.items() <= labels.items()
        assert not any(selector.items() <= other.items() for other in others)


def test_what_others_define() -> None:
    """Fields that the custom resources need, by their documentation: there are no schemas of them here."""
    found = rendered("everything")
    monitor, service = found.one("ServiceMonitor"), found.one("Service")
    (endpoint,) = monitor["spec"]["endpoints"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert (
        not monitor["spec"]["selector"]["matchLabels"].items()
        <= found.one("Service", "manylora-pods")["metadata"]["labels"].items()
    )
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    assert (endpoint["scheme"], endpoint["authorization"]["credentials"]["name"]) == ("https", "metrics-key")
    rules = yaml.safe_load((CHART / "rules" / "manylora.yaml").read_text())
    assert found.one("PrometheusRule")["spec"] == rules
    dashboards = found.one("ConfigMap", "manylora-dashboards")
    assert dashboards["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert dashboards["data"] == {"manylora.json": (CHART / "dashboards" / "manylora.json").read_text()}

    scaled = rendered("keda").one("ScaledObject")["spec"]
    assert scaled["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "manylora"}
    (trigger,) = scaled["triggers"]
    assert trigger["metadata"]["query"] == 'sum(manylora_requests_waiting{namespace="models",service="manylora"})'
    assert all(isinstance(value, str) for value in trigger["metadata"].values())
    assert "replicas" not in rendered("keda").workload["spec"]


def test_a_pool_sends_requests_to_where_their_adapter_is() -> None:
    found = rendered("a pool")
    pool = found.one("InferencePool")
    assert pool["spec"]["targetPorts"] == [{"number": found.server["ports"][0]["containerPort"]}]
    picker = found.one("Service", pool["spec"]["endpointPickerRef"]["name"])
    assert picker["spec"]["ports"][0]["port"] == pool["spec"]["endpointPickerRef"]["port"]["number"]
    config = yaml.safe_load(found.one("ConfigMap", "manylora-picker")["data"]["picker.yaml"])
    (profile,) = config["schedulingProfiles"]
    weights = {each["pluginRef"]: each["weight"] for each in profile["plugins"]}
    assert set(weights) == {each["type"] for each in config["plugins"]}
    assert max(weights, key=weights.__getitem__) == "lora-affinity-scorer"
    (backend,) = found.one("HTTPRoute")["spec"]["rules"][0]["backendRefs"]
    assert (backend["kind"], backend["name"]) == ("InferencePool", name(pool))


@pytest.mark.parametrize("metric", ["manylora_requests_waiting", "vllm:lora_requests_info"])
def test_metrics_that_the_chart_names_exist(metric: str) -> None:
    assert metric in "".join(path.read_text() for path in (CHART / "templates").iterdir())
    assert f"| `{metric}` |" in (ROOT / "docs" / "metrics.md").read_text()


# The server's own options


@each_case
def test_the_server_takes_its_settings(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rendered(case)
    for variable in os.environ:
        if variable.startswith("MANYLORA_"):
            monkeypatch.delenv(variable)
    for variable, value in found.settings.items():
        monkeypatch.setenv(variable, value)
    for entry in found.server["env"]:
        monkeypatch.setenv(entry["name"], entry.get("value", "postgresql://host/registry"))
    command, *words = found.server["args"]
    assert command == "serve"
    settings = read_settings(words)  # an unknown variable or flag is an error
    assert (settings.host, settings.port) == ("0.0.0.0", found.server["ports"][0]["containerPort"])
    mounts = {mount["mountPath"] for mount in found.server["volumeMounts"]}
    for path in (settings.data_dir, settings.api_key_file, settings.tls_cert, settings.tls_key):
        assert path is None or {str(path), str(path.parent)} & mounts
    if case == "everything":
        assert settings.adapter == {"legal": "hf://org/legal@v1", "team/german": "s3://bucket/adapters/german"}
        assert (settings.max_queue_tokens, settings.host_cache_gib, settings.lenient) == (2_000_000, 0.5, True)
        assert settings.cors_origin == ("https://a.example", "https://b.example")
        assert (settings.device, settings.model, settings.store_url) == (
            "cuda", "org/base", "s3://bucket/adapters",
        )  # fmt: skip


def test_a_server_without_keys_knows_its_names() -> None:
    hosts = rendered("a pool").settings["MANYLORA_ALLOWED_HOST"].split(",")
    assert {"manylora", "manylora.models.svc", "models.example.com"} <= set(hosts)
    job = {"name": "a", "configMap": "rows", "files": ["a.jsonl"]}
    (container,) = render({**POOL, "training": {"jobs": [job]}}).all("Job")[0]["spec"]["template"]["spec"]["containers"]
    address = container["args"][container["args"].index("--publish") + 1]
    assert address == "http://manylora.models.svc:80"


def test_training_jobs_are_commands_that_manylora_takes() -> None:
    jobs = rendered("everything").all("Job")
    given = []
    for job in jobs:
        (container,) = job["spec"]["template"]["spec"]["containers"]
        command, *words = container["args"]
        assert command == "train"
        given.append(TrainSettings(**parse(TrainSettings, words, "manylora train")))
        assert {each["name"] for each in container["env"] if each["name"].startswith("MANYLORA_")} == {
            "MANYLORA_API_KEY"
        }
    first, second = given
    assert (first.name, first.r, first.epochs, [str(path) for path in first.data]) == (
        "support", 8, 0.5, ["/rows/a.jsonl", "/rows/b.jsonl"],
    )  # fmt: skip
    assert (second.packing, second.rslora, second.gradient_checkpointing, second.learning_rate) == (
        True, False, False, 0.0002,
    )  # fmt: skip
    assert first.publish == "https://manylora.models.svc:80"


def test_a_job_with_other_values_is_another_job() -> None:
    job = {"name": "a", "configMap": "rows", "files": ["a.jsonl"]}
    names = {
        name(render({**KEYS, "training": {"jobs": [{**job, "options": {"seed": seed}}]}}).all("Job")[0])
        for seed in (1, 2)
    }
    assert len(names) == 2


def test_a_changed_option_restarts_the_servers_and_a_changed_label_does_not() -> None:
    def template(values: Values) -> Manifest:
        return render({**KEYS, **values}).workload["spec"]["template"]

    assert template({"settings": {"max_rank": 8}}) != template({})
    assert template({"service": {"port": 8080}}) == template({})


def test_the_base_is_fetched_with_the_servers_options() -> None:
    found = rendered("everything")
    (fetch,) = found.workload["spec"]["template"]["spec"]["initContainers"]
    assert fetch["args"] == ["fetch"]
    assert "fetch" in COMMANDS
    assert {key: fetch[key] for key in ("env", "envFrom", "volumeMounts", "image")} == {
        key: found.server[key] for key in ("env", "envFrom", "volumeMounts", "image")
    }
    assert "nvidia.com/gpu" not in fetch["resources"]["limits"], "it needs none, and would occupy it"
    for values in (KEYS, {**KEYS, "model": {"source": "org/base", "fetch": False}}):
        assert "initContainers" not in render(values).workload["spec"]["template"]["spec"]


# Policies


def check_policies(found: Rendered) -> None:
    for owner, pod in found.pods():
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True, owner
        assert security["runAsUser"] > 0, owner
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, owner
        assert pod["enableServiceLinks"] is False, owner
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), owner
        assert not any("hostPath" in volume for volume in pod["volumes"]), owner
        mounted = {mount["name"] for each in pod["containers"] for mount in each["volumeMounts"]}
        claims = {each["metadata"]["name"] for each in found.workload["spec"].get("volumeClaimTemplates", [])}
        assert mounted <= {volume["name"] for volume in pod["volumes"]} | claims, owner
        assert all("sizeLimit" in volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume), owner
        if owner != "Deployment manylora-picker":  # it watches pods
            assert pod["automountServiceAccountToken"] is False, owner
    for owner, container in found.containers():
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True, owner
        assert security["allowPrivilegeEscalation"] is False, owner
        assert security["capabilities"] == {"drop": ["ALL"]}, owner
        for limit in (container["resources"]["requests"], container["resources"]["limits"]):
            assert {"cpu", "memory"} <= limit.keys(), owner
        image = container["image"]
        assert "@sha256:" in image or image.rpartition(":")[2] not in ("", "latest", image), owner
        assert image.count("/") >= 2, f"{owner}: the registry must be named"
        variables = [entry["name"] for entry in container["env"]]
        assert len(set(variables)) == len(variables), owner
        if owner.startswith(("StatefulSet", "Deployment")) and not owner.endswith("fetch"):
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys(), owner
    assert "Secret" not in found.kinds(), "secrets are made by others"
    for manifest in found.all("ConfigMap"):
        assert (
            not {"MANYLORA_API_KEYS", "MANYLORA_DATABASE_URL", "MANYLORA_API_KEY", "HF_TOKEN"} & manifest["data"].keys()
        )


@each_case
def test_policies(case: str) -> None:
    check_policies(rendered(case))


def test_probes_and_shutdown_fit_long_loads_and_the_drain() -> None:
    found = rendered("everything")
    startup, readiness, liveness = (found.server[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness"))
    assert startup["periodSeconds"] * startup["failureThreshold"] == 1800
    assert [each["httpGet"]["path"] for each in (startup, readiness, liveness)] == ["/readyz", "/readyz", "/livez"]
    assert {each["httpGet"]["scheme"] for each in (startup, readiness, liveness)} == {"HTTPS"}
    pod = found.workload["spec"]["template"]["spec"]
    assert found.server["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "5"]
    assert pod["terminationGracePeriodSeconds"] == 5 + 46 + 20
    assert rendered("one server").workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 5 + 30 + 20
    delayed = render({**KEYS, "settings": {"drain_delay_seconds": 15}})
    assert delayed.workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 5 + 15 + 30 + 20
    at_once = render({**KEYS, "settings": {"drain_seconds": 0}})
    assert at_once.workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 5 + 20
    assert "lifecycle" not in rendered("little").server


def test_a_gpu_is_asked_for() -> None:
    resources = rendered("everything").server["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == 1
    assert resources["limits"]["memory"] == "4Gi"
    assert render({**KEYS, "gpu": {"enabled": True}}).server["image"].endswith("-cuda")


def test_the_network_lets_in_what_is_named() -> None:
    (rule,) = rendered("a pool").one("NetworkPolicy")["spec"]["ingress"]
    assert rule["from"] == POOL["networkPolicy"]["from"]
    nobody = render({**KEYS, "networkPolicy": {"from": []}}).one("NetworkPolicy")["spec"]
    assert (nobody["ingress"], nobody["policyTypes"]) == ([], ["Ingress", "Egress"])
    ports = [rule["ports"][0]["port"] for rule in rendered("everything").one("NetworkPolicy")["spec"]["egress"]]
    assert ports == [53, 443, 5432, 9000]


# What is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "set keys.existingSecret"),
        ({**KEYS, "replicas": 2}, "several servers need database.existingSecret and store.url"),
        ({**KEYS, "autoscaling": {"enabled": True}}, "several servers need database.existingSecret and store.url"),
        ({**KEYS, "database": {"existingSecret": "a"}}, "database.existingSecret needs store.url"),
        ({**SHARED, "workload": {"kind": "Deployment"}}, "servers of a Deployment cannot share a volume"),
        ({**KEYS, "persistence": {"existingClaim": "a"}}, "persistence.existingClaim is for workload.kind=Deployment"),
        ({**POOL, **KEYS}, "the endpoint picker sends no API key"),
        ({**KEYS, "image": {"tag": "latest"}}, "/image/tag"),
        ({**KEYS, "image": {"tagg": "1"}}, "'tagg' not allowed"),
        ({**KEYS, "replica": 2}, "'replica' not allowed"),
        ({**KEYS, "settings": {"max_rnak": 8}}, "'max_rnak' not allowed"),
        ({**KEYS, "settings": {"max_rank": 512}}, "/settings/max_rank"),
        ({**KEYS, "settings": {"max_rank": "8"}}, "/settings/max_rank"),
        ({**KEYS, "settings": {"cpu": "avx"}}, "/settings/cpu"),
        ({**KEYS, "settings": {"database_url": "postgresql://a:b@c"}}, "'database_url' not allowed"),
        ({**KEYS, "store": {"url": "s3://user:password@bucket"}}, "/store/url"),
        ({**KEYS, "extraEnv": [{"name": "MANYLORA_API_KEYS", "value": "a"}]}, "/extraEnv/0/name"),
        ({**KEYS, "adapters": [{"name": "a", "source": "/data/a"}]}, "/adapters/0/source"),
        ({**KEYS, "adapters": [{"name": "a,b", "source": "hf://a/b"}]}, "/adapters/0/name"),
        ({**KEYS, "model": {"source": "two words"}}, "/model/source"),
        ({**KEYS, "resources": {"limits": {"memory": None}}}, "/resources/limits"),
        ({**KEYS, "termination": {"marginSeconds": 5}}, "/termination/marginSeconds"),
        ({**KEYS, "training": {"jobs": [{"name": "a", "files": ["a"]}]}}, "/training/jobs/0"),
        (
            {**KEYS, "training": {"jobs": [{"name": "a", "files": ["a"], "claim": "c", "options": {"ranks": 8}}]}},
            "'ranks' not allowed",
        ),
    ],
)
def test_bad_values_are_refused(values: Values, message: str) -> None:
    assert message in refusal(values)


def test_a_case_sets_each_value() -> None:
    """A value that no case sets may be one that no template reads."""
    used = {key for values in CASES.values() for key in values}
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    assert defaults.keys() - used == {"scratch", "resources", "probes"}, "values that are read without being set"


# What is written by helm/update.py


def test_readme_and_schema_are_up_to_date() -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("update", ROOT / "helm" / "update.py")
    assert spec is not None
    assert spec.loader is not None
    update: Any = module_from_spec(spec)
    spec.loader.exec_module(update)
    for path, content in update.generated().items():
        assert path.read_text() == content, (
            f"{path.name} is not up to date: run PYTHONPATH=. .venv/bin/python helm/update.py"
        )


def test_every_value_has_a_comment_and_a_schema() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    table = (CHART / "README.md").read_text().partition("<!-- values:")[2]

    def check(values: dict[str, Any], described: dict[str, Any], path: str) -> None:
        for key, value in values.items():
            place = f"{path}{key}"
            assert key in described["properties"], place
            inner = described["properties"][key]
            if f"| `{place}` |" not in table:
                assert isinstance(value, dict), f"{place} has no comment in values.yaml"
                check(value, inner, f"{place}.")

    check(yaml.safe_load((CHART / "values.yaml").read_text()), schema, "")
