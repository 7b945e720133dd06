"""Who is synced at a tick: once, no more than the budget serves, news first, everybody in turn."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import event, func, insert, select, text, update

from lifelogger.budget import Usage, Window
from lifelogger.connections import note_news
from lifelogger.pacing import Pace
from lifelogger.planner import EVENLY, Allowance, allowance, allowed, claim, tick
from lifelogger.providers.base import Pool
from lifelogger.runtime import Runtime
from lifelogger.settings import MAIN, Settings
from lifelogger.store.models import Connection, Tick, User
from tests.servers import RedisServer

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
QUARTER = timedelta(minutes=15)
LEASE = timedelta(minutes=10)
PLENTY = Allowance(news=1000, background=1000)


class Clock:
    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock(NOW)


@pytest.fixture
def rt(runtime: Runtime, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """With a clock of the test's, and budgets that serve whatever is due; a test may give others."""
    allow(monkeypatch, PLENTY)
    return dataclasses.replace(runtime, clock=clock)


def allow(monkeypatch: pytest.MonkeyPatch, plan: Allowance) -> None:
    monkeypatch.setattr("lifelogger.planner.allowance", lambda *_: plan)


def connect(
    rt: Runtime, *users: str, due: datetime | None = NOW, provider: str = "strava", **more: Any
) -> None:
    row = {
        "provider": provider,
        "status": "active",
        "scopes": [],
        "access_token": b"sealed",
        "token_expires_at": NOW,
        "next_sync_at": due,
        "created_at": NOW,
        "updated_at": NOW,
        **more,
    }
    with rt.store.write() as db:
        for user_id in users:
            db.execute(
                rt.store.insert(User.__table__).values(id=user_id, created_at=NOW).on_conflict_do_nothing()
            )
            db.execute(insert(Connection).values(user_id=user_id, **row))


def plan(rt: Runtime, due_at: datetime | None = None) -> list[str]:
    """The users that one tick sends, in order."""
    sent: list[str] = []
    tick("sync_active_users", due_at, sent.append, runtime=rt)
    return sent


def stored(rt: Runtime, table: Any = Connection) -> list[dict[str, Any]]:
    with rt.store.read() as db:
        return [dict(row._mapping) for row in db.execute(select(table.__table__))]


# Who is due -------------------------------------------------------------------------------------------------


def test_who_is_due_is_planned_and_claimed_by_a_lease(rt: Runtime) -> None:
    connect(rt, "ann")

    assert plan(rt) == ["ann"]

    [row] = stored(rt)
    assert (row["next_sync_at"], row["claimed_at"]) == (NOW + LEASE, NOW)


def test_who_is_not_due_yet_is_not(rt: Runtime, clock: Clock) -> None:
    connect(rt, "ann", due=NOW + timedelta(seconds=1))

    assert plan(rt) == []

    clock.now += timedelta(seconds=1)
    assert plan(rt) == ["ann"]


def test_who_has_to_sign_in_again_is_never_planned(rt: Runtime, clock: Clock) -> None:
    connect(rt, "ann", status="needs_reauth", due=None, news_at=NOW)

    clock.now += timedelta(days=365)
    note_news(rt, "ann")

    assert plan(rt) == []


def test_a_provider_that_is_switched_off_is_never_planned(rt: Runtime) -> None:
    connect(rt, "ann")
    off = rt.settings.providers["strava"].model_copy(update={"enabled": False})
    without = dataclasses.replace(rt, settings=rt.settings.model_copy(update={"providers": {"strava": off}}))

    assert plan(without) == []


def test_one_of_several_providers_has_its_own_budget_and_a_user_is_sent_once(
    rt: Runtime, clock: Clock
) -> None:
    connect(rt, "ann", "bob", "carl")
    connect(rt, "ann", provider="other")
    allowances = {("other", MAIN): Allowance(1, 1), ("strava", MAIN): Allowance(2, 2)}

    with rt.store.write() as db:
        users = claim(rt, db, allowances, NOW)

    assert users == ["ann", "bob"]
    assert len([row for row in stored(rt) if row["claimed_at"]]) == 3


# A tick fires once (promise 8) ------------------------------------------------------------------------------


