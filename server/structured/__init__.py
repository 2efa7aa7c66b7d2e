"""Structured output: from what a request asks for to a compiled grammar, with llguidance."""
