"""Store the files of adapters by the digest of their content: on disk, and in a store that servers share."""
