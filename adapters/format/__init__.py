"""The format: what an adapter's files say, and whether they can be trusted."""