def test_the_same_tick_makes_one_plan(rt: Runtime, clock: Clock) -> None:
    connect(rt, "ann")
    assert plan(rt, due_at=NOW) == ["ann"]
    with rt.store.write() as db:
        db.execute(update(Connection).values(next_sync_at=NOW))

    clock.now += timedelta(seconds=30)
    assert plan(rt, due_at=NOW) == [], "a restart within the minute, or a redelivery"
    assert plan(rt, due_at=NOW + QUARTER) == ["ann"]

    assert [(row["due_at"], row["planned"]) for row in stored(rt, Tick)] == [(NOW, 1), (NOW + QUARTER, 1)]


def test_it_says_whether_it_fired(rt: Runtime) -> None:
    assert tick("sync_active_users", NOW, print, runtime=rt) == 0
    assert tick("sync_active_users", NOW, print, runtime=rt) is None
    assert tick("another", NOW, print, runtime=rt) == 0
    assert tick("sync_active_users", None, print, runtime=rt) == 0


def together(*plans: Callable[[], list[str]]) -> list[list[str]]:
    """Run them at the same time, and return what each sent."""
    start = threading.Barrier(len(plans), timeout=10)

    def run(each: Callable[[], list[str]]) -> list[str]:
        start.wait()
        return each()

    with ThreadPoolExecutor(len(plans)) as pool:
        return list(pool.map(run, plans))


def test_two_schedulers_at_once_make_one_plan(rt: Runtime) -> None:
    connect(rt, *"abcdefgh")

    for minutes in range(0, 60, 15):
        due_at = NOW + timedelta(minutes=minutes)
        plans = together(*[lambda due_at=due_at: plan(rt, due_at)] * 3)
        assert sorted(plans, key=len)[:2] == [[], []]

    assert sorted(row["planned"] for row in stored(rt, Tick)) == [0, 0, 0, 8]


def test_plans_of_different_ticks_at_once_share_no_connection(rt: Runtime) -> None:
    connect(rt, *"abcdefgh")

    plans = together(lambda: plan(rt, NOW), lambda: plan(rt), lambda: plan(rt, NOW + QUARTER))

    assert sorted(user for each in plans for user in each) == [*"abcdefgh"]


