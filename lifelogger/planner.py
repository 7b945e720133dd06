"""Who is synced at a tick: as many as the budget can serve, news first, then by the best time of each.

When a connection is best polled is worked out at the end of its last sync (`pacing.next_poll`) and stored as
`next_sync_at`, so a tick costs what it plans, however many connections wait. What is due is taken as far as
the day's pace allows; where less is due than the day could serve, what is due soonest is taken early.

A plan is a claim: one conditional UPDATE moves `next_sync_at` of the chosen connections on by a
lease and is committed before anything is sent. A crash after it costs one lease; a second tick
finds nothing due.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import chain, zip_longest

from sqlalchemy import ColumnElement, select, update
from sqlalchemy import Connection as Database

from lifelogger import pacing
from lifelogger import runtime as processwide
from lifelogger.budget import Window
from lifelogger.connections import under_way
from lifelogger.errors import Unavailable
from lifelogger.habits import DAY
from lifelogger.pacing import Pace
from lifelogger.runtime import Runtime
from lifelogger.store.models import Connection, Tick

log = logging.getLogger(__name__)

EVENLY = Pace()
AGAIN = "plan_again"
"""The name of a plan between two ticks: the budget has become known."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """How many connections of an application may be planned now."""

    news: int
    """Where somebody knows of news: all that the windows have left."""
    background: int
    """Of them for plain polling: paced over the rest of each window, and less the reserve."""
    early: int = 0
    """Of the background at least so many, if need be before their best time: else the day is not used."""


SLACK = 0.08
"""How far polling may be ahead of the day's curve or behind it, as a share of what is still to come."""
MOST_EARLY = 1000
"""Connections that one tick takes early when webhooks have stopped."""
LOOKED_AT = 4
"""For each connection that is taken early so many are looked at: some are being synced, or have to wait."""


def tick(
    name: str, due_at: datetime | None, send: Callable[[str], object], *, runtime: Runtime | None = None
) -> int | None:
    """Plan, then `send` each planned user; return how many, or None when this tick fired before.

    `due_at` is the minute on the timetable; None for a plan that nobody scheduled, which always
    goes ahead: its claims make it harmless.
    """
    rt = runtime or processwide.runtime()
    now = rt.clock()
    allowances = {each.key: allowance(rt, *each.key, now) for each in rt.applications()}
    with rt.store.write() as db:
        # One transaction with the claims: a tick that dies before it is redelivered and made good.
        fired = db.execute(
            rt.store.insert(Tick.__table__)
            .values(name=name, due_at=due_at or now, fired_at=now)
            .on_conflict_do_nothing()
        )
        if fired.rowcount != 1 and due_at is not None:
            return None
        users = claim(rt, db, allowances, now)
        db.execute(
            update(Tick).where(Tick.name == name, Tick.due_at == (due_at or now)).values(planned=len(users))
        )
    for user_id in users:
        send(user_id)
    log.info("tick %s: %d users planned", name, len(users))
    return len(users)


def serve_news(send: Callable[[str], object], *, runtime: Runtime | None = None) -> int:
    """Plan those alone of whom news is known: what no message told, and hints that had to wait a minute.

    The claim makes it harmless to ask twice, so no tick is written down.
    """
    rt = runtime or processwide.runtime()
    now = rt.clock()
    with rt.store.read() as db:
        news = (Connection.next_sync_at <= now, Connection.news_at.is_not(None))
        waiting = [
            each.key
            for each in rt.applications()
            if db.execute(select(Connection.id).where(*belongs(*each.key), *news).limit(1)).first()
        ]
    if not waiting:
        return 0
    allowances = {key: Allowance(allowance(rt, *key, now).news, 0) for key in waiting}
    with rt.store.write() as db:
        users = claim(rt, db, allowances, now)
    for user_id in users:
        send(user_id)
    return len(users)


def belongs(provider: str, application: str) -> tuple[ColumnElement[bool], ...]:
    """Whether a connection is an application's."""
    return Connection.provider == provider, Connection.application == application


