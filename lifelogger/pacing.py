"""How an application's requests are spent over a day: at one price, found on a sample of its connections.

Everybody's polls are planned at the same price (`lifelogger.timing`), so the price decides how many requests
a day they come to. Once an hour a tick asks a sample of connections how many polls they are worth at the
price in force, by hour of the day, and moves it towards the one at which they want what the windows offer. So
its cost does not grow with the number of connections, and nothing but a row for each application is kept.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection as Database
from sqlalchemy import func, literal, select, update

from lifelogger import recheck
from lifelogger.budget import Window
from lifelogger.habits import DAY, HOUR, LEAST_KNOWN_DAYS, Crowd, Habits, spread
from lifelogger.runtime import Runtime
from lifelogger.settings import MAIN, path_of
from lifelogger.store.models import Connection
from lifelogger.store.models import Pace as Stored
from lifelogger.timing import next_polls

log = logging.getLogger(__name__)

PRICED_EVERY = timedelta(hours=1)
SAMPLE = 100
"""Connections that are asked each time."""
LOOKED_AT = 500
"""Numbers of connections that are drawn at a time: not all of them are this application's ..."""
MOST_DRAWS = 20
"""... and so often at most, until enough of them are."""
AFRESH = 2.0
"""Wanting so many times more or less than is offered has the price found anew, not moved."""
STIFFNESS = 0.3
"""How far the price follows one sample: what is wanted falls with its square root."""
REMEMBERED = 0.95
"""How much of the day's curve each hour keeps."""
DAYS_A_ROUND = 2.0
"""Nobody is left unpolled longer than this many times what a poll of each in turn takes, or the setting."""
SURELY = 0.9
"""Of that time a poll is planned so early: its tick may come late, and be full."""
LATE_SHARE = 0.3
"""The part of a day's requests that goes to news which the day before put off. With all of it, where there is
more news than requests, each day begins with the rest of the last and is spent ever sooner, until nothing is
there within seconds. Whoever waits longer is met with their next news."""
LONGEST_PUT_OFF = timedelta(days=7)
ABOUT = timedelta(minutes=30)
LEAST_OFFERED = 0.1
"""The share of what there is that polls are offered, however many news webhooks announce."""
DEAF = 1e-4
"""How unlikely it must be that no webhook came, for us to believe that they have stopped."""


@dataclass(frozen=True, slots=True)
class Pace:
    """The columns of `store.models.Pace`, but for whose it is; the defaults hold until it is priced."""

    price: float = 0.0
    rate: float = 1.0
    hours: list[float] | None = None
    curve: list[float] | None = None
    wanted: float = 0.0
    offered: float = 0.0
    longest_s: float = 0.0
    priced_at: datetime | None = None
    heard_at: datetime | None = None
    deaf: bool = False
    connections: float = 0.0
    recheck_s: float | None = None
    recheck_at: datetime | None = None

    @property
    def crowd(self) -> Crowd:
        return Crowd(self.rate, tuple(self.hours)) if self.hours else Crowd(self.rate)

    @property
    def scarce(self) -> bool:
        """Whether there are fewer requests than everybody could use."""
        return self.price > 0

    def share(self, now: datetime) -> float:
        """The share of a UTC day's polls that belongs before this instant."""
        passed = (now - now.replace(hour=0, minute=0, second=0, microsecond=0)) / timedelta(hours=1)
        if not self.curve or sum(self.curve) <= 0:
            return passed / 24
        whole, hour = int(passed), min(23, int(passed))
        return (sum(self.curve[:whole]) + self.curve[hour] * (passed - whole)) / sum(self.curve)


COLUMNS = tuple(getattr(Stored, each.name) for each in fields(Pace))


def of(row: Any) -> Pace:
    """The pace in a row that has its columns; all of them are null where there is none."""
    return (
        Pace(**{each.name: getattr(row, each.name) for each in fields(Pace)})
        if row and row.price is not None
        else Pace()
    )


