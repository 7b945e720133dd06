"""What a tick costs: promise 9 says that it follows the budget, not the number of users.

    make bench

Plans 100 connections at a time, from many and from few that are due, interleaved, and prints the ratio. One
run on one machine: only the ratio means something.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from sqlalchemy import insert

from lifelogger.planner import Allowance, claim
from lifelogger.runtime import Runtime
from lifelogger.settings import load_settings
from lifelogger.store import Store
from lifelogger.store.migrate import upgrade
from lifelogger.store.models import Connection, User

FEW, MANY = 1_000, 200_000
ROUNDS = 9
PLANNED = 100
NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


def filled(path: Path, number: int) -> Store:
    """A database where so many connections are due, each since another second."""
    store = Store(f"sqlite:///{path}")
    upgrade(store)
    for start in range(0, number, 10_000):
        ids = range(start, min(start + 10_000, number))
        with store.write() as db:
            db.execute(insert(User), [{"id": f"u{each}", "created_at": NOW} for each in ids])
            db.execute(insert(Connection), [connection(each) for each in ids])
    return store


def connection(number: int) -> dict[str, Any]:
    return {
        "user_id": f"u{number}",
        "provider": "strava",
        "status": "active",
        "scopes": [],
        "access_token": b"sealed",
        "token_expires_at": NOW,
        "next_sync_at": NOW - timedelta(seconds=number + 1),
        "failures": 0,
        "fence": 0,
        "created_at": NOW,
        "updated_at": NOW,
    }


def seconds(store: Store) -> float:
    """How long one plan takes, claims and commit included."""
    rt = cast(Runtime, SimpleNamespace(store=store, settings=load_settings({})))
    started = time.perf_counter()
    with store.write() as db:
        users = claim(rt, db, {"strava": Allowance(PLANNED, PLANNED)}, NOW)
    assert len(users) == PLANNED
    return time.perf_counter() - started


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        few, many = filled(Path(folder) / "few.db", FEW), filled(Path(folder) / "many.db", MANY)
        ratios = []
        for _ in range(ROUNDS):
            base = seconds(few)
            ratios.append(seconds(many) / base)
    ratios.sort()
    print(f"python {sys.version.split()[0]}, SQLite, {len(ratios)} rounds of {PLANNED} planned connections")
    print(f"a tick over {MANY:,} due connections takes {statistics.median(ratios):.2f} times as long")
    print(f"as one over {FEW:,} (range {ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
