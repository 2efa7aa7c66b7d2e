"""``manylora adapters``, and the HTTP client it uses."""
