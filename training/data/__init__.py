"""Reads files of rows and converts them to token ids and labels."""
