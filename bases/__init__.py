"""Finds, checks, quantises, caches and fingerprints the frozen base model, for the server and the trainer.

Also holds what several packages share: errors, command lines, interrupts, and what the machine has.
"""
