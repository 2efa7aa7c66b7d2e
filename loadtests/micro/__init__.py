"""Benchmarks of one part of the product, without HTTP."""
