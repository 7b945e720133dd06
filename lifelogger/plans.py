"""What the next ticks will do, and why: for `lifelogger plan` and the page. Nothing here changes anything."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select

from lifelogger import pacing, planner, progress
from lifelogger.errors import Unavailable
from lifelogger.habits import DAY, HOUR, Habits
from lifelogger.pacing import Pace
from lifelogger.runtime import Application, Runtime
from lifelogger.status import CONNECTION, count, explained, left_behind, moment, round_of
from lifelogger.store.models import Connection
from lifelogger.timing import ANNOUNCED

TICKS_SHOWN = 4
MOST_COUNTED = 1000
"""Connections that are counted for a tick; more are "1,000 or more"."""
MOST_NAMED = 20


def overall(rt: Runtime) -> dict[str, Any]:
    """For each provider: the price of a request, what the next ticks may spend, and whom they take first.

    Further applications have plans of their own, by path.
    """
    now = rt.clock()
    return {"now": now, "providers": {each.path: of_application(rt, each, now) for each in rt.applications()}}


def of_application(rt: Runtime, application: Application, now: datetime) -> dict[str, Any]:
    """One application's plan, in plain values; its `allowed` is None when Redis does not answer."""
    about, endpoints = application.provider, application.settings
    interval = pacing.interval(rt)
    mine = (*planner.belongs(*application.key), Connection.next_sync_at.is_not(None))
    with rt.store.read() as db:
        pace = pacing.read(db, *application.key)
        news = db.scalars(
            select(Connection.next_sync_at)
            .where(*mine, Connection.news_at.is_not(None), Connection.next_sync_at <= now)
            .limit(MOST_COUNTED)
        ).all()
        soonest = db.execute(
            select(*CONNECTION, Connection.habits)
            .where(*mine, Connection.news_at.is_(None))
            .order_by(Connection.next_sync_at)
            .limit(MOST_NAMED)
        ).all()
        due = db.scalars(
            select(Connection.next_sync_at)
            .where(
                *mine, Connection.news_at.is_(None), Connection.next_sync_at <= now + interval * TICKS_SHOWN
            )
            .order_by(Connection.next_sync_at)
            .limit(MOST_COUNTED)
        ).all()
    try:
        windows = rt.budget.windows(application.pools, leave_share=rt.settings.schedule.reserve)
        left = planner.allowed(windows, now, interval, about.poll_cost(endpoints), pace)
        allowed = {"news": left.news, "polls": left.background, "early": left.early}
        held = max((window.held for window in windows), default=0)
    except Unavailable:
        allowed, held = None, None
    ends = [now + interval * tick for tick in range(TICKS_SHOWN + 1)]
    return {
        "title": application.title,
        "sentence": spending(pace, interval),
        "price_hours": pace.price,
        "requests_offered_a_day": pace.offered,
        "requests_worth_their_price_a_day": pace.wanted,
        "curve": pace.curve,
        "longest_days": pace.longest_s / DAY or None,
        "webhooks_stopped": pace.deaf,
        "priced_at": pace.priced_at,
        "allowed": allowed,
        "held": held,
        "news_due": len(news),
        "due": [
            {"until": end, "connections": sum(at is not None and at <= end for at in due)} for end in ends
        ],
        "next": [
            {
                "user_id": row.user_id,
                "next_sync_at": row.next_sync_at,
                "why": why(rt, pace, row._mapping, now),
            }
            for row in soonest
        ],
    }


def spending(pace: Pace, interval: timedelta) -> str:
    """How a provider's requests are spent, as a sentence."""
    if pace.priced_at is None:
        return "No tick has reckoned with its budget yet: everybody is polled as often as can be."
    if not pace.scarce:
        return f"There are requests for everybody, every {interval / timedelta(minutes=1):g} minutes."
    return (
        f"There are {pace.offered:,.0f} requests a day for polls. Each goes where it spares news "
        f"{length(pace.price)} of waiting or more, which {pace.wanted:,.0f} a day do at present; what is not "
        f"needed so goes to whoever is due next."
    )


def of_user(rt: Runtime, user_id: str) -> list[dict[str, Any]]:
    """When each of a user's connections is polled next, and why then."""
    now = rt.clock()
    found = []
    with rt.store.read() as db:
        rows = db.execute(
            select(*CONNECTION, Connection.habits)
            .where(Connection.user_id == user_id)
            .order_by(Connection.provider)
        ).all()
        paces = {row.id: pacing.read(db, row.provider, row.application) for row in rows}
        rounds = progress.rounds(rt, db, rows)
    for row in rows:
        pace, habits = paces[row.id], Habits.unpack(row.habits)
        known = None
        if habits is not None:
            day, week = habits.day(pace.crowd), habits.week()
            known = {
                "news_a_day": habits.rate(pace.crowd, now.timestamp()),
                "hours": day,
                "weekdays": [share / 7 for share in week],
                "utc_offset_s": habits.offset_s,
                "unannounced": habits.silent,
            }
        found.append(
            {
                "provider": row.provider,
                "next_sync_at": row.next_sync_at,
                "last_sync_at": row.last_sync_at,
                "why": why(rt, pace, row._mapping, now),
                "recheck": round_of(rt, pace, rounds.get(row.id)),
                "habits": known,
            }
        )
    return found


def why(rt: Runtime, pace: Pace, row: Mapping[Any, Any], now: datetime) -> str:
    """Why a connection is polled when it is."""
    due: datetime | None = row["next_sync_at"]
    waits = row["wait_reason"] and due is not None and due > now
    waits = waits or left_behind(rt, row)
    if row["status"] != "active" or waits or row["claimed_at"] is not None or due is None:
        return explained(rt, row, now)
    if row["news_at"] is not None:
        return f"There is news of {moment(row['news_at'], now)}: it goes before all polls."
    habits = Habits.unpack(row["habits"])
    interval = pacing.interval(rt)
    if habits is None or not pace.scarce:
        known = habits is not None and habits.silent < ANNOUNCED and not pace.deaf
        return (
            "Webhooks announce what is new: polls are a safety net."
            if known
            else f"There are requests for everybody, every {interval / timedelta(minutes=1):g} minutes."
        )
    since = (row["last_sync_at"] or now).timestamp()
    hours = max(1, round((max(due, now).timestamp() - since) / HOUR))
    waiting = sum(habits.expected(pace.crowd, since, HOUR, hours))
    return (
        f"About {habits.rate(pace.crowd, since):.2g} news a day, most of them around {usual(habits, pace)}; "
        f"by then {waiting:.2g} may be waiting."
    )


def usual(habits: Habits, pace: Pace) -> str:
    """The hour of the person's day in which most comes."""
    day = habits.day(pace.crowd)
    return f"{day.index(max(day)):02}:30 of their day"


def length(hours: float) -> str:
    """Hours, or minutes where they are few."""
    return f"{hours:.1f} hours" if hours >= 2 else count(max(1, round(hours * 60)), "minute")
