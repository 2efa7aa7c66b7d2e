"""Describes an adapter (manifest, model card) and publishes it to a server."""