def read(db: Database, provider: str, application: str = MAIN) -> Pace:
    """How an application's requests are spent now."""
    mine = (Stored.provider == provider, Stored.application == application)
    return of(db.execute(select(*COLUMNS).where(*mine)).first())


def next_poll(
    pace: Pace, habits: Habits | None, start: datetime, interval: timedelta, now: datetime | None = None
) -> datetime:
    """When a connection that was read at `start` is best read again; never before one interval has passed.

    A little before the interval ends: the tick that meets it comes on the minute.
    """
    soonest = start + interval * 0.9
    if habits is None:
        habits = unknown(start)
    tick = interval.total_seconds()
    first = next_polls(habits, pace.crowd, pace.price, start.timestamp(), tick, deaf=pace.deaf)[0]
    due = datetime.fromtimestamp(first, UTC) - interval * 0.1
    if pace.longest_s:
        due = min(due, start + timedelta(seconds=pace.longest_s * SURELY))
    return max(soonest, due)


def unknown(now: datetime) -> Habits:
    """The habits of somebody of whom nothing is known."""
    at = now.timestamp()
    return Habits(at - LEAST_KNOWN_DAYS * DAY, at)


def heard(db: Database, provider: str, now: datetime, application: str = MAIN) -> None:
    """Note that a webhook has brought us to news: once a minute is enough."""
    db.execute(
        update(Stored)
        .where(
            Stored.provider == provider,
            Stored.application == application,
            func.coalesce(Stored.heard_at, _LONG_AGO) < now - timedelta(minutes=1),
        )
        .values(heard_at=now, deaf=False)
    )


_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


# The price -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """Some connections of an application, and how many there are for each of them."""

    connections: list[tuple[Habits, datetime | None]]
    """What is known of each, and when it is due; None: it is not polled."""
    each: float
    recheck_s: float | None = None
    """How long their rounds over what is older than the look-back take."""

    @property
    def number(self) -> float:
        return self.each * len(self.connections)


def offer(windows: Sequence[Window]) -> float:
    """Requests a day that polls may spend: what the narrowest window leaves when others took their share."""
    spare = ((window.limit - window.reserve) * DAY / window.seconds for window in windows)
    return max(1.0, min(spare, default=math.inf))


def price(
    rt: Runtime, provider: str, windows: Sequence[Window], now: datetime, application: str = MAIN
) -> Pace:
    """The pace in force, priced anew if its hour is over."""
    with rt.store.read() as db:
        pace = read(db, provider, application)
        if pace.priced_at is not None and now - pace.priced_at < PRICED_EVERY:
            return pace
        sample = drawn(db, provider, now, application, timedelta(days=rt.settings.sync.lookback_days))
        if put_off(db, provider, application):  # webhooks come: what is missing is requests
            pace = replace(pace, heard_at=now)
    mine = rt.application(provider, application)
    cost = max(1, mine.provider.poll_cost(mine.settings))
    pace = priced(pace, sample, offer(windows), cost, interval(rt), rt.settings.sync.longest_days, now)
    theirs = ("heard_at", "recheck_at")  # written by syncs
    values = {key: each for key, each in asdict(pace).items() if key not in theirs}
    row = {"provider": provider, "application": application, **values}
    statement = rt.store.insert(Stored.__table__).values(row)
    with rt.store.write() as db:
        db.execute(statement.on_conflict_do_update(index_elements=["provider", "application"], set_=values))
    return pace


def interval(rt: Runtime) -> timedelta:
    return timedelta(seconds=rt.settings.sync.interval_seconds)


