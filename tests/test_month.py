"""A month of a hundred people's lives, with all that clouds do to a client, ends equal to the truth.

A poll in two days and a bit for each connection, since every request is a real one. All limits are as
documented; another program of the same Strava application spends most of its day, so that polls and first
imports are deferred again and again, and a hundred people at once are too many for its 15 minutes.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection as Pipe
from typing import Any

import pytest
from sqlalchemy import func, select

from lifelogger import planner, sync
from lifelogger.budget import Budget
from lifelogger.connections import import_lines, note_news
from lifelogger.runtime import build
from lifelogger.sandbox.clock import Clock
from lifelogger.sandbox.server import listen, serve, url_of
from lifelogger.sandbox.world import World
from lifelogger.settings import Settings, load_settings
from lifelogger.store.models import Connection, Quarantined, Record, Stream
from lifelogger.tokens import Tokens
from tests.conftest import make_tables, pointed_at
from tests.sandbox.control import Control

PEOPLE, DAYS = 100, 30
START = datetime(2026, 11, 1, 0, 7, tzinfo=UTC)
TICK, QUARTER = timedelta(hours=3), timedelta(minutes=15)
AWAY = timedelta(days=3)
"""How long somebody who took back their grant waits before they sign in again."""
SYNC = {"interval_seconds": 60 * 3600, "lookback_days": 7, "history_days": 40}
PROVIDERS = ("fitbit", "oura", "strava")
WORKERS = 3

READS = ("GET *", "POST /dataTypes/*")
TOKENS = "POST */token"
BROKEN: list[dict[str, Any]] = [
    {"status": 500},
    {"status": 502, "body": "<html>Bad gateway</html>"},
    {"status": 503, "headers": {"Retry-After": "5400"}},
    {"cut": "before"},
    {"cut": "middle"},
    {"cut": "after"},
    {"body": "[{"},
    {"status": 429},
]
"""What becomes of two reads in a hundred."""
UNANSWERED = BROKEN[:4]
"""And of two token calls in a hundred: nobody can promise anything when an answer is lost that has the only
refresh token in it (lifelogger/tokens.py)."""


# A world and its workers, in processes of their own ---------------------------------------------------


def simulate(pipe: Pipe) -> None:
    clock = Clock()
    clock.freeze(START.timestamp())
    listener = listen()
    pipe.send(url_of(listener))
    serve(World(people=PEOPLE, seed=11, history_days=40, clock=clock), listener)


class Timed:
    """A runtime whose time is told to it."""

    def __init__(self, settings: Settings) -> None:
        self.now = START
        rt = build(settings)
        budget = Budget(settings.redis.url, prefix=settings.redis.prefix, clock=lambda: self.now.timestamp())
        self.rt = dataclasses.replace(rt, clock=lambda: self.now, budget=budget)


worker: Timed


def begin_work() -> None:
    global worker
    worker = Timed(load_settings())


def work(now: datetime, person: str) -> list[sync.Run]:
    """One message of a tick."""
    worker.now = now
    return sync.run(person, "tick", runtime=worker.rt)


@pytest.fixture
def world() -> Iterator[Control]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=simulate, args=(there,), daemon=True)
    process.start()
    control = Control(here.recv())
    yield control
    control.close()
    process.terminate()
    process.join(10)


class Month(Timed):
    """The application and the world, from tick to tick."""

    def __init__(self, settings: Settings, sandbox: Control) -> None:
        super().__init__(settings)
        make_tables(self.rt.store)
        self.sandbox = sandbox
        self.chance = random.Random(5)
        self.people = [person["user_id"] for person in sandbox.people()]
        self.streams = {
            (name, stream.name): stream
            for name, provider in self.rt.providers.items()
            for stream in provider.streams
            if not stream.optional
        }
        self.outcomes: Counter[str] = Counter()
        self.away: list[tuple[datetime, str, str]] = []
        context = multiprocessing.get_context("spawn")
        self.workers = ProcessPoolExecutor(WORKERS, context, begin_work)

    # What the application does

    def connect(self, provider: str, *people: str) -> None:
        lines = self.sandbox.connect(*people, provider=provider)
        import_lines(self.rt, map(json.dumps, lines))

    def tick(self) -> None:
        """What the timetable sends is worked off; and again when somebody learned a count (`plan_again`)."""
        learned = True
        while learned:
            planned: list[str] = []
            planner.tick("month", None, planned.append, runtime=self.rt)
            jobs = [self.workers.submit(work, self.now, person) for person in planned]
            runs = [run for job in jobs for run in job.result(60)]
            self.outcomes.update(run.outcome for run in runs)
            learned = any(run.learned for run in runs)

    def step(self, step: timedelta) -> None:
        self.now += step
        self.sandbox.set_clock(self.now)

    def pass_time(self) -> None:
        """Until the next tick. The other program works on, and ours learns of it from headers."""
        for _ in range(2):
            self.step(TICK / 2)
            used = self.sandbox.spend(0)["reads"][1]
            self.sandbox.spend(min(self.chance.randint(35, 65), max(0, 880 - used)))

    # What people do

    def live_on(self) -> None:
        """People do things, upload them late, edit and delete; some disconnect us and come back later."""
        chance = self.chance
        for _ in range(5):
            person, (provider, stream) = chance.choice(self.people), chance.choice(list(self.streams))
            what = chance.choice(("add", "late", "edit", "delete"))
            if what in ("add", "late"):
                start = self.now - timedelta(minutes=chance.randint(30, 5 * 1440))
                uploaded = start + timedelta(minutes=30)
                if what == "late":
                    uploaded = self.now + timedelta(minutes=chance.randint(1, 1440))
                self.sandbox.add(person, start=start, elapsed=1500, uploaded=uploaded)
                continue
            recent = self.recent(person, provider, stream)
            if recent:
                edited = {"fields": {"noted": {"at": self.now.isoformat()}}}
                done = edited if what == "edit" else {"deleted": True}
                self.sandbox.change_item(person, stream, chance.choice(recent)["key"], provider, **done)
        if chance.random() < 0.1:
            person, provider = chance.choice(self.people), chance.choice(PROVIDERS)
            self.sandbox.revoke(person, provider=provider)
            self.away.append((self.now + AWAY, person, provider))
        self.come_back()

    def come_back(self, now: bool = False) -> None:
        for each in list(self.away):
            until, person, provider = each
            if now or until <= self.now:
                self.connect(provider, person)
                self.away.remove(each)

    def recent(self, person: str, provider: str, stream: str) -> list[dict[str, Any]]:
        """What lies within the look-back at the next poll, too."""
        about, since = self.streams[provider, stream], self.now - timedelta(days=6)
        return [
            found
            for found in self.sandbox.items(person, stream, provider)
            if self.rt.providers[provider].record(about, found["item"]).ordered_at >= since
        ]

    # What is to be the same in the end

    def differences(self, person: str, provider: str) -> list[str]:
        """What of a connection's streams is not as the cloud has it."""
        with self.rt.store.read() as db:
            found = db.execute(
                select(Record.stream, Record.external_id, Record.raw)
                .join_from(Record, Connection, Record.connection_id == Connection.id)
                .where(
                    Connection.user_id == person,
                    Connection.provider == provider,
                    Record.deleted_at.is_(None),
                )
            ).all()
        stored: dict[str, dict[str, Any]] = {}
        for row in found:
            stored.setdefault(row.stream, {})[row.external_id] = row.raw
        assert sum(map(len, stored.values())) == len(found), "each once"
        wrong = []
        for (name, stream), about in self.streams.items():
            if name != provider:
                continue
            items = [each["item"] for each in self.sandbox.items(person, stream, provider)]
            truth = {self.rt.providers[provider].external_id(about, item): item for item in items}
            assert len(truth) == len(items)
            ours = stored.pop(stream, {})
            wrong += [
                f"{self.now} {person} {provider} {stream} {key}: {ours.get(key)} is {truth.get(key)}"
                for key in truth.keys() | ours.keys()
                if truth.get(key) != ours.get(key)
            ]
        return [*wrong, *stored]

    def quarantined(self) -> list[Any]:
        with self.rt.store.read() as db:
            return list(db.execute(select(Quarantined.stream, Quarantined.external_id, Quarantined.reason)))

    def connections(self) -> list[Any]:
        """Each with how many of its streams have history left to read."""
        left = select(func.count()).where(
            Stream.connection_id == Connection.id, Stream.backlog_until.is_not(None)
        )
        with self.rt.store.read() as db:
            return list(db.execute(select(Connection.__table__, left.scalar_subquery().label("left"))))


