"""The database: tables, sessions, queries, migrations. Knows nothing of providers' protocols."""

import logging

from lifelogger.store.engine import Bound, Prepared, Store, run_together, table

logging.getLogger("alembic").setLevel(logging.WARNING)  # else it tells of each plugin that it loads

__all__ = ["Bound", "Prepared", "Store", "run_together", "table"]
