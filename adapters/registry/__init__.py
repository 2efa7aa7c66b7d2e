"""The registry: names, versions, aliases and pins, in a database and in memory."""
