"""Worker processes: for work on what clients send that may take any time or memory, and that no thread could stop."""
