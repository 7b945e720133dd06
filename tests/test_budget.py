"""Promise 3: the budget is the provider's. On a real Redis, with a clock that the test turns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pytest
import redis as redis_client
from hypothesis import given, settings
from hypothesis import strategies as st

from lifelogger.budget import Budget, BudgetSpent, CountUnknown, Pool, Ticket, Usage
from lifelogger.errors import Unavailable
from tests.budget_provider import Clock, Provider, hammer, served
from tests.servers import RedisServer

READS = Pool("reads", "strava:7:reads", ("100/15 minutes", "1000/day"), reports=True)
OVERALL = Pool("overall", "strava:7:overall", ("200/15 minutes", "2000/day"), reports=True)
SILENT = Pool("reads", "oura:7:reads", ("10/5 minutes",), reports=False)


def at(text: str) -> datetime:
    return datetime.fromisoformat(f"2026-11-14T{text}").replace(tzinfo=UTC)


@pytest.fixture
def clock() -> Clock:
    return Clock(at("12:07:00"))


@pytest.fixture
def budget(redis_url: str, clock: Clock) -> Budget:
    return Budget(redis_url, clock=clock)


@pytest.fixture
def known(budget: Budget, clock: Clock) -> Budget:
    """A budget that has learned its counts: one read was made, and nobody else made any."""
    assert exchange(budget, clock, used=(1, 1)).probe
    return budget


def reads(*used: int, limits: tuple[int, ...] = (100, 1000)) -> dict[str, Usage]:
    return {"reads": Usage(limits, used)}


def exchange(budget: Budget, clock: Clock, *, used: tuple[int, ...] = (), pool: Pool = READS) -> Ticket:
    """One request and its reply, in no time."""
    ticket = budget.take([pool])
    budget.settle(ticket, usage=reads(*used) if used else None, date=clock.date())
    return ticket


def spend(budget: Budget, number: int, pool: Pool = READS) -> None:
    """Requests that the provider counts as we do."""
    for _ in range(number):
        ticket = budget.take([pool])
        budget.settle(ticket, usage=reads(*used(budget)) if pool.reports else None)


def used(budget: Budget, pool: Pool = READS) -> list[int]:
    return [window.used for window in budget.windows([pool])]


def spent(budget: Budget, *pools: Pool, **leave: float) -> BudgetSpent:
    with pytest.raises(BudgetSpent) as refusal:
        budget.take(pools or [READS], **leave)
    return refusal.value


# Windows ----------------------------------------------------------------------------------------------------


def test_the_hundredth_read_goes_out_and_the_next_waits_for_the_window(known: Budget) -> None:
    spend(known, 99)

    refusal = spent(known)

    assert refusal.reason == "strava reads: 100 of 100 requests used in the 15 minutes to 12:15 UTC"
    assert refusal.until == at("12:15:01")


def test_every_window_opens_on_the_providers_clock_not_at_its_first_hit(known: Budget, clock: Clock) -> None:
    spend(known, 99)
    clock.set(at("12:15:01"))  # eight minutes after the first request

    spend(known, 100)

    assert spent(known).until == at("12:30:01")


def test_both_windows_change_at_midnight(redis_url: str, clock: Clock) -> None:
    budget = Budget(redis_url, clock=clock)
    clock.set(at("23:59:58"))
    exchange(budget, clock, used=(60, 999))
    clock.set(at("23:59:58.500"))
    exchange(budget, clock, used=(61, 1000))

    refusal = spent(budget)
    assert refusal.reason == "strava reads: 1000 of 1000 requests used in the day to 00:00 UTC"
    assert refusal.until is not None
    assert at("23:59:59") + timedelta(seconds=1) <= refusal.until <= at("23:59:59") + timedelta(seconds=3)

    clock.set(refusal.until)
    assert used(budget) == [0, 0]
    spend(budget, 100)
    assert used(budget) == [100, 100]


def test_until_is_when_the_last_of_the_refusing_windows_opens(budget: Budget, clock: Clock) -> None:
    exchange(budget, clock, used=(100, 1000))

    assert spent(budget).until == at("23:59:59") + timedelta(seconds=2)


def test_no_window_opens_early_because_clocks_are_not_quite_equal(known: Budget, clock: Clock) -> None:
    """Nothing told which of two clocks is right, so just after a boundary both windows must have room."""
    spend(known, 99)

    clock.set(at("12:15:00.100"))

    assert "to 12:15 UTC" in spent(known).reason


def test_before_a_reply_told_the_time_clocks_may_differ_by_a_second(budget: Budget, clock: Clock) -> None:
    clock.set(at("12:09:58.500"))
    spend(budget, 10, SILENT)

    clock.set(at("12:10:00.900"))

    assert spent(budget, SILENT).until == at("12:10:01")


def test_the_days_budget_lasts_the_day(known: Budget, clock: Clock) -> None:
    """Promise 4: work that can wait spends of each window what its time so far allows, and a round ahead."""
    hourly = Pool("reads", SILENT.key, ("100/hour",), reports=False)
    clock.set(at("13:00:30"))
    paced = {"leave_share": 0.2, "pace": 900.0}

    for _ in range(20):  # a quarter hour of 80
        known.settle(known.take([hourly], **paced))
    with pytest.raises(BudgetSpent) as refused:
        known.take([hourly], **paced)
    assert refused.value.until is not None
    # 21 of 80 belong to 945 s, of which 900 may be spent ahead; and some of the reserve has flown back.
    assert at("13:00:43") <= refused.value.until <= at("13:00:45")
    assert known.take([hourly])  # a person need not wait

    clock.set(at("13:30:30"))  # half of the reserve has come back: of 90 belong 68 to 45 minutes
    for _ in range(68 - 21):
        known.settle(known.take([hourly], **paced))
    with pytest.raises(BudgetSpent):
        known.take([hourly], **paced)


def test_a_limit_changed_in_mid_window_keeps_its_count(budget: Budget) -> None:
    spend(budget, 10, SILENT)
    raised = Pool("reads", SILENT.key, ("12/5 minutes",), reports=False)
    spend(budget, 2, raised)

    assert "12 of 12" in spent(budget, raised).reason
    assert "12 of 10" in spent(budget, SILENT).reason


def test_counters_are_read_by_limits_with_the_start_of_the_window_in_the_key(budget: Budget) -> None:
    spend(budget, 3, SILENT)

    start = int(at("12:05:00").timestamp())
    assert budget._storage.get(f"{SILENT.key}:300:{start}") == 3
    assert budget._storage.prefixed_key("x") == "lifelogger:budget:x"


# Several at once --------------------------------------------------------------------------------------------


def test_a_refusal_by_one_pool_charges_no_other(known: Budget, clock: Clock) -> None:
    overall = Pool("overall", OVERALL.key, ("2/15 minutes",), reports=False)
    spend(known, 2, overall)
    before = used(known)

    for pools in ([READS, overall], [overall, READS]):
        assert "overall: 2 of 2" in spent(known, *pools).reason

    assert used(known) == before
    assert used(known, overall) == [2]
    assert [window.in_flight for window in known.windows([READS, overall])] == [0, 0, 0]


def test_one_request_spends_from_every_window_of_every_pool(budget: Budget, clock: Clock) -> None:
    ticket = budget.take([READS, OVERALL])
    usage = {"reads": Usage((100, 1000), (7, 70)), "overall": Usage((200, 2000), (9, 90))}
    budget.settle(ticket, usage=usage, date=clock.date())
    budget.take([READS, OVERALL])

    assert used(budget, READS) == [8, 71]
    assert used(budget, OVERALL) == [10, 91]


def test_a_pool_without_limits_limits_nothing(budget: Budget) -> None:
    unlimited = Pool("user", "oura:7:user:1", (), reports=False)

    budget.settle(budget.take([unlimited, SILENT]))

    assert used(budget, unlimited) == []
    assert used(budget, SILENT) == [1]
    assert budget.windows([]) == []


# What replies tell ------------------------------------------------------------------------------------------


def test_limits_in_a_reply_win_over_the_settings(known: Budget, clock: Clock) -> None:
    known.settle(known.take([READS]), usage=reads(2, 2, limits=(200, 2000)), date=clock.date())
    assert [window.limit for window in known.windows([READS])] == [200, 2000]

    known.settle(known.take([READS]), usage=reads(3, 3, limits=(3, 2000)), date=clock.date())
    assert "3 of 3" in spent(known).reason


def test_a_limit_of_nothing_lets_one_request_ask_again(known: Budget, clock: Clock) -> None:
    known.settle(known.take([READS]), usage=reads(2, 2, limits=(0, 0)), date=clock.date())
    assert spent(known).until == at("23:59:59") + timedelta(seconds=2)

    clock.set(at("00:00:10") + timedelta(days=1))

    assert known.take([READS])


def test_what_others_spend_from_the_same_budget_is_believed(known: Budget, clock: Clock) -> None:
    first, second = known.take([READS]), known.take([READS])

    known.settle(first, usage=reads(57, 570), date=clock.date())

    assert used(known) == [58, 571]  # the other one in flight may come on top
    known.settle(second, usage=reads(58, 571), date=clock.date())
    assert used(known) == [58, 571]


def test_replies_may_arrive_in_any_order(known: Budget, clock: Clock) -> None:
    tickets = [known.take([READS]) for _ in range(5)]
    numbers = {ticket.id: number for number, ticket in enumerate(tickets, start=2)}
    assert used(known) == [6, 6]

    for ticket in (tickets[4], tickets[0], tickets[2], tickets[3], tickets[1]):
        number = numbers[ticket.id]
        known.settle(ticket, usage=reads(number, number), date=clock.date())
        assert used(known) == [6, 6]


def test_a_request_that_never_arrived_is_given_back(known: Budget, clock: Clock) -> None:
    known.settle(known.take([READS]), answered=False)
    exchange(known, clock, used=(2, 2))
    assert used(known) == [3, 3]  # while the provider may still count it

    clock.forward(known._lease * 2 + 1)
    exchange(known, clock, used=(3, 3))

    assert used(known) == [3, 3]


def test_replies_without_usage_leave_the_count_alone(known: Budget, clock: Clock) -> None:
    slow = known.take([READS])
    exchange(known, clock)  # a gateway's 502: perhaps counted, and after the slow one

    known.settle(slow, usage=reads(2, 2), date=clock.date())

    assert used(known) == [3, 3]


def test_usage_of_other_windows_than_the_settings_name_is_not_used(
    budget: Budget, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    day = Pool("reads", READS.key, ("1000/day",), reports=True)

    budget.settle(budget.take([day]), usage=reads(7, 70), date=clock.date())

    assert "replies tell of 2 windows, the settings of 1 (1000/day)" in caplog.text
    assert not budget.windows([day])[0].known


# 429 --------------------------------------------------------------------------------------------------------


def test_a_429_closes_the_window_for_all_workers(known: Budget, redis_url: str, clock: Clock) -> None:
    colleague = Budget(redis_url, clock=clock)

    until = known.settle(known.take([READS]), usage=reads(100, 300), date=clock.date(), limited=True)

    assert until == at("12:15:01")
    assert spent(colleague).until == until


def test_a_429_that_shows_nothing_closes_the_shortest_window(known: Budget, clock: Clock) -> None:
    until = known.settle(known.take([READS, OVERALL]), usage=reads(2, 2), date=clock.date(), limited=True)

    assert until == at("12:15:01")
    for pool in (READS, OVERALL):
        assert "refuses requests until 12:15:01 UTC" in spent(known, pool).reason
    assert [window.remaining for window in known.windows([READS])] == [0, 0]
    assert known.windows([READS])[0].closed_until == until

    clock.set(at("12:15:01"))
    assert known.take([READS])
    assert known.windows([READS])[0].closed_until is None


def test_a_429_that_names_a_time_is_obeyed(budget: Budget, clock: Clock) -> None:
    ticket = budget.take([SILENT])

    until = budget.settle(ticket, date=clock.date(), limited=True, retry_at=at("12:07:30"))

    assert until is not None
    assert at("12:07:30") <= until <= at("12:07:32")
    assert spent(budget, SILENT).until == until
    clock.set(until)
    assert budget.take([SILENT])


def test_a_429_for_one_user_does_not_close_the_application(budget: Budget) -> None:
    user = Pool("user", "fitbit:7:user:1", ("300/minute",), reports=False)

    budget.settle(budget.take([user, SILENT]), limited={"user"})

    assert spent(budget, user, SILENT).reason.startswith("fitbit user")
    assert budget.take([SILENT])


# Unknown ----------------------------------------------------------------------------------------------------


def test_a_first_request_goes_out_alone_and_tells(budget: Budget, clock: Clock) -> None:
    [quarter, day] = budget.windows([READS])
    assert (quarter.known, quarter.remaining) == (False, 1)

    probe = budget.take([READS])
    assert probe.probe
    with pytest.raises(CountUnknown) as refusal:
        budget.take([READS])
    assert refusal.value.until == clock.datetime() + timedelta(seconds=1)
    assert budget.windows([READS])[0].remaining == 0

    budget.settle(probe, usage=reads(40, 990), date=clock.date())
    [quarter, day] = budget.windows([READS])
    assert (quarter.known, quarter.remaining, day.remaining) == (True, 60, 10)
    assert not budget.take([READS]).probe


def test_a_count_that_was_lost_is_unknown_not_zero(
    known: Budget, clock: Clock, redis_server: RedisServer
) -> None:
    spend(known, 60)
    straggler = known.take([READS])
    redis_server.client.flushall()

    probe = known.take([READS])
    assert probe.probe
    with pytest.raises(CountUnknown):
        known.take([READS])
    known.settle(straggler, usage=reads(62, 62), date=clock.date())
    with pytest.raises(CountUnknown):  # that reply may be older than requests nobody remembers
        known.take([READS])
    known.settle(probe, usage=reads(63, 63), date=clock.date())

    assert used(known) == [63, 63]
    assert not known.take([READS]).probe


def test_a_probe_that_brings_nothing_makes_way_for_the_next(budget: Budget, clock: Clock) -> None:
    budget.settle(budget.take([READS]), answered=False)
    budget.settle(budget.take([READS]))

    probe = budget.take([READS])
    budget.settle(probe, usage=reads(8, 8), date=clock.date())

    assert probe.probe
    assert used(budget) == [10, 10]  # the two before may still come on top


def test_a_probe_whose_worker_died_makes_way_at_the_end_of_its_lease(budget: Budget, clock: Clock) -> None:
    budget.take([READS])

    clock.forward(budget._lease - 1)
    assert isinstance(spent(budget), CountUnknown)
    clock.forward(2)

    assert budget.take([READS]).probe


def test_a_window_that_opened_after_counting_began_is_known(budget: Budget, clock: Clock) -> None:
    quarter = Pool("reads", READS.key, ("100/15 minutes",), reports=True)
    exchange(budget, clock, pool=quarter)
    assert budget.take([quarter]).probe

    clock.set(at("12:20:00"))

    assert not budget.take([quarter]).probe


def test_without_the_providers_time_no_window_is_known_to_have_opened(budget: Budget, clock: Clock) -> None:
    budget.settle(budget.take([READS]), usage=reads(1, 1))
    assert not budget.take([READS]).probe

    clock.set(at("12:20:00"))

    assert budget.take([READS]).probe


def test_an_evicted_counter_is_unknown(known: Budget, clock: Clock, redis_server: RedisServer) -> None:
    spend(known, 10)
    clock.forward(1)
    start = int(at("12:00:00").timestamp())
    assert redis_server.client.delete(f"lifelogger:budget:{READS.key}:900:{start}")

    assert known.take([READS]).probe


def test_an_old_snapshot_is_no_count(known: Budget, clock: Clock, redis_server: RedisServer) -> None:
    """Redis came back with what it held minutes ago: a lower bound, and a request goes out alone."""
    spend(known, 20)
    known.take([READS])  # in flight in the snapshot, settled after it
    client = redis_server.client
    snapshot = {key: client.dump(key) for key in client.keys("*")}
    spend(known, 30)
    clock.forward(1)

    redis_server.restart()
    for key, value in snapshot.items():
        client.restore(key, 0, value)

    probe = known.take([READS])
    assert probe.probe
    assert isinstance(spent(known), CountUnknown)
    known.settle(probe, usage=reads(53, 53), date=clock.date())
    assert not known.take([READS]).probe


def test_where_replies_report_nothing_what_we_count_is_all_there_is(budget: Budget) -> None:
    assert not budget.take([SILENT]).probe
    assert not budget.take([SILENT]).probe

    [window] = budget.windows([SILENT])
    assert (window.known, window.used, window.remaining, window.in_flight) == (True, 2, 8, 2)


def test_no_request_goes_out_when_redis_cannot_count(
    known: Budget, clock: Clock, redis_server: RedisServer
) -> None:
    ticket = known.take([READS])
    redis_server.stop()

    for call in (
        lambda: known.take([READS]),
        lambda: known.settle(ticket, usage=reads(2, 2)),
        lambda: known.windows([READS]),
    ):
        with pytest.raises(Unavailable, match="Redis cannot count requests now, so none is sent") as trouble:
            call()
        assert trouble.value.__cause__ is trouble.value.__context__ is None

    redis_server.start()
    assert known.take([READS]).probe


def test_a_redis_that_refuses_to_write_sends_nothing(known: Budget, redis_server: RedisServer) -> None:
    redis_server.client.config_set("maxmemory", 1)
    try:
        with pytest.raises(Unavailable, match="OOM command not allowed"):
            known.take([READS])
    finally:
        redis_server.client.config_set("maxmemory", 0)
    assert used(known) == [1, 1]


def test_a_call_that_is_sent_again_is_charged_once(known: Budget) -> None:
    """As the client does when the connection breaks before it has the answer."""
    calls = [known._call("take", [READS], id="a", leave=0, leave_share=0) for _ in range(2)]

    assert calls[0] == calls[1]
    assert used(known) == [2, 2]


# Boundaries -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [READS, SILENT])
def test_a_request_in_flight_at_a_boundary_counts_in_both_windows(
    known: Budget, clock: Clock, pool: Pool
) -> None:
    clock.set(at("12:14:30"))
    ticket = known.take([pool])
    clock.set(at("12:15:30"))

    assert used(known, pool)[0] == 1
    assert known.windows([pool])[0].in_flight == 1
    known.settle(ticket, date=clock.date())

    assert used(known, pool)[0] == 1


def test_without_an_answer_a_request_stays_in_flight_until_its_lease_ends(
    budget: Budget, clock: Clock
) -> None:
    clock.set(at("12:09:30"))
    budget.settle(budget.take([SILENT]), answered=False)
    clock.set(at("12:10:30"))
    spend(budget, 9, SILENT)
    assert "10 of 10" in spent(budget, SILENT).reason

    clock.set(at("12:15:30"))
    assert used(budget, SILENT) == [0]


def test_the_last_reply_of_a_window_does_not_close_the_next(known: Budget, clock: Clock) -> None:
    """Counted as the hundredth at 12:14:59, answered at 12:15:05: that hundred is the old window's."""
    clock.set(at("12:14:59"))
    slow = known.take([READS])
    clock.set(at("12:15:05"))

    known.settle(slow, usage=reads(100, 400), date=clock.date())

    assert used(known) == [1, 400]
    assert known.take([READS])


