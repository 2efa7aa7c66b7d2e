"""The workloads of a load test: adapters, prompts, lengths and arrival times."""
