"""From a file of examples to an adapter that a server can trust, and from an adapter to plain weights."""
