"""What Alembic runs: the steps that are missing, on the connection and in the transaction of :mod:`adapters.schema`."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], render_as_batch=True)
context.run_migrations()
