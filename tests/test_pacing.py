"""How a provider's requests are spent over the day: the price, on a sample (promises 4 and 9)."""

from __future__ import annotations

import dataclasses
import math
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import event, func, insert, select, update

from lifelogger import pacing
from lifelogger.budget import Pool, Window
from lifelogger.habits import DAY, HOUR, Habits
from lifelogger.pacing import Pace, Sample, announced, is_deaf, next_poll, priced, wants
from lifelogger.runtime import Runtime
from lifelogger.store.models import Connection, User
from lifelogger.store.models import Pace as Stored

NOW = datetime(2026, 11, 23, tzinfo=UTC)
QUARTER = timedelta(minutes=15)


def somebody(seed: int, rate: float = 0.6) -> Habits:
    """A year of news at one hour of the day, more or less."""
    dice = random.Random(seed)
    hour, at = dice.uniform(0, 24), NOW.timestamp()
    days = [day for day in range(1, 365) if dice.random() < rate]
    habits = Habits(at - 365 * DAY, at)
    habits.learn([at - (day + 1) * DAY + (hour + dice.gauss(0, 0.7)) * HOUR for day in days], at)
    return habits


def sample(number: int, each: float = 1.0) -> Sample:
    return Sample([(somebody(one), NOW) for one in range(number)], each)


def settle(group: Sample, offered: float, hours: int = 12) -> Pace:
    """The price after some hours of asking the same people."""
    pace = Pace()
    for hour in range(hours):
        pace = priced(pace, group, offered, 1, QUARTER, 7, NOW + timedelta(hours=hour))
    return pace


@pytest.mark.parametrize("offered", [60, 200, 1000])
def test_the_price_is_where_they_want_what_is_offered(offered: int) -> None:
    pace = settle(sample(40), offered)

    assert pace.scarce
    wanted, _ = wants(pace, sample(40), 1, QUARTER, NOW + timedelta(hours=12))
    assert wanted == pytest.approx(offered, rel=0.2)
    assert (pace.offered, pace.wanted) == (offered, pytest.approx(offered, rel=0.2))


def test_a_sample_stands_for_all() -> None:
    all_of_them, some = settle(sample(40, each=1), 100), settle(sample(40, each=50), 5000)

    assert some.price == pytest.approx(all_of_them.price)


def test_where_there_is_enough_for_everybody_requests_cost_nothing() -> None:
    assert settle(sample(8), 8 * 96).price == 0
    assert settle(sample(8), 8 * 96 - 1).price > 0
    assert settle(sample(8), math.inf).price == 0
    assert settle(Sample([], 1), 100).price == 0


def test_a_budget_that_grew_is_used_at_once() -> None:
    pace = settle(sample(40), 60)

    after = priced(pace, sample(40), 900, 1, QUARTER, 7, NOW + timedelta(hours=13))

    assert after.wanted == pytest.approx(900, rel=1)
    assert after.price < pace.price / 20


def test_the_days_curve_is_that_of_the_best_times() -> None:
    """All live by one hour: most of the day's requests belong there, and nothing is left behind it."""
    group = Sample([(somebody(3), NOW + timedelta(hours=1))] * 30, 1)
    hour = max(range(24), key=lambda one: somebody(3).hours[one])

    pace = settle(group, 60)

    assert pace.curve is not None
    around = sum(pace.curve[(hour + away) % 24] for away in (-1, 0, 1, 2, 3))
    assert around > 0.6 * sum(pace.curve)
    shares = [pace.share(NOW + timedelta(minutes=15 * tick)) for tick in range(96)]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert pace.share(NOW + timedelta(hours=24) - timedelta(seconds=1)) == pytest.approx(1, abs=0.001)


def test_nobody_is_left_unpolled_longer_than_the_setting_or_two_rounds() -> None:
    assert settle(sample(40), 60).longest_s == 7 * DAY
    assert settle(sample(40, each=100), 40).longest_s == pytest.approx(2 * 100 * DAY)


@given(
    price=st.floats(0, 1e4),
    rate=st.sampled_from([0.002, 0.1, 0.9]),
    longest=st.floats(1, 30),
    minutes=st.integers(0, 7 * 24 * 60),
)
def test_the_next_poll_is_never_sooner_than_the_interval_nor_later_than_the_floor(
    price: float, rate: float, longest: float, minutes: int
) -> None:
    pace, start = Pace(price=price, longest_s=longest * DAY), NOW + timedelta(minutes=minutes)

    due = next_poll(pace, somebody(1, rate), start, QUARTER)

    assert QUARTER * 0.9 <= due - start <= timedelta(days=longest)


