"""The server over HTTP: routes by resource, OpenAI's shapes, and the one table from error to status."""