@pytest.fixture
def month(
    database_url: str, redis_url: str, settings_env: Callable[..., Settings], world: Control
) -> Iterator[Month]:
    settings = settings_env(
        database={"url": database_url}, redis={"url": redis_url}, providers=pointed_at(world), sync=SYNC
    )
    made = Month(settings, world)
    yield made
    made.workers.shutdown()
    made.rt.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_month_ends_equal_to_the_truth(month: Month) -> None:
    """Promises 1, 3, 5 to 7, for three clouds at once: record for record, in every stream."""
    sandbox = month.sandbox
    for provider in PROVIDERS:
        month.connect(provider, *month.people)
    for number, fault in enumerate(BROKEN):
        for read in READS:  # of equal shares each would hit the request after the other's
            sandbox.fault(read, share=0.02 / len(BROKEN) + number / 1e6, **fault)
    for number, fault in enumerate(UNANSWERED):
        sandbox.fault(TOKENS, share=0.02 / len(UNANSWERED) + number / 1e6, **fault)

    for number in range(round(timedelta(days=DAYS) / TICK)):
        if number % 9 == 7:
            month.outcomes.update(Tokens(month.rt).refresh_expiring())
        month.tick()
        month.live_on()
        month.pass_time()

    sandbox.clear_faults()
    month.come_back(now=True)
    for _ in range(4):  # the longest back-off passes
        month.tick()
        month.step(TICK)
    month.now = month.now.replace(minute=0)
    month.step(timedelta(minutes=7))
    for person in month.people:
        note_news(month.rt, person)
    waiting = {(row.user_id, row.provider) for row in month.connections()}
    wrong: list[str] = []
    for _ in range(12):  # a quarter of an hour is not enough for everybody
        month.tick()
        done = {
            (row.user_id, row.provider)
            for row in month.connections()
            if row.last_sync_at == month.now and not row.left
        }
        wrong += [each for pair in sorted(done & waiting) for each in month.differences(*pair)]
        waiting -= done
        if not waiting:
            break
        month.step(QUARTER)

    summary = sandbox.summary()
    assert (waiting, wrong) == (set(), [])
    assert month.quarantined() == []
    assert [window for window in summary["windows"] if window["used"] > window["limit"]] == []
    assert (summary["refresh_tokens_used_twice"], summary["overlaps"], summary["unexpected"]) == (0, 0, 0)
    assert {row.status for row in month.connections()} == {"active"}
    assert month.outcomes["failed"] > 100
    assert month.outcomes["deferred"] > 100
    assert month.outcomes["needs_reauth"] > 5
