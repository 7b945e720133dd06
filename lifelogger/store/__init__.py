"""The database: tables, sessions, queries, migrations. Knows nothing of providers' protocols."""

from lifelogger.store.engine import Store

__all__ = ["Store"]
