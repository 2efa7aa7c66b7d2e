"""Plain weights: a base with an adapter merged into it."""