def test_a_429_of_the_old_window_does_not_close_the_new(known: Budget, clock: Clock) -> None:
    clock.set(at("12:14:59"))
    slow = known.take([READS])
    clock.set(at("12:15:05"))

    assert known.settle(slow, usage=reads(100, 400), date=clock.date(), limited=True) is None

    assert known.take([READS])


@pytest.mark.parametrize("ahead", [300, -300])
def test_a_clock_that_is_wrong_is_known_by_the_providers_date(
    budget: Budget, clock: Clock, ahead: int
) -> None:
    """At 12:07 by our clock it is 12:12 (or 12:02) at the provider: its windows are what counts."""
    clock.ahead = timedelta(seconds=ahead)
    exchange(budget, clock, used=(100, 500))

    [quarter, _] = budget.windows([READS])
    assert (quarter.start, quarter.end) == (at("12:00:00"), at("12:15:00"))
    until = spent(budget).until
    assert until is not None
    assert timedelta(0) <= until - (at("12:15:00") - clock.ahead) <= timedelta(seconds=2)

    clock.set(until)
    assert used(budget)[0] == 0
    assert budget.take([READS])


def test_a_wrong_clock_is_not_a_second_budget(budget: Budget, clock: Clock) -> None:
    """The first replies without a `Date` were counted in a window that the provider does not have."""
    clock.ahead = timedelta(minutes=4)
    tickets = [budget.take([SILENT]) for _ in range(10)]
    budget.settle(tickets[0])

    budget.settle(tickets[1], date=clock.date())

    assert budget.windows([SILENT])[0].start == at("12:10:00")
    assert "10 of 10" in spent(budget, SILENT).reason


