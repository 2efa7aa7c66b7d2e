#!/bin/sh
# Write .env beside compose.yaml: a new random secret for each service, readable by its owner alone. Never overwrites one.
set -eu
cd "$(dirname "$0")"
umask 077
set -C # `>` refuses a file that exists
for name in ADMIN_KEY METRICS_KEY POSTGRES_PASSWORD MINIO_PASSWORD GRAFANA_PASSWORD; do
    printf '%s=%s\n' "$name" "$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')" # hex: it also stands in an address
done > .env
