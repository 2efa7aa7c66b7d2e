"""Values for the chart's tests: each case is a way to run servers that docs or the chart's README name."""

from itertools import product
from typing import Any

Values = dict[str, Any]

KEYS: Values = {"keys": {"existingSecret": "keys"}}
SHARED: Values = {
    **KEYS,
    "replicas": 3,
    "database": {"existingSecret": "database"},
    "store": {"url": "s3://bucket/adapters", "existingSecret": "bucket"},
}
EVERYTHING: Values = {
    **SHARED,
    "image": {"digest": "sha256:" + "0" * 64, "pullSecrets": ["registry"]},
    "model": {"source": "org/base"},
    "adapters": [
        {"name": "legal", "source": "hf://org/legal@v1"},
        {"name": "team/german", "source": "s3://bucket/adapters/german"},
    ],
    "settings": {
        "max_queue_tokens": 2_000_000,
        "host_cache_gib": 0.5,
        "lenient": True,
        "cors_origin": ["https://a.example", "https://b.example"],
        "drain_seconds": 45.5,
    },
    "hub": {"existingSecret": "hub"},
    "tls": {"existingSecret": "certificate"},
    "gpu": {"enabled": True, "runtimeClassName": "nvidia"},
    "service": {"annotations": {"example.com/balancer": "internal"}},
    "serviceAccount": {"annotations": {"example.com/role": "reader"}},
    "networkPolicy": {"extraEgress": [{"ports": [{"port": 9000, "protocol": "TCP"}]}]},
    "nodeSelector": {"pool": "gpu"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "serving",
    "podAnnotations": {"example.com/a": "b"},
    "podLabels": {"team": "models"},
    "extraEnv": [{"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector:4318"}],
    "extraVolumes": [{"name": "templates", "configMap": {"name": "templates"}}],
    "extraVolumeMounts": [{"name": "templates", "mountPath": "/templates"}],
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}, "keySecret": "metrics-key"},
    "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
    "dashboards": {"enabled": True},
    "autoscaling": {"enabled": True, "maxReplicas": 8},
    "training": {
        "keySecret": "train-key",
        "jobs": [
            {"name": "support", "configMap": "rows", "files": ["a.jsonl", "b.jsonl"], "options": {
                "r": 8, "epochs": 0.5}},
            {"name": "team/Tax_1.0", "claim": "rows", "files": ["c.jsonl"], "options": {
                "packing": True, "rslora": False, "gradient_checkpointing": False, "learning_rate": 0.0002}},
        ],
    },
}  # fmt: skip
POOL: Values = {
    "settings": {"allow_anonymous": True, "allowed_host": ["models.example.com"]},
    "networkPolicy": {"from": [{"namespaceSelector": {"matchLabels": {"name": "gateway"}}}]},
    "inferencePool": {"enabled": True, "gateway": "inference", "gatewayNamespace": "gateway"},
}
CASES: dict[str, Values] = {
    "one server": KEYS,
    "shared": SHARED,
    "everything": EVERYTHING,
    "a deployment with a volume": {**KEYS, "workload": {"kind": "Deployment"}},
    "a deployment without": {**SHARED, "workload": {"kind": "Deployment"}, "persistence": {"enabled": False}},
    "keda": {**SHARED, "autoscaling": {"enabled": True, "kind": "keda", "triggerAuthentication": "prometheus"}},
    "a pool": POOL,
    "little": {
        **KEYS,
        "fullnameOverride": "manylora",
        "serviceAccount": {"existingName": "servers"},
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "topologySpread": {"whenUnsatisfiable": ""},
        "termination": {"preStopSeconds": 0},
        "persistence": {"enabled": False},
    },
}


def matrix() -> list[Values]:
    """All combinations of what the templates branch on, as far as they can be combined."""
    found = []
    for kind, volume, shared, tls, gpu, fetch, scaled in product(
        ("StatefulSet", "Deployment"), (True, False), (True, False), (True, False), (True, False), (True, False),
        ("", "hpa", "keda"),
    ):  # fmt: skip
        if (scaled and not shared) or (kind == "Deployment" and volume and (scaled or shared)):
            continue
        found.append(
            {
                **(SHARED if shared else KEYS),
                "workload": {"kind": kind},
                "persistence": {"enabled": volume},
                "tls": {"existingSecret": "certificate" if tls else ""},
                "gpu": {"enabled": gpu},
                "model": {"source": "org/base", "fetch": fetch},
                "autoscaling": {"enabled": bool(scaled), "kind": scaled or "hpa"},
                "serviceMonitor": {"enabled": tls},
                "prometheusRule": {"enabled": gpu},
                "dashboards": {"enabled": fetch},
            }
        )
    return found
