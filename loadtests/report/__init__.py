"""Metrics, records and reports of a run, and comparisons of runs."""
