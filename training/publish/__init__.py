"""What goes with an adapter, and to a server."""
