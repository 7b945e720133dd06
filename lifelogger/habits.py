"""When a person's news come: learned from the times of their own records, in constant space.

A connection remembers how many of its records ended in each hour of the person's day and on each weekday,
the older the less: half is forgotten in `HALF_LIFE_DAYS`. A first import brings years of such times at once,
so nobody has to be watched for weeks. What little is known of somebody is filled up with what is usual: the
crowd's rate and hours. Whose news webhooks announce need not be looked for; what polls find unannounced says
otherwise.

Instants are epoch seconds. docs/planning.md has the formulas.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

HALF_LIFE_DAYS = 90.0
MEMORY_DAYS = HALF_LIFE_DAYS / math.log(2)
"""How many days' worth of news are remembered in the end."""
RATE_WEIGHT = 1.0
"""How many records the crowd's rate is worth against a person's own."""
HOURS_WEIGHT = 0.5
WEEKDAYS_WEIGHT = 20.0
"""The same of the hours and the weekdays."""
ANY_HOUR = 0.01
"""The share of a person's news that may come at any hour, whatever their habits are: habits change."""
LEAST_KNOWN_DAYS = 7.0
"""Less than that is not taken for how somebody lives."""
UNANNOUNCED_WEIGHT = 0.5
"""How many unannounced news are thought possible before webhooks have shown that they work."""
DOUBT = 0.1
"""What is left of the trust in webhooks once a poll has found what none announced ..."""
TRUST = 0.5
"""... and of what polls found with each news that one announced: they may be new."""

HOUR, DAY = 3600.0, 86400.0
WEEK_HOURS = 168
_MONDAY = 4 * DAY  # the epoch was a Thursday
_PACKED = struct.Struct("<33e2Ih")
_VERSION = b"\x01"
_MOST = 60_000.0  # what half a precision holds


@dataclass(frozen=True, slots=True)
class Crowd:
    """What is usual among a provider's connections."""

    rate: float = 1.0
    """News a day."""
    hours: tuple[float, ...] = (1 / 24,) * 24
    """The share of each hour of a person's day."""


