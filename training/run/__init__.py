"""A training run, from its command to its last checkpoint."""
