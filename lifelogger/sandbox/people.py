"""Simulated lives: who there is, where they live, and what they did when.

Everything is computed from the seed and the calendar, nothing is stored: the same seed gives the same
people, and a given day of theirs is the same whenever it is looked at. It knows no provider.
"""

from __future__ import annotations

import calendar
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random
from typing import NamedTuple, Protocol
from zoneinfo import ZoneInfo

NAMES = (
    "Alice Abel, Bruno Castillo, Chiyo Tanaka, Devi Iyer, Ewa Nowak, Finn Moana, Gita Thapa, "
    "Hugo Laurent, Ines Duarte, Jonas Berg, Kala Naone, Luis Rojas, Mina Karimi, Noah Wilson, "
    "Olga Petrova, Paul Dubois, Qiang Li, Rosa Ferreira, Sami Haddad, Tala Leota, Uma Reddy, "
    "Vera Conti, Wilma Lind, Xenia Pappas, Yara Costa, Zoe Martin, Amara Okafor, Boris Ilic, "
    "Clara Jensen, Dario Greco, Elif Kaya, Farid Rahimi, Greta Vogel, Hana Kim, Ivan Horvat, "
    "Julia Santos"
)
"""First and last names; the first, in lower case, is the `user_id`."""

HOMES = (
    ("Europe/Berlin", "Berlin", "Germany", 52.52, 13.40),
    ("America/Los_Angeles", "San Francisco", "United States", 37.77, -122.42),
    ("Asia/Tokyo", "Tokyo", "Japan", 35.68, 139.69),
    ("Asia/Kolkata", "Pune", "India", 18.52, 73.86),
    ("America/New_York", "Boston", "United States", 42.36, -71.06),
    ("Pacific/Auckland", "Auckland", "New Zealand", -36.85, 174.76),
    ("Asia/Kathmandu", "Kathmandu", "Nepal", 27.72, 85.32),
    ("Europe/Paris", "Lyon", "France", 45.76, 4.84),
    ("Europe/Lisbon", "Porto", "Portugal", 41.15, -8.61),
    ("Europe/London", "Leeds", "United Kingdom", 53.80, -1.55),
    ("Pacific/Honolulu", "Honolulu", "United States", 21.31, -157.86),
    ("America/Santiago", "Santiago", "Chile", -33.45, -70.67),
    ("Asia/Tehran", "Tehran", "Iran", 35.69, 51.39),
    ("Australia/Adelaide", "Adelaide", "Australia", -34.93, 138.60),
    ("Asia/Yekaterinburg", "Yekaterinburg", "Russia", 56.84, 60.61),
    ("America/St_Johns", "St. John's", "Canada", 47.56, -52.71),
    ("Asia/Shanghai", "Shanghai", "China", 31.23, 121.47),
    ("America/Sao_Paulo", "São Paulo", "Brazil", -23.55, -46.63),
    ("Asia/Beirut", "Beirut", "Lebanon", 33.89, 35.50),
    ("Pacific/Pago_Pago", "Pago Pago", "American Samoa", -14.28, -170.70),
    ("Pacific/Kiritimati", "London", "Kiribati", 1.98, -157.47),
    ("Pacific/Chatham", "Waitangi", "New Zealand", -43.95, -176.56),
    ("America/Anchorage", "Anchorage", "United States", 61.22, -149.90),
    ("Atlantic/Azores", "Ponta Delgada", "Portugal", 37.74, -25.67),
    ("Australia/Lord_Howe", "Lord Howe Island", "Australia", -31.56, 159.08),
    ("Africa/Lagos", "Lagos", "Nigeria", 6.52, 3.38),
    ("America/Denver", "Boulder", "United States", 40.01, -105.27),
    ("Asia/Seoul", "Seoul", "South Korea", 37.57, 126.98),
)
"""Zone, city, country, latitude and longitude; from UTC-11 to UTC+14, with and without summer time."""


class Sport(NamedTuple):
    """What is typical of a sport."""

    speed: float
    """Metres a second while moving; 0 when no distance is covered."""
    minutes: float
    climb: float
    """Metres of ascent per kilometre."""
    indoor: bool = False
    pedals: bool = False
    """A bicycle: its work is measured, in kilojoules."""
    likelihood: float = 1.0
    """How likely somebody does this at all, compared with other sports."""


SPORTS = {
    "Run": Sport(2.9, 42, 8, likelihood=5),
    "Ride": Sport(7.2, 80, 10, pedals=True, likelihood=4),
    "Walk": Sport(1.4, 45, 5, likelihood=3),
    "VirtualRide": Sport(8.5, 50, 12, indoor=True, pedals=True, likelihood=1.5),
    "WeightTraining": Sport(0, 50, 0, indoor=True, likelihood=2),
    "Swim": Sport(0.8, 38, 0, likelihood=1.5),
    "Hike": Sport(1.1, 150, 35, likelihood=1.5),
    "TrailRun": Sport(2.4, 65, 30, likelihood=1),
    "GravelRide": Sport(6.2, 95, 14, pedals=True, likelihood=1),
    "MountainBikeRide": Sport(4.6, 85, 25, pedals=True, likelihood=1),
    "Yoga": Sport(0, 40, 0, indoor=True, likelihood=1.5),
    "Workout": Sport(0, 35, 0, indoor=True, likelihood=1),
    "Rowing": Sport(2.6, 40, 0, likelihood=0.5),
    "NordicSki": Sport(3.6, 75, 20, likelihood=0.5),
}

