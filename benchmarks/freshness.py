"""How long news wait, and what each request brings: the real planner against others, on a fast clock.

    python benchmarks/freshness.py                      # 10, 200 and 2,000 athletes, one world each
    python benchmarks/freshness.py --athletes 200 --seeds 1 2 3 4 5 --days 21
    python benchmarks/freshness.py --lively             # with holidays, bursts, late uploads, new habits
    python benchmarks/freshness.py --athletes 2000 --webhooks

What runs is `planner.tick`, the engine, the budget in a Redis and the store, and the sandbox's own Strava
with its ledger. Only the wire is short: requests reach the sandbox in this process, not through a socket, and
one clock that nobody waits for is everybody's, so a sync takes no time. Delays are read from the store: when
a record was made, less when the simulated person uploaded it. The ledger says which requests were made.
*In memory* the same planning runs without all that, for many worlds.

With `--webhooks` the sandbox tells of each upload, and its call is handed to where webhooks arrive
(`webhooks.hear`) so much later as is drawn: exponential, two seconds on average. Nothing else is simulated of
them; the user whom that returns is synced at once, as by an idle worker, and `planner.serve_news` runs each
minute.

The rivals poll at the same ticks with the same 1,000 requests a day, and poll nothing else. When they poll
does not depend on what they find, so they need no engine: the seed's way (everybody each 15 minutes, as far
as the budget goes), each in turn, by the square root of everybody's true mean rate, and by the index that
grows with time since the last poll times the news expected since, at everybody's true rate by hour and
weekday.
*Told* is our own planner that was told those true rates.

Needs numpy and, for `--plot`, matplotlib.
"""

from __future__ import annotations

import argparse
import heapq
import io
import json
import logging
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import requests
import urllib3
from sqlalchemy import select, update

from lifelogger import http, pacing, planner, sync, webhooks
from lifelogger.budget import Budget, Pool, Window
from lifelogger.connections import import_lines
from lifelogger.habits import Crowd, Habits
from lifelogger.pacing import Pace
from lifelogger.providers.base import Call, Subscription
from lifelogger.runtime import Runtime, build
from lifelogger.sandbox import hooks
from lifelogger.sandbox.app import App
from lifelogger.sandbox.clock import Clock
from lifelogger.sandbox.people import FIRST_ADDED_KEY, Activity, Person
from lifelogger.sandbox.strava import Strava
from lifelogger.sandbox.world import World
from lifelogger.settings import MAIN, load_settings
from lifelogger.settings import Http as HttpLimits
from lifelogger.store.models import Connection, Record

TICK = 900
HOUR, DAY = 3600, 86_400
WEEK = 7 * DAY
SLOTS = WEEK // TICK
A_DAY = DAY // TICK
MONDAY = 1_798_416_000
"""When the world begins to be watched: a Monday, 00:00 UTC."""
INDOORS = "Workout"
"""What everybody does: there is no track to draw."""
LATE_S = 20
"""Ticks come this long after the quarter of an hour."""
DAILY, QUARTERLY = 1000, 100
ADDRESS = "http://127.0.0.1:1/strava"
CALLBACK = "http://127.0.0.1:1/webhooks/strava"
TOLD_AFTER_S = 2.0
"""How long a webhook takes from an upload to us, on average."""


# The world -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lives:
    """Who uploads how often when, and what they did upload. Times are seconds since the Monday."""

    rates: Any
    """News expected in each quarter of an hour of the week, by athlete."""
    uploads: list[Any]
    """When each athlete uploaded, in order."""
    ends: list[Any]
    """When the activity behind each upload ended."""


def lives(seed: int, athletes: int, before: int, after: int, *, lively: bool = False) -> Lives:
    """A world: `before` days of history and `after` days to come."""
    dice = np.random.default_rng(seed)
    rates = profiles(dice, athletes)
    weeks_before, weeks = math.ceil(before / 7), math.ceil((before + after) / 7) + 1
    later = profiles(dice, athletes)
    later *= (rates.sum(1) / later.sum(1))[:, None]  # as much as before, at other times
    uploads, ends = [], []
    for athlete in range(athletes):
        week = np.tile(rates[athlete], weeks)
        if lively:
            week = with_changes(dice, week, later[athlete], weeks_before * SLOTS, after * A_DAY)
        counts = dice.poisson(week)
        at = (
            np.repeat(np.arange(len(week)), counts) + dice.random(counts.sum()) - weeks_before * SLOTS
        ) * TICK
        end = at - dice.uniform(15, 600, len(at))
        if lively:  # one in ten comes late, one in twenty with two others
            late = dice.random(len(at)) < 0.1
            at = at + late * np.where(dice.random(len(at)) < 0.7, dice.uniform(1, 14, len(at)) * 3600, DAY)
            extra = np.repeat(np.flatnonzero(dice.random(len(at)) < 0.05), 2)
            at = np.concatenate([at, at[extra] + dice.uniform(1, 60, len(extra))])
            end = np.concatenate([end, end[extra] - dice.uniform(1, 3, len(extra)) * 3600])
        order = np.argsort(at)
        keep = at[order] > -before * DAY
        uploads.append(at[order][keep])
        ends.append(end[order][keep])
    return Lives(rates, uploads, ends)


