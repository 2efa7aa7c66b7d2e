"""The multi-adapter server: one frozen base, many LoRA adapters, one batch."""
