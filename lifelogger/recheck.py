"""Rounds over what is older than the look-back: whose turn it is, how far they are, how long they take.

A round (`lifelogger.sweep`) is read with requests that polls leave. Where polls use the whole day, they would
leave none, ever: there a small share of it is for rounds, and all connections of an application take turns.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from statistics import median
from typing import Any, NamedTuple

from sqlalchemy import Connection as Database
from sqlalchemy import func, or_, select, update

from lifelogger.habits import DAY
from lifelogger.store.models import Pace, Record, Stream

LONGEST = timedelta(days=3650)
"""However small the share is: what is longer is never, to whoever waits."""


class Spare(NamedTuple):
    """What a sync may spend on rounds."""

    pages: int
    turn: timedelta | None = None
    """Where all take turns, how long each is; None: they need not."""
    pause: timedelta = timedelta(0)
    """How long a stream waits for its next page."""


def turn(offered: float, share: float) -> timedelta | None:
    """The time between two requests that come to this share of those `offered` a day; None: it is nothing."""
    return of_seconds(DAY / (offered * share)) if offered * share > 0 else None


def of_seconds(seconds: float) -> timedelta:
    return timedelta(seconds=min(seconds, LONGEST.total_seconds()))


def take_turn(db: Database, provider: str, application: str, now: datetime, until: datetime) -> bool:
    """Whether nobody else has had the turn; if so nobody has the next one before `until`."""
    free = or_(Pace.recheck_at.is_(None), Pace.recheck_at <= now)
    its = (Pace.provider == provider, Pace.application == application)
    taken = db.execute(update(Pace).where(*its, free).values(recheck_at=until))
    return bool(taken.rowcount == 1)


def charge_turn(db: Database, provider: str, application: str, until: datetime) -> None:
    """The same when the turn has cost another number of requests than one; none: it is free again."""
    its = (Pace.provider == provider, Pace.application == application)
    db.execute(update(Pace).where(*its).values(recheck_at=until))


def rows(db: Database, connections: Collection[int]) -> list[Any]:
    """The rounds of these connections' streams, with the oldest record of each."""
    mine = (
        Record.connection_id == Stream.connection_id,
        Record.stream == Stream.name,
        Record.deleted_at.is_(None),
    )
    columns = (
        Stream.connection_id,
        Stream.name,
        Stream.off_reason,
        Stream.recheck_at,
        Stream.recheck_until,
        Stream.recheck_began_at,
        Stream.recheck_ended_at,
        select(func.min(Record.ordered_at)).where(*mine).scalar_subquery().label("oldest"),
    )
    return list(db.execute(select(*columns).where(Stream.connection_id.in_(connections))))


def share(row: Any, lookback: timedelta) -> float:
    """How much of the time that we hold records of was read again in the round of such a row: 0 to 1.

    1 only when it is over: where it began, nobody knows what lies below the oldest record.
    """
    if row.recheck_began_at is None:
        return 0.0
    if row.recheck_until is None:
        return 1.0
    top = row.recheck_began_at - lookback
    whole = (top - row.oldest).total_seconds() if row.oldest is not None else 0.0
    here: float = (top - row.recheck_until).total_seconds()
    return min(0.9999, max(0.0, here / whole)) if whole > 0 else 0.9999


def round_s(found: Collection[Any], lookback: timedelta, now: datetime) -> float | None:
    """Seconds from the beginning of a round to that of the next, at the pace of these rows; None: none tells.

    Of a round under way it is reckoned from what was read of it until its next page is due, so waiting for a
    turn counts.
    """
    took = [
        # As a number: of a page that lies within minutes it is more than a timedelta can be.
        (
            max(row.recheck_at, now if row.recheck_until else row.recheck_at) - row.recheck_began_at
        ).total_seconds()
        / done
        for row in found
        if row.recheck_began_at is not None and (done := share(row, lookback)) > 0
    ]
    return median(took) if took else None
