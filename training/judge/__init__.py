"""Judging an adapter: its answers to held-out rows beside the base's."""
