"""``manylora adapters``, and the client it uses."""
