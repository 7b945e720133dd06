"""What a host application does with lifelogger: read records, follow their changes, and ask for a sync.

Nothing here needs a worker in the same process; `request_sync` needs the Redis that the workers use.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, TypedDict

from dramatiq import Message
from sqlalchemy import ColumnElement, literal, select, tuple_, union_all
from sqlalchemy import Connection as Database

from lifelogger import progress, status
from lifelogger.connections import Wish, note_news, note_wish
from lifelogger.errors import LifeloggerError
from lifelogger.progress import Import
from lifelogger.runtime import Runtime
from lifelogger.runtime import runtime as processwide
from lifelogger.store import feed
from lifelogger.store.models import Connection, Record, Stream

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
    return record_page(user_id, kind=kind, since=since, until=until, limit=limit, runtime=runtime).records


class RecordPage(NamedTuple):
    """Records, and the cursor to the older ones; None: there are none."""

    records: list[dict[str, Any]]
    next: str | None


def record_page(
    user_id: str,
    *,
    kind: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    after: str = "",
    limit: int = 100,
    runtime: Runtime | None = None,
) -> RecordPage:
    """The same as `records`, page by page: ask again with `after=next`.

    A cursor is a place in the order, so what is stored or deleted meanwhile moves nothing: no record comes
    twice or is left out. The last page costs as much as the first. Raises `CursorUnknown`.
    """
    for name, instant in (("since", since), ("until", until)):
        if instant is not None and instant.tzinfo is None:
            raise ValueError(f"{name} needs a time zone: {instant} may be any of a day's hours")
    rt = runtime or processwide()
    limit = max(1, min(limit, MOST))
    wanted: list[ColumnElement[bool]] = [Record.deleted_at.is_(None)]
    if kind is not None:
        wanted.append(Record.kind == kind)
    if since is not None:
        wanted.append(Record.ordered_at >= since)
    if until is not None:
        wanted.append(Record.ordered_at < until)
    if after:
        instant, number = _place(after)
        here = tuple_(literal(instant, Record.ordered_at.type), literal(number))
        wanted.append(tuple_(Record.ordered_at, Record.id) < here)
    with rt.store.read() as db:
        mine = db.scalars(select(Connection.id).where(Connection.user_id == user_id))
        # One range of an index for each connection: together they are in no order, and would all be sorted.
        heads = [_newest(limit + 1, Record.connection_id == connection, *wanted) for connection in mine]
        found = _records(db, heads, limit + 1)
    page = found[:limit]
    return RecordPage(page, _cursor(page[-1]["ordered_at"], page[-1]["id"]) if len(found) > limit else None)


def latest(user_id: str, *, kind: str | None = None, runtime: Runtime | None = None) -> list[dict[str, Any]]:
    """The latest record of each stream that a user's connections have, of one kind or all; the newest first.

    Of each stream rather than each kind: a day's steps and its score may be two records.
    """
    rt = runtime or processwide()
    wanted = [Record.deleted_at.is_(None)] + ([] if kind is None else [Record.kind == kind])
    with rt.store.read() as db:
        streams = db.execute(
            select(Stream.connection_id, Stream.name, Connection.provider)
            .join_from(Stream, Connection, Stream.connection_id == Connection.id)
            .where(Connection.user_id == user_id)
        )
        kinds = {(name, each.name): each.kind for name, of in rt.providers.items() for each in of.streams}
        heads = [
            _newest(1, Record.connection_id == row.connection_id, Record.stream == row.name, *wanted)
            for row in streams
            if kind is None or kinds.get((row.provider, row.name), kind) == kind
        ]
        return _records(db, heads, len(heads))


def _newest(limit: int, *where: Any) -> Any:
    """The ids of the newest records of one range of an index."""
    order = (Record.ordered_at.desc(), Record.id.desc())
    return select(select(Record.id).where(*where).order_by(*order).limit(limit).subquery().c.id)


def _records(db: Database, heads: Sequence[Any], limit: int) -> list[dict[str, Any]]:
    """The newest of what these queries name."""
    if not heads:
        return []
    query = (
        select(Connection.provider, *_COLUMNS)
        .join_from(Record, Connection, Record.connection_id == Connection.id)
        .where(Record.id.in_(union_all(*heads)))
        .order_by(Record.ordered_at.desc(), Record.id.desc())
        .limit(limit)
    )
    return [dict(row._mapping) for row in db.execute(query)]


def _cursor(instant: datetime, number: int) -> str:
    return urlsafe_b64encode(f"{instant.isoformat()} {number}".encode()).decode().rstrip("=")


def _place(cursor: str) -> tuple[datetime, int]:
    try:
        text = urlsafe_b64decode(cursor.encode("ascii") + b"==").decode("ascii")
        instant, _, number = text.partition(" ")
        place = datetime.fromisoformat(instant).astimezone(UTC), int(number)
        if _cursor(*place) != cursor or place[1] >= 2**63:
            raise ValueError("not as we write them")
        return place
    except (ValueError, OverflowError):
        raise CursorUnknown("That cursor cannot be read. Begin without one.") from None


_HIDDEN = frozenset({"connection_id", "digest", "deleted_at", "change"})
_COLUMNS = [column for column in Record.__table__.columns if column.name not in _HIDDEN]


class Change(TypedDict):
    """What became of one record, or at an erasure of all that a user had; or of a connection."""

    action: Literal["upsert", "delete", "erase", "sign_in_again", "signed_in"]
    """`upsert`: it is new or different, `record` is how it is now. `delete`: the provider no longer has it.
    `erase`: forget all records of the user; of `provider`, if there is one. Only for who asks with
    `connections`: `sign_in_again`: the user has to, nothing comes from `provider` before; `signed_in`: they
    have."""
    at: datetime
    user_id: str
    provider: str | None
    stream: str | None
    external_id: str | None
    """With user, provider and stream the record's identity; else None."""
    record: dict[str, Any] | None
    """What `records` returns of it."""
    reason: str | None
    """Why they have to sign in again."""


