"""What an adapter is, whether it can be trusted, and where it lives.

Imports neither the server nor the trainer; both import this package.
"""
