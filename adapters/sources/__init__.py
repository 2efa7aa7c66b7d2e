"""Where adapters come from: hubs, buckets, addresses, and a watched folder."""
