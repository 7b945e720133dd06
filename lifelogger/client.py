"""What a host application does with lifelogger: read a user's records, and ask for a sync.

Nothing here needs a worker in the same process; `request_sync` needs the Redis that the workers use.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from dramatiq import Message
from sqlalchemy import select

from lifelogger.connections import Wish, note_news, note_wish
from lifelogger.runtime import Runtime
from lifelogger.runtime import runtime as processwide
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
    columns = [column for column in Record.__table__.columns if column.name not in _HIDDEN]
    query = (
        select(Connection.provider, *columns)
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


_HIDDEN = frozenset({"connection_id", "digest", "deleted_at"})


def request_sync(user_id: str, *, runtime: Runtime | None = None) -> int:
    """Say that there is news of one user; return how many of the connections will look at once.

    The wish is written down before the message is sent, so a message that finds a sync running,
    or is lost, loses nothing: the running sync or the next tick serves it.
    """
    from lifelogger.broker import broker

    noted = note_news(runtime or processwide(), user_id)
    if noted:
        broker.enqueue(urgent(user_id))
    return noted


def sync_now(user_id: str, *, runtime: Runtime | None = None) -> Wish:
    """A person's "sync now": as `request_sync`, once a minute; tells when it looks, and which runs it joins.

    Sooner, the wish is written down all the same, and served by the run under way or when the minute is over.
    """
    from lifelogger.broker import broker

    rt = runtime or processwide()
    wish = note_wish(rt, user_id)
    if wish.connections and wish.at <= rt.clock():
        broker.enqueue(urgent(user_id))
    return wish


def urgent(user_id: str, trigger: str = "asked") -> Message[Any]:
    """The message for somebody who waits: its queue is not that of a tick's long line."""
    return Message(
        queue_name="now", actor_name="sync_user_now", args=(user_id, trigger), kwargs={}, options={}
    )
