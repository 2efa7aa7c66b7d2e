"""Load tests: a separate process, which speaks only HTTP to the server it measures."""
