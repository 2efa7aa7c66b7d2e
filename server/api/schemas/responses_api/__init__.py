"""Schemas of OpenAI's Responses API."""
