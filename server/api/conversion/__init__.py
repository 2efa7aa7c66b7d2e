"""Requests of other chat APIs to chat requests: from there on, all take the same path."""