def test_usage_belongs_to_the_window_of_its_date(known: Budget, clock: Clock) -> None:
    """By our clock still 12:14:59.9, at the provider already 12:15: its first request of the new window."""
    clock.ahead = timedelta(seconds=0.5)
    clock.set(at("12:14:59.900"))

    exchange(known, clock, used=(1, 2))

    clock.set(at("12:15:10"))
    assert used(known) == [1, 2]


def test_a_clock_that_is_set_is_followed(known: Budget, clock: Clock) -> None:
    clock.ahead = timedelta(minutes=20)
    exchange(known, clock, used=(5, 50))
    assert known.windows([READS])[0].start == at("12:15:00")

    clock.ahead = timedelta(0)
    exchange(known, clock, used=(6, 51))
    assert known.windows([READS])[0].start == at("12:00:00")


# For others -------------------------------------------------------------------------------------------------


def test_background_work_leaves_a_reserve(known: Budget, clock: Clock) -> None:
    """Promise 4: of the share what belongs to the rest of the window; so nothing is left in the end."""
    clock.set(at("12:07:30"))  # half of the window is to come
    spend(known, 89)

    refusal = spent(known, leave_share=0.2)
    assert refusal.reason == (
        "strava reads: 90 of 100 requests used in the 15 minutes to 12:15 UTC; "
        "the last 10 are held for others"
    )
    spent(known, leave=10)
    spent(known, leave=5, leave_share=0.1)
    known.take([READS], leave=4, leave_share=0.1)
    known.take([READS])

    refusal = spent(known, leave_share=0.2)
    assert refusal.until == at("12:09:01"), "when the tenth last is no longer held"
    clock.set(at("12:09:02"))
    known.take([READS], leave_share=0.2)


