"""What it costs to be large: periodic tasks and the status page, over a thousand to a million connections.

    python -m benchmarks.scale             # the table of benchmarks/scale.md, in about a quarter of an hour
    python -m benchmarks.scale --to 10000  # the same, smaller

Every connection is due, has a token that expires, and a journal; 100 are planned at a time. Rounds are
interleaved, medians are told. A real Redis and PostgreSQL, private and gone afterwards, like all data.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dramatiq
from sqlalchemy import text

from lifelogger import leaving, notices, planner, status
from lifelogger.broker import make_broker
from lifelogger.budget import Usage
from lifelogger.runtime import Runtime, build
from lifelogger.settings import load_settings
from lifelogger.store import counts, journal
from lifelogger.store.migrate import upgrade
from lifelogger.tokens import Tokens
from tests.servers import PostgresServer, RedisServer

SIZES = (1_000, 10_000, 100_000, 1_000_000)
LARGEST_SQLITE = 100_000
ROUNDS = 9
PLANNED = 100
BUDGET = f"{PLANNED * 5 // 4 + 1}/15 minutes"
"""Of which the reserve and one request, which tells the count, leave as many polls."""
RECORDS_EACH = 1
OLD_RUNS = 2_000
"""Runs that the clean-up finds, whatever else the journal holds."""
MEMORY = {"shared_buffers": "1GB", "max_wal_size": "8GB"}
JOURNAL_DAYS = timedelta(days=90)
SPACE = {
    "a connection": ("users", "connections", "streams"),
    "a record": ("records",),
    "a run": ("sync_runs",),
}

TASKS: dict[str, Callable[[Place], object]] = {}
"""What is measured, by the title of its row."""


def task(title: str) -> Callable[[Callable[[Place], object]], Callable[[Place], object]]:
    def put(function: Callable[[Place], object]) -> Callable[[Place], object]:
        TASKS[title] = function
        return function

    return put


@dataclass
class Place:
    """A store of some size with all that a process works with."""

    kind: str
    number: int
    rt: Runtime
    broker: dramatiq.Broker
    seconds: dict[str, list[float]] = field(default_factory=dict)
    space: dict[str, float] = field(default_factory=dict)

    def send(self, user_id: str) -> None:
        self.broker.enqueue(
            dramatiq.Message(
                queue_name="default",
                actor_name="sync_user_data",
                args=(user_id, "tick"),
                kwargs={},
                options={},
            )
        )

    def run(self, *statements: str, **values: Any) -> None:
        with self.rt.store.write() as db:
            for each in statements:
                db.execute(text(each), values)

    def measure(self) -> None:
        for title, function in TASKS.items():
            self.settle()
            began = time.perf_counter()
            function(self)
            self.seconds.setdefault(title, []).append(time.perf_counter() - began)

    def settle(self) -> None:
        """What syncs do meanwhile: those that were claimed are done, and some have news again."""
        now = self.rt.clock()
        self.run(
            "UPDATE connections SET claimed_at = NULL, news_at = NULL, next_sync_at = :due "
            "WHERE claimed_at IS NOT NULL",
            due=at(now),  # behind all others: the smallest store has just enough for a few ticks
        )
        self.rt.redis.delete(f"{self.rt.settings.redis.prefix}:default")
        old = at(now - 2 * JOURNAL_DAYS)
        self.run(
            f"WITH RECURSIVE n(i) AS ({numbers(OLD_RUNS)}) {RUN_COLUMNS} SELECT 1 + i % {self.number}, "
            "'tick', :old, :old, 'ok', 1, 0, 0, 0, 0 FROM n",
            old=old,
        )

    def median(self, title: str) -> float:
        return statistics.median(self.seconds[title])


@task(f"tick: plan, claim and enqueue {PLANNED}")
def tick(place: Place) -> None:
    name = f"bench-{time.monotonic_ns()}"
    planned = planner.tick(name, place.rt.clock(), place.send, runtime=place.rt)
    assert planned is not None
    assert planned >= PLANNED  # one more in a window that has not seen the request which told the count


@task("look for news that no message told")
def serve_news(place: Place) -> None:
    assert planner.serve_news(place.send, runtime=place.rt) == 0


@task("token keeper: who expires, who left, who is told")
def tokens(place: Place) -> None:
    margin = timedelta(seconds=place.rt.settings.sync.refresh_margin_seconds)
    assert Tokens(place.rt).expiring(place.rt.clock() + margin)
    leaving.end_deauthorised(place.rt)
    notices.tell(place.rt)


@task("status page")
def page(place: Place) -> None:
    assert status.overview(place.rt)["connections"] == place.number
    status.runs(place.rt, limit=10)
    status.users(place.rt, limit=50)


@task("page of one user")
def person(place: Place) -> None:
    found = status.user(place.rt, f"u{place.number // 2}")
    assert found is not None
    assert found["runs"]


@task(f"journal: forget {OLD_RUNS:,} old runs")
def tidy(place: Place) -> None:
    assert journal.forget(place.rt.store, place.rt.clock() - JOURNAL_DAYS) >= OLD_RUNS


# Data ------------------------------------------------------------------------------------------------

RUN_COLUMNS = (
    "INSERT INTO sync_runs (connection_id, trigger, started_at, ended_at, outcome, requests, inserted, "
    "updated, deleted, quarantined)"
)
RAW = '{"id":12345678901,"name":"Morning Run",' + ",".join(
    f'"{name}":{value}'
    for name, value in [
        *((f"measured_value_{number}", "1234.5") for number in range(30)),
        ("map", '{"id":"a12345678901","summary_polyline":"' + "ab~cd" * 40 + '"}'),
    ]
) + "}"  # fmt: skip
"""As long as an activity of Strava's: about 1.1 kB."""


