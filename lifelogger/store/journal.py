"""Keeping the journal as long as somebody may ask, and no longer."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import delete, select, tuple_

from lifelogger.store.engine import Store
from lifelogger.store.models import Erasure, SyncRun, Tick

BATCH = 1000
"""Rows that one transaction deletes, so that no writer waits for a long one."""


def forget(store: Store, before: datetime) -> int:
    """Delete sync runs, ticks and marks of erasures from before an instant; return how many there were."""
    return sum(
        forget_rows(store, column, before)
        for column in (SyncRun.started_at, Tick.fired_at, Erasure.erased_at)
    )


def forget_rows(store: Store, column: Any, before: datetime) -> int:
    """Delete the rows whose `column` is before an instant, the oldest first, a small batch at a time."""
    table = column.class_.__table__
    key = tuple(table.primary_key.columns)
    gone, reached = 0, None
    while True:
        old = select(*key).where(column < before).order_by(column).limit(BATCH)
        if reached is not None:
            # Not from the beginning again: an index keeps what was deleted until nobody can see it.
            old = old.where(column >= reached)
        old = old.with_for_update(skip_locked=True)  # an erasure deletes them in another order
        with store.write() as db:
            rows = db.scalars(delete(table).where(tuple_(*key).in_(old)).returning(column)).all()
        gone += len(rows)
        if len(rows) < BATCH:
            return gone
        reached = max(rows)
