"""Schemas of Anthropic's Messages API."""
