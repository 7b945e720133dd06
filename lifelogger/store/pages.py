"""Writing one page: records, quarantine and deletions, exactly once however often it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnClause, Connection, bindparam, delete, insert, literal_column, select, update

from lifelogger.errors import LifeloggerError
from lifelogger.providers.base import Record as Normal
from lifelogger.store import feed
from lifelogger.store.engine import Store
from lifelogger.store.models import Quarantined, Record

COLUMNS = tuple(each.name for each in fields(Normal))
VALUES = tuple(name for name in COLUMNS if name != "external_id")
OVERWRITTEN: dict[str, ColumnClause[Any]] = {
    name: literal_column(f"excluded.{name}")
    for name in (*VALUES, "raw", "digest", "deleted_at", "updated_at", "change")
}
"""What a record that is there already takes from the new one; made once, since it costs as much as a page."""
MOST_DEPTH = 500
"""Levels of nesting that we keep: Python reads and writes JSON by recursion, up to 1000 calls deep in all."""
KEPT_OF_A_DELETED = {"kind", "ordered_at"}


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a page: its key if it could be read, and its record or why there is none."""

    external_id: str | None
    raw: Any
    record: Normal | None = None
    reason: str | None = None
    digest: str = field(init=False)
    """SHA-256 of the raw item, the order of its keys aside. Raises `TooDeep`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", digest_of(self.raw))


class TooDeep(LifeloggerError):
    """JSON is nested so deeply that what was read might not be written again."""


def digest_of(raw: Any) -> str:
    trouble = False
    try:
        text = json.dumps(raw, sort_keys=True, separators=(",", ":"))
        # Nesting needs brackets, so only what has that many is looked at.
        trouble = text.count("{") + text.count("[") > MOST_DEPTH and is_deeper(raw, MOST_DEPTH)
    except RecursionError:
        trouble = True
    if trouble:
        raise TooDeep(f"nested more than {MOST_DEPTH} levels deep")
    return hashlib.sha256(text.encode()).hexdigest()


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

    @property
    def changed(self) -> bool:
        """Whether any record is another than before."""
        return bool(self.inserted or self.updated or self.deleted)

    def add(self, other: Counts) -> None:
        self.inserted += other.inserted
        self.updated += other.updated
        self.deleted += other.deleted
        self.quarantined += other.quarantined


def write_items(
    store: Store, db: Connection, connection_id: int, stream: str, items: Sequence[Item], now: datetime
) -> Counts:
    """Upsert what is new or changed by (connection, stream, external id); the rest is left alone."""
    good = {
        item.record.external_id: item for item in items if item.record
    }  # of a doubled item the last counts
    known = digests(db, connection_id, stream, good)
    changed = [item for key, item in good.items() if known.get(key, "") != item.digest]
    numbers = feed.take(db, len(changed)) if changed else ()
    rows = [
        {
            **{name: getattr(item.record, name) for name in COLUMNS},
            "change": number,
            "connection_id": connection_id,
            "stream": stream,
            "raw": item.raw,
            "digest": item.digest,
            "deleted_at": None,
            "created_at": now,
            "updated_at": now,
        }
        for item, number in zip(changed, numbers, strict=True)
        if item.record
    ]
    if rows:
        statement = store.insert(Record.__table__)
        statement = statement.on_conflict_do_update(
            index_elements=["connection_id", "stream", "external_id"], set_=OVERWRITTEN
        )
        db.execute(statement, rows)
    counts = Counts(inserted=sum(item.external_id not in known for item in changed))
    counts.updated = len(changed) - counts.inserted
    counts.quarantined = quarantine(store, db, connection_id, stream, items, now)
    return counts


def digests(db: Connection, connection_id: int, stream: str, keys: Iterable[str]) -> dict[str, str | None]:
    """The stored digest of each known key; None for one that was deleted."""
    found: dict[str, str | None] = {}
    wanted = sorted(keys)
    for start in range(0, len(wanted), 500):
        query = select(Record.external_id, Record.digest).where(
            Record.connection_id == connection_id,
            Record.stream == stream,
            Record.external_id.in_(wanted[start : start + 500]),
        )
        found.update((row.external_id, row.digest) for row in db.execute(query))
    return found


def quarantine(
    store: Store, db: Connection, connection_id: int, stream: str, items: Sequence[Item], now: datetime
) -> int:
    """Keep the bad items with their reasons; an item that is good again leaves the quarantine."""
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
        if item.record is None
    ]
    mended = {item.external_id for item in items if item.record} - {row["external_id"] for row in bad}
    if mended:
        db.execute(
            delete(Quarantined).where(
                Quarantined.connection_id == connection_id,
                Quarantined.stream == stream,
                Quarantined.external_id.in_(mended),
            )
        )
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
    """Empty the records of [since, until) that the provider no longer lists; return how many.

    The row stays as a mark that there was one (the values and the payload go), so that readers
    who follow the changes learn of the deletion.
    """
    there = select(Record.id, Record.external_id).where(
        Record.connection_id == connection_id,
        Record.stream == stream,
        Record.ordered_at >= since,
        Record.deleted_at.is_(None),
    )
    if until is not None:
        there = there.where(Record.ordered_at < until)
    gone = [row.id for row in db.execute(there) if row.external_id not in present]
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