DAY = 86_400
USUAL_RATE = 0.6
"""Activities a day of the person in the middle."""
FIRST_ADDED_KEY = 5_000_000_000_000
"""Keys from here on belong to activities that were added by hand, smaller ones to seeded ones."""
MOST_PEOPLE = 100_000
MOST_IN_A_MONTH = 1_000


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody who wears something. `user_id` is how the application knows them."""

    index: int
    user_id: str
    first_name: str
    last_name: str
    sex: str
    home: tuple[str, str, str, float, float]
    joined: int
    """When they began to record, in epoch seconds."""
    rates: tuple[float, ...]
    """Activities a day, for Monday to Sunday."""
    hours: tuple[float, ...]
    """The local hours they like to start at."""
    sports: tuple[str, ...]
    """What they do, the favourite several times."""
    weight: float
    """In kilograms."""
    resting_pulse: int
    wears_a_strap: float
    """Share of activities with a heart rate."""
    late: float
    """Share of activities uploaded hours or days late."""
    shy: float
    """Share of activities that nobody else may see."""

    @property
    def timezone(self) -> str:
        return self.home[0]

    @property
    def name(self) -> str:
        return f"{self.first_name} {self.last_name}"


class Activity(NamedTuple):
    """Something a person did, in no provider's words. Times are epoch seconds."""

    key: int
    """Unique over all people."""
    owner: int
    """The index of the person."""
    start: int
    elapsed: int
    sport: str
    uploaded: float
    """From when on it can be seen."""
    private: bool


class Measures(NamedTuple):
    """What the devices measured of an activity. None: not measured."""

    moving: int
    distance: float
    climb: float
    manual: bool
    """Typed in by hand: no device, no track."""
    top_speed: float
    pulse: float | None
    top_pulse: int | None
    watts: float | None
    cadence: float | None
    calories: float
    words: Random
    """Further chance, for what only one provider tells."""


class Life(Protocol):
    """What one person does."""

    def until(self, moment: float) -> Sequence[Activity]:
        """All of it up to a moment and some days beyond, by start and key; uploaded by then or not."""


class People:
    """All people of a seed.

    `origin` is the moment (epoch seconds) the world was made: people joined up to `history_days` before it.
    """

    def __init__(self, seed: int, number: int, history_days: int, origin: float) -> None:
        if not 1 <= number <= MOST_PEOPLE:
            raise ValueError(f"people: {number} is not between 1 and {MOST_PEOPLE}")
        if not 1 <= history_days <= 20_000:
            raise ValueError(f"history days: {history_days} is not between 1 and 20000")
        self.seed = seed
        self.history_days = history_days
        self.origin = origin
        self.all = [self._person(index) for index in range(number)]
        self.by_id = {person.user_id: person for person in self.all}
        self._lives: dict[int, Life] = {}

    def activities(self, person: Person, until: float) -> Sequence[Activity]:
        """All that a person does up to a moment and some days beyond, by start; uploaded by then or not."""
        life = self._lives.get(person.index)
        if life is None:
            life = self._lives[person.index] = _Seeded(self.seed, person)
        return life.until(until)

    def lead(self, person: Person, life: Life) -> None:
        """Have a person lead this life instead of the seed's. Its keys are from `FIRST_ADDED_KEY` on.

        Before anybody asks for it: what was shown already stays so for a while.
        """
        self._lives[person.index] = life

    def owner(self, key: int) -> Person | None:
        """Whose activity a seeded key is, if it is one at all."""
        index = key // MOST_IN_A_MONTH % MOST_PEOPLE
        return self.all[index] if 0 < key < FIRST_ADDED_KEY and index < len(self.all) else None

    def measures(self, activity: Activity) -> Measures:
        return measures(self.seed, self.all[activity.owner], activity)

    def _person(self, index: int) -> Person:
        chance = Random(f"{self.seed}/person/{index}")
        names = NAMES.split(", ")
        first, last = names[index % len(names)].split()
        again = f"{index // len(names) + 1}" if index >= len(names) else ""
        habit = chance.lognormvariate(math.log(USUAL_RATE), 0.6)
        week = [chance.uniform(0.4, 1.0) for _ in range(5)] + [chance.uniform(0.8, 2.0) for _ in range(2)]
        favourites = chance.choices(
            list(SPORTS), [sport.likelihood for sport in SPORTS.values()], k=chance.randint(2, 5)
        )
        return Person(
            index=index,
            user_id=f"{first.lower()}{again}",
            first_name=first,
            last_name=f"{last} {again}".strip(),
            sex=chance.choice("FM"),
            home=HOMES[index % len(HOMES)],
            joined=int(self.origin - self.history_days * DAY * (1 if index == 0 else chance.uniform(0.3, 1))),
            rates=tuple(min(habit, 6) * share * 7 / sum(week) for share in week),
            hours=tuple(chance.choice((6, 7, 8, 12, 16, 17, 18, 19)) for _ in range(chance.randint(1, 3))),
            sports=(*favourites, favourites[0], favourites[0]),
            weight=round(chance.gauss(71, 11), 1),
            resting_pulse=chance.randint(46, 68),
            wears_a_strap=chance.choice((0.0, 0.6, 0.95, 0.95, 1.0)),
            late=chance.uniform(0.05, 0.2),
            shy=chance.choice((0.0, 0.03, 0.1)),
        )


