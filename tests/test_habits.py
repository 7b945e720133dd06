"""What is learned of when a person's news come (promise 9: the most deserving first)."""

from __future__ import annotations

import random
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifelogger.habits import DAY, HALF_LIFE_DAYS, HOUR, Crowd, Habits, spread

MONDAY = datetime(2026, 11, 23, tzinfo=UTC).timestamp()
CROWD = Crowd(0.6, tuple(1.0 if hour == 19 else 0.0 for hour in range(24)))


def evenings(days: int, hour: float = 19.5) -> list[float]:
    """One a day at that hour, until `MONDAY`."""
    return [MONDAY - day * DAY + hour * HOUR for day in range(1, days + 1)]


def someone(days: int = 120) -> Habits:
    habits = Habits(MONDAY - days * DAY, MONDAY)
    habits.learn(evenings(days), MONDAY)
    return habits


def test_years_of_records_tell_a_rate_and_an_hour_at_once() -> None:
    habits = someone(400)

    assert habits.rate(CROWD, MONDAY) == pytest.approx(1, rel=0.05)
    day = habits.day(Crowd())
    assert day.index(max(day)) == 19
    assert sum(day[18:21]) > 0.9


def test_of_whom_nothing_is_known_the_crowd_tells() -> None:
    stranger = Habits(MONDAY - 7 * DAY, MONDAY)

    assert 0.05 < stranger.rate(CROWD, MONDAY) < 0.6, "a week without any news tells something"
    assert stranger.day(CROWD)[19] > 0.9
    assert stranger.week() == [1.0] * 7


def test_a_long_silence_lowers_the_rate() -> None:
    habits = someone()
    before = habits.rate(CROWD, MONDAY)

    assert habits.rate(CROWD, MONDAY + 90 * DAY) < before / 1.5


def test_new_habits_replace_old_ones() -> None:
    habits = someone(365)
    for day in range(1, 200):
        at = MONDAY + day * DAY + 7 * HOUR
        habits.learn([at], at + HOUR)

    day = habits.day(Crowd())
    assert sum(day[6:9]) > 3 * sum(day[18:21])


def test_hours_are_those_of_the_person() -> None:
    habits = Habits(MONDAY, MONDAY, offset_s=int(-8 * HOUR))
    habits.learn([MONDAY + 3 * HOUR], MONDAY + 4 * HOUR)  # still Sunday there, 19:00

    assert (habits.hours[19], habits.weekdays[6]) == (pytest.approx(1, rel=0.01), pytest.approx(1, rel=0.01))
    in_utc = habits.expected(Crowd(), MONDAY, HOUR, 24)
    assert in_utc.index(max(in_utc)) == 3


def test_weekdays_are_told_apart() -> None:
    habits = Habits(MONDAY - 350 * DAY, MONDAY)
    habits.learn([MONDAY - (7 * week + 1) * DAY + 10 * HOUR for week in range(50)], MONDAY)

    week = habits.week()
    assert week.index(max(week)) == 6
    assert week[6] > 3 * week[0]


def test_webhooks_that_work_leave_little_to_be_found_and_one_that_is_missed_puts_them_in_doubt() -> None:
    habits = someone()
    assert habits.silent == 1
    for _ in range(20):
        habits.heard(1, announced=True)
    assert habits.silent < 0.05

    habits.heard(0, announced=False)
    assert habits.silent < 0.05, "a poll that finds nothing agrees with them"
    habits.heard(1, announced=False)
    assert habits.silent > 0.2


def test_webhooks_that_were_just_switched_on_are_trusted_after_some_news() -> None:
    habits = someone()
    habits.heard(500, announced=False)
    assert habits.silent == 1

    for _ in range(10):
        habits.heard(1, announced=True)

    assert habits.silent < 0.1


@given(
    arrivals=st.lists(st.floats(-3000 * DAY, 3 * DAY), max_size=60),
    offset=st.integers(-14 * 60, 14 * 60),
    slot=st.sampled_from([300.0, 900.0, 1800.0, HOUR, 3 * HOUR, 200 * HOUR]),
    number=st.integers(1, 300),
)
def test_whatever_is_learned_expects_so_much_in_each_span_and_packs_small(
    arrivals: list[float], offset: int, slot: float, number: int
) -> None:
    habits = Habits(MONDAY - 7 * DAY, MONDAY, offset * 60)
    habits.learn([MONDAY + at for at in arrivals], MONDAY)
    packed = habits.pack()
    again = Habits.unpack(packed)

    assert again is not None
    assert len(packed) <= 80
    assert again.hours == pytest.approx(habits.hours, rel=0.002, abs=0.001)
    assert again.offset_s == habits.offset_s
    news = habits.expected(CROWD, MONDAY, slot, number)
    assert len(news) == number
    assert all(each > 0 for each in news), "nobody is ever given up"
    week = sum(habits.expected(CROWD, MONDAY, HOUR, 168))
    assert week == pytest.approx(7 * habits.rate(CROWD, MONDAY))


def test_finer_slots_expect_the_same_together() -> None:
    habits = someone()

    coarse = habits.expected(CROWD, MONDAY, 2 * HOUR, 200)
    fine = habits.expected(CROWD, MONDAY, 900.0, 1600)

    assert [sum(fine[at : at + 8]) for at in range(0, 1600, 8)] == pytest.approx(coarse)


def test_in_between_it_is_forgotten_by_halves() -> None:
    habits = someone()
    seen = sum(habits.hours)

    habits.learn([], MONDAY + HALF_LIFE_DAYS * DAY)

    assert sum(habits.hours) == pytest.approx(seen / 2)


def test_a_poll_each_quarter_of_an_hour_does_not_keep_it_from_fading() -> None:
    """It is packed after each, and rounded."""
    habits = someone()
    seen = sum(habits.hours)

    for poll in range(1, round(HALF_LIFE_DAYS) * 96 + 1):
        found = Habits.unpack(habits.pack())
        assert found is not None
        habits = found
        habits.learn([], MONDAY + poll * 900)

    assert sum(habits.hours) == pytest.approx(seen / 2, rel=0.03)


@pytest.mark.parametrize("packed", [None, b"", b"\x00" * 77, b"\x01short"])
def test_what_it_cannot_read_is_learned_anew(packed: bytes | None) -> None:
    assert Habits.unpack(packed) is None


@given(st.lists(st.floats(0, 1000), min_size=24, max_size=24))
def test_spreading_loses_nothing(hours: list[float]) -> None:
    assert sum(spread(hours)) == pytest.approx(sum(hours))


def test_a_clock_that_was_set_back_does_no_harm() -> None:
    habits = someone()
    seen = sum(habits.hours)

    habits.learn([MONDAY + random.random()], MONDAY - 5 * DAY)

    assert sum(habits.hours) == pytest.approx(seen + 1)
    assert habits.as_of == MONDAY - 5 * DAY
