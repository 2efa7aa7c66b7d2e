"""Metrics for Prometheus, one collector for each thing that is measured. docs/metrics.md lists all of them."""
