"""Formats: pieces of an answer as each endpoint writes them, whole or as server-sent events."""
