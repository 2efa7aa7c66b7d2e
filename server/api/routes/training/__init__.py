"""``/v1/training``: runs on the server's disk, and data before it is trained on."""