class _Seeded:
    """What the seed has one person do, computed month by month as far as somebody asked."""

    def __init__(self, seed: int, person: Person) -> None:
        self.seed = seed
        self.person = person
        self.zone = ZoneInfo(person.timezone)
        self.limits = [math.exp(-rate) for rate in person.rates]
        self.next_month = month_of(person.joined - 2 * DAY)
        self.done: list[Activity] = []

    def until(self, moment: float) -> list[Activity]:
        last = month_of(moment + 3 * DAY)
        if self.next_month <= last:
            while self.next_month <= last:
                self.done += self._month(self.next_month)
                self.next_month += 1
            self.done.sort(key=lambda activity: (activity.start, activity.key))
        return self.done

    def _month(self, month: int) -> list[Activity]:
        person = self.person
        done: list[Activity] = []
        chance = Random(f"{self.seed}/month/{person.index}/{month}")
        year, month_index = divmod(month, 12)
        weekday, days = calendar.monthrange(year, month_index + 1)
        free_from = 0
        for day in range(1, days + 1):
            number, product = -1, 1.0  # a Poisson number, by Knuth
            while product > self.limits[weekday]:
                product *= chance.random()
                number += 1
            weekday = (weekday + 1) % 7
            if not number:
                continue
            midnight = int(datetime(year, month_index + 1, day, tzinfo=self.zone).timestamp())
            for _ in range(number):
                sport = chance.choice(person.sports)
                hour = min(max(chance.choice(person.hours) + chance.gauss(0, 0.8), 0.1), 23.5)
                elapsed = max(240, int(SPORTS[sport].minutes * 60 * chance.lognormvariate(0, 0.35)))
                begun = max(midnight + int(hour * 3600), free_from)
                free_from = begun + elapsed + 300
                uploaded = begun + elapsed + self._delay(chance)
                private, hidden = chance.random() < person.shy, chance.random() < 0.01
                if begun >= person.joined and len(done) < MOST_IN_A_MONTH:
                    key = (month * MOST_PEOPLE + person.index) * MOST_IN_A_MONTH + len(done)
                    # Who hides the time of the start shows one second after the local midnight.
                    start = midnight + 1 if hidden else begun
                    done.append(Activity(key, person.index, start, elapsed, sport, uploaded, private))
        return done

    def _delay(self, chance: Random) -> int:
        """Seconds from the end of an activity to its upload."""
        if chance.random() >= self.person.late:
            return chance.randint(15, 900)
        return chance.randint(3600, 14 * 3600) if chance.random() < 0.7 else chance.randint(DAY, 5 * DAY)


def month_of(moment: float) -> int:
    """The calendar month (UTC) of an epoch time, counted from the year 0."""
    day = datetime.fromtimestamp(moment, UTC)
    return day.year * 12 + day.month - 1


def measures(seed: int, person: Person, activity: Activity) -> Measures:
    """What was measured of an activity; the same each time it is asked."""
    chance = Random(f"{seed}/measures/{activity.key}")
    sport = SPORTS.get(activity.sport, Sport(0, 40, 0))
    manual = chance.random() < 0.03
    moving = max(1, int(activity.elapsed * chance.uniform(0.86, 1.0)))
    speed = sport.speed * chance.uniform(0.85, 1.15)
    distance = round(moving * speed, 1)
    climb = 0.0 if manual else round(distance / 1000 * sport.climb * chance.uniform(0.3, 1.7), 1)
    effort = chance.uniform(0.45, 0.8)
    strap = chance.random() < person.wears_a_strap and not manual
    pulse = round(person.resting_pulse + effort * 130, 1) if strap else None
    return Measures(
        moving=moving,
        distance=distance,
        climb=climb,
        manual=manual,
        top_speed=0.0 if manual else round(speed * chance.uniform(1.2, 1.9), 3),
        pulse=pulse,
        top_pulse=None if pulse is None else int(pulse + chance.uniform(8, 30)),
        watts=round(person.weight * effort * 3.6, 1) if sport.pedals and not manual else None,
        cadence=round(chance.uniform(72, 92), 1)
        if (sport.pedals or sport.speed > 2.2) and not manual
        else None,
        calories=round(person.weight * moving / 3600 * effort * 13, 1),
        words=chance,
    )
