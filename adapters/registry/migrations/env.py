"""Run the migrations that are missing, in the transaction that :mod:`adapters.registry.schema` opened."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], render_as_batch=True)
context.run_migrations()
