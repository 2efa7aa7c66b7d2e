"""Sampling: the logits of a step become tokens and log probabilities."""
