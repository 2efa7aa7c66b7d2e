"""From an upload, a folder or an address to a version in the registry."""
