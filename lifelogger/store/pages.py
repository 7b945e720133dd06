"""Writing one page: records, quarantine and deletions, exactly once however often it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import (
    ColumnElement,
    Connection,
    Executable,
    Text,
    any_,
    bindparam,
    cast,
    column,
    delete,
    exists,
    func,
    insert,
    literal_column,
    not_,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.postgresql import ARRAY

from lifelogger.errors import LifeloggerError
from lifelogger.providers.base import Record as Normal
from lifelogger.store import feed
from lifelogger.store.engine import Prepared, Store, table
from lifelogger.store.models import Quarantined, Record

NORMAL = tuple(each.name for each in fields(Normal))
VALUES = tuple(name for name in NORMAL if name != "external_id")
OVERWRITTEN = (*VALUES, "raw", "digest", "deleted_at", "updated_at", "change")
normal = attrgetter(*NORMAL)
canonical = msgspec.json.Encoder(order="sorted")
lenient = json.JSONEncoder(sort_keys=True, separators=(",", ":"))
"""Writes letters that are none (a surrogate alone) as well, by their numbers."""
page_of = msgspec.json.Encoder()
WRITTEN = (*NORMAL, "change", "connection_id", "stream", "raw", "digest", "created_at", "updated_at")
# What a kind of record has not is left out of a page: most of it.
Row = msgspec.defstruct("Row", [(name, Any, None) for name in WRITTEN], omit_defaults=True)
ENDLESS = datetime(9999, 12, 31, tzinfo=UTC)
"""Later than all records. Of a span without an end PostgreSQL thinks that it holds a third of the table, and
plans the statement anew each time, which takes longer than to run it."""
MOST_DEPTH = 500
"""Levels of nesting that we keep: Python reads and writes JSON by recursion, up to 1000 calls deep in all."""
KEPT_OF_A_DELETED = {"kind", "ordered_at"}


@dataclass(slots=True)
class Item:
    """One item of a page: its key if it could be read, and its record or why there is none.

    It has neither where the same is stored already, and so need not be read.
    """

    external_id: str | None
    raw: Any
    record: Normal | None = None
    reason: str | None = None
    text: str = field(init=False)
    """The raw item as it is stored: JSON, its keys in order. Raises `TooDeep`."""
    digest: str = field(init=False)
    """SHA-256 of it."""

    def __post_init__(self) -> None:
        text = text_of(self.raw)
        self.text, self.digest = text.decode(), hashlib.sha256(text).hexdigest()


class TooDeep(LifeloggerError):
    """JSON is nested so deeply that what was read might not be written again."""


def text_of(raw: Any) -> bytes:
    trouble = False
    try:
        try:
            text = canonical.encode(raw)
        except UnicodeEncodeError:
            text = lenient.encode(raw).encode()
        # Nesting needs brackets, so only what has that many is looked at.
        trouble = text.count(b"{") + text.count(b"[") > MOST_DEPTH and is_deeper(raw, MOST_DEPTH)
    except RecursionError:
        trouble = True
    if trouble:
        raise TooDeep(f"nested more than {MOST_DEPTH} levels deep")
    return text


def is_deeper(value: Any, levels: int) -> bool:
    """Whether JSON is nested more deeply than so many levels."""
    layer = [value]
    for _ in range(levels + 1):
        layer = [
            each
            for holder in layer
            if isinstance(holder, dict | list)
            for each in (holder.values() if isinstance(holder, dict) else holder)
        ]
    return any(isinstance(each, dict | list) for each in layer)


@dataclass(slots=True)
class Counts:
    """What a sync changed in the store, in records."""

    inserted: int = 0
    updated: int = 0
    deleted: int = 0
    quarantined: int = 0
    new: list[Normal] = field(default_factory=list, compare=False, repr=False)
    """The records that were inserted."""

    @property
    def changed(self) -> bool:
        """Whether any record is another than before."""
        return bool(self.inserted or self.updated or self.deleted)

    def add(self, other: Counts) -> None:
        self.inserted += other.inserted
        self.updated += other.updated
        self.deleted += other.deleted
        self.quarantined += other.quarantined
        self.new += other.new


@dataclass(frozen=True, slots=True)
class Held:
    """What the store holds of a page: of its items, and of the span that it shows."""

    known: dict[str, Any]
    """By key, the rows of its items; of one that was deleted the digest is None."""
    others: list[Any]
    """The other rows of the span, without those deleted."""
    quarantined: bool
    """Whether the stream may have bad items."""

    def has(self, item: Item) -> bool:
        """Whether this very item is stored."""
        row = self.known.get(item.external_id or "")
        return row is not None and row.digest == item.digest


def look(
    db: Connection,
    connection_id: int,
    stream: str,
    keys: Iterable[str | None],
    since: datetime | None = None,
    until: datetime | None = None,
) -> Held:
    """What is held of these items, and in [since, until): nothing without `since`, no end without `until`."""
    wanted = {key for key in keys if key is not None}
    sqlite = db.dialect.name == "sqlite"
    span = (since or ENDLESS, until or ENDLESS)
    rows = statements(sqlite).held(
        db, of=connection_id, stream=stream, keys=listed(wanted, sqlite), since=span[0], until=span[1]
    )
    return Held(
        {row.external_id: row for row in rows if row.asked},
        [row for row in rows if not row.asked],
        not rows or rows[0].quarantined,
    )


def write_items(
    store: Store,
    db: Connection,
    connection_id: int,
    stream: str,
    items: Sequence[Item],
    now: datetime,
    held: Held | None = None,
) -> Counts:
    """Upsert what is new or changed by (connection, stream, external id); the rest is left alone.

    `held` is what `look` told of them, if nobody else can have written there since.
    """
    held = held or look(db, connection_id, stream, [item.external_id for item in items])
    # Of a doubled item the last counts.
    good = {item.external_id: item for item in items if item.reason is None}
    changed = [item for item in good.values() if not held.has(item)]
    if changed:
        rows: list[Any] = [
            Row(*normal(aware(item.record)), None, connection_id, stream, item.text, item.digest, now, now)
            for item in changed
        ]
        numbers = feed.take(db, len(rows))  # from here on other writers wait
        for row, number in zip(rows, numbers, strict=True):
            row.change = number
        if store.is_sqlite:
            db.execute(statements(True).upsert, [msgspec.structs.asdict(row) for row in rows])
        else:
            db.execute(statements(False).upsert, {"page": page_of.encode(rows).decode()})
    new = [aware(item.record) for item in changed if item.external_id not in held.known]
    counts = Counts(inserted=len(new), new=new)
    counts.updated = len(changed) - counts.inserted
    counts.quarantined = quarantine(store, db, connection_id, stream, items, now, mend=held.quarantined)
    return counts


class Statements(NamedTuple):
    """What is run for each page, built once: to build a statement takes as long as to run it."""

    held: Prepared
    upsert: Executable
    mend: Prepared


@cache
def statements(is_sqlite: bool) -> Statements:
    """The statements of a database."""
    of, bad = Record.__table__.c, Quarantined.__table__.c
    here = (of.connection_id == bindparam("of"), of.stream == bindparam("stream"))
    there = (bad.connection_id == bindparam("of"), bad.stream == bindparam("stream"))
    # Each half is a range of an index. As one, with OR, it is planned to look through all of the stream.
    asked = one_of(of.external_id, "keys", is_sqlite)
    span = (of.ordered_at >= bindparam("since"), of.ordered_at < bindparam("until"), of.deleted_at.is_(None))
    quarantined = exists().where(*there).label("quarantined")
    columns = (of.id, of.external_id, of.digest, of.ordered_at, quarantined)
    upsert: Any
    if is_sqlite:
        upsert = sqlite.insert(table(Record)).values({name: bindparam(name) for name in WRITTEN})
        upsert = upsert.values(raw=bindparam("raw", type_=Text))  # it is JSON already
        upsert = upsert.on_conflict_do_update(
            index_elements=["connection_id", "stream", "external_id"],
            set_={name: upsert.excluded[name] for name in OVERWRITTEN},
        )
    else:
        # A page is one parameter, which the database takes apart: rows one by one take half as long again.
        # Not `jsonb`, and `raw` is a text in it: a \\u0000 in a payload stays the six characters that it is.
        names = ", ".join(WRITTEN)
        upsert = text(
            f"INSERT INTO records ({names}) SELECT {names} FROM json_populate_recordset(NULL::records, :page)"
            " ON CONFLICT (connection_id, stream, external_id) DO UPDATE SET "
            + ", ".join(f"{name} = excluded.{name}" for name in OVERWRITTEN)
        )
    return Statements(
        held=Prepared(
            union_all(
                select(*columns, literal_column("1").label("asked")).where(*here, asked),
                select(*columns, literal_column("0")).where(*here, *span, not_(asked)),
            )
        ),
        upsert=upsert,
        mend=Prepared(delete(table(Quarantined)).where(*there, one_of(bad.external_id, "keys", is_sqlite))),
    )


def aware(record: Normal | None) -> Normal:
    """A record for a page. Raises `ValueError` for an instant without an offset."""
    assert record is not None
    for at in (record.ordered_at, record.start_at, record.end_at):
        if at is not None and at.tzinfo is None:
            raise ValueError(f"an instant without an offset: {at}")
    return record


def one_of(what: ColumnElement[Any], name: str, is_sqlite: bool) -> ColumnElement[bool]:
    """Whether a column is among the texts of one parameter, however many there are: see `listed`."""
    if is_sqlite:
        return what.in_(select(column("value")).select_from(func.json_each(bindparam(name, type_=Text))))
    return what == any_(cast(bindparam(name, type_=Text), ARRAY(Text)))


def listed(texts: Iterable[str | None], is_sqlite: bool) -> str:
    """The value of such a parameter: an array as its database writes it. Drivers take longer over lists."""
    if is_sqlite:
        return json.dumps(list(texts))
    quoted = (str(each).replace("\\", "\\\\").replace('"', '\\"') for each in texts)
    return "{" + ",".join(f'"{each}"' for each in quoted) + "}"


def quarantine(
    store: Store,
    db: Connection,
    connection_id: int,
    stream: str,
    items: Sequence[Item],
    now: datetime,
    *,
    mend: bool,
) -> int:
    """Keep the bad items with their reasons; an item that is good again leaves the quarantine (`mend`)."""
    bad = [
        {
            "connection_id": connection_id,
            "stream": stream,
            "external_id": item.external_id,
            "digest": item.digest,
            "reason": item.reason,
            "payload": item.raw,
            "created_at": now,
        }
        for item in items
        if item.reason is not None
    ]
    mended = {item.external_id for item in items} - {row["external_id"] for row in bad}
    if mended and mend:
        keys = listed(mended, store.is_sqlite)
        statements(store.is_sqlite).mend(db, of=connection_id, stream=stream, keys=keys)
    if not bad:
        return 0
    seen = {(row.digest) for row in db.execute(
        select(Quarantined.digest).where(
            Quarantined.connection_id == connection_id,
            Quarantined.stream == stream,
            Quarantined.digest.in_([row["digest"] for row in bad]),
        )
    )}  # fmt: skip
    fresh = list({row["digest"]: row for row in bad if row["digest"] not in seen}.values())
    if fresh:
        db.execute(insert(Quarantined), fresh)
    return len(fresh)


def delete_missing(
    db: Connection,
    connection_id: int,
    stream: str,
    *,
    since: datetime,
    until: datetime | None,
    present: Collection[str],
    now: datetime,
) -> int:
    """Empty the records of [since, until) that the provider no longer lists; return how many."""
    rows = look(db, connection_id, stream, (), since, until).others
    gone = [row.id for row in rows if row.external_id not in present]
    return empty(db, gone, now)


def empty(db: Connection, gone: Sequence[int], now: datetime) -> int:
    """Empty these records; return how many.

    The row stays as a mark that there was one (the values and the payload go), so that readers
    who follow the changes learn of the deletion.
    """
    if gone:
        cleared = {name: None for name in VALUES if name not in KEPT_OF_A_DELETED}
        db.execute(
            update(Record)
            .where(Record.id == bindparam("gone"))
            .values(
                **cleared, raw=None, digest=None, deleted_at=now, updated_at=now, change=bindparam("number")
            ),
            [
                {"gone": id, "number": number}
                for id, number in zip(gone, feed.take(db, len(gone)), strict=True)
            ],
        )
    return len(gone)
