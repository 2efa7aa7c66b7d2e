"""Load tests: a process of its own that speaks only HTTP to the server it measures."""
