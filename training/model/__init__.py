"""The base with its LoRA layers: what is added, what it needs of memory, and how it is computed."""