def numbers(until: int) -> str:
    return f"SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {until}"


def at(instant: datetime) -> str:
    """An instant as both databases take it."""
    return f"{instant.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}"


def fill(place: Place) -> None:
    """As many connections, all due, each since another time; with streams, records and a journal."""
    rt, number = place.rt, place.number
    before = (  # :now, less so many seconds
        "(datetime(:now, '-' || ({}) || ' seconds') || '.000000')"
        if rt.store.is_sqlite
        else "(CAST(:now AS timestamptz) - ({}) * interval '1 second')"
    )
    due, started = before.format("1 + i % 86400"), before.format("i % 7000000")
    now = "'" + at(rt.clock()) + "'"
    rows = f"WITH RECURSIVE n(i) AS ({numbers(number)})"
    items = f"WITH RECURSIVE n(i) AS ({numbers(number * RECORDS_EACH)})"
    sealed = rt.vault.encrypt("a" * 40)
    place.run(
        f"{rows} INSERT INTO users (id, created_at) SELECT 'u' || i, {now} FROM n",
        f"{rows} INSERT INTO connections (id, user_id, provider, provider_user_id, status, scopes, "
        "access_token, refresh_token, token_expires_at, next_sync_at, failures, fence, last_sync_at, "
        f"created_at, updated_at) SELECT i, 'u' || i, 'strava', '10' || i, 'active', '[\"read\"]', :sealed, "
        f":sealed, {due}, {due}, 0, 1, {due}, {now}, {now} FROM n",
        f"{rows} INSERT INTO streams (connection_id, name, cursor) SELECT i, 'activities', {due} FROM n",
        f"{items} INSERT INTO records (connection_id, stream, external_id, kind, ordered_at, start_at, "
        "title, type, provider_type, duration_s, moving_s, distance_m, raw, digest, created_at, updated_at, "
        "change) "
        f"SELECT 1 + i % {number}, 'activities', '123456' || i, 'activity', {started}, {started}, "
        f"'Morning Run', 'run', 'Run', 1800, 1750, 5000, :raw, :digest, {now}, {now}, i FROM n",
        f"UPDATE feed SET newest = {number * RECORDS_EACH}",
        f"{rows} {RUN_COLUMNS} SELECT i, 'tick', {started}, {started}, 'ok', 1, 0, 0, 0, 0 FROM n",
        now=at(rt.clock()),
        sealed=sealed,
        raw=RAW,
        digest="d" * 64,
    )  # fmt: skip
    with rt.store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
        db.exec_driver_sql("ANALYZE" if rt.store.is_sqlite else "VACUUM ANALYZE")
    place.space = space(place)
    counts.recount(rt.store, rt.clock)


def space(place: Place) -> dict[str, float]:
    """Bytes of each, indexes included, as the database lays them out at first."""
    if place.rt.store.is_sqlite:
        return {}
    each = {"a connection": place.number, "a record": place.number * RECORDS_EACH, "a run": place.number}
    with place.rt.store.read() as db:
        return {
            thing: sum(
                db.execute(text("SELECT pg_total_relation_size(:name)"), {"name": name}).scalar_one()
                for name in tables
            )
            / each[thing]
            for thing, tables in SPACE.items()
        }


