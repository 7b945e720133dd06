"""What a host application does with lifelogger: read records, follow their changes, and ask for a sync.

Nothing here needs a worker in the same process; `request_sync` needs the Redis that the workers use.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple, TypedDict

from dramatiq import Message
from sqlalchemy import select

from lifelogger.connections import note_news
from lifelogger.errors import LifeloggerError
from lifelogger.runtime import Runtime
from lifelogger.runtime import runtime as processwide
from lifelogger.store import feed
from lifelogger.store.models import Connection, Record

MOST = 1000
"""The most records that one call returns."""


def records(
    user_id: str,
    *,
    kind: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    limit: int = 100,
    runtime: Runtime | None = None,
) -> Sequence[dict[str, Any]]:
    """A user's records that started in [since, until), the newest first, at most `limit` (1 to 1000).

    Each is a dictionary of the columns of docs/records.md: instants are UTC datetimes, units stand
    in the names, what the provider did not say is None, and `raw` is the provider's own item.
    """
    for name, instant in (("since", since), ("until", until)):
        if instant is not None and instant.tzinfo is None:
            raise ValueError(f"{name} needs a time zone: {instant} may be any of a day's hours")
    rt = runtime or processwide()
    query = (
        select(Connection.provider, *_COLUMNS)
        .join_from(Record, Connection, Record.connection_id == Connection.id)
        .where(Connection.user_id == user_id, Record.deleted_at.is_(None))
        .order_by(Record.ordered_at.desc(), Record.id.desc())
        .limit(max(1, min(limit, MOST)))
    )
    if kind is not None:
        query = query.where(Record.kind == kind)
    if since is not None:
        query = query.where(Record.ordered_at >= since)
    if until is not None:
        query = query.where(Record.ordered_at < until)
    with rt.store.read() as db:
        return [dict(row._mapping) for row in db.execute(query)]


_HIDDEN = frozenset({"connection_id", "digest", "deleted_at", "change"})
_COLUMNS = [column for column in Record.__table__.columns if column.name not in _HIDDEN]


class Change(TypedDict):
    """What became of one record, or at an erasure of all that a user had."""

    action: Literal["upsert", "delete", "erase"]
    """`upsert`: it is new or different, `record` is how it is now. `delete`: the provider no longer has it.
    `erase`: forget all records of the user; of `provider`, if there is one."""
    at: datetime
    user_id: str
    provider: str | None
    stream: str | None
    external_id: str | None
    """With user, provider and stream the record's identity; None of an erasure."""
    record: dict[str, Any] | None
    """What `records` returns of it."""


class Changes(NamedTuple):
    """A page of the feed, and the cursor behind it."""

    changes: list[Change]
    next: str


class CursorUnknown(LifeloggerError):
    """The cursor is none of this database's: forget what was read, and begin without one."""


def changes(
    after: str = "", *, limit: int = 100, user_id: str | None = None, runtime: Runtime | None = None
) -> Changes:
    """What changed since the cursor `after`, in order, at most `limit` (1 to 1000), of one user or all.

    Keep `next` together with what you made of the changes, and ask with it again: nothing is missed, however
    many write meanwhile, and what was read before a crash is only read again. Without a cursor it begins
    with everything there is; `newest_cursor` begins with what comes. Each record comes once, as it is now,
    however often it changed since `after`. An empty page says that there is no more for now.

    Raises `CursorUnknown`.
    """
    rt = runtime or processwide()
    limit = max(1, min(limit, MOST))
    with rt.store.read() as db:
        until = feed.newest(db)
        begin = _position(after, until)
        records, erasures = feed.read(db, _COLUMNS, begin, until, limit, user_id)
    found = sorted([*records, *erasures], key=lambda row: row.change)
    page = found[:limit]
    # A page that is not full has all there was; its cursor goes on over what concerns others.
    behind = page[-1].change if len(found) > limit or len(page) == limit else until
    return Changes([_change(row) for row in page], str(behind))


def newest_cursor(*, runtime: Runtime | None = None) -> str:
    """The cursor behind all that has changed so far."""
    with (runtime or processwide()).store.read() as db:
        return str(feed.newest(db))


def _position(cursor: str, newest: int) -> int:
    known = len(cursor) < 20 and (cursor == "" or (cursor.isascii() and cursor.isdecimal()))
    position = int(cursor or 0) if known else -1
    if not 0 <= position <= newest:
        raise CursorUnknown(
            "That cursor is not of this database: it may have been restored from a backup. "
            "Forget what you have read, and begin without a cursor."
        )
    return position


def _change(row: Any) -> Change:
    values = row._mapping
    if "erased_at" in values:
        return Change(
            action="erase",
            at=row.erased_at,
            user_id=row.user_id,
            provider=row.provider,
            stream=None,
            external_id=None,
            record=None,
        )
    shown = {name: values[name] for name in ("provider", *(column.name for column in _COLUMNS))}
    return Change(
        action="delete" if row.deleted_at else "upsert",
        at=row.updated_at,
        user_id=row.user_id,
        provider=row.provider,
        stream=row.stream,
        external_id=row.external_id,
        record=None if row.deleted_at else shown,
    )


def request_sync(user_id: str, *, runtime: Runtime | None = None) -> int:
    """Ask for a sync of one user now; return how many of the connections will look.

    The wish is written down before the message is sent, so a message that finds a sync running,
    or is lost, loses nothing: the running sync or the next tick serves it.
    """
    from lifelogger.broker import broker

    noted = note_news(runtime or processwide(), user_id)
    if noted:
        broker.enqueue(
            Message(queue_name="default", actor_name="sync_user_data", args=(user_id,), kwargs={}, options={})
        )
    return noted
