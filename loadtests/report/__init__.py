"""Figures of a run, and how they are shown and compared."""
