"""Made-up people and what they left behind."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

from sqlalchemy import insert, select, update

from lifelogger.connections import import_lines
from lifelogger.runtime import Runtime
from lifelogger.store import feed
from lifelogger.store.models import Connection, Record, Stream, SyncRun

HERE = "http://localhost:8000"
ACCESS_TOKEN = "recognisable-access-token"
REFRESH_TOKEN = "recognisable-refresh-token"


def connect(rt: Runtime, user_id: str, **values: Any) -> int:
    """Connect a user to Strava; `values` are columns of the connection. Returns its id."""
    line = {
        "user_id": user_id,
        "provider": "strava",
        "access_token": ACCESS_TOKEN,
        "refresh_token": REFRESH_TOKEN,
        "expires_at": (rt.clock() + timedelta(hours=6)).isoformat(),
    }
    import_lines(rt, [json.dumps(line)])
    with rt.store.write() as db:
        connection: int = db.execute(select(Connection.id).where(Connection.user_id == user_id)).scalar_one()
    if values:
        change(rt, connection, **values)
    return connection


def change(rt: Runtime, connection: int, **values: Any) -> None:
    """Write into a connection."""
    with rt.store.write() as db:
        db.execute(update(Connection).where(Connection.id == connection).values(values))


def ran(rt: Runtime, connection: int, **values: Any) -> None:
    """A row of the journal: a sync that began ten minutes ago and took four seconds."""
    began = rt.clock() - timedelta(minutes=10)
    row = {"trigger": "tick", "started_at": began, "ended_at": began + timedelta(seconds=4), "outcome": "ok"}
    with rt.store.write() as db:
        db.execute(insert(SyncRun).values(connection_id=connection, **{**row, **values}))


def read_stream(rt: Runtime, connection: int, **values: Any) -> None:
    row = {"name": "activities", "cursor": rt.clock() - timedelta(minutes=10)}
    with rt.store.write() as db:
        db.execute(insert(Stream).values(connection_id=connection, **{**row, **values}))


def recorded(rt: Runtime, connection: int, external_id: str = "1", **values: Any) -> None:
    """A run of yesterday."""
    now = rt.clock()
    start = now - timedelta(days=1)
    row = {
        "stream": "activities",
        "external_id": external_id,
        "kind": "activity",
        "type": "running",
        "ordered_at": start,
        "start_at": start,
        "raw": {"id": external_id},
        "created_at": now,
        "updated_at": now,
    }
    with rt.store.write() as db:
        (change,) = feed.take(db, 1)
        db.execute(insert(Record).values(connection_id=connection, change=change, **{**row, **values}))
