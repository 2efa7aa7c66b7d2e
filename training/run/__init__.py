"""One ``manylora train``: its plan, steps, checkpoints and working folder."""