class Changes(NamedTuple):
    """A page of the feed, and the cursor behind it."""

    changes: list[Change]
    next: str


class CursorUnknown(LifeloggerError):
    """The cursor is none of this database's: begin without one; with changes, forget first what was read."""


def changes(
    after: str = "",
    *,
    limit: int = 100,
    user_id: str | None = None,
    connections: bool = False,
    runtime: Runtime | None = None,
) -> Changes:
    """What changed since the cursor `after`, in order, at most `limit` (1 to 1000), of one user or all.

    With `connections` it also tells of those whose person has to sign in again, or has done so.

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
        statuses = feed.statuses(db, begin, until, limit, user_id) if connections else []
    found = sorted([*records, *erasures, *statuses], key=lambda row: row.change)
    page = found[:limit]
    # A page that is not full has all there was; its cursor goes on over what concerns others.
    behind = page[-1].change if len(page) == limit else until
    return Changes([_change(row) for row in page], str(behind))


def newest_cursor(*, runtime: Runtime | None = None) -> str:
    """The cursor behind all that has changed so far."""
    with (runtime or processwide()).store.read() as db:
        return str(feed.newest(db))


def cursor_since(user_id: str, since: datetime, *, runtime: Runtime | None = None) -> str:
    """The cursor before the first change of a user that was stored at `since` or later."""
    if since.tzinfo is None:
        raise ValueError(f"since needs a time zone: {since} may be any of a day's hours")
    with (runtime or processwide()).store.read() as db:
        newest = feed.newest(db)
        first = feed.first_since(db, user_id, since)
    return str(newest if first is None else first - 1)


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
            reason=None,
        )
    if "status_at" in values:
        ended = row.status == "needs_reauth"
        return Change(
            action="sign_in_again" if ended else "signed_in",
            at=row.status_at,
            user_id=row.user_id,
            provider=row.provider,
            stream=None,
            external_id=None,
            record=None,
            reason=row.status_reason,
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
        reason=None,
    )


class Freshness(TypedDict):
    """How far one stream of a connection is known."""

    provider: str
    stream: str
    kind: str | None
    as_of: datetime | None
    """Everything that the provider had then is stored, but for the history below; None: never read."""
    pending: bool
    """Whether more may be on its way: somebody knows of news, or a sync is due to start or runs."""
    history_left_since: datetime | None
    history_left_until: datetime | None
    """The span of the past that is still to be imported; None: none is."""
    history_share: float
    """How much of the time that the history goes back is here: 0 to 1."""
    off_reason: str | None
    """Why the stream is not read at all."""
    status: str
    """Of the connection: `active`, or `needs_reauth`: nothing comes until the person signs in again."""
    sentence: str
    """The state of the connection, for a person."""


def freshness(user_id: str, *, runtime: Runtime | None = None) -> list[Freshness]:
    """How fresh each stream of a user's connections is; those never read yet are among them."""
    rt = runtime or processwide()
    now = rt.clock()
    with rt.store.read() as db:
        connections = db.execute(
            select(*status.CONNECTION).where(Connection.user_id == user_id).order_by(Connection.provider)
        ).all()
        read = {
            (row.connection_id, row.name): row
            for row in db.execute(
                select(Stream.__table__).where(Stream.connection_id.in_([each.id for each in connections]))
            )
        }
    found: list[Freshness] = []
    for each in connections:
        provider = rt.providers.get(each.provider)  # None: its package is no longer installed
        streams = provider.streams if provider else ()
        kinds = {stream.name: stream.kind for stream in streams}
        wanted = {stream.name for stream in streams if stream.wanted(rt.settings.providers[each.provider])}
        known = {name for number, name in read if number == each.id}
        state = status.of_connection(rt, each._mapping)
        due = each.next_sync_at is not None and each.next_sync_at <= now
        pending = each.news_at is not None or each.claimed_at is not None or due
        for name in sorted(wanted | known):
            row = read.get((each.id, name))
            span = progress.span(row, now, rt.settings.sync.history_days)
            found.append(
                Freshness(
                    provider=each.provider,
                    stream=name,
                    kind=kinds.get(name),
                    as_of=row.cursor if row else None,
                    pending=each.status == "active" and pending,
                    history_left_since=row.backlog_since if row else None,
                    history_left_until=row.backlog_until if row else None,
                    history_share=span.share,
                    off_reason=row.off_reason if row else None,
                    status=each.status,
                    sentence=state["sentence"],
                )
            )
    return found


def imports(user_id: str, *, runtime: Runtime | None = None) -> list[Import]:
    """How far each first import of a user's connections is; those that are done are not among them."""
    rt = runtime or processwide()
    query = select(Connection.id, Connection.provider, Connection.status).order_by(Connection.provider)
    with rt.store.read() as db:
        connections = db.execute(query.where(Connection.user_id == user_id)).all()
        return list(progress.of_user(rt, db, connections).values())


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
