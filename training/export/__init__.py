"""Merges adapters into plain weights or into one adapter, and writes safetensors or GGUF files."""
