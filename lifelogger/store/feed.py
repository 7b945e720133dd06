"""The change feed: one number for each write of a record, visible in the order of the numbers.

A sequence would not do: a transaction that took 7 may commit after the one that took 8, and who has read up
to 8 never sees 7. So the numbers come from one row, which a writer locks by taking some and holds until it
commits. Writers of records therefore commit one after the other; a sync that finds nothing new takes no
number and waits for nobody.

A record has the number of its newest write only, so a reader sees each once in its latest state, however
far behind it is. A deleted one keeps its row as a mark. Where rows go for good there is a mark of an erasure.
A connection whose status changed has a number too; it gets it in a transaction that follows the change.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection as Database
from sqlalchemy import bindparam, func, insert, select, update

from lifelogger.store.engine import Prepared, table
from lifelogger.store.models import Connection, Erasure, Feed, Record

TAKE = Prepared(
    update(table(Feed))
    .values(newest=Feed.__table__.c.newest + bindparam("number"))
    .returning(Feed.__table__.c.newest)
)


def take(db: Database, number: int) -> range:
    """Take so many change numbers, and keep other writers of records waiting until this transaction ends.

    Whoever also locks connections locks them first: two writers in two orders would wait for each other.
    """
    newest: int
    [(newest,)] = TAKE(db, number=number)
    return range(newest - number + 1, newest + 1)


def newest(db: Database) -> int:
    """The newest number: all changes up to it are visible to the statements that follow."""
    return int(db.execute(select(Feed.newest)).scalar_one())


def first_since(db: Database, user_id: str, since: datetime) -> int | None:
    """The number of the first change of a user that was written at `since` or later; None: there is none."""
    records = (
        select(func.min(Record.change))
        .join_from(Record, Connection, Record.connection_id == Connection.id)
        .where(Connection.user_id == user_id, Record.updated_at >= since)
    )
    erasures = select(func.min(Erasure.change)).where(Erasure.user_id == user_id, Erasure.erased_at >= since)
    found = [number for query in (records, erasures) if (number := db.scalar(query)) is not None]
    return min(found, default=None)


def first_after(db: Database, after: int) -> datetime | None:
    """When the first change behind a number was written; None: there is none."""
    firsts = (
        select(column, at).where(column > after).order_by(column).limit(1)
        for column, at in (
            (Record.change, Record.updated_at),
            (Erasure.change, Erasure.erased_at),
            (Connection.status_change, Connection.status_at),
        )
    )
    found = [row for query in firsts if (row := db.execute(query).first())]
    return min(found)[1] if found else None


def mark_erased(db: Database, user_id: str, provider: str | None, now: datetime) -> None:
    """Tell the readers that all records of a user are gone for good; of one provider, if it is named.

    Belongs into the transaction that deletes them.
    """
    (change,) = take(db, 1)
    db.execute(insert(Erasure).values(change=change, user_id=user_id, provider=provider, erased_at=now))


def number_statuses(db: Database, limit: int) -> int:
    """Give a number to changes of a connection's status that have none yet; returns how many.

    Not where the status changes: who stores many connections would lock some after the feed's row.
    """
    unnumbered = (Connection.status_at.is_not(None), Connection.status_change.is_(None))
    waiting = db.scalars(
        select(Connection.id)
        .where(*unnumbered)
        .order_by(Connection.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    if waiting:
        numbers = take(db, len(waiting))
        db.execute(
            update(Connection)
            .where(Connection.id == bindparam("which"))
            .values(status_change=bindparam("number")),
            [{"which": each, "number": number} for each, number in zip(waiting, numbers, strict=True)],
        )
    return len(waiting)


def statuses(db: Database, after: int, until: int, limit: int, user_id: str | None = None) -> list[Any]:
    """The connections whose status changed in (after, until], as they are now, at most `limit`."""
    query = (
        select(
            Connection.status_change.label("change"),
            Connection.user_id,
            Connection.provider,
            Connection.status,
            Connection.status_reason,
            Connection.status_at,
        )
        .where(Connection.status_change > after, Connection.status_change <= until)
        .order_by(Connection.status_change)
        .limit(limit)
    )
    return list(db.execute(query if user_id is None else query.where(Connection.user_id == user_id)))


def read(
    db: Database, columns: Sequence[Any], after: int, until: int, limit: int, user_id: str | None = None
) -> tuple[list[Any], list[Any]]:
    """The changes of (after, until], at most `limit` of each: rows of records with `change`, and erasures."""
    records = (
        select(Connection.user_id, Connection.provider, Record.change, Record.deleted_at, *columns)
        .join_from(Record, Connection, Record.connection_id == Connection.id)
        .where(Record.change > after, Record.change <= until)
        .order_by(Record.change)
        .limit(limit)
    )
    erasures = (
        select(Erasure.__table__)
        .where(Erasure.change > after, Erasure.change <= until)
        .order_by(Erasure.change)
        .limit(limit)
    )
    if user_id is not None:
        records = records.where(Connection.user_id == user_id)
        erasures = erasures.where(Erasure.user_id == user_id)
    return list(db.execute(records)), list(db.execute(erasures))
