"""The bytes of adapters, by the digest of their content: on this disk, and in a store that servers share."""
