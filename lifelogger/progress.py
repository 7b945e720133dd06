"""How far a connection's past is imported and read again, and how long it takes: told here, shown everywhere.

The streams' rows say exactly what is left (`lifelogger.sweep`), so the share is one of time: how much of the
past is here, not how many of the records, which nobody can know before. How long it still takes is concluded
from the connection's own last day: what its syncs read of the past, over all the time that passed, waiting
included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Connection as Database
from sqlalchemy import func, select

from lifelogger import recheck
from lifelogger.runtime import Runtime
from lifelogger.store.models import Record, Stream, SyncRun

LATELY = timedelta(days=1)
"""How far back the pace is looked for: the longest window of a budget is a day."""
MOST_RUNS = 200
"""Syncs that are looked at for it, so that it costs the same for everybody."""


@dataclass(frozen=True, slots=True)
class Import:
    """How far the import of one connection's past is."""

    provider: str
    reached: datetime | None
    """Everything newer is here, of each stream that is read; None: of one, nothing is yet."""
    goes_to: datetime
    """How far back it goes in the end, as `sync.history_days` was at the first sync."""
    share: float
    """How much of that time is here: 0 to below 1."""
    records: int
    """How many the connection holds by now."""
    requests: int
    """What its syncs cost until now, as far as the journal has them, without one that still runs."""
    left_s: int | None
    """Seconds that it still takes if it goes on as during the last day; None: nothing tells that yet, or it
    does not go on before the person signs in again."""


@dataclass(frozen=True, slots=True)
class Round:
    """How far what is older than the look-back has been read again, of one connection."""

    began_at: datetime | None
    """A round is under way since then; None: none is."""
    share: float
    """How much of the time that records are held of was read again in it; 1: none is under way."""
    ended_at: datetime | None
    """By then all of it had been read again; None: not yet."""
    due_at: datetime | None
    """When it goes on, or the next one begins, at the earliest; None: not while anything was never read."""


def wanted(rt: Runtime, provider: str) -> frozenset[str]:
    """The streams of a provider that these settings read; one that was taken out of them comes no further."""
    on = rt.enabled().get(provider)
    settings = rt.settings.providers.get(provider)
    return (
        frozenset(each.name for each in on.streams if each.wanted(settings))
        if on and settings
        else frozenset()
    )


class Span(NamedTuple):
    """What one stream has of its past, in seconds, and where that goes to."""

    here: float
    left: float
    goes_to: datetime | None
    """None: all of it is here."""

    @property
    def share(self) -> float:
        return share(self.here, self.left)


def span(stream: Any, now: datetime, history_days: int) -> Span:
    """The span of a row of `streams`; None: there is none yet."""
    whole = timedelta(days=history_days)
    if stream is None or stream.cursor is None:
        return Span(0.0, whole.total_seconds(), now - whole)
    if stream.backlog_until is None:
        return Span(whole.total_seconds(), 0.0, None)
    here, left = stream.cursor - stream.backlog_until, stream.backlog_until - stream.backlog_since
    return Span(max(0.0, here.total_seconds()), max(0.0, left.total_seconds()), stream.backlog_since)


def share(here: float, left: float) -> float:
    """0 to 1, and 1 only when nothing is left."""
    return math.floor(10_000 * here / (here + left)) / 10_000 if left > 0 else 1.0


def of_connections(
    rt: Runtime, db: Database, connections: Iterable[Any], streams: Mapping[int, Sequence[Any]]
) -> dict[int, Import]:
    """The imports that are not done yet, by connection; `streams` has the rows of each.

    A connection is a row with `id`, `provider` and `status`. One that is done costs no query.
    """
    now, days = rt.clock(), rt.settings.sync.history_days
    found = {}
    for each in connections:
        # Without any its first sync has not begun.
        names, rows = wanted(rt, each.provider), streams.get(each.id) or [None]
        read = [row for row in rows if row is None or (row.off_reason is None and row.name in names)]
        spans = [span(row, now, days) for row in read]
        goals = [one.goes_to for one in spans if one.goes_to is not None]
        if not goals:
            continue
        begun = all(row is not None and row.cursor is not None for row in read)
        left = sum(one.left for one in spans)
        found[each.id] = Import(
            provider=each.provider,
            reached=max(row.backlog_until for row in read if row.backlog_until) if begun else None,
            goes_to=min(goals),
            share=share(sum(one.here for one in spans), left),
            records=db.scalar(
                select(func.count())
                .select_from(Record)
                .where(Record.connection_id == each.id, Record.deleted_at.is_(None))
            )
            or 0,
            requests=db.scalar(
                select(func.coalesce(func.sum(SyncRun.requests), 0)).where(SyncRun.connection_id == each.id)
            )
            or 0,
            left_s=still(lately(db, each.id, now), left, now) if each.status == "active" else None,
        )
    return found


def of_user(rt: Runtime, db: Database, connections: Sequence[Any]) -> dict[int, Import]:
    """The same, of connections whose streams are not at hand."""
    streams: dict[int, list[Any]] = {}
    mine = Stream.connection_id.in_([each.id for each in connections])
    for row in db.execute(select(Stream.__table__).where(mine)):
        streams.setdefault(row.connection_id, []).append(row)
    return of_connections(rt, db, connections, streams)


def lately(db: Database, connection_id: int, now: datetime) -> list[Any]:
    """A connection's syncs of the last day that have ended, the oldest first."""
    newest = (
        select(SyncRun.started_at, SyncRun.ended_at, SyncRun.history_s)
        .where(SyncRun.connection_id == connection_id)
        .order_by(SyncRun.id.desc())
        .limit(MOST_RUNS)
    )
    ended = [row for row in db.execute(newest) if row.ended_at and row.started_at >= now - LATELY]
    return ended[::-1]


def still(runs: Sequence[Any], left: float, now: datetime) -> int | None:
    """How many seconds it takes to read what is `left` at the pace of these syncs; None: they have none.

    Counted from the end of the first: each of the others has waited for its turn, and then read.
    """
    read = sum(run.history_s or 0.0 for run in runs[1:])
    passed = (now - runs[0].ended_at).total_seconds() if runs else 0.0
    return round(left * passed / read) if read > 0 and passed > 0 else None


def rounds(rt: Runtime, db: Database, connections: Iterable[Any]) -> dict[int, Round]:
    """The rounds of connections (rows with `id` and `provider`) of which a stream is read."""
    provider = {each.id: each.provider for each in connections}
    mine: dict[int, list[Any]] = {}
    for row in recheck.rows(db, provider.keys()):
        if row.off_reason is None and row.name in wanted(rt, provider[row.connection_id]):
            mine.setdefault(row.connection_id, []).append(row)
    lookback = timedelta(days=rt.settings.sync.lookback_days)
    return {number: together(rows, lookback) for number, rows in mine.items()}


def together(rows: Sequence[Any], lookback: timedelta) -> Round:
    """The round of a connection, of those of its streams: they begin at about the same time."""
    began = min((row.recheck_began_at for row in rows if row.recheck_until), default=None)
    done = [
        recheck.share(row, lookback) if row.recheck_began_at and row.recheck_began_at >= began else 0.0
        for row in rows
        if began is not None
    ]
    ended = [row.recheck_ended_at for row in rows]
    due = [row.recheck_at for row in rows if row.recheck_at is not None]
    return Round(
        began_at=began,
        share=math.floor(10_000 * sum(done) / len(done)) / 10_000 if done else 1.0,
        ended_at=None if None in ended else min(ended),
        due_at=min(due, default=None),
    )
