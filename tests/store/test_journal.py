"""The journal is kept for a while, then forgotten."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import func, insert, select

from lifelogger.connections import Line, save
from lifelogger.runtime import Runtime
from lifelogger.store.feed import mark_erased
from lifelogger.store.journal import forget
from lifelogger.store.models import Erasure, SyncRun, Tick


def test_old_runs_ticks_and_marks_of_erasures_go_and_younger_ones_stay(runtime: Runtime) -> None:
    now = runtime.clock()
    line = Line(user_id="ann", provider="strava", access_token="a", expires_at=now)
    with runtime.store.write() as db:
        save(runtime, db, line)
        for days in (0, 89, 91, *[400] * 2500):
            at = now - timedelta(days=days)
            db.execute(insert(SyncRun).values(connection_id=1, trigger="tick", started_at=at, outcome="ok"))
        for days in (1, 200):
            at = now - timedelta(days=days)
            db.execute(insert(Tick).values(name="t", due_at=at, fired_at=at))
            mark_erased(db, "bob", None, at)

    assert forget(runtime.store, now - timedelta(days=90)) == 2501 + 1 + 1
    assert forget(runtime.store, now - timedelta(days=90)) == 0

    with runtime.store.read() as db:
        assert db.scalar(select(func.count()).select_from(SyncRun)) == 2
        assert db.scalar(select(func.count()).select_from(Tick)) == 1
        assert db.scalar(select(func.count()).select_from(Erasure)) == 1
