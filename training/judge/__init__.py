"""Judges an adapter: compares it with the base on held-out rows."""
