"""How much there is, by provider: counted when somebody asks, or, of a large store, beforehand.

Counting reads every row. Of a small store it costs milliseconds; a page over a hundred million records would
wait for a minute. So a periodic actor counts, and keeps the result of a store that is large: who asks is told
that one, and when it was counted. Counters that every write keeps would be exact, but then every write would
cost more, and writers of one provider would wait for each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import ColumnElement, and_, delete, func, select
from sqlalchemy import Connection as Database

from lifelogger.store.engine import Store
from lifelogger.store.models import Connection, Counted, Quarantined, Record, User

LARGE = 100_000
"""Rows of users, connections, records and quarantine together, from which on a count is kept."""
SHARE = 0.01
"""Of the time, what counting may take: a count that took a second is kept for a hundred."""
MOST_WAITS = 20
"""Reasons for waiting that are told of one provider, the most frequent first."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Connections that are deferred for one reason, and when the first of them is due."""

    reason: str
    until: datetime
    connections: int


@dataclass(frozen=True, slots=True)
class OfProvider:
    """What there is of one provider."""

    connections: int = 0
    needs_reauth: int = 0
    records: int = 0
    last_sync: datetime | None = None
    waiting: int = 0
    waits: tuple[Wait, ...] = ()
    applications: Mapping[str, int] = field(default_factory=dict)
    """Of the connections so many each application has, by name."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What there was at an instant."""

    counted_at: datetime
    users: int
    connections: int
    records: int
    """Without those that were deleted at their provider."""
    quarantined: int
    providers: Mapping[str, OfProvider]


_counts = TypeAdapter(Counts)


def read(db: Database, now: datetime) -> Counts:
    """The count that is kept, or of a small store a fresh one."""
    kept = db.execute(select(Counted.value)).scalar()
    return count(db, now) if kept is None else _counts.validate_python(kept)


def of_applications(db: Database, provider: str) -> Mapping[str, int]:
    """How many connections each application of a provider has; of a large store, had when it was counted."""
    kept = db.execute(select(Counted.value)).scalar()
    if kept is not None:
        return _counts.validate_python(kept).providers.get(provider, OfProvider()).applications
    query = select(Connection.application, func.count()).where(Connection.provider == provider)
    return {row[0]: row[1] for row in db.execute(query.group_by(Connection.application))}


def recount(store: Store, clock: Callable[[], datetime], *, large: int = LARGE) -> bool:
    """Count, unless what is kept is young for what it cost; return whether a count is kept now."""
    now = clock()
    with store.read() as db:
        kept = db.execute(select(Counted.counted_at, Counted.seconds)).first()
        if kept is not None and (now - kept.counted_at).total_seconds() < kept.seconds / SHARE:
            return True
        began = time.perf_counter()
        found = count(db, now)
        seconds = time.perf_counter() - began
    keep = found.users + found.connections + found.records + found.quarantined >= large
    with store.write() as db:
        if not keep:
            db.execute(delete(Counted))
            return False
        row = {"counted_at": now, "seconds": seconds, "value": _counts.dump_python(found, mode="json")}
        statement = store.insert(Counted.__table__).values(id=1, **row)
        db.execute(statement.on_conflict_do_update(index_elements=["id"], set_=row))
    return True


def count(db: Database, now: datetime) -> Counts:
    """Count everything: takes as long as there are rows."""
    states = db.execute(
        select(
            Connection.provider,
            Connection.application,
            func.count().label("connections"),
            func.count().filter(Connection.status == "needs_reauth").label("needs_reauth"),
            func.count().filter(waits(now)).label("waiting"),
            func.max(Connection.last_sync_at).label("last_sync"),
        )
        .group_by(Connection.provider, Connection.application)
        .order_by(Connection.provider, Connection.application)
    ).all()
    reasons = db.execute(
        select(
            Connection.provider,
            Connection.wait_reason.label("reason"),
            func.min(Connection.next_sync_at).label("until"),
            func.count().label("connections"),
        )
        .where(waits(now))
        .group_by(Connection.provider, Connection.wait_reason)
        .order_by(func.count().desc())
    ).all()
    # In two steps, so that each is the range of an index: the rows themselves, with people's payloads, are
    # hundreds of times as much to read.
    rows = select(Record.connection_id, func.count().label("number")).group_by(Record.connection_id)
    stored, gone = _by_provider(db, rows), _by_provider(db, rows.where(Record.deleted_at.is_not(None)))
    providers = {}
    for name, group in groupby(states, key=lambda row: row.provider):
        rows_of = list(group)
        providers[name] = OfProvider(
            connections=sum(row.connections for row in rows_of),
            needs_reauth=sum(row.needs_reauth for row in rows_of),
            records=stored.get(name, 0) - gone.get(name, 0),
            last_sync=max((row.last_sync for row in rows_of if row.last_sync), default=None),
            waiting=sum(row.waiting for row in rows_of),
            waits=tuple(
                Wait(each.reason or "", each.until or now, each.connections)
                for each in reasons
                if each.provider == name
            )[:MOST_WAITS],
            applications={row.application: row.connections for row in rows_of},
        )
    return Counts(
        counted_at=now,
        users=db.scalar(select(func.count()).select_from(User)) or 0,
        connections=sum(found.connections for found in providers.values()),
        records=sum(found.records for found in providers.values()),
        quarantined=db.scalar(select(func.count()).select_from(Quarantined)) or 0,
        providers=providers,
    )


def _by_provider(db: Database, rows: Any) -> dict[str, int]:
    numbers = rows.subquery()
    query = select(Connection.provider, func.sum(numbers.c.number)).join_from(
        numbers, Connection, numbers.c.connection_id == Connection.id
    )
    return {name: int(number) for name, number in db.execute(query.group_by(Connection.provider))}


def waits(now: datetime) -> ColumnElement[bool]:
    """Whether a connection is deferred: it has a reason, and the time has not come."""
    return and_(Connection.wait_reason.is_not(None), Connection.next_sync_at > now)