DAYS = Pool("reads", "strava:9:reads", ("1000/day",), reports=False)


def held(budget: Budget) -> tuple[int, int]:
    (window,) = budget.windows([DAYS], leave_share=0.2)
    return window.reserve, window.held


def test_the_reserve_of_a_day_is_what_was_used_lately(budget: Budget, clock: Clock) -> None:
    """Promise 4: until a whole day was watched it is the share, and never more than that."""
    clock.set(at("12:00:00"))
    assert held(budget) == (200, 100)
    spend(budget, 40, DAYS)
    for _ in range(9):  # polls are no reason to keep anything
        budget.settle(budget.take([DAYS], leave_share=0.2))
    assert held(budget) == (200, 100)

    clock.forward(86400)
    assert held(budget)[0] == 200, "half a day was watched so far"
    spend(budget, 36, DAYS)
    clock.forward(86400)
    assert held(budget) == (66, 33), "36 and half of them, and two standard deviations"

    spend(budget, 400, DAYS)
    clock.forward(86400)
    assert held(budget)[0] == 200
    clock.forward(8 * 86400)
    assert held(budget)[0] == 0, "nobody asked for anything in a week"


def test_what_was_not_used_of_the_reserve_comes_back_before_midnight(budget: Budget, clock: Clock) -> None:
    clock.set(at("00:00:30"))
    taken = 0
    for _ in range(96):
        while True:
            try:
                budget.settle(budget.take([DAYS], leave_share=0.2, pace=900))
            except BudgetSpent:
                break
            taken += 1
        assert taken < 1000 or clock() >= at("23:30:00").timestamp()
        clock.forward(900)

    assert taken >= 970


