"""What a load test asks for: adapters, prompts, lengths and arrival times."""
