"""Text and tokens: prompts, chat templates, incremental decoding, stop strings. Knows nothing of HTTP."""
