"""All that is kept about one user, as plain objects: what `lifelogger export` writes, one JSON a line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from sqlalchemy import Table, func, select

from lifelogger.errors import LifeloggerError
from lifelogger.runtime import Runtime
from lifelogger.status import CONNECTION, as_json
from lifelogger.store.models import Connection, Quarantined, Record, Stream, SyncRun, User

BATCH = 500
_HIDDEN = {"id", "connection_id", "digest", "change"}
_TABLES: dict[str, Table] = {
    kind: cast(Table, model.__table__)
    for kind, model in {
        "stream": Stream,
        "record": Record,
        "quarantined": Quarantined,
        "sync_run": SyncRun,
    }.items()
}
"""What hangs on a connection, by the `object` it is exported as."""


def size(rt: Runtime, user_id: str) -> int:
    """How many objects `objects` yields. Raises `LifeloggerError` when there is no such user."""
    with rt.store.read() as db:
        if db.scalar(select(User.id).where(User.id == user_id)) is None:
            raise LifeloggerError(f"There is no user {user_id!r}: `lifelogger user list` shows all")
        connections = select(Connection.id).where(Connection.user_id == user_id)
        counts = [
            db.scalar(select(func.count()).select_from(table).where(table.c.connection_id.in_(connections)))
            for table in _TABLES.values()
        ]
        return (
            1
            + (db.scalar(select(func.count()).select_from(connections.subquery())) or 0)
            + sum(count or 0 for count in counts)
        )


def objects(rt: Runtime, user_id: str) -> Iterator[dict[str, Any]]:
    """The user, each connection, and all that belongs to it; tokens are not in it.

    Each says in `object` what it is. (Not in `type`: a record has one of its own, as `run`.)
    """
    with rt.store.read() as db:
        user = db.execute(select(User.__table__).where(User.id == user_id)).one_or_none()
        connections = db.execute(
            select(*CONNECTION).where(Connection.user_id == user_id).order_by(Connection.id)
        ).all()
    if user is None:
        raise LifeloggerError(f"There is no user {user_id!r}: `lifelogger user list` shows all")
    yield {"object": "user", **as_json(user._mapping)}
    for connection in connections:
        shown = {name: value for name, value in connection._mapping.items() if name not in _HIDDEN}
        yield {"object": "connection", **as_json(shown)}
        for kind, table in _TABLES.items():
            for row in _rows(rt, table, connection.id):
                kept = {name: value for name, value in row.items() if name not in _HIDDEN}
                yield {"object": kind, "provider": connection.provider, **as_json(kept)}


def _rows(rt: Runtime, table: Table, connection_id: int) -> Iterator[dict[str, Any]]:
    """A connection's rows in batches, so that no transaction is open while somebody writes them elsewhere."""
    last = 0
    while True:
        query = (
            select(table)
            .where(table.c.connection_id == connection_id, table.c.id > last)
            .order_by(table.c.id)
            .limit(BATCH)
        )
        with rt.store.read() as db:
            rows = [dict(row._mapping) for row in db.execute(query)]
        yield from rows
        if len(rows) < BATCH:
            return
        last = rows[-1]["id"]
