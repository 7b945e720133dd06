"""How everything stands, for people and programs: the same words on the page, in the CLI and in the API.

Everything returned is plain: dictionaries of strings, numbers and UTC datetimes, ready for `as_json`.
Nothing here changes anything, and no secret is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import date, datetime
from typing import Any

from sqlalchemy import func, select

from lifelogger.budget import Window
from lifelogger.errors import Unavailable
from lifelogger.planner import AGAIN
from lifelogger.providers.base import Pool
from lifelogger.runtime import Runtime
from lifelogger.store import counts
from lifelogger.store.models import Connection, Quarantined, Record, Stream, SyncRun, Tick, User


def overview(rt: Runtime, *, budgets: bool = True) -> dict[str, Any]:
    """What `status --json` and `/api/status` say: totals, the last tick, and each enabled provider.

    `counted_at` is when the numbers were true: now, but for a large store (`store.counts`).
    Without `budgets` Redis is not asked: for who knows that it does not answer, and will not wait.
    """
    now = rt.clock()
    with rt.store.read() as db:
        counted = counts.read(db, now)
        fired = select(Tick.__table__).where(Tick.name != AGAIN).order_by(Tick.fired_at.desc())
        tick = db.execute(fired.limit(1)).first()
    providers = {}
    for name, provider in rt.enabled().items():
        found = counted.providers.get(name, counts.OfProvider())
        providers[name] = {
            "title": provider.title,
            "simulated": name in rt.settings.simulated,
            "connections": found.connections,
            "needs_reauth": found.needs_reauth,
            "records": found.records,
            "budget": budget(rt, name) if budgets else None,
            "last_sync": found.last_sync,
            "waiting": found.waiting,
            "waits": [asdict(wait) for wait in found.waits],
        }
    return {
        "now": now,
        "counted_at": counted.counted_at,
        "users": counted.users,
        "connections": counted.connections,
        "records": counted.records,
        "quarantined": counted.quarantined,
        "last_tick": tick and dict(tick._mapping),
        "providers": providers,
    }


def budget(rt: Runtime, provider: str) -> list[dict[str, Any]] | None:
    """The windows of a provider's budget, those of the whole application; None: Redis does not answer."""
    pools = rt.providers[provider].shared_pools(rt.settings.providers[provider])
    try:
        return [of_window(window) for window in rt.budget.windows(pools)]
    except Unavailable:
        return None


def of_window(window: Window) -> dict[str, Any]:
    """One window in plain values; `pool` and `seconds` name it."""
    pool: Pool = window.pool
    return {
        "pool": pool.name,
        "seconds": window.seconds,
        "limit": window.limit,
        "used": window.used,
        "remaining": window.remaining,
        "in_flight": window.in_flight,
        "known": window.known,
        "start": window.start,
        "end": window.end,
        "closed_until": window.closed_until,
    }


def users(rt: Runtime, *, after: str = "", limit: int = 50, search: str = "") -> list[dict[str, Any]]:
    """Users by id, those behind `after`, with their connections; `search` is the beginning of an id."""
    query = select(User.id).where(User.id > after).order_by(User.id).limit(limit)
    if search:
        query = query.where(User.id.startswith(search, autoescape=True))
    with rt.store.read() as db:
        found = db.scalars(query).all()
        rows = db.execute(
            select(*CONNECTION).where(Connection.user_id.in_(found)).order_by(Connection.provider)
        ).all()
    mine: dict[str, list[dict[str, Any]]] = {user_id: [] for user_id in found}
    for row in rows:
        mine[row.user_id].append(of_connection(rt, row._mapping))
    return [{"user_id": user_id, "connections": connections} for user_id, connections in mine.items()]