@dataclass(slots=True)
class Habits:
    """How many news came when, each counted the less the older it is."""

    since: float
    """From when on all news are known."""
    as_of: float
    """When the counts were last brought up to date."""
    offset_s: int = 0
    """The person's offset from UTC, as their newest record has it."""
    hours: list[float] = field(default_factory=lambda: [0.0] * 24)
    weekdays: list[float] = field(default_factory=lambda: [0.0] * 7)
    announced: float = 0.0
    """News that a webhook brought us to ..."""
    unannounced: float = 0.0
    """... and news that a poll found."""

    def learn(self, arrivals: Iterable[float], now: float) -> None:
        """Count news that came at these instants; those of the future count as of now."""
        if (
            abs(now - self.as_of) >= DAY
        ):  # not at each poll: what fades within minutes is lost in the rounding
            faded = _left(max(0.0, now - self.as_of))  # a clock that was set back makes nothing grow
            self.hours = [count * faded for count in self.hours]
            self.weekdays = [count * faded for count in self.weekdays]
            self.announced, self.unannounced = self.announced * faded, self.unannounced * faded
            self.as_of = now
        for each in arrivals:
            at = min(each, now)
            self.since = min(self.since, at)
            weight, local = _left(self.as_of - at), at + self.offset_s
            self.hours[int(local % DAY / HOUR)] += weight
            self.weekdays[int((local - _MONDAY) // DAY) % 7] += weight

    def heard(self, news: int, *, announced: bool) -> None:
        """Note whether a webhook told of so many news.

        A few that are announced make up for years without, and one that is missed for all of them.
        """
        if announced:
            self.announced += news
            self.unannounced *= TRUST**news
        elif news:
            self.unannounced += news
            self.announced *= DOUBT

    @property
    def silent(self) -> float:
        """The share of this person's news that no webhook announces: 1 until one did."""
        seen = self.announced + self.unannounced
        return (self.unannounced + UNANNOUNCED_WEIGHT) / (seen + UNANNOUNCED_WEIGHT)

    def rate(self, crowd: Crowd, now: float) -> float:
        """News a day."""
        days = max(LEAST_KNOWN_DAYS, (now - self.since) / DAY)
        seen = sum(self.hours) * _left(now - self.as_of)
        watched = MEMORY_DAYS * (1 - _left(days * DAY))
        return (seen + RATE_WEIGHT) / (watched + RATE_WEIGHT / crowd.rate)

    def day(self, crowd: Crowd) -> list[float]:
        """The share of each hour of the person's day: neighbours lend each other some, the crowd the rest."""
        smooth = spread(self.hours)
        total = sum(smooth) + HOURS_WEIGHT
        return [
            (1 - ANY_HOUR) * (mine + HOURS_WEIGHT * usual) / total + ANY_HOUR / 24
            for mine, usual in zip(smooth, crowd.hours, strict=True)
        ]

    def week(self) -> list[float]:
        """How many times the average comes on each weekday, Monday first."""
        total = sum(self.weekdays) + WEEKDAYS_WEIGHT
        return [(7 * count + WEEKDAYS_WEIGHT) / total for count in self.weekdays]

    def expected(self, crowd: Crowd, start: float, slot: float, number: int) -> list[float]:
        """How many news to expect in each of `number` slots of `slot` seconds from `start` on.

        A slot is a whole part of an hour, or whole hours.
        """
        day, week, rate = self.day(crowd), self.week(), self.rate(crowd, start)
        local = start + self.offset_s - _MONDAY
        if slot < HOUR:
            share = rate * slot / HOUR
            hours = (int((local + (at + 0.5) * slot) // HOUR) for at in range(number))
            return [share * week[hour // 24 % 7] * day[hour % 24] for hour in hours]
        first, wide = int(local // HOUR), round(slot / HOUR)
        hourly = [rate * week[hour // 24 % 7] * day[hour % 24] for hour in range(first, first + WEEK_HOURS)]
        hourly *= 2 + wide // WEEK_HOURS  # a slot may reach into the week after
        return [sum(hourly[at * wide % WEEK_HOURS : at * wide % WEEK_HOURS + wide]) for at in range(number)]

    def pack(self) -> bytes:
        """All of it in 77 bytes, for `unpack`."""
        counts = (*self.hours, *self.weekdays, self.announced, self.unannounced)
        instants = (min(max(0, int(at)), 2**32 - 1) for at in (self.since, self.as_of))
        return _VERSION + _PACKED.pack(
            *(min(count, _MOST) for count in counts), *instants, round(self.offset_s / 60)
        )

    @classmethod
    def unpack(cls, packed: bytes | None) -> Habits | None:
        """None of nothing, or of what another version wrote: it is learned anew."""
        if packed is None or packed[:1] != _VERSION or len(packed) != 1 + _PACKED.size:
            return None
        *counts, since, as_of, minutes = _PACKED.unpack(packed[1:])
        return cls(since, as_of, minutes * 60, counts[:24], counts[24:31], counts[31], counts[32])


def spread(hours: Sequence[float]) -> list[float]:
    """Counts by hour, each shared with the hours around it: the fewer there are, the further."""
    width = 1.5 * (1 + sum(hours)) ** -0.2
    shares = [math.exp(-0.5 * (away / width) ** 2) for away in range(-3, 4)]
    whole = sum(shares)
    return [
        sum(share * hours[(hour + away) % 24] for away, share in enumerate(shares, -3)) / whole
        for hour in range(24)
    ]


def _left(seconds: float) -> float:
    """What is left of a count after so long, or how much more it is worth beforehand."""
    return float(0.5 ** (seconds / DAY / HALF_LIFE_DAYS))
