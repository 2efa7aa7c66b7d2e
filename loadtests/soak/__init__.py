"""A soak: many kinds of clients at once for a long time, while memory, files, threads and answers are watched."""
