"""What a body does every day, whoever measures it: nights, steps, the heart, the scale.

Computed from the seed and the calendar like people's activities, and nothing is stored: a given day of
a person is the same whenever it is looked at. It knows no provider.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from random import Random
from typing import NamedTuple
from zoneinfo import ZoneInfo

from lifelogger.sandbox.people import Person

HOUR = 3600
STAGES = ("light", "deep", "light", "rem", "awake")
"""A cycle of sleep, again and again; each stage is of one of these four kinds."""


class Stage(NamedTuple):
    """A part of a night, in epoch seconds."""

    kind: str
    """`light`, `deep`, `rem` or `awake`."""
    start: int
    end: int


class Sleep(NamedTuple):
    """A night or a nap, in epoch seconds."""

    date: date
    """The civil day of waking up."""
    start: int
    end: int
    stages: tuple[Stage, ...]
    nap: bool

    def seconds(self, *kinds: str) -> int:
        """How long it was of these kinds of stage."""
        return sum(stage.end - stage.start for stage in self.stages if stage.kind in kinds)


class Beat(NamedTuple):
    """How fast the heart beats at a moment."""

    moment: int
    """Epoch seconds."""
    at: datetime
    """The same, where the person lives."""
    rate: int
    """Beats a minute."""
    asleep: bool


class Day(NamedTuple):
    """A civil day of a person, as far as it went."""

    date: date
    steps: int
    metres: float
    calories: float
    """All energy spent, in kilocalories."""
    active_calories: float
    pulse: float
    lowest_pulse: int
    highest_pulse: int
    resting_pulse: int
    variability: float
    """Of the heart, at night: RMSSD in milliseconds."""
    oxygen: float
    """Average saturation at night, in per cent."""
    breaths: float
    """A minute, at night."""
    weight: float | None
    """In kilograms, in the morning; None on a day without the scale."""
    weighed: int
    """When, in epoch seconds."""


def sleeps(seed: int, person: Person, first: date, last: date, now: float) -> Iterator[Sleep]:
    """What a person slept and had synced by `now`, by the civil day of waking, oldest first."""
    for day in dates(person, first, last, now):
        found = [night(seed, person, day)]
        chance = Random(f"{seed}/nap/{person.index}/{day}")
        if chance.random() < 0.12:
            begun = local(person, day, 13) + chance.randint(0, HOUR)
            ended = begun + chance.randint(15, 70) * 60
            found.append(Sleep(day, begun, ended, (Stage("light", begun, ended),), nap=True))
        yield from (sleep for sleep in found if sleep.end + 600 <= now and sleep.start >= person.joined)


@lru_cache(4096)  # each list of it, of sleep or of what is judged by it, computes the same nights again
def night(seed: int, person: Person, day: date) -> Sleep:
    """The night before a day: some go to bed after midnight, and no night overlaps another."""
    chance = Random(f"{seed}/night/{person.index}/{day}")
    begun = local(person, day, 0) + int(chance.gauss(-0.7, 0.7) * 60) * 60
    moment, stages = begun, list[Stage]()
    for turn in range(chance.randint(18, 26)):
        kind = STAGES[turn % len(STAGES)]
        end = moment + (chance.randint(1, 9) if kind == "awake" else chance.randint(12, 34)) * 60
        stages.append(Stage(kind, moment, end))
        moment = end
    return Sleep(day, begun, moment, tuple(stages), nap=False)


def days(seed: int, person: Person, first: date, last: date, now: float) -> Iterator[Day]:
    """The civil days of a person that have begun by `now`, oldest first. Today grows by the hour."""
    for day in dates(person, first, last, now):
        chance = Random(f"{seed}/day/{person.index}/{day}")
        midnight = local(person, day, 0)
        share = min(1.0, (now - midnight) // HOUR / 24)
        steps, metabolism = chance.randint(2500, 16000), person.weight * 24
        resting = person.resting_pulse + chance.randint(-3, 3)
        weighed = midnight + 7 * HOUR + chance.randint(0, HOUR)
        weight = round(person.weight + chance.gauss(0, 0.6), 1) if chance.random() < 0.4 else None
        yield Day(
            date=day,
            steps=int(steps * share),
            metres=round(int(steps * share) * 0.74, 3),
            calories=round((metabolism + steps * 0.045) * share, 2),
            active_calories=round(steps * 0.045 * share, 2),
            pulse=round(resting + 14 + chance.uniform(-3, 3), 1),
            lowest_pulse=resting - chance.randint(2, 6),
            highest_pulse=resting + chance.randint(50, 110),
            resting_pulse=resting,
            variability=round(chance.uniform(22, 80), 1),
            oxygen=round(chance.uniform(93.5, 98.5), 1),
            breaths=round(chance.uniform(12, 18), 1),
            weight=weight if weighed <= now else None,
            weighed=weighed,
        )


def beats(person: Person, first: date, last: date, now: float) -> Iterator[Beat]:
    """The heart each five minutes that something was worn, on some days (UTC), as far as it was synced: to
    the full hour."""
    begin = max(midnight(first), -(-person.joined // 300) * 300)
    end = min(midnight(last + timedelta(days=1)), int(now // HOUR * HOUR))
    zone = ZoneInfo(person.timezone)
    for moment in range(begin, end, 300):
        if moment // 300 % 17:
            at = datetime.fromtimestamp(moment, zone)
            asleep = at.hour < 6
            rate = person.resting_pulse + moment // 300 * 7919 % (9 if asleep else 60)
            yield Beat(moment, at, rate, asleep)


def dates(person: Person, first: date, last: date, now: float) -> Iterator[date]:
    """The civil days from `first` to `last` on which a person recorded something by `now`."""
    zone = ZoneInfo(person.timezone)
    day = max(first, datetime.fromtimestamp(person.joined, zone).date() + timedelta(days=1))
    end = min(last, datetime.fromtimestamp(now, zone).date())
    while day <= end:
        yield day
        day += timedelta(days=1)


def local(person: Person, day: date, hour: int) -> int:
    """The epoch second of an hour of a civil day, where the person lives."""
    return int(datetime.combine(day, time(hour), ZoneInfo(person.timezone)).timestamp())


def midnight(day: date) -> int:
    """The epoch second in which a day begins in UTC."""
    return int(datetime.combine(day, time(), UTC).timestamp())
