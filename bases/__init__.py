"""The frozen base model: found, quantised once, cached, checked and fingerprinted.

The server and the trainer both import this package, so both mean the same weights by the same fingerprint.
"""
