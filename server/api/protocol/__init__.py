"""HTTP/1.1 on a connection: heads of requests, clients that are slow or leave, and connections above the limits."""
