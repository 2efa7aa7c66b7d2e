"""Parsers of a model's text: what is content, what reasoning, what a tool call. Knows nothing of HTTP."""
