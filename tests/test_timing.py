"""When to poll next: the best plan there is, by the price of a request."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifelogger.habits import DAY, HOUR, Crowd, Habits
from lifelogger.timing import best_next, next_polls
from tests.test_habits import MONDAY, someone

QUARTER = 900.0


def cost(news: list[float], price: float, polls: list[int]) -> float:
    """What a plan costs that begins with a poll at 0, by the definition."""
    total = 0.0
    for sooner, later in pairwise([0, *polls]):
        total += price + sum(news[at] * (later - at - 0.5) for at in range(sooner, later))
    return total


def path(found: list[int]) -> list[int]:
    polls, at = [], 0
    while at < len(found):
        at = found[at]
        polls.append(at)
    return polls


@given(
    news=st.lists(st.floats(0, 3), min_size=1, max_size=40),
    price=st.floats(0.001, 50),
)
def test_no_plan_is_cheaper(news: list[float], price: float) -> None:
    """Against trying all."""

    @cache
    def least(at: int) -> float:
        if at == len(news):
            return 0.0
        return min(
            cost(news[at:], price, [later - at]) + least(later) for later in range(at + 1, len(news) + 1)
        )

    polls = path(best_next(news, price))

    assert polls[-1] == len(news)
    assert cost(news, price, polls) == pytest.approx(least(0), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("rate", [0.001, 0.02, 0.3])
def test_for_a_steady_rate_it_is_the_square_root_rule(rate: float) -> None:
    gaps = [later - sooner for sooner, later in pairwise(path(best_next([rate] * 2000, 1.0)))]

    best = math.sqrt(2 / rate)
    assert all(math.floor(best) - 1 <= gap <= math.ceil(best) + 1 for gap in gaps[:-3])


def test_somebody_is_polled_right_after_their_hour() -> None:
    """Once a day is dear here: so it is in the evening, when the day's news have come."""
    habits = someone(400)

    polls = next_polls(habits, Crowd(), 4.0, MONDAY + 9 * HOUR, QUARTER)

    first = (polls[0] - MONDAY) / HOUR
    assert 20 <= first <= 23, "their hour is 19 to 20"


def test_during_their_hour_they_are_polled_often() -> None:
    habits = someone(400)
    cheap = next_polls(habits, Crowd(), 0.02, MONDAY + 9 * HOUR, QUARTER)

    that_day = [(at - MONDAY) / HOUR for at in cheap if at < MONDAY + DAY]
    assert len([hour for hour in that_day if 18 <= hour <= 22]) >= len(that_day) / 2


@given(
    price=st.floats(1e-6, 1e4),
    start=st.floats(0, 7 * DAY),
    tick=st.sampled_from([1.0, 60.0, 700.0, 900.0, 1000.0, 5400.0]),
)
def test_polls_are_a_tick_apart_and_come_in_order(price: float, start: float, tick: float) -> None:
    polls = next_polls(someone(), Crowd(), price, MONDAY + start, tick)

    assert all(later - sooner >= tick - 1e-3 for sooner, later in pairwise([MONDAY + start, *polls]))


@given(low=st.floats(1e-3, 10), times=st.floats(1, 50))
def test_a_dearer_request_is_made_less_often(low: float, times: float) -> None:
    habits = someone()

    def each_day(price: float) -> float:
        polls = next_polls(habits, Crowd(), price, MONDAY, HOUR)
        return len(polls) / (polls[-1] - MONDAY)

    # The end of a plan is a poll whatever it is worth, and slots are finer for who is polled often.
    assert each_day(low * times) <= each_day(low) * 1.5


def test_where_there_is_enough_the_next_tick_is_best() -> None:
    assert next_polls(someone(), Crowd(), 0.0, MONDAY, QUARTER) == [MONDAY + QUARTER]


def test_whose_news_are_announced_is_looked_at_rarely_and_at_once_more_often_when_they_are_not() -> None:
    habits = someone()
    alone = next_polls(habits, Crowd(), 0.05, MONDAY, QUARTER)[0]
    for _ in range(30):
        habits.heard(1, announced=True)

    assert next_polls(habits, Crowd(), 0.0, MONDAY, QUARTER)[0] - MONDAY > DAY / 2
    assert next_polls(habits, Crowd(), 0.05, MONDAY, QUARTER, deaf=True)[0] == alone
    safe = next_polls(habits, Crowd(), 0.05, MONDAY, QUARTER)
    habits.heard(1, announced=False)
    doubtful = next_polls(habits, Crowd(), 0.05, MONDAY, QUARTER)
    assert len([at for at in doubtful if at < MONDAY + DAY]) > len([at for at in safe if at < MONDAY + DAY])


def test_who_never_has_news_is_polled_all_the_same() -> None:
    silent = Habits(MONDAY - 2000 * DAY, MONDAY)

    assert next_polls(silent, Crowd(0.6), 100.0, MONDAY, QUARTER)[0] <= MONDAY + 365 * DAY