def drawn(
    db: Database,
    provider: str,
    now: datetime,
    application: str = MAIN,
    lookback: timedelta = timedelta(0),
) -> Sample:
    """A sample by number of the row, so that it costs the same of a thousand and of a million.

    Of few all are known: among very many others hardly one would be drawn.
    """
    mine = (
        Connection.provider == provider,
        Connection.application == application,
        # Written out: a parameter does not tell a database that its partial index fits.
        Connection.status == literal("active", literal_execute=True),
    )
    first = select(Connection.id).where(*mine).order_by(Connection.token_expires_at)  # as an index has them
    few = db.scalars(first.limit(LOOKED_AT)).all()
    if not few:
        return Sample([], 1)
    dice = random.Random(f"{path_of(provider, application)} {now.isoformat()}")
    among = few
    if len(few) == LOOKED_AT:
        low, high = db.execute(select(func.min(Connection.id), func.max(Connection.id))).one()
        among = range(low, high + 1)
    seen = select(Connection.id, Connection.habits, Connection.next_sync_at, Connection.claimed_at).where(
        *mine
    )
    rows: list[Any] = []
    looked = 0
    for _ in range(MOST_DRAWS):
        ids = dice.sample(among, min(LOOKED_AT, len(among)))
        rows += db.execute(seen.where(Connection.id.in_(ids)).order_by(Connection.id)).all()
        looked += len(ids)
        if len(rows) >= SAMPLE or looked >= len(among):
            break
    chosen = dice.sample(rows, min(SAMPLE, len(rows)))
    found = [
        (Habits.unpack(row.habits) or unknown(now), now if row.claimed_at else row.next_sync_at)
        for row in chosen
    ]
    rounds = [each for each in recheck.rows(db, [row.id for row in chosen]) if each.off_reason is None]
    each = len(among) / looked * len(rows) / max(1, len(chosen))
    return Sample(found, each, recheck.round_s(rounds, lookback, now))


def priced(
    pace: Pace,
    sample: Sample,
    offered: float,
    cost: int,
    every: timedelta,
    longest_days: float,
    now: datetime,
) -> Pace:
    """A new price: towards the one at which the sample wants what is offered, both in requests a day."""
    pace = replace(pace, connections=sample.number, recheck_s=sample.recheck_s)
    if not sample.connections or not math.isfinite(offered):
        return replace(pace, price=0.0, curve=None, wanted=0.0, offered=0.0, priced_at=now)
    known = pace.hours is not None
    pace = replace(pace, **crowd(sample, now), priced_at=now)
    round_s = sample.number * cost / offered * DAY
    pace = replace(pace, longest_s=max(longest_days * DAY, DAYS_A_ROUND * round_s))
    pace = replace(pace, deaf=is_deaf(pace, sample, now))
    hints = announced(pace, sample, now)
    offered = max(offered * LEAST_OFFERED, offered - sum(hints))
    pace = replace(pace, offered=offered)
    free, _ = wants(replace(pace, price=0.0), sample, cost, every, now)
    if free <= offered:  # everybody at every tick
        return replace(pace, price=0.0, curve=None, wanted=free)
    if not pace.scarce or not known:
        pace = replace(pace, price=first_price(sample, pace, offered / cost), curve=None)
    wanted, curve = wants(pace, sample, cost, every, now)
    for _ in range(8):
        if offered / AFRESH < wanted < offered * AFRESH:
            break
        pace = replace(pace, price=max(1e-6, pace.price * min(100.0, max(0.01, (wanted / offered) ** 2))))
        wanted, curve = wants(pace, sample, cost, every, now)
    curve = [polls + news for polls, news in zip(curve, hints, strict=True)]
    moved = pace.price * min(2.0, max(0.5, (wanted / offered) ** STIFFNESS))
    old = pace.curve or curve
    mixed = [REMEMBERED * was + (1 - REMEMBERED) * new for was, new in zip(old, curve, strict=True)]
    return replace(pace, price=max(1e-6, moved), wanted=wanted, curve=mixed)


def crowd(sample: Sample, now: datetime) -> dict[str, Any]:
    """The rate and hours of all together, with a little of nobody in particular."""
    at, flat = now.timestamp(), Crowd()
    everybody = [habits for habits, _ in sample.connections]
    sums = [sum(each) for each in zip(*(spread(habits.hours) for habits in everybody), strict=True)]
    whole = sum(sums) + 1
    rate = sum(habits.rate(flat, at) for habits in everybody) / len(everybody)
    return {"rate": rate, "hours": [(each + 1 / 24) / whole for each in sums]}


