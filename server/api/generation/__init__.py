"""From a validated request to text: leased adapters, a sequence in the engine, and the response."""
