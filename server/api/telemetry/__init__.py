"""What is told about requests that have ended: a log line, a trace."""
