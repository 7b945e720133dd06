"""Keeping the journal as long as somebody may ask, and no longer."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import delete, select

from lifelogger.store.engine import Store
from lifelogger.store.models import Erasure, SyncRun, Tick

BATCH = 1000
"""Rows that one transaction deletes, so that no writer waits for a long one."""


def forget(store: Store, before: datetime) -> int:
    """Delete sync runs, ticks and marks of erasures from before an instant; return how many there were."""
    gone = 0
    while True:
        with store.write() as db:
            old = select(SyncRun.id).where(SyncRun.started_at < before).limit(BATCH)
            old = old.with_for_update(skip_locked=True)  # an erasure deletes them in another order
            number = db.execute(delete(SyncRun).where(SyncRun.id.in_(old.scalar_subquery()))).rowcount
            if number < BATCH:
                number += db.execute(delete(Tick).where(Tick.due_at < before)).rowcount
                number += db.execute(delete(Erasure).where(Erasure.erased_at < before)).rowcount
                return gone + number
        gone += number
