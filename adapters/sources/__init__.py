"""Download adapters from hubs and buckets, and register those in a watched folder."""
