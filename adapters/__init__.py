"""The adapter's file format and its checks, the registry, and where adapters come from and are stored.

Imports neither the server nor the trainer; both import this package.
"""