def user(rt: Runtime, user_id: str, *, runs_each: int = 20) -> dict[str, Any] | None:
    """Everything about one user: connections, streams, what they hold, and their last runs; None: unknown."""
    with rt.store.read() as db:
        row = db.execute(select(User.id, User.created_at).where(User.id == user_id)).one_or_none()
        if row is None:
            return None
        connections = db.execute(
            select(*CONNECTION).where(Connection.user_id == user_id).order_by(Connection.provider)
        ).all()
        found = []
        for connection in connections:
            mine = [table.connection_id == connection.id for table in (Record, Quarantined, Stream)]
            streams = db.execute(select(Stream.__table__).where(mine[2]).order_by(Stream.name)).all()
            found.append(
                {
                    **of_connection(rt, connection._mapping),
                    "records": db.scalar(
                        select(func.count()).select_from(Record).where(mine[0], Record.deleted_at.is_(None))
                    ),
                    "quarantined": db.scalar(select(func.count()).select_from(Quarantined).where(mine[1])),
                    "streams": [
                        {
                            "name": stream.name,
                            "read_at": stream.cursor,
                            "off_reason": stream.off_reason,
                            "history_left_since": stream.backlog_since,
                            "history_left_until": stream.backlog_until,
                        }
                        for stream in streams
                    ],
                }
            )
    return {
        "user_id": row.id,
        "created_at": row.created_at,
        "connections": found,
        "runs": runs(rt, user_id=user_id, limit=runs_each),
    }


def runs(
    rt: Runtime, *, user_id: str | None = None, before: int | None = None, limit: int = 50
) -> list[dict[str, Any]]:
    """The journal, newest first: one row for each connection and sync; `before` is the id of one."""
    columns = [column for column in SyncRun.__table__.columns if column.name != "connection_id"]
    query = (
        select(Connection.user_id, Connection.provider, *columns)
        .join_from(SyncRun, Connection, SyncRun.connection_id == Connection.id)
        .order_by(SyncRun.id.desc())
        .limit(limit)
    )
    if user_id is not None:
        query = query.where(Connection.user_id == user_id)
    if before is not None:
        query = query.where(SyncRun.id < before)
    with rt.store.read() as db:
        return [dict(row._mapping) for row in db.execute(query)]


CONNECTION = (
    Connection.id,
    Connection.user_id,
    Connection.provider,
    Connection.provider_user_id,
    Connection.status,
    Connection.status_reason,
    Connection.scopes,
    Connection.token_expires_at,
    Connection.next_sync_at,
    Connection.claimed_at,
    Connection.news_at,
    Connection.wait_reason,
    Connection.failures,
    Connection.last_sync_at,
    Connection.created_at,
)
"""The columns of a connection that may be shown: none of them is a secret."""


def of_connection(rt: Runtime, row: Mapping[Any, Any]) -> dict[str, Any]:
    """One connection in plain values, with its state as a sentence."""
    shown = {column.key: row[column.key] for column in CONNECTION if column.key != "id"}
    return {**shown, "sentence": sentence(shown, rt.clock())}


def sentence(connection: Mapping[str, Any], now: datetime) -> str:
    """The state of a connection, as docs/architecture.md draws it, for a person."""
    due = connection["next_sync_at"]
    if connection["status"] == "needs_reauth":
        return f"Has to sign in again: {ended(connection['status_reason'])}"
    if connection["wait_reason"] and due is not None and due > now:
        return f"Waiting until {moment(due, now)}: {ended(connection['wait_reason'])}"
    if connection["claimed_at"] is not None and due is not None and due > now:
        return f"A sync is on its way since {moment(connection['claimed_at'], now)}."
    if due is None:
        return "Not polled."
    if due > now:
        return f"Up to date; due again at {moment(due, now)}."
    return "Due: the next tick takes it, as far as the budget goes."


def count(number: int, noun: str) -> str:
    """`1 record`, `2,000 records`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def brought(run: Mapping[str, Any]) -> str:
    """What a sync, or several together, did to the records: `3 new, 1 changed`, or `nothing new`."""
    words = {"inserted": "new", "updated": "changed", "deleted": "gone", "quarantined": "quarantined"}
    parts = [f"{run[name]:,} {word}" for name, word in words.items() if run[name]]
    return ", ".join(parts) or ("nothing yet" if run.get("outcome") == "running" else "nothing new")


def ended(reason: str) -> str:
    """A reason as the end of a sentence."""
    return f"{reason.rstrip('.')}."


def moment(instant: datetime, now: datetime) -> str:
    """A time as a person reads it: with the date unless it is today's."""
    day = "" if instant.date() == now.date() else f"{instant:%Y-%m-%d} "
    return f"{day}{instant:%H:%M} UTC"


def as_json(value: Any) -> Any:
    """The same with ISO texts for times, for `json.dumps`."""
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {key: as_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    return value
