"""From a checked request to text: adapters, the sequence in the engine, and the answer."""
