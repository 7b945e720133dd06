"""Promise 12: what the next ticks will do, for whom, and why then."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import insert, select

from lifelogger import plans
from lifelogger.habits import DAY, HOUR, Habits
from lifelogger.runtime import Runtime
from lifelogger.store.models import Connection, Pace
from tests.servers import RedisServer
from tests.web.people import connect

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.fixture
def rt(runtime: Runtime) -> Runtime:
    return dataclasses.replace(runtime, clock=lambda: NOW)


def evenings(told: int = 0) -> bytes:
    """One record each evening after seven, `told` of them announced."""
    at = NOW.replace(hour=0).timestamp()
    habits = Habits(at - 300 * DAY, at)
    habits.learn([at - day * DAY + 19.5 * HOUR for day in range(1, 300)], at)
    habits.heard(told, announced=True)
    return habits.pack()


def scarce(rt: Runtime, **values: Any) -> None:
    row = {"price": 1.5, "wanted": 812.0, "offered": 800.0, "longest_s": 7.0 * DAY, "priced_at": NOW}
    with rt.store.write() as db:
        db.execute(insert(Pace).values(provider="strava", **{**row, **values}))


def known(rt: Runtime, user_id: str, **values: Any) -> None:
    connect(rt, user_id, **{"news_at": None, "last_sync_at": NOW, "habits": evenings(), **values})


def whys(rt: Runtime) -> dict[str, str]:
    return {each["user_id"]: each["why"] for each in plans.overall(rt)["providers"]["strava"]["next"]}


def test_for_one_user_the_reason_and_the_time_of_the_next_poll(rt: Runtime) -> None:
    scarce(rt)
    due = NOW.replace(hour=21, minute=15)
    known(rt, "ann", next_sync_at=due)

    (told,) = plans.of_user(rt, "ann")

    assert (told["provider"], told["next_sync_at"]) == ("strava", due)
    assert told["why"] == (
        "About 1 news a day, most of them around 19:30 of their day; by then 0.96 may be waiting."
    )
    assert told["habits"]["news_a_day"] == pytest.approx(1, rel=0.05)
    assert max(range(24), key=told["habits"]["hours"].__getitem__) == 19
    assert sum(told["habits"]["weekdays"]) == pytest.approx(1)
    assert told["habits"]["unannounced"] == 1


def test_each_reason_is_told(rt: Runtime) -> None:
    scarce(rt, price=0.0)
    soon = NOW + timedelta(minutes=5)
    known(rt, "plenty", next_sync_at=soon)
    known(rt, "announced", next_sync_at=soon, habits=evenings(told=50))
    known(rt, "waiting", next_sync_at=soon, wait_reason="Strava is down")
    known(rt, "coming", next_sync_at=soon, claimed_at=NOW)
    known(rt, "new", next_sync_at=soon, habits=None)

    assert whys(rt) == {
        "plenty": "There are requests for everybody, every 15 minutes.",
        "announced": "Webhooks announce what is new: polls are a safety net.",
        "waiting": "Waiting until 12:05 UTC: Strava is down.",
        "coming": "A sync is on its way since 12:00 UTC.",
        "new": "There are requests for everybody, every 15 minutes.",
    }
    known(rt, "hinted", next_sync_at=NOW, news_at=NOW)
    assert plans.of_user(rt, "hinted")[0]["why"] == "There is news of 12:00 UTC: it goes before all polls."
    known(rt, "ended", status="needs_reauth", status_reason="it is gone", next_sync_at=None)
    assert plans.of_user(rt, "ended")[0]["why"] == "Has to sign in again: it is gone."


def test_what_the_next_ticks_may_do(rt: Runtime) -> None:
    scarce(rt)
    for minutes in (-10, 5, 300):
        known(rt, f"in {minutes}", next_sync_at=NOW + timedelta(minutes=minutes))
    known(rt, "hinted", next_sync_at=NOW, news_at=NOW)

    told = plans.overall(rt)["providers"]["strava"]

    assert [each["connections"] for each in told["due"]] == [1, 2, 2, 2, 2]
    assert told["due"][1]["until"] == NOW + timedelta(minutes=15)
    assert told["news_due"] == 1
    assert told["allowed"] == {"news": 1, "polls": 1, "early": 0}, "nobody has counted yet: one request tells"
    assert told["sentence"].startswith(
        "There are 800 requests a day for polls. Each goes where it spares news 90 minutes of waiting or more"
    )


def test_nothing_is_changed_by_asking(rt: Runtime) -> None:
    known(rt, "ann", next_sync_at=NOW)
    with rt.store.read() as db:
        before = db.execute(select(Connection.__table__)).all()

    plans.overall(rt)
    plans.of_user(rt, "ann")

    with rt.store.read() as db:
        assert db.execute(select(Connection.__table__)).all() == before
        assert db.execute(select(Pace.__table__)).all() == []


def test_without_redis_it_says_so(rt: Runtime, redis_server: RedisServer) -> None:
    known(rt, "ann", next_sync_at=NOW)
    redis_server.stop()

    assert plans.overall(rt)["providers"]["strava"]["allowed"] is None
