"""Benchmarks of one part, without HTTP."""
