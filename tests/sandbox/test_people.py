"""Simulated lives: the same for the same seed, spread over the world and the week."""

from __future__ import annotations

from datetime import datetime
from statistics import mean
from zoneinfo import ZoneInfo

import pytest

from lifelogger.sandbox.people import People
from tests.sandbox.conftest import NOW

DAY = 86_400


def lives(people: People) -> list[list[tuple[object, ...]]]:
    return [[tuple(one) for one in people.activities(person, NOW)] for person in people.all]


def test_the_same_seed_gives_the_same_lives() -> None:
    first, second, other = (People(seed, 4, 200, NOW) for seed in (1, 1, 2))

    assert first.all == second.all
    assert lives(first) == lives(second)
    assert lives(first) != lives(other)
    assert [person.user_id for person in other.all] == [person.user_id for person in first.all]


def test_a_day_is_the_same_whenever_it_is_looked_at() -> None:
    at_once = People(1, 1, 400, NOW)
    little_by_little = People(1, 1, 400, NOW)
    alice = at_once.all[0]
    for day in range(-30, 60):
        little_by_little.activities(alice, NOW + day * DAY)

    assert little_by_little.activities(alice, NOW + 60 * DAY) == at_once.activities(alice, NOW + 60 * DAY)


def test_people_live_all_over_the_world() -> None:
    people = People(1, 36, 30, NOW).all
    moment = datetime.fromtimestamp(NOW, ZoneInfo("UTC"))
    offsets = [moment.astimezone(ZoneInfo(person.timezone)).utcoffset() for person in people]
    hours = [offset.total_seconds() / 3600 for offset in offsets if offset is not None]

    assert (min(hours), max(hours)) == (-11, 14)
    assert len(set(hours)) > 15
    assert any(hour % 1 for hour in hours)
    assert len({person.user_id for person in People(1, 200, 30, NOW).all}) == 200


def test_activities_are_plausible() -> None:
    people = People(3, 60, 365, NOW)
    rates = []
    for person in people.all:
        done = [one for one in people.activities(person, NOW) if one.start < NOW]
        rates.append(len(done) / ((NOW - person.joined) / DAY))
        assert list(done) == sorted(done, key=lambda one: (one.start, one.key))
        assert all(one.uploaded > one.start + one.elapsed for one in done)
        assert all(one.uploaded - one.start < 8 * DAY for one in done)
        assert all(people.owner(one.key) == person for one in done)
    assert 0.4 < mean(rates) < 1.0
    late = [one for person in people.all for one in people.activities(person, NOW)]
    assert 0.05 < mean(one.uploaded - one.start - one.elapsed > 3600 for one in late) < 0.25


@pytest.mark.parametrize(("number", "days"), [(0, 30), (10**6, 30), (1, 0)])
def test_impossible_worlds_are_refused(number: int, days: int) -> None:
    with pytest.raises(ValueError, match="between"):
        People(1, number, days, NOW)
