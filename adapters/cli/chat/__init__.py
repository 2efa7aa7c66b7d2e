"""``manylora chat``: talk with a running server's base and adapters, in a terminal or in a script."""