def opened(kind: str, number: int, url: str, redis_url: str, folder: Path) -> Place:
    rt = build(
        load_settings(
            {
                "LIFELOGGER_SETTINGS": str(folder / "settings.toml"),
                "LIFELOGGER_DATABASE__URL": url,
                "LIFELOGGER_REDIS__URL": redis_url,
                "LIFELOGGER_REDIS__PREFIX": f"{kind}{number}",
                "LIFELOGGER_PROVIDERS__STRAVA__BUDGET": BUDGET,
                "LIFELOGGER_PROVIDERS__STRAVA__OVERALL_BUDGET": BUDGET,
            }
        )
    )
    broker = make_broker(rt.settings)
    broker.declare_queue("default")
    upgrade(rt.store)
    place = Place(kind, number, rt, broker)
    began = time.perf_counter()
    fill(place)
    print(f"{kind}, {number:,} connections: made in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    pools = rt.providers["strava"].shared_pools(rt.settings.providers["strava"])
    limit = PLANNED * 5 // 4 + 1
    told = {pool.name: Usage((limit,), (1,)) for pool in pools}
    rt.budget.settle(rt.budget.take(pools), usage=told, date=rt.clock())
    return place


# The table -------------------------------------------------------------------------------------------


def table(places: list[Place]) -> str:
    lines = []
    for kind in dict.fromkeys(place.kind for place in places):
        row = [place for place in places if place.kind == kind]
        first, last = row[0], row[-1]
        lines += [
            f"| {kind}, ms | " + " | ".join(f"{place.number:,}" for place in row) + " | last to first |",
            "| --- |" + " ---: |" * (len(row) + 1),
        ]
        for title in TASKS:
            cells = [f"{place.median(title) * 1000:.1f}" for place in row]
            ratios = sorted(b / a for a, b in zip(first.seconds[title], last.seconds[title], strict=True))
            middle = statistics.median(ratios)
            cells.append(f"{middle:.2f} ({ratios[1]:.2f} to {ratios[-2]:.2f})")
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
        counted = [f"{place.seconds['count'][0] * 1000:,.0f}" for place in row]
        lines += [f"| counting everything, beforehand | {' | '.join(counted)} | |", ""]
    spaces = [place for place in places if place.space]
    lines += [
        "| bytes, with indexes | " + " | ".join(f"{place.number:,}" for place in spaces) + " |",
        "| --- |" + " ---: |" * len(spaces),
        *(
            f"| {thing} | " + " | ".join(f"{place.space[thing]:,.0f}" for place in spaces) + " |"
            for thing in SPACE
        ),
    ]
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--to", type=int, default=SIZES[-1], help="the largest number of connections")
    options.add_argument("--rounds", type=int, default=ROUNDS)
    chosen = options.parse_args()
    sizes = [size for size in SIZES if size <= chosen.to]
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "settings.toml").touch()
        redis, postgres = RedisServer(), PostgresServer()
        for server in (redis, postgres):
            stack.callback(server.close)
            server.start()
        with postgres.connect() as db:  # as one would for a million; its own default is 128 MB
            for name, value in MEMORY.items():
                db.execute(f"ALTER SYSTEM SET {name} = '{value}'")  # type: ignore[arg-type]
        postgres.restart()
        places = []
        for kind, largest in (("PostgreSQL", sizes[-1]), ("SQLite", LARGEST_SQLITE)):
            for size in (each for each in sizes if each <= largest):
                url = postgres.create(f"b{size}") if kind == "PostgreSQL" else f"sqlite:///{folder}/{size}.db"
                place = opened(kind, size, url, redis.url, folder)
                stack.callback(place.rt.close)
                places.append(place)
        for place in places:
            with place.rt.store.read() as db:
                began = time.perf_counter()
                counts.count(db, place.rt.clock())
                place.seconds["count"] = [time.perf_counter() - began]
        for number in range(chosen.rounds + 1):
            for place in places:
                place.measure()
                if number == 0:  # connections and plans are made, pages read
                    place.seconds = {"count": place.seconds["count"]}
    memory = ", ".join(f"{name} {value}" for name, value in MEMORY.items())
    print(
        f"Python {platform.python_version()}, {chosen.rounds} interleaved rounds, median; the ratio is the "
        "median of those of each round, in brackets its range without the best and the worst. "
        f"PostgreSQL without fsync, {memory}.\n"
    )
    print(table(places))


if __name__ == "__main__":
    main()
