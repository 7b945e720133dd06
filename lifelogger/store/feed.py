"""The change feed: one number for each write of a record, visible in the order of the numbers.

A sequence would not do: a transaction that took 7 may commit after the one that took 8, and who has read up
to 8 never sees 7. So the numbers come from one row, which a writer locks by taking some and holds until it
commits. Writers of records therefore commit one after the other; a sync that finds nothing new takes no
number and waits for nobody.

A record has the number of its newest write only, so a reader sees each once in its latest state, however
far behind it is. A deleted one keeps its row as a mark. Where rows go for good there is a mark of an erasure.
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


def mark_erased(db: Database, user_id: str, provider: str | None, now: datetime) -> None:
    """Tell the readers that all records of a user are gone for good; of one provider, if it is named.

    Belongs into the transaction that deletes them.
    """
    (change,) = take(db, 1)
    db.execute(insert(Erasure).values(change=change, user_id=user_id, provider=provider, erased_at=now))


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
