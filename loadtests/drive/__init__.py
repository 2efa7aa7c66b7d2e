"""Sending a workload to a server."""
