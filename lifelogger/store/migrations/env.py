"""Alembic's entry: always with the connection that `store.migrate` opened."""

from alembic import context

from lifelogger.store.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
    transactional_ddl=False,  # the transaction is the caller's, on SQLite too
)
context.run_migrations()