def profiles(dice: Any, athletes: int) -> Any:
    """Rates log-normal (sigma 1, 0.6 a day on average), one or two personal hours, personal weekdays."""
    rate = np.exp(dice.normal(0, 1, athletes)) * 0.6 / math.exp(0.5)
    two = dice.random(athletes) < 0.5
    evening = dice.random(athletes) < 0.5
    first = np.where(evening, dice.normal(19, 1.5, athletes), dice.uniform(5, 23, athletes)) % 24
    second = dice.uniform(5, 23, athletes)
    hours = (np.arange(A_DAY) + 0.5) / 4

    def around(middle: Any) -> Any:
        away = (hours[None] - middle[:, None] + 12) % 24 - 12
        bump = np.exp(-(away**2) / 2 / 1.2**2)
        return bump / bump.sum(1, keepdims=True)

    share = np.where(two, 0.5, 1.0)[:, None]
    day = share * around(first) + (1 - share) * around(second)
    week = np.exp(dice.normal(0, 0.5, (athletes, 7)))
    week /= week.mean(1, keepdims=True)
    return (rate[:, None, None] * week[:, :, None] * day[:, None, :]).reshape(athletes, SLOTS)


def with_changes(dice: Any, week: Any, later: Any, begin: int, length: int) -> Any:
    """Three in ten take other habits some day of the watched time, a quarter are away for ten days."""
    week = week.copy()
    if dice.random() < 0.3:
        at = begin + int(dice.uniform(0, length))
        week[at:] = np.tile(later, len(week) // SLOTS)[at:]
    if dice.random() < 0.25:
        at = begin + int(dice.uniform(-5 * A_DAY, length))
        week[at : at + 10 * A_DAY] = 0
    return week


class Life:
    """What the sandbox asks of a person's life: see `sandbox.people`."""

    def __init__(self, person: Person, uploads: Any, ends: Any, first_key: int) -> None:
        self.done = sorted(
            Activity(
                first_key + number, person.index, int(MONDAY + end - 3000), 3000, INDOORS, MONDAY + at, False
            )
            for number, (at, end) in enumerate(zip(uploads.tolist(), ends.tolist(), strict=True))
        )
        self.done.sort(key=lambda activity: (activity.start, activity.key))

    def until(self, moment: float) -> list[Activity]:
        return self.done


# Everything in one process -------------------------------------------------------------------------


class ShortWire(http.Session):
    """Requests that the sandbox answers without a socket between."""

    def __init__(self, sandbox: App) -> None:
        super().__init__()
        self.sandbox = sandbox

    def send_plainly(self, request: requests.PreparedRequest, limits: HttpLimits) -> urllib3.BaseHTTPResponse:
        url = urllib3.util.parse_url(request.url or "")
        scope = {
            "method": request.method,
            "path": url.path or "/",
            "query_string": (url.query or "").encode(),
            "headers": [(name.lower().encode(), value.encode()) for name, value in request.headers.items()],
        }
        body = request.body.encode() if isinstance(request.body, str) else request.body or b""
        reply, headers = self.sandbox.ask(scope, body)
        return urllib3.HTTPResponse(
            io.BytesIO(reply.body), headers=headers, status=reply.status, preload_content=False
        )


class Told(Habits):
    """Somebody whose true rates are known. It packs itself as its number."""

    everybody: ClassVar[list[Told]] = []
    week: Any
    number: int

    @classmethod
    def all_of(cls, rates: Any) -> None:
        cls.everybody = []
        for number, week in enumerate(rates):
            one = cls(0.0, 0.0)
            one.number, one.week = number, np.concatenate([week, week])
            cls.everybody.append(one)

    def learn(self, arrivals: Any, now: float) -> None:
        pass

    def heard(self, news: int, *, announced: bool) -> None:
        pass

    def rate(self, crowd: Crowd, now: float) -> float:
        return float(self.week.sum() / 14)

    def expected(self, crowd: Crowd, start: float, slot: float, number: int) -> list[float]:
        wide = max(1, round(slot / TICK))
        first = round((start - MONDAY) / TICK) + np.arange(number) * wide
        sums = np.concatenate([[0.0], np.cumsum(np.concatenate([self.week] * (1 + wide // SLOTS)))])
        found: list[float] = (sums[first % SLOTS + wide] - sums[first % SLOTS]).tolist()
        return found

    def pack(self) -> bytes:
        return b"told" + self.number.to_bytes(4, "big")


def unpack(packed: bytes | None) -> Habits | None:
    if packed is not None and packed[:4] == b"told":
        return Told.everybody[int.from_bytes(packed[4:], "big")]
    return learned(packed)


learned = Habits.unpack


@dataclass
class Outcome:
    """What a way of polling came to."""

    name: str
    delays: Any
    """From upload to store in seconds, of what was uploaded while it was watched."""
    requests: int
    news: int
    by_hour: list[int]
    longest_s: float
    """The longest that anybody was left unpolled."""
    floor_s: float = math.nan
    """How long that may be."""
    least_used: float = math.nan
    """The share of its day's requests that the emptiest day had used."""
    first_spent: str = ""
    """The earliest time of a day at which all was spent."""
    fullest: str = ""
    """The most that the provider's own ledger counted in a window of 15 minutes and of a day, and refused."""
    seconds: float = 0.0


def lifelogger(
    world_lives: Lives, athletes: int, before: int, warm: int, days: int, *, told: bool, hooked: bool
) -> Outcome:
    """The whole application over `warm` + `days` days; the last `days` are watched."""
    started = time.monotonic()
    clock = Clock()
    clock.freeze(MONDAY - HOUR)
    world = World(people=athletes, seed=1, history_days=before, clock=clock, providers=[Strava])
    strava = world.providers["strava"]
    strava.configure({"access_token_seconds": 10**9})
    for person in world.people.all:
        mine = (world_lives.uploads[person.index], world_lives.ends[person.index])
        world.people.lead(person, Life(person, *mine, first_key(person.index)))
    Told.all_of(world_lives.rates)
    Habits.unpack = staticmethod(unpack) if told else learned  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        rt = runtime(Path(folder), clock, before)
        try:
            wire = ShortWire(App(world))
            http.session = lambda: wire  # of this thread alone, which is all that runs
            connect(rt, world, told=told)
            print(f"  connected: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            events = announced(rt, world, world_lives) if hooked else []
            polls = run(rt, world, warm + days, events)
            outcome = measured(rt, world, world_lives, polls, warm, days)
        finally:
            rt.redis.shutdown(nosave=True)
            rt.close()
    outcome.name = (TOLD if told else LEARNED) + (HOOKED if hooked else "")
    outcome.seconds = time.monotonic() - started
    world.close()
    return outcome


def connect(rt: Runtime, world: World, *, told: bool) -> None:
    """Everybody was connected some time ago: their past is imported, and their next polls are planned.

    The engine imports it, an hour before the first day, with the provider's limits out of the way. Then
    they are what they are, nobody has counted anything, and all polls are planned at the first price.
    """
    strava = world.providers["strava"]
    usual = {pool: list(limits) for pool, limits in strava.limits.items()}
    strava.limit({pool: [10**6] * len(limits) for pool, limits in usual.items()})
    grants = [(each, strava.connect(each, "sandbox", None)) for each in world.people.all]
    import_lines(
        rt,
        [json.dumps({"user_id": person.user_id, "provider": "strava", **grant}) for person, grant in grants],
    )
    for person, _ in grants:
        for each in sync.run(person.user_id, runtime=rt):
            if each.outcome != "ok":
                raise RuntimeError(f"{person.user_id} was not imported: {each.message}")
    strava.limit(usual)
    rt.redis.flushdb()
    if told:
        with rt.store.write() as db:
            for one, (person, _) in zip(Told.everybody, grants, strict=True):
                here = update(Connection).where(Connection.user_id == person.user_id)
                db.execute(here.values(habits=one.pack()))
    world.clock.freeze(MONDAY - 2)
    planner.allowance(rt, "strava", MAIN, rt.clock())  # sets the price
    with rt.store.write() as db:
        pace = pacing.read(db, "strava")
        for row in db.execute(select(Connection.id, Connection.habits, Connection.last_sync_at)).all():
            due = pacing.next_poll(pace, Habits.unpack(row.habits), row.last_sync_at, pacing.interval(rt))
            db.execute(update(Connection).where(Connection.id == row.id).values(next_sync_at=due))


@dataclass(frozen=True, order=True)
class Upload:
    """Something that a webhook tells of."""

    told_at: float
    at: float
    person: int
    key: int


def announced(rt: Runtime, world: World, world_lives: Lives) -> list[Upload]:
    """Subscribe to Strava's webhooks; returns when what is uploaded from now on will be told, in order."""
    subscription = hooks.Subscription("300001", "sandbox", CALLBACK, "", [], world.clock.now())
    world.providers["strava"].hooks.add(subscription)
    found = Subscription(subscription.id, "all", CALLBACK)
    webhooks.save(rt, "strava", [found], None)
    dice = random.Random(1)
    return sorted(
        Upload(float(at) + dice.expovariate(1 / TOLD_AFTER_S), float(at), index, first_key(index) + number)
        for index, uploads in enumerate(world_lives.uploads)
        for number, at in enumerate(uploads)
        if at >= 0
    )


def first_key(index: int) -> int:
    return FIRST_ADDED_KEY + index * 1_000_000


def runtime(folder: Path, clock: Clock, history_days: int) -> Runtime:
    """A runtime of its own, with all that it makes in `folder`."""
    file = folder / "settings.toml"
    strava = {
        "client_id": "sandbox",
        "client_secret": "sandbox",
        "api_url": f"{ADDRESS}/api/v3",
        "authorize_url": f"{ADDRESS}/oauth/authorize",
        "token_url": f"{ADDRESS}/api/v3/oauth/token",
        "revoke_url": f"{ADDRESS}/oauth/revoke",
    }
    text = [f"[sync]\nhistory_days = {history_days}", "[providers.strava]"]
    text += [f"{key} = {json.dumps(value)}" for key, value in strava.items()]
    text += [f"[providers.{name}]\nenabled = false" for name in ("fitbit", "oura")]
    file.write_text("\n".join(text))
    built = build(load_settings({"LIFELOGGER_SETTINGS": str(file)}))
    url = built.redis.connection_pool.connection_kwargs
    address = (
        f"unix://{url['path']}?db={url.get('db', 0)}"
        if "path" in url
        else (f"redis://{url['host']}:{url['port']}/{url.get('db', 0)}")
    )
    return replace(
        built,
        clock=lambda: datetime.fromtimestamp(clock.now(), UTC),
        budget=Budget(address, prefix=built.settings.redis.prefix, clock=clock.now),
    )


def run(rt: Runtime, world: World, days: int, events: Sequence[Upload]) -> dict[str, list[float]]:
    """Everything of so many days, in order; returns when each user was synced."""
    polls: dict[str, list[float]] = {}

    def synced(user_id: str, trigger: str) -> bool:
        """Sync, and say whether that made a budget known that was not."""
        runs = sync.run(user_id, trigger, runtime=rt)
        if any(each.requests for each in runs):
            polls.setdefault(user_id, []).append(world.clock.now() - MONDAY)
        return any(each.learned for each in runs)

    def served(planned: list[str]) -> None:
        while planned:
            users = planned[:]
            planned.clear()
            learned = [synced(user_id, "tick") for user_id in users]
            if any(learned):  # as the actors do
                planner.tick(planner.AGAIN, None, planned.append, runtime=rt)

    ticks = ((number * TICK + LATE_S, 0, None) for number in range(days * A_DAY))
    minutes = ((number * 60.0, 1, None) for number in range(days * DAY // 60 if events else 0))
    told = ((each.told_at, 2, each) for each in events if each.told_at < days * DAY)
    for at, what, event in heapq.merge(ticks, minutes, told, key=lambda each: each[:2]):
        world.clock.freeze(MONDAY + at)
        planned: list[str] = []
        if what == 0:
            if at == LATE_S + at // DAY * DAY:
                print(f"  day {at // DAY} of {days}", file=sys.stderr, flush=True)
            due_at = datetime.fromtimestamp(MONDAY + at - LATE_S, UTC)
            planner.tick("sync_active_users", due_at, planned.append, runtime=rt)
        elif what == 1:
            planner.serve_news(planned.append, runtime=rt)
        elif event is not None:
            for user_id in heard(rt, world, event):
                if synced(user_id, "news"):
                    planner.tick(planner.AGAIN, None, planned.append, runtime=rt)
        served(planned)
    return polls


def heard(rt: Runtime, world: World, event: Upload) -> list[str]:
    """Have the sandbox tell of an upload, and hand its call to where webhooks arrive.

    Returns whom to sync."""
    strava, now = world.providers["strava"], world.clock.now()
    world.clock.freeze(MONDAY + event.at)
    strava.hooks.happened(world.people.all[event.person], "activities", str(event.key), "create")
    world.clock.freeze(now)
    body = strava.hooks.deliveries.pop().body
    _, users = webhooks.hear(rt, "strava", Call("POST", {"content-type": "application/json"}, {}, body))
    return users


def measured(
    rt: Runtime, world: World, world_lives: Lives, polls: dict[str, list[float]], warm: int, days: int
) -> Outcome:
    """Read from the store, the ledger and what was polled when."""
    begin, end = warm * DAY, (warm + days) * DAY
    with rt.store.read() as db:
        made = {
            int(row.external_id): row.created_at.timestamp() - MONDAY
            for row in db.execute(select(Record.external_id, Record.created_at))
        }
    delays: list[float] = []
    for index, uploads in enumerate(world_lives.uploads):
        for number, at in enumerate(uploads):
            if begin <= at < watched_until(begin, end):
                # What is not there yet has waited until the end at least.
                delays.append(made.get(first_key(index) + number, end) - at)
    entries = [each for each in world.ledger.requests(limit=-1, kind="read") if each.at >= MONDAY]
    windows = [each for each in world.ledger.windows() if each[2] >= MONDAY and each[0].endswith("reads")]
    most = {
        seconds: max(count for _, each, _, count in windows if each == seconds) for seconds in (TICK, DAY)
    }
    refused = sum(each.status == 429 for each in entries)
    watched = [each for each in entries if each.at - MONDAY >= begin]
    used = [
        count / DAILY for _, seconds, start, count in windows if seconds == DAY and start - MONDAY >= begin
    ]
    by_day: dict[int, list[float]] = {}
    by_hour = [0] * 24
    for each in watched:
        by_day.setdefault(int((each.at - MONDAY) // DAY), []).append((each.at - MONDAY) % DAY)
        by_hour[int(each.at % DAY // 3600)] += 1
    spent = [sorted(times)[DAILY - 1] for times in by_day.values() if len(times) >= DAILY]
    with rt.store.read() as db:
        floor = pacing.read(db, "strava").longest_s
    return Outcome(
        "",
        np.array(delays),
        len(watched),
        len(delays),
        by_hour,
        max(longest(polls.get(person.user_id, []), begin, end) for person in world.people.all),
        floor,
        least_used=min(used, default=math.nan),
        first_spent=clock_time(min(spent)) if spent else "never",
        fullest=f"{most[TICK]} / {most[DAY]} / {refused}",
    )


def watched_until(begin: float, end: float) -> float:
    """What is uploaded in the last tenth of the time may be stored behind it, so it is not looked at."""
    return end - max(DAY, (end - begin) / 10)


def longest(times: Sequence[float], begin: float, end: float) -> float:
    marks = [
        max((at for at in times if at <= begin), default=begin),
        *(at for at in times if at > begin),
        end,
    ]
    return max(later - sooner for sooner, later in pairwise(marks))


# In memory -----------------------------------------------------------------------------------------


def in_memory(world_lives: Lives, before: int, warm: int, days: int, *, told: bool) -> Outcome:
    """The same planning without engine, store, Redis and sandbox, for many worlds in little time.

    What is learned, the best times, the price and the pace are the library's; the index is a heap, a poll
    costs a request and brings what was uploaded, and first imports cost nothing.
    """
    started = time.monotonic()
    athletes, every = len(world_lives.uploads), timedelta(seconds=TICK)
    Told.all_of(world_lives.rates)
    known: list[Habits] = []
    for number, (uploads, ends) in enumerate(zip(world_lives.uploads, world_lives.ends, strict=True)):
        past = (MONDAY + ends[uploads < 0]).tolist()
        habits = Habits(min(past, default=MONDAY - before * DAY), MONDAY)
        habits.learn(past, MONDAY)
        known.append(Told.everybody[number] if told else habits)
    dice = random.Random(1)
    due = [MONDAY + dice.random() * DAY * max(1, athletes / DAILY) for _ in range(athletes)]
    queue = sorted(zip(due, range(athletes), strict=True))
    seen = [int(np.searchsorted(uploads, 0)) for uploads in world_lives.uploads]
    looked = [float(MONDAY)] * athletes
    begin, end = MONDAY + warm * DAY, MONDAY + (warm + days) * DAY
    watched = begin - MONDAY, watched_until(begin - MONDAY, end - MONDAY)
    pace, used, total, by_hour = Pace(), 0, 0, [0] * 24
    delays: list[float] = []
    polls: list[list[float]] = [[] for _ in range(athletes)]
    least, first_spent = 1.0, 86_400.0
    for tick in range((warm + days) * A_DAY):
        now = MONDAY + tick * TICK + LATE_S
        at = datetime.fromtimestamp(now, UTC)
        if tick % A_DAY == 0:
            least = min(least, used / DAILY) if now > begin + DAY else least
            used = 0
        if tick % 4 == 0:
            chosen = dice.sample(range(athletes), min(pacing.SAMPLE, athletes))
            asked = [(known[each], datetime.fromtimestamp(due[each], UTC)) for each in chosen]
            sample = pacing.Sample(asked, athletes / len(chosen))
            pace = pacing.priced(pace, sample, DAILY, 1, every, 7, at)
        window = day_window(at, used)
        allowed = planner.allowed([window], at, every, 1, pace)
        taken: list[int] = []
        while queue and len(taken) < QUARTERLY:
            late = queue[0][0] <= now and len(taken) < allowed.background
            if not late and len(taken) >= allowed.early:
                break
            taken.append(heapq.heappop(queue)[1])
        for each in taken:
            uploads, ends = world_lives.uploads[each], world_lives.ends[each]
            upto = int(np.searchsorted(uploads, now - MONDAY, "right"))
            new = range(seen[each], upto)
            seen[each] = upto
            news = [MONDAY + float(ends[one]) for one in new]
            late_ones = [at if at >= looked[each] else (looked[each] + now) / 2 for at in news]
            known[each].learn(late_ones, now)
            delays += [now - MONDAY - uploads[one] for one in new if watched[0] <= uploads[one] < watched[1]]
            looked[each] = now
            polls[each].append(now - MONDAY)
            due[each] = pacing.next_poll(pace, known[each], at, every).timestamp()
            heapq.heappush(queue, (due[each], each))
        used += len(taken)
        if now >= begin:
            total += len(taken)
            by_hour[int(now % DAY // 3600)] += len(taken)
            first_spent = min(first_spent, now % DAY) if used >= DAILY else first_spent
    for each, uploads in enumerate(world_lives.uploads):  # what was never found has waited until the end
        rest = uploads[seen[each] :]
        delays += (end - MONDAY - rest[(rest >= watched[0]) & (rest < watched[1])]).tolist()
    return Outcome(
        (TOLD if told else LEARNED) + MEMORY,
        np.array(delays),
        total,
        len(delays),
        by_hour,
        max(longest(mine, begin - MONDAY, end - MONDAY) for mine in polls),
        pace.longest_s,
        least,
        "never" if first_spent >= DAY else clock_time(first_spent),
        seconds=time.monotonic() - started,
    )


def day_window(at: datetime, used: int) -> Window:
    """A day's window of which nobody else wants any."""
    start = at.replace(hour=0, minute=0, second=0, microsecond=0)
    end = start + timedelta(days=1)
    return Window(NOBODYS, DAY, start, end, end, DAILY, used, 0, True, DAILY - used, None)


NOBODYS = Pool("reads", "strava:memory:reads", (f"{DAILY}/day",), reports=True)


def clock_time(seconds: float) -> str:
    return f"{int(seconds // 3600):02}:{int(seconds % 3600 // 60):02}"


# The rivals ----------------------------------------------------------------------------------------


def rival(name: str, world_lives: Lives, warm: int, days: int, seed: int) -> Outcome:
    """One of the others, with all of the day's requests for polls, as far as its rule says."""
    rates, athletes = world_lives.rates, len(world_lives.uploads)
    dice = np.random.default_rng(seed)
    mean = rates.sum(1) / 7
    last = -dice.integers(1, A_DAY * max(1, athletes // DAILY + 1), athletes)
    index = np.zeros(athletes)
    polls: list[list[int]] = [[] for _ in range(athletes)]
    by_hour, used, total = [0] * 24, 0, 0
    for tick in range((warm + days) * A_DAY):
        if tick % A_DAY == 0:
            used = 0
        age = tick - last
        index += np.maximum(0, age - 0.5) * rates[:, (tick - 1) % SLOTS]  # of the slot that has just ended
        paced = int(DAILY * (tick % A_DAY + 1) / A_DAY) - used
        number = min(QUARTERLY, athletes, DAILY - used if name == SEED else paced)
        score = {
            SEED: dice.random(athletes), TURN: age, ROOT: np.sqrt(mean) * age, INDEX: index
        }[name]  # fmt: skip
        chosen = np.argpartition(-score, number - 1)[:number] if number > 0 else []
        for each in chosen:
            polls[each].append(tick)
        last[chosen] = tick
        index[chosen] = 0
        used += number
        if tick >= warm * A_DAY:
            by_hour[tick % A_DAY // 4] += number
            total += number
    begin, end = warm * DAY, (warm + days) * DAY
    delays, unpolled = [], 0.0
    for mine, uploads in zip(polls, world_lives.uploads, strict=True):
        at = uploads[(uploads >= begin) & (uploads < watched_until(begin, end))]
        times = np.append(np.array(mine, dtype=float) * TICK + LATE_S, end)
        delays.append(times[np.searchsorted(times, at)] - at)
        unpolled = max(unpolled, longest(times[:-1].tolist(), begin, end))
    found = np.concatenate(delays)
    return Outcome(name, found, total, len(found), by_hour, unpolled)


SEED, TURN, ROOT = "everybody each 15 min", "each in turn", "square root of true rates"
INDEX = "index at true rates"
LEARNED, TOLD, MEMORY, HOOKED = "lifelogger", "told", ", in memory", ", webhooks"


# What is told --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What the command line wants of each world."""

    lively: bool
    memory: bool
    webhooks: bool
    ways: Sequence[str]
    days: int | None

    def watched(self, athletes: int) -> int:
        return self.days or (7 if athletes <= 500 or self.webhooks else 14 if athletes <= 5000 else 30)


def compared(asked: Asked, athletes: int, seed: int) -> list[Outcome]:
    """All ways of polling in one world."""
    warm, days = warm_days(athletes), asked.watched(athletes)
    before = 365 if athletes <= 500 else 120 if athletes <= 5000 else 30
    world_lives = lives(seed, athletes, before, warm + days, lively=asked.lively)
    found = [rival(name, world_lives, warm, days, seed) for name in (SEED, TURN, ROOT, INDEX)]
    for told in (True, False):
        if ("told" if told else "learned") in asked.ways:
            found.append(
                in_memory(world_lives, before, warm, days, told=told)
                if asked.memory
                else lifelogger(world_lives, athletes, before, warm, days, told=told, hooked=asked.webhooks)
            )
            print(f"  {found[-1].name}: {found[-1].seconds:.0f} s", file=sys.stderr, flush=True)
    return found


def warm_days(athletes: int) -> int:
    """Until everybody was polled in turn: not watched."""
    return 4 + math.ceil(athletes / 1000)


HEAD = (
    "| | mean | to turn's | median | p95 | requests a news | longest unpolled, d | least used | spent at "
    "| most in 15 min / a day / refused |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def rows(outcomes: Sequence[Outcome]) -> Iterator[str]:
    turn = next(each for each in outcomes if each.name == TURN)
    for each in outcomes:
        used = "" if math.isnan(each.least_used) else f"{each.least_used:.1%}"
        floor = "" if math.isnan(each.floor_s) else f" of {each.floor_s / DAY:.1f}"
        yield (
            f"| {each.name} | {waited(each.delays.mean())} | {each.delays.mean() / turn.delays.mean():.2f} "
            f"| {waited(np.median(each.delays))} | {waited(np.percentile(each.delays, 95))} "
            f"| {each.requests / each.news:.2f} | {each.longest_s / DAY:.1f}{floor} "
            f"| {used} | {each.first_spent} | {each.fullest} |"
        )
    yield "\nRequests by hour of the day, UTC, % of all:"
    for each in outcomes:
        yield f"{each.name}: " + " ".join(f"{number / sum(each.by_hour):.1%}"[:-1] for number in each.by_hour)


def waited(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / HOUR:.2f} h"


def plot(found: dict[int, list[Outcome]], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "freshness"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(found), figsize=(5.5 * len(found), 7.5), squeeze=False)
    for column, (athletes, outcomes) in enumerate(found.items()):
        above, below = axes[0][column], axes[1][column]
        for each in outcomes:
            shares = np.linspace(0, 1, 101)
            above.plot(np.quantile(each.delays, shares) / 3600, shares, label=each.name)
            if each.name.startswith((TURN, "lifelogger", "told")):
                below.step(
                    range(24), [number * 100 / sum(each.by_hour) for number in each.by_hour], label=each.name
                )
        above.set(
            xscale="log",
            xlim=(0.02, 300),
            title=f"{athletes:,} athletes",
            xlabel="hours from upload to store",
        )
        below.set(xlabel="hour of the day, UTC", ylim=(0, None))
    axes[0][0].set_ylabel("share of news")
    axes[1][0].set_ylabel("% of requests")
    axes[0][0].legend(fontsize=8)
    axes[1][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, format="svg", metadata={"Date": None})


def summary(outcomes: Sequence[Sequence[Outcome]]) -> Iterator[str]:
    """What several worlds of one size came to: medians, and from where to where they go."""
    turns = [next(each for each in world if each.name == TURN).delays.mean() for world in outcomes]
    by_name: dict[str, list[float]] = {}
    yield "| | mean to turn's | median | p95 | requests a news |\n| --- | ---: | ---: | ---: | ---: |"
    for mine in zip(*outcomes, strict=True):
        ratios = [each.delays.mean() / turn for each, turn in zip(mine, turns, strict=True)]
        by_name[mine[0].name] = ratios
        halves = [float(np.median(each.delays)) for each in mine]
        tails = [float(np.percentile(each.delays, 95)) for each in mine]
        costs = [each.requests / each.news for each in mine]
        yield (
            f"| {mine[0].name} | {spread_of(ratios)} | {waited(statistics.median(halves))} "
            f"({waited(min(halves))} to {waited(max(halves))}) | {waited(statistics.median(tails))} "
            f"({waited(min(tails))} to {waited(max(tails))}) | {statistics.median(costs):.2f} |"
        )
    for one, ratios in by_name.items():
        best = by_name.get(one.replace(LEARNED, TOLD))
        if best is not None and one.startswith(LEARNED):
            over = [mine / told for mine, told in zip(ratios, best, strict=True)]
            yield f"\n{one} to the planner at true rates: {spread_of(over)}"


def spread_of(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--athletes", type=int, nargs="+", default=[10, 200, 2000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--days", type=int, default=None, help="how many days are watched")
    parser.add_argument("--lively", action="store_true", help="holidays, bursts, late uploads, new habits")
    parser.add_argument("--webhooks", action="store_true", help="the provider tells of each upload")
    parser.add_argument("--ways", nargs="+", choices=("told", "learned"), default=("told", "learned"))
    parser.add_argument("--memory", action="store_true", help="the planning alone, without the engine")
    parser.add_argument("--jobs", type=int, default=1, help="worlds at once, each in a process of its own")
    parser.add_argument("--plot", type=Path, help="write an SVG of the first seed there")
    told = parser.parse_args()
    if told.memory and told.webhooks:
        parser.error("--webhooks needs the engine")
    asked = Asked(told.lively, told.memory, told.webhooks, told.ways, told.days)
    logging.disable(logging.ERROR)
    plotted: dict[int, list[Outcome]] = {}
    with ProcessPoolExecutor(told.jobs, max_tasks_per_child=1) as processes:
        for athletes in told.athletes:
            worlds: list[list[Outcome]] = []
            found = processes.map(partial(compared, asked, athletes), told.seeds)
            for seed, outcomes in zip(told.seeds, found, strict=True):
                worlds.append(outcomes)
                what = "".join(f", {name}" for name in ("lively", "webhooks") if getattr(asked, name))
                print(f"\n{athletes:,} athletes, seed {seed}, {asked.watched(athletes)} days{what}\n\n{HEAD}")
                print(*rows(outcomes), sep="\n", flush=True)
            if len(worlds) > 1:
                print(f"\n{athletes:,} athletes, {len(worlds)} seeds: median and range\n")
                print(*summary(worlds), sep="\n", flush=True)
            plotted[athletes] = worlds[0]
    if told.plot:
        plot(plotted, told.plot)


if __name__ == "__main__":
    main()
