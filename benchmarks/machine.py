"""What a poll costs a machine, in CPU time, by part: the arithmetic of docs/scaling.md begins with it.

    python -m benchmarks.machine

Real commands, PostgreSQL and Redis; the simulated provider answers at once and is not counted. CPU time, not
time by the clock: who else is busy on the machine matters little.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dramatiq
from sqlalchemy import func, select

from lifelogger.broker import make_broker
from lifelogger.connections import import_lines
from lifelogger.runtime import Runtime, build
from lifelogger.sandbox.server import Sandbox
from lifelogger.settings import load_settings
from lifelogger.store.migrate import upgrade
from lifelogger.store.models import SyncRun
from tests.processes import Command
from tests.sandbox.control import Control
from tests.servers import PostgresServer, RedisServer, wait_until

PLENTY = (1_000_000, 10_000_000)
IDLE_SECONDS = 10
TICKS = os.sysconf("SC_CLK_TCK")


def cpu(root: int) -> float:
    """Seconds of CPU that a process, its group, its children and those that have ended used."""
    used = 0.0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        parent, group = int(fields[1]), int(fields[2])
        if int(folder.name) == root:
            used += sum(map(int, fields[11:15]))
        elif root in (parent, group):
            used += sum(map(int, fields[11:13]))
    return used / TICKS


def environ(folder: Path, database: str, redis: str, sandbox: str) -> dict[str, str]:
    strava = f"{sandbox}/strava"
    (folder / "settings.toml").touch()
    values: dict[str, Any] = {
        "SETTINGS": folder / "settings.toml",
        "DATABASE__URL": database,
        "REDIS__URL": redis,
        "PROVIDERS__STRAVA__CLIENT_ID": "sandbox",
        "PROVIDERS__STRAVA__CLIENT_SECRET": "sandbox",
        "PROVIDERS__STRAVA__API_URL": f"{strava}/api/v3",
        "PROVIDERS__STRAVA__AUTHORIZE_URL": f"{strava}/oauth/authorize",
        "PROVIDERS__STRAVA__TOKEN_URL": f"{strava}/api/v3/oauth/token",
        "PROVIDERS__STRAVA__REVOKE_URL": f"{strava}/oauth/revoke",
        "PROVIDERS__STRAVA__BUDGET": f"{PLENTY[0]}/15 minutes, {PLENTY[1]}/day",
        "PROVIDERS__STRAVA__OVERALL_BUDGET": f"{PLENTY[0]}/15 minutes, {PLENTY[1]}/day",
        "SYNC__INTERVAL_SECONDS": 1,
    }
    return {f"LIFELOGGER_{name}": str(value) for name, value in values.items()}


def ended(rt: Runtime) -> int:
    with rt.store.read() as db:
        return db.scalar(select(func.count()).where(SyncRun.outcome == "ok")) or 0


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--people", type=int, default=200)
    options.add_argument("--rounds", type=int, default=10)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        redis, postgres = RedisServer(), PostgresServer()
        for server in (redis, postgres):
            stack.callback(server.close)
            server.start()
        world = stack.enter_context(Sandbox(people=chosen.people, seed=1, history_days=30))
        control = Control(world.url)
        control.limits(reads=PLENTY, overall=PLENTY)
        values = environ(Path(name), postgres.create("machine"), redis.url, world.url)
        rt = build(load_settings(values))
        stack.callback(rt.close)
        upgrade(rt.store)
        lines = control.connect()
        import_lines(rt, map(json.dumps, lines))
        broker = make_broker(rt.settings)
        broker.declare_queue("default")
        worker = stack.enter_context(
            Command("lifelogger", "worker", ready="Worker process is ready for action", environ=values)
        )
        assert worker.process is not None
        assert redis.process is not None
        assert postgres.process is not None
        parts = {
            "worker": worker.process.pid,
            "PostgreSQL": postgres.process.pid,
            "Redis": redis.process.pid,
        }

        def everybody(times: int, news: bool = False) -> None:
            for _ in range(times):
                before = ended(rt)
                for line in lines:
                    if news:
                        control.add(line["user_id"])
                    broker.enqueue(dramatiq.Message("default", "sync_user_data", (line["user_id"],), {}, {}))
                wait_until(lambda: ended(rt) >= before + len(lines), "a round", 300)  # noqa: B023

        def used() -> dict[str, float]:
            return {part: cpu(pid) for part, pid in parts.items()}

        everybody(2)  # the first imports, and the first look at the end of each list
        before = used()
        time.sleep(IDLE_SECONDS)
        idle = {part: (after - before[part]) / IDLE_SECONDS for part, after in used().items()}
        costs = []
        for news in (False, True):
            began, before = time.perf_counter(), used()
            everybody(chosen.rounds, news)
            seconds = time.perf_counter() - began
            costs.append(
                {
                    part: (after - before[part] - idle[part] * seconds) / (chosen.rounds * len(lines)) * 1000
                    for part, after in used().items()
                }
            )
        print(f"Python {platform.python_version()}, {chosen.rounds * len(lines):,} polls of each kind\n")
        print("| CPU | a poll without news, ms | with one activity, ms | idle, % of a core |")
        print("| --- | ---: | ---: | ---: |")
        for part in parts:
            plain, busy = (cost[part] for cost in costs)
            print(f"| {part} | {plain:.2f} | {busy:.2f} | {idle[part] * 100:.1f} |")
        plain, busy = (sum(cost.values()) for cost in costs)
        print(f"| together | {plain:.2f} | {busy:.2f} | {sum(idle.values()) * 100:.1f} |")


if __name__ == "__main__":
    main()