def test_without_a_price_it_is_the_interval() -> None:
    assert next_poll(Pace(), None, NOW, QUARTER) == NOW + QUARTER * 0.9


def test_webhooks_that_stop_are_noticed() -> None:
    """Somebody has news in most hours, and all were announced so far."""
    group = Sample([(somebody(one), NOW) for one in range(30)], 10)
    for habits, _ in group.connections:
        habits.heard(50, announced=True)
    pace = settle(group, 500)
    assert pace.price == 0, "a safety net needs few requests"

    heard = dataclasses.replace(pace, heard_at=NOW)
    assert not is_deaf(heard, group, NOW + timedelta(minutes=59))
    assert is_deaf(heard, group, NOW + timedelta(hours=12))
    told = priced(heard, group, 500, 1, QUARTER, 7, NOW + timedelta(hours=12))
    assert told.deaf
    assert told.price > 0
    assert next_poll(told, group.connections[0][0], NOW, QUARTER) < next_poll(
        heard, group.connections[0][0], NOW, QUARTER
    )


def hearing(number: int, each: float = 1.0) -> Sample:
    """People all of whose news was announced so far."""
    group = sample(number, each)
    for habits, _ in group.connections:
        habits.heard(50, announced=True)
    return group


def test_what_webhooks_will_tell_of_is_not_offered_to_polls() -> None:
    group = hearing(30, each=20)
    hints = announced(Pace(), group, NOW)
    assert sum(hints) == pytest.approx(0.6 * 30 * 20, rel=0.2)

    pace = settle(group, 600)
    assert pace.offered == pytest.approx(600 - sum(hints), rel=0.1)
    assert pace.longest_s == settle(sample(30, each=20), 600).longest_s, "who is told of is looked at too"
    assert settle(group, 300).offered == 30, "polls are offered a tenth"
    assert settle(sample(30, each=20), 600).offered == 600


def test_the_days_curve_has_the_hours_in_which_webhooks_come() -> None:
    group = hearing(30, each=20)
    hints = announced(Pace(), group, NOW)
    busy = max(range(24), key=hints.__getitem__)

    curve = settle(group, 400).curve

    assert curve is not None
    assert curve[busy] / sum(curve) == pytest.approx(hints[busy] / sum(hints), rel=0.3)


def test_webhooks_that_have_stopped_keep_no_requests_from_polls() -> None:
    group = hearing(30, each=20)
    pace = dataclasses.replace(settle(group, 600), heard_at=NOW)
    later = NOW + timedelta(hours=12)

    assert priced(pace, group, 600, 1, QUARTER, 7, later).offered == 600


# In the database --------------------------------------------------------------------------------------------


def connect(rt: Runtime, number: int, **values: Any) -> None:
    row = {
        "provider": "strava",
        "status": "active",
        "scopes": [],
        "access_token": b"sealed",
        "token_expires_at": NOW,
        "next_sync_at": NOW,
        "created_at": NOW,
        "updated_at": NOW,
        **values,
    }
    with rt.store.write() as db:
        for one in range(number):
            name = f"{values.get('provider', 'strava')}{one}"
            db.execute(insert(User).values(id=name, created_at=NOW))
            db.execute(insert(Connection).values(user_id=name, **row))


def a_day(limit: int) -> list[Window]:
    pool = Pool("reads", "strava:7:reads", (f"{limit}/day",), reports=True)
    end = NOW + timedelta(days=1)
    return [Window(pool, 86400, NOW, end, end, limit, 0, 0, True, limit, None)]


def test_the_price_is_kept_for_an_hour(runtime: Runtime) -> None:
    connect(runtime, 20)

    first = pacing.price(runtime, "strava", a_day(100), NOW)
    soon = pacing.price(runtime, "strava", a_day(5000), NOW + timedelta(minutes=59))
    later = pacing.price(runtime, "strava", a_day(5000), NOW + timedelta(minutes=60))

    assert first.scarce
    assert soon == first
    assert (later.price, later.priced_at) == (0, NOW + timedelta(minutes=60))
    with runtime.store.read() as db:
        assert pacing.read(db, "strava") == later
        assert pacing.read(db, "oura") == Pace()
        assert db.scalar(select(func.count()).select_from(Stored)) == 1