def test_windows_change_nothing(known: Budget, redis_server: RedisServer) -> None:
    client = redis_server.client
    before = {key: client.dump(key) for key in client.keys("*")}

    known.windows([READS, OVERALL, SILENT])

    assert {key: client.dump(key) for key in client.keys("*")} == before


def test_nothing_is_kept_for_ever(known: Budget, redis_server: RedisServer) -> None:
    known.settle(known.take([READS]), answered=False)
    known.take([READS, SILENT])

    keys = redis_server.client.keys("*")

    assert keys
    lives = {key: redis_server.client.ttl(key) for key in keys}
    assert all(
        0 < life <= (9 * 86400 if b":urgent:" in key else 2 * 86400 + 90) for key, life in lives.items()
    )


# Against a provider that counts -----------------------------------------------------------------------------

_names = count()


class Shuttle:
    """Requests on their way between a budget and a provider, moved by the test in any order."""

    def __init__(self, budget: Budget, pool: Pool, clock: Clock, provider: Provider) -> None:
        self.budget, self.pool, self.clock, self.provider = budget, pool, clock, provider
        self.sent: list[Ticket] = []
        self.answered: list[tuple[Ticket, dict[str, Usage] | None, datetime]] = []

    def send(self) -> None:
        with contextlib.suppress(BudgetSpent):
            self.sent.append(self.budget.take([self.pool]))

    def count(self, number: int) -> None:
        ticket = self.sent.pop(number % len(self.sent))
        usage = self.provider.request(ticket.probe)
        told = {"reads": usage} if self.pool.reports else None
        self.answered.append((ticket, told, self.clock.date()))

    def deliver(self, number: int) -> None:
        ticket, usage, date = self.answered.pop(number % len(self.answered))
        self.budget.settle(ticket, usage=usage, date=date)

    def cut(self, number: int) -> None:
        self.budget.settle(self.answered.pop(number % len(self.answered))[0], answered=False)

    def gateway(self, number: int) -> None:
        ticket, _, date = self.answered.pop(number % len(self.answered))
        self.budget.settle(ticket, date=date)

    def drain(self) -> None:
        while self.sent:
            self.count(0)
        while self.answered:
            self.deliver(0)

    def forward(self, seconds: float) -> None:
        """Let time pass; a request takes less than its lease, so the overdue come home first."""
        under_way = [*self.sent, *(ticket for ticket, _, _ in self.answered)]
        if any(self.clock() + seconds > ticket.taken + 85 for ticket in under_way):
            self.drain()
        self.clock.forward(seconds)

    def steps(self) -> dict[str, Callable[[int], Any]]:
        possible: dict[str, Callable[[int], Any]] = {"send": lambda _: self.send()}
        if self.sent:
            possible["count"] = self.count
        if self.answered:
            possible |= {"deliver": self.deliver, "cut": self.cut, "gateway": self.gateway}
        return possible


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(
                ["send"] * 3 + ["count", "deliver"] * 2 + ["cut", "gateway", "wait", "next", "flush"]
            ),
            st.integers(0, 60),
        ),
        max_size=60,
    ),
    ahead=st.sampled_from([0, 0.4, -0.7, 299.5, -1000, 4000]),
    reports=st.booleans(),
)
def test_whatever_happens_the_provider_never_counts_above_its_limit(
    redis_server: RedisServer, steps: list[tuple[str, int]], ahead: float, reports: bool
) -> None:
    """Any order of sending, counting, replying and losing, over boundaries, with any clock."""
    clock = Clock(at("12:44:55"), timedelta(seconds=ahead))
    pool = Pool("reads", f"p:{next(_names)}:reads", ("5/minute", "12/hour"), reports=reports)
    provider = Provider((60, 5), (3600, 12), clock=clock)
    shuttle = Shuttle(Budget(redis_server.url, prefix="any", clock=clock), pool, clock, provider)
    for step, number in steps:
        if step == "wait":
            shuttle.forward(number / 60)
        elif step == "next":  # to just before or after a boundary
            shuttle.forward(60 - (clock() + ahead) % 60 - 1 + number / 30)
        elif step == "flush" and reports and number < 10:
            shuttle.drain()
            redis_server.client.flushall()
        elif step in (possible := shuttle.steps()):
            possible[step](number)
    shuttle.drain()
    assert provider.excess() == {}


