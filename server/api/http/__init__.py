"""HTTP itself: middleware, connections, paths, errors, ETags, lists, and the OpenAPI document."""