def test_what_waits_for_a_budget_shows_that_webhooks_come(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(runtime, 20)
    for habits, _ in (group := hearing(20, each=20)).connections:
        assert habits.silent < 0.1
    monkeypatch.setattr(pacing, "drawn", lambda *_: group)
    pacing.price(runtime, "strava", a_day(100), NOW)
    with runtime.store.write() as db:
        pacing.heard(db, "strava", NOW)

    def deaf_after_a_night(**of_one: Any) -> bool:
        with runtime.store.write() as db:
            db.execute(update(Stored).values(priced_at=NOW))
            db.execute(update(Connection).where(Connection.user_id == "strava7").values(**of_one))
        return pacing.price(runtime, "strava", a_day(100), NOW + timedelta(hours=12)).deaf

    assert deaf_after_a_night(news_at=None)
    assert deaf_after_a_night(news_at=NOW, news_streams=["activities"]), "forged, and in a minute's queue"
    assert not deaf_after_a_night(wait_reason="strava reads: 100 of 100 requests used")


def test_what_others_need_is_not_offered_to_polls() -> None:
    (day,) = a_day(1000)
    quarter = dataclasses.replace(day, seconds=900, limit=15, reserve=3)

    assert pacing.offer([day]) == 1000
    assert pacing.offer([dataclasses.replace(day, reserve=150)]) == 850
    assert pacing.offer([day, quarter]) == 1000
    assert pacing.offer([day, dataclasses.replace(quarter, limit=10)]) == 7 * 96
    assert pacing.offer([]) == math.inf


def test_a_sample_is_drawn_of_the_providers_own(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    connect(runtime, 30)
    connect(runtime, 10, provider="oura")
    connect(runtime, 5, provider="fitbit", status="needs_reauth", next_sync_at=None)
    with runtime.store.read() as db:
        assert pacing.drawn(db, "strava", NOW).number == pytest.approx(30)
        assert pacing.drawn(db, "oura", NOW).number == pytest.approx(10)
        assert pacing.drawn(db, "fitbit", NOW).number == 0

    monkeypatch.setattr(pacing, "SAMPLE", 8)
    monkeypatch.setattr(pacing, "LOOKED_AT", 20)
    with runtime.store.read() as db:
        numbers = [pacing.drawn(db, "strava", NOW + timedelta(hours=hour)).number for hour in range(100)]
        assert len(pacing.drawn(db, "strava", NOW).connections) <= 8
    assert sum(numbers) / 100 == pytest.approx(30, rel=0.15), "it is right on average"


def test_pricing_runs_as_many_statements_for_many_as_for_few(runtime: Runtime) -> None:
    counts = []
    for number in (5, 300):
        with runtime.store.write() as db:
            db.execute(User.__table__.delete())
            db.execute(Stored.__table__.delete())
        connect(runtime, number)
        ran: list[str] = []

        def note(_: Any, __: Any, statement: str, *more: Any, ran: list[str] = ran) -> None:
            ran.append(statement)

        event.listen(runtime.store.engine, "before_cursor_execute", note)
        pacing.price(runtime, "strava", a_day(100), NOW)
        event.remove(runtime.store.engine, "before_cursor_execute", note)
        counts.append(len(ran))

    assert counts[0] == counts[1]


def test_hearing_of_news_is_written_down_once_a_minute(runtime: Runtime) -> None:
    connect(runtime, 2)
    pacing.price(runtime, "strava", a_day(10), NOW)
    with runtime.store.write() as db:
        db.execute(update(Stored).values(deaf=True))
        for second in (0, 30, 59):
            pacing.heard(db, "strava", NOW + timedelta(seconds=second))
        assert pacing.read(db, "strava").heard_at == NOW
        assert not pacing.read(db, "strava").deaf
        pacing.heard(db, "strava", NOW + timedelta(seconds=61))
        assert pacing.read(db, "strava").heard_at == NOW + timedelta(seconds=61)


@hypothesis_settings(max_examples=15)
@given(number=st.integers(1, 12), each=st.floats(1, 1e5), offered=st.floats(0.5, 1e6))
def test_a_price_is_found_whatever_the_numbers(number: int, each: float, offered: float) -> None:
    pace = settle(sample(number, each), offered, hours=3)

    assert 0 <= pace.price < math.inf
    assert pace.longest_s > 0
    if pace.scarce:
        assert pace.curve is not None
        assert all(one >= 0 for one in pace.curve)
