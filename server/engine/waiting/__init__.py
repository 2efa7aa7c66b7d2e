"""The sequences that wait: whose turn it is, which of them may start by their adapters, and until when they may."""