def test_a_budget_is_spent_to_the_last_request(known: Budget, clock: Clock) -> None:
    """Caution at boundaries and with replies in any order must not waste what is there."""
    provider = Provider((900, 100), (86400, 1000), clock=clock)
    provider.request()
    shuttle = Shuttle(known, READS, clock, provider)
    for step in range(400):
        shuttle.send()
        if len(shuttle.sent) > 3:
            shuttle.count(step * 7)
        if len(shuttle.answered) > 3:
            shuttle.deliver(step * 5)
        if step % 4 == 0:
            clock.forward(1)
    shuttle.drain()

    assert provider.excess() == {}
    assert provider.counts[900][int(at("12:00:00").timestamp())] == 100


@pytest.mark.slow
def test_workers_in_threads_and_processes_stay_below_a_limit_together(redis_url: str) -> None:
    """Two processes of four threads each, on Redis's own clock, against a provider that counts over HTTP."""
    windows = ((1, 15), (3, 30))

    with served(windows, ahead=0.6, last=4) as (provider, address):
        outcomes = hammer(redis_url, address, windows, processes=2, threads=4)

    assert provider.excess() == {}
    assert all(outcome["sent"] > 0 for outcome in outcomes)
    assert sum(outcome["refused"] for outcome in outcomes) > 0
    assert sum(outcome["sent"] for outcome in outcomes) == provider.total
    with redis_client.Redis.from_url(redis_url) as client:
        assert client.zcard("lifelogger:budget:strava:7:reads:flight") == 0