def first_price(sample: Sample, pace: Pace, polls: float) -> float:
    """The price at which people without habits would want so many polls a day: where the search begins."""
    roots = sum(
        math.sqrt(habits.rate(pace.crowd, habits.as_of) * habits.silent / 24)
        for habits, _ in sample.connections
    )
    return max(1e-6, (roots * sample.each * 24 / polls) ** 2 / 2)


def wants(
    pace: Pace, sample: Sample, cost: int, every: timedelta, now: datetime
) -> tuple[float, list[float]]:
    """Requests a day that are worth the price, and polls by hour of the UTC day."""
    start, tick = now.timestamp(), every.total_seconds()
    total, curve = 0.0, [0.0] * 24
    for habits, due_at in sample.connections:
        if due_at is None:
            continue
        due = max(start, due_at.timestamp())
        polls = [due, *next_polls(habits, pace.crowd, pace.price, due, tick, deaf=pace.deaf)]
        if len(polls) == 2 and polls[1] - due <= tick:  # one at each tick
            total += DAY / tick
            curve = [each + HOUR / tick for each in curve]
            continue
        # Whole days of the plan, but not its end: what comes behind would change it.
        days = max(1, int((polls[-1] - start) * 0.75 / DAY))
        mine = [at for at in polls if at < start + days * DAY]
        total += len(mine) / days
        for at in mine:
            curve[int(at % DAY / HOUR)] += 1 / days
    return total * sample.each * cost, [each * sample.each for each in curve]


def announced(pace: Pace, sample: Sample, now: datetime) -> list[float]:
    """News of the next day that webhooks will tell of, by hour of the UTC day: each costs a request then."""
    start, found = now.timestamp(), [0.0] * 24
    for habits, due_at in sample.connections:
        told = 1 - habits.silent
        if due_at is None or told <= 0 or pace.deaf:
            continue
        for hour, news in enumerate(habits.expected(pace.crowd, start, HOUR, 24)):
            found[int((start + hour * HOUR) % DAY / HOUR)] += news * told * sample.each
    return found


def put_off(db: Database, provider: str, application: str = MAIN) -> bool:
    """Whether something that a webhook told of waits for its budget."""
    mine = (Connection.provider == provider, Connection.application == application)
    known = (Connection.next_sync_at.is_not(None), Connection.news_at.is_not(None))  # as the index has them
    told = (Connection.news_streams.is_not(None), Connection.wait_reason.is_not(None))
    query = select(Connection.id).where(*mine, *known, *told).limit(1)
    return db.execute(query).first() is not None


def morning(db: Database, provider: str, application: str, opens: datetime, most: int) -> datetime:
    """When news is met that a webhook told of when the day was spent: as soon as the next day opens, unless
    `most` others wait for that already; then a day later, and so on.

    Whoever is told of again before is met then.
    """
    at = opens
    while at < opens + LONGEST_PUT_OFF and _waiting(db, provider, application, at, most):
        at += timedelta(days=1)
    return at


def _waiting(db: Database, provider: str, application: str, at: datetime, most: int) -> bool:
    """Whether so many wait for the day that opens then, or about then: clocks are compared all the time."""
    mine = (Connection.provider == provider, Connection.application == application)
    then = Connection.next_sync_at.between(at - ABOUT, at + ABOUT)
    told = (Connection.news_at.is_not(None), Connection.news_streams.is_not(None))
    few = select(Connection.id).where(*mine, then, *told).limit(most).subquery()
    return (db.scalar(select(func.count()).select_from(few)) or 0) >= most


def is_deaf(pace: Pace, sample: Sample, now: datetime) -> bool:
    """Whether webhooks should have come since the last one: a Poisson count would hardly be nought."""
    if pace.heard_at is None:
        return False
    since = pace.heard_at.timestamp()
    hours = min(24 * 7, int((now.timestamp() - since) / HOUR))
    missed = sum(
        sum(habits.expected(pace.crowd, since, HOUR, hours)) * (1 - habits.silent)
        for habits, _ in sample.connections
    )
    return missed * sample.each > -math.log(DEAF)