def test_a_tick_that_dies_before_its_commit_is_made_good_by_its_redelivery(
    rt: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(rt, "ann")

    with monkeypatch.context() as patched:
        patched.setattr("lifelogger.planner.claim", lambda *_: _raise(MemoryError))
        with pytest.raises(MemoryError):
            plan(rt, due_at=NOW)

    assert stored(rt, Tick) == []
    assert plan(rt, due_at=NOW) == ["ann"]


def test_a_crash_after_the_commit_costs_one_lease(rt: Runtime, clock: Clock) -> None:
    """The same goes for a message that is lost."""
    connect(rt, "ann", "bob")

    with pytest.raises(ConnectionError):
        tick("sync_active_users", NOW, lambda _: _raise(ConnectionError), runtime=rt)

    assert plan(rt, due_at=NOW) == []
    clock.now += LEASE - timedelta(seconds=1)
    assert plan(rt) == []
    clock.now += timedelta(seconds=1)
    assert plan(rt) == ["ann", "bob"]


def _raise(error: type[BaseException]) -> Any:
    raise error


# Within the budget, in turn (promise 9) ---------------------------------------------------------------------


def test_no_more_are_planned_than_the_budget_serves_the_stalest_first(
    rt: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    for minutes, user_id in enumerate("edcba"):
        connect(rt, user_id, due=NOW - timedelta(minutes=minutes))
    allow(monkeypatch, Allowance(news=10, background=2))

    assert plan(rt) == ["a", "b"]
    assert plan(rt) == ["c", "d"]
    assert plan(rt) == ["e"]


def test_news_come_first_and_are_not_paced(rt: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    connect(rt, "stale", due=NOW - timedelta(days=9))
    connect(rt, "second", due=NOW - timedelta(minutes=1), news_at=NOW - timedelta(minutes=1))
    connect(rt, "first", due=NOW - timedelta(minutes=2), news_at=NOW - timedelta(minutes=2))
    connect(rt, "later", due=NOW + QUARTER, news_at=NOW - timedelta(minutes=3))
    allow(monkeypatch, Allowance(news=3, background=1))

    assert plan(rt) == ["first", "second", "stale"]


def test_news_and_polling_spend_one_budget(rt: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    connect(rt, "a", "b", "c", news_at=NOW)
    connect(rt, "d", "e")
    allow(monkeypatch, Allowance(news=2, background=2))

    assert len(plan(rt)) == 2
    assert set(plan(rt)) == {"c", "d"}


def test_nobody_starves(rt: Runtime, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven people, two polls a tick, and all are due again at every tick: each gets its turn in four."""
    connect(rt, *"abcdefg", due=NOW - QUARTER)
    allow(monkeypatch, Allowance(news=2, background=2))
    served: list[str] = []
    for _ in range(8):
        users = plan(rt)
        served += users
        with rt.store.write() as db:  # as the engine does when a sync ends well
            db.execute(
                update(Connection)
                .where(Connection.user_id.in_(users))
                .values(next_sync_at=clock.now + QUARTER * 0.9, claimed_at=None)
            )
        clock.now += QUARTER

    assert set(served[:7]) == set("abcdefg")
    assert {served.count(user_id) for user_id in "abcdefg"} == {2, 3}


def test_nothing_is_planned_for_an_empty_budget(rt: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    connect(rt, "a", news_at=NOW)
    connect(rt, "b")
    allow(monkeypatch, Allowance(0, 0))

    assert plan(rt) == []
    assert {row["claimed_at"] for row in stored(rt)} == {None}


# What it costs ----------------------------------------------------------------------------------------------


@contextmanager
def statements(rt: Runtime) -> Iterator[list[tuple[str, Any]]]:
    """The statements that the block runs, with their parameters."""
    found: list[tuple[str, Any]] = []

    def note(_: Any, __: Any, statement: str, parameters: Any, *more: Any) -> None:
        found.append((statement, parameters))

    event.listen(rt.store.engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(rt.store.engine, "before_cursor_execute", note)


def many(rt: Runtime, number: int) -> None:
    """So many connections that wait, all due: half of them with news."""
    connect(rt, "0")
    series = (
        "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < :number) "
        "INSERT INTO {table} ({columns}) SELECT {values} FROM n, {table} AS old WHERE old.{key} = '0'"
    )
    with rt.store.write() as db:
        for table, key in ((User, "id"), (Connection, "user_id")):
            columns = [column.name for column in table.__table__.columns]
            values = {name: f"old.{name}" for name in columns} | {key: "CAST(n AS VARCHAR(9))"}
            if table is Connection:
                values |= {"id": "n + 1000", "news_at": "CASE n % 2 WHEN 0 THEN old.created_at END"}
            db.execute(
                text(
                    series.format(
                        table=table.__tablename__,
                        key=key,
                        columns=", ".join(columns),
                        values=", ".join(values[name] for name in columns),
                    )
                ),
                {"number": number},
            )
    with rt.store.write() as db:
        db.execute(text("ANALYZE"))


def test_a_tick_reads_the_order_from_an_index_and_claims_by_number(
    rt: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it costs what it plans, however many wait: nothing is sorted, and no table is read through."""
    many(rt, 3000)
    allow(monkeypatch, Allowance(news=8, background=4))

    with statements(rt) as ran:
        assert len(plan(rt, due_at=NOW)) == 8
        with rt.store.write() as db:
            db.execute(update(Connection).values(news_at=None))
        assert len(plan(rt)) == 4

    reads = [each for each in ran if each[0].startswith("SELECT connections.id")]
    claims = [each for each in ran if each[0].startswith("UPDATE connections SET next_sync_at")]
    assert (len(reads), len(claims)) == (4 * len(rt.enabled()), 2)
    plans = [explain(rt, *reads[0]), explain(rt, *reads[-1])]
    assert "ix_connections_news" in plans[0]
    assert "ix_connections_due" in plans[1]
    for each in plans:
        assert "TEMP B-TREE" not in each
        assert "Sort" not in each
        assert "Seq Scan" not in each
        assert "SCAN connections" not in each
    for statement, parameters in claims:
        how = explain(rt, statement, parameters)
        assert "pk_connections" in how or "INTEGER PRIMARY KEY" in how


def explain(rt: Runtime, statement: str, parameters: Any) -> str:
    with rt.store.write() as db:
        how = "EXPLAIN QUERY PLAN " if rt.store.is_sqlite else "EXPLAIN "
        rows = db.exec_driver_sql(how + statement, parameters).all()
    return "\n".join(str(row[-1]) for row in rows)


def test_a_tick_runs_as_many_statements_for_many_as_for_few(
    rt: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(monkeypatch, Allowance(news=3, background=3))
    counts = []
    for number in (10, 500):
        with rt.store.write() as db:
            db.execute(text("DELETE FROM users"))
        many(rt, number)
        with statements(rt) as ran:
            assert len(plan(rt)) == 3
        counts.append(len(ran))

    assert counts[0] == counts[1]


# How many are allowed (promises 4 and 9) --------------------------------------------------------------------

READS = Pool("reads", "strava:7:reads", ("100/15 minutes", "1000/day"), reports=True)


def window(
    limit: int,
    used: int,
    *,
    ends: timedelta,
    seconds: int = 900,
    known: bool = True,
    closed: timedelta | None = None,
    reserve: float = 0.2,
) -> Window:
    held = math.floor(math.floor(limit * reserve) * min(1, ends / timedelta(seconds=seconds)))
    return Window(
        pool=READS,
        seconds=seconds,
        start=NOW + ends - timedelta(seconds=seconds),
        end=NOW + ends,
        opens=NOW + ends,
        limit=limit,
        used=used,
        in_flight=0,
        known=known,
        remaining=max(0, limit - used) if known else 1,
        closed_until=None if closed is None else NOW + closed,
        reserve=math.floor(limit * reserve),
        held=held,
    )


def day(used: int, hours_left: float, limit: int = 1000, reserve: float = 0.2) -> Window:
    return window(limit, used, ends=timedelta(hours=hours_left), seconds=86400, reserve=reserve)


def quarter(used: int, minutes_left: float = 15, limit: int = 100, reserve: float = 0.2) -> Window:
    return window(limit, used, ends=timedelta(minutes=minutes_left), reserve=reserve)


def polls(*windows: Window, cost: int = 1, pace: Pace = EVENLY) -> Allowance:
    return allowed(windows, NOW, QUARTER, cost, pace)


def test_polling_is_paced_over_the_day_and_leaves_a_reserve() -> None:
    """96 ticks share 800 of the day's 1000 requests: nine each, not the hundred of the next 15 minutes."""
    assert polls(quarter(0), day(0, 24)) == Allowance(news=100, background=9)
    assert polls(quarter(0), day(450, 12)) == Allowance(news=100, background=10), (
        "half of the reserve is back"
    )
    assert polls(quarter(0), day(0, 1)) == Allowance(news=100, background=80)


def test_the_reserve_is_for_news() -> None:
    assert polls(quarter(80)) == Allowance(news=20, background=0)
    assert polls(quarter(95)) == Allowance(news=5, background=0)
    assert polls(quarter(80, reserve=0)) == Allowance(news=20, background=20)


def test_the_narrowest_window_counts() -> None:
    assert polls(quarter(90), day(100, 24)).news == 10
    assert polls(quarter(0), day(997, 24)) == Allowance(news=3, background=0)
    assert polls(quarter(100), day(0, 24)) == Allowance(0, 0)


def test_a_poll_of_several_requests_is_reckoned_as_such() -> None:
    assert polls(quarter(0, reserve=0), cost=3) == Allowance(news=33, background=33)


def test_a_count_that_nobody_knows_allows_one() -> None:
    assert polls(quarter(0), window(1000, 0, ends=timedelta(hours=9), known=False)) == Allowance(1, 1)


def test_a_closed_window_allows_none_until_it_opens() -> None:
    closed = window(100, 0, ends=QUARTER, closed=timedelta(minutes=3))
    assert polls(closed, day(0, 24)) == Allowance(0, 0)
    assert polls(window(100, 0, ends=QUARTER, known=False, closed=timedelta(minutes=3))) == Allowance(0, 0)

    opened = window(100, 0, ends=QUARTER, closed=timedelta(0))
    assert polls(opened).news == 100


def test_a_provider_without_limits_is_planned_all_the_same() -> None:
    assert polls().background > 1000


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    limit=st.integers(1, 2000),
    spent=st.integers(0, 2500),
    hours=st.integers(1, 24),
    reserve=st.sampled_from([0, 0.2, 0.5, 0.99]),
    cost=st.integers(1, 5),
)
def test_a_day_of_polling_keeps_the_reserve_as_long_as_it_may_be_needed_and_spends_the_rest(
    limit: int, spent: int, hours: int, reserve: float, cost: int
) -> None:
    """Every tick of what is left of the day polls what it may."""
    used = min(spent, limit)
    ticks = hours * 4
    for number in range(ticks):
        left = window(limit, used, ends=QUARTER * (ticks - number), seconds=86400, reserve=reserve)
        plan = polls(left, cost=cost)
        assert 0 <= plan.background <= plan.news <= max(0, limit - used)
        used += plan.background * cost
        sofar = 1 - (ticks - number - 1) / 96
        assert not plan.background or used <= math.ceil((limit - left.held) * sofar)

    # The reserve of the last tick alone is left, and what makes no whole poll.
    assert used <= limit
    assert used >= min(limit, spent) or used >= limit - math.ceil(reserve * limit / 96) - cost


@pytest.mark.parametrize("minutes", [5, 15, 60])
def test_polling_lasts_the_day_however_often_ticks_fire(minutes: int) -> None:
    """Promise 4: each quarter of the day has its share, whatever `schedule.sync` says."""
    used, quarters = 0, [0, 0, 0, 0]
    for minute in range(0, 24 * 60, minutes):
        plan = polls(day(used, 24 - minute / 60))
        used += plan.background
        quarters[minute // 360] += plan.background

    assert 970 <= used <= 1000 or minutes == 60
    assert all(number >= 180 for number in quarters), quarters


EVENING = Pace(price=1.0, curve=[0.0] * 18 + [1.0, 2.0, 2.0, 1.0] + [0.0] * 2)
"""Requests are scarce, and best spent between 18 and 22 o'clock."""


def at(hour: float, used: int, pace: Pace = EVENING) -> Allowance:
    """What is allowed at an hour of a day without a reserve."""
    left = dataclasses.replace(
        day(used, 24 - hour, reserve=0), start=NOW.replace(hour=0), end=NOW.replace(hour=0) + timedelta(1)
    )
    return allowed([left], NOW.replace(hour=0) + timedelta(hours=hour), QUARTER, 1, pace)


def test_where_requests_are_scarce_the_day_follows_its_curve() -> None:
    """By noon next to nothing may be gone, and is not forced; at night all of it has to be."""
    assert at(12, 0) == Allowance(news=1000, background=80, early=0)
    assert at(12, 80) == Allowance(news=920, background=0, early=0)
    assert at(20, 400) == Allowance(news=600, background=217, early=150)
    assert at(20, 620).background == 0
    assert at(23.75, 990) == Allowance(news=10, background=10, early=10)


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    curve=st.lists(st.floats(0, 1), min_size=24, max_size=24).filter(lambda hours: sum(hours) > 1),
    due=st.lists(st.integers(0, 40), min_size=96, max_size=96),
    asked=st.integers(0, 3),
)
def test_a_day_is_used_and_lasts_whatever_is_due_when(curve: list[float], due: list[int], asked: int) -> None:
    """Promise 4: at least 97 % of it, and never all before 23:30, with what people ask for besides."""
    pace, used, waiting = Pace(price=1.0, curve=[*curve[:23], max(curve[23], 0.1)]), 0, 0
    start = NOW.replace(hour=0)
    for number in range(96):
        reserve = 1.5 * asked * 96 / 1000
        left = dataclasses.replace(
            day(used, 24 - number / 4, reserve=reserve), start=start, end=start + timedelta(days=1)
        )
        plan = allowed([left], start + QUARTER * number, QUARTER, 1, pace)
        waiting += due[number]
        polled = min(waiting, plan.background)
        waiting -= polled
        used += max(polled, plan.early)
        assert used < 1000 or number >= 94
        used = min(1000, used + asked)

    assert used >= 970


def test_when_webhooks_stop_whoever_relied_on_them_is_polled_at_once() -> None:
    """Their times are far away, with requests for everybody too."""
    assert at(12, 0, Pace(deaf=True)) == Allowance(news=1000, background=511, early=511)
    assert at(12, 0, Pace(price=1.0, curve=EVENING.curve, deaf=True)).early == 80


def test_without_a_curve_nobody_is_taken_early() -> None:
    assert at(12, 0, EVENLY).early == 0


def test_whom_nobody_else_needs_is_polled_early_the_one_that_is_due_soonest_first(
    rt: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    soon = {"last_sync_at": NOW - timedelta(hours=3), "due": NOW + timedelta(hours=1)}
    connect(rt, "due")
    connect(rt, "second", last_sync_at=NOW - timedelta(days=1), due=NOW + timedelta(hours=2))
    connect(rt, "first", **soon)
    connect(rt, "third", last_sync_at=None, due=NOW + timedelta(hours=3))
    connect(rt, "claimed", **soon, claimed_at=NOW - timedelta(minutes=1))
    connect(rt, "waiting", **soon, wait_reason="Strava is down")
    connect(rt, "just polled", due=NOW + timedelta(minutes=1), last_sync_at=NOW - timedelta(minutes=13))
    connect(rt, "ended", status="needs_reauth", due=None)
    allow(monkeypatch, Allowance(news=9, background=9, early=3))

    assert plan(rt) == ["due", "first", "second"]
    assert plan(rt) == ["third"]
    assert plan(rt) == []


def test_so_few_are_taken_early_as_are_missing(rt: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    connect(rt, "due", "too")
    connect(rt, "later", due=NOW + QUARTER)
    allow(monkeypatch, Allowance(news=9, background=9, early=2))

    assert plan(rt) == ["due", "too"]


def test_who_waits_is_read_through_no_further_than_so_many(
    rt: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider that is down has all its connections wait: a tick must not look at each."""
    many(rt, 500)
    with rt.store.write() as db:
        db.execute(update(Connection).values(next_sync_at=NOW + QUARTER, wait_reason="down", news_at=None))
    allow(monkeypatch, Allowance(news=9, background=9, early=9))

    with statements(rt) as ran:
        assert plan(rt) == []

    statement, parameters = next(each for each in ran if "wait_reason" in each[0])
    how = explain(rt, statement, parameters)
    assert "ix_connections_due" in how
    assert "TEMP B-TREE" not in how
    assert "Sort" not in how
    assert statement.count("LIMIT") == 1


# What the budget says ---------------------------------------------------------------------------------------


def test_an_unknown_budget_is_asked_with_one_connection(runtime: Runtime, clock: Clock) -> None:
    """Redis is empty: nobody has counted yet."""
    rt = dataclasses.replace(runtime, clock=clock)
    connect(rt, "a", "b", "c")

    assert plan(rt) == ["a"]


def test_a_counted_budget_is_read(runtime: Runtime, settings_env: Callable[..., Settings]) -> None:
    rt = dataclasses.replace(
        runtime, settings=settings_env(providers={"strava": {"budget": ["50/day"], "overall_budget": []}})
    )
    [pool] = [
        each
        for each in rt.providers["strava"].pools(rt.settings.providers["strava"], 0)
        if each.name == "reads"
    ]
    now = rt.clock()
    rt.budget.settle(rt.budget.take([pool]), usage={"reads": Usage((50,), (10,))}, date=now)

    found = allowance(rt, "strava", MAIN, now)

    assert found.news == 40
    assert 0 <= found.background <= 40


def test_without_redis_nothing_is_planned(
    runtime: Runtime, clock: Clock, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    rt = dataclasses.replace(runtime, clock=clock)
    connect(rt, "ann", news_at=NOW)
    redis_server.stop()

    assert tick("sync_active_users", NOW, print, runtime=rt) == 0

    assert stored(rt)[0]["claimed_at"] is None
    assert "strava: no plan: its budget cannot be read" in caplog.text


def test_a_tick_is_written_down_with_what_it_planned(rt: Runtime) -> None:
    connect(rt, "ann", "bob")

    plan(rt, due_at=NOW - timedelta(minutes=1))

    assert stored(rt, Tick) == [
        {"name": "sync_active_users", "due_at": NOW - timedelta(minutes=1), "fired_at": NOW, "planned": 2}
    ]
    with rt.store.read() as db:
        assert db.scalar(select(func.count()).select_from(Tick)) == 1


def test_plans_that_are_not_spent_yet_are_not_made_again(runtime: Runtime) -> None:
    """Three ticks inside one lease, with 5 requests left, claim 5 connections in all (promise 9)."""
    provider = runtime.providers["strava"]
    pools = provider.pools(runtime.settings.providers["strava"], 0)
    clock = runtime.clock
    ticket = runtime.budget.take(pools)
    used = {"reads": Usage((100, 1000), (95, 95)), "overall": Usage((200, 2000), (95, 95))}
    runtime.budget.settle(ticket, usage=used, date=clock())
    connect(runtime, *[f"user{number}" for number in range(20)], news_at=clock(), due=clock())

    planned = [plan(runtime), plan(runtime), plan(runtime)]

    assert [len(users) for users in planned] == [5, 0, 0]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_an_import_and_a_tick_do_not_wait_for_each_other(rt: Runtime) -> None:
    """A tick passes over the rows that somebody writes; on SQLite writers take turns anyway."""
    connect(rt, "ann", "bob")

    with rt.store.write() as other:
        other.execute(update(Connection).where(Connection.user_id == "ann").values(updated_at=NOW))
        planned = plan(rt)

    assert planned == ["bob"]