def claim(
    rt: Runtime, db: Database, allowances: Mapping[tuple[str, str], Allowance], now: datetime
) -> list[str]:
    """Claim the connections that may be synced now; return their users, each once.

    Allowances are by provider and application. News first, of all in turn: nobody's only connection stands
    behind all of another provider's.
    """
    lines: list[tuple[list[str], list[str]]] = []
    lease, interval = timedelta(seconds=rt.settings.sync.lease_seconds), pacing.interval(rt)
    for key, allowed in allowances.items():
        mine = belongs(*key)
        due = (*mine, Connection.next_sync_at <= now)
        news = db.scalars(
            select(Connection.id)
            .where(*due, Connection.news_at.is_not(None))
            .order_by(Connection.next_sync_at)
            .limit(allowed.news)
            .with_for_update(skip_locked=True)
        ).all()
        stale = db.scalars(
            select(Connection.id)
            .where(*due, Connection.news_at.is_(None))
            .order_by(Connection.next_sync_at)
            .limit(max(0, min(allowed.background, allowed.news - len(news))))
            .with_for_update(skip_locked=True)
        ).all()
        stale = [*stale, *early(db, mine, allowed.early - len(news) - len(stale), interval, now)]
        chosen = [*news, *stale]
        if not chosen:
            continue
        claimed = db.execute(
            update(Connection)
            .where(
                Connection.id.in_(chosen), Connection.claimed_at.is_(None) | (Connection.next_sync_at <= now)
            )
            .values(next_sync_at=now + lease, claimed_at=now)
            .returning(Connection.id, Connection.user_id)
        ).all()
        owner = {row.id: row.user_id for row in claimed}
        urgent, others = ([owner[each] for each in ids if each in owner] for ids in (news, stale))
        lines.append((urgent, others))
    turns = [zip_longest(*(line[urgency] for line in lines)) for urgency in (0, 1)]
    return list(dict.fromkeys(user for turn in chain(*turns) for user in turn if user is not None))


def early(
    db: Database, mine: Sequence[ColumnElement[bool]], number: int, interval: timedelta, now: datetime
) -> list[int]:
    """The connections among those that are `mine` that are due soonest, and may be polled although not yet.

    Not those that a sync has or waits for, nor whom we looked at within the interval.
    """
    if number <= 0:
        return []
    soonest = (
        select(
            Connection.id,
            Connection.next_sync_at,
            Connection.claimed_at,
            Connection.wait_reason,
            Connection.last_sync_at,
        )
        .where(*mine, Connection.next_sync_at > now, Connection.news_at.is_(None))
        .order_by(Connection.next_sync_at)
        .limit(number * LOOKED_AT)
        .with_for_update(skip_locked=True)
    )
    free = [
        row.id
        for row in db.execute(soonest)
        if row.claimed_at is None
        and row.wait_reason is None
        and (row.last_sync_at is None or row.last_sync_at <= now - interval * 0.9)
    ]
    return free[:number]


def allowance(rt: Runtime, provider: str, application: str, now: datetime) -> Allowance:
    """What the application's windows leave for this tick, less what earlier plans have yet to spend.

    Nothing when Redis cannot tell.
    """
    mine = rt.application(provider, application)
    try:
        windows = rt.budget.windows(mine.pools, leave_share=rt.settings.schedule.reserve)
    except Unavailable:
        log.warning("%s: no plan: its budget cannot be read", mine.path)
        return Allowance(0, 0)
    pace = pacing.price(rt, provider, windows, now, application)
    left = allowed(windows, now, pacing.interval(rt), mine.provider.poll_cost(mine.settings), pace)
    claimed = under_way(rt, provider, application)
    return Allowance(*(max(0, each - claimed) for each in (left.news, left.background, left.early)))


def allowed(
    windows: Sequence[Window], now: datetime, period: timedelta, cost: int, pace: Pace = EVENLY
) -> Allowance:
    """How many polls of `cost` requests the windows allow.

    Background polls may have spent of each window, less what is held for others, what belongs to its time so
    far and one `period` ahead: the rule of `Budget.take`. Where requests are scarce a day's share follows the
    curve of its best times, a little ahead or behind. A window that nobody has counted yet allows one poll:
    its reply tells the rest.
    """
    if any(window.closed_until and window.closed_until > now for window in windows):
        return Allowance(0, 0)
    if any(not window.known for window in windows):
        return Allowance(1, 1)
    news = min((window.remaining for window in windows), default=10_000)
    background = news
    behind: list[int] = []
    for window in windows:
        spendable = window.limit - window.held
        share = min(1.0, (now - window.start + period) / timedelta(seconds=window.seconds))
        most = share
        if pace.scarce and window.seconds == DAY:
            share = 1.0 if share == 1.0 else pace.share(now + period)
            most = share + SLACK * (1 - share)
            behind.append(math.floor(spendable * (share - SLACK * (1 - share))) - window.used)
        background = min(background, math.ceil(spendable * most - 0.000001) - window.used)  # of rounding
    # Whom webhooks were thought to tell of has a time that is far away: not any more.
    least = MOST_EARLY * cost if pace.deaf else min(behind, default=0)
    return Allowance(max(0, news // cost), max(0, background // cost), max(0, min(least, background) // cost))
