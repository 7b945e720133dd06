"""What a sync costs in one thread, as a ratio to the floor's, and where that goes.

    benchmarks/.venv/bin/python -m benchmarks.cost [--parts] [--profile]

The floor's sync and ours take turns in batches, in one process with one thread: no queue, no planner, and
nobody else who could run between them. Each batch tells its CPU time, so a busy machine matters little.
`--parts` says which part of our sync takes how much, `--profile` what Python's profiler saw; its own cost is
in those figures, so read them as shares.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib
import os
import pstats
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

from benchmarks import compare
from benchmarks.compare import HERE, USERS, WORKLOADS, Floor, Ground, connect_everybody, copy, cpu, grounds

BATCH = 10


class Parts:
    """CPU time of functions, each without that of the others that it calls."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self._within: list[float] = []

    def watch(self, part: str, holder: Any, name: str) -> None:
        function = getattr(holder, name)

        @wraps(function)
        def watched(*arguments: Any, **more: Any) -> Any:
            self._within.append(0.0)
            began = time.process_time()
            try:
                return function(*arguments, **more)
            finally:
                whole = time.process_time() - began
                self.spent[part] += whole - self._within.pop()
                if self._within:
                    self._within[-1] += whole

        setattr(holder, name, watched)

    def watch_a_sync(self) -> None:
        from lifelogger import budget, http, mutex, sweep, sync, tokens

        for part, holder, names in (
            ("lock: taken and released", mutex.Mutex, "acquire release"),
            ("begin: fence, journal, streams", sync, "begin"),
            ("opening the sealed token", tokens.Tokens, "usable"),
            ("a note that a stream is on", sync.ConnectionSync, "_note"),
            ("budget: taken and settled", budget.Budget, "take settle"),
            ("the request", http, "exchange"),
            ("parsing the reply", http, "parse"),
            ("items: normalised, as JSON, digest", sweep.Sweep, "_item"),
            ("the page: fence, known, gone, cursor; written", sweep.Sweep, "_store"),
            ("end: fence and news, connection, journal", sync.ConnectionSync, "_finish"),
            ("all the rest", sync, "run"),
        ):
            for name in names.split():
                self.watch(part, holder, name)

    def show(self, syncs: int) -> None:
        for part, seconds in self.spent.most_common():
            print(f"  {seconds / syncs * 1000:6.2f} ms  {part}")


def batches(ground: Ground, workload: str, rounds: int, profile: bool, parts: Parts | None) -> None:
    """Sync half of the users by the floor, the others by us; print what one costs each."""
    import psycopg

    from lifelogger import sync
    from lifelogger.runtime import build
    from lifelogger.settings import load_settings

    floor, plain = importlib.import_module("floor"), importlib.import_module("plain")
    plain.API = ground.api
    template, _ = WORKLOADS[workload]
    spent: dict[str, list[float]] = {"floor": [], "ours": []}
    servers = {"PostgreSQL": ground.postgres.process.pid, "Redis": ground.redis.process.pid}
    served: dict[str, list[float]] = {f"{who}, {what}": [] for who in spent for what in servers}
    profiler = cProfile.Profile(time.process_time)
    if parts:
        parts.spent.clear()
    for _ in range(rounds):
        ground.redis.flush()
        copy(ground, template, "bench")
        ground.ask("/control?delay=0")
        os.environ.update(ground.environ())
        rt = build(load_settings())
        ground.sql("UPDATE connections SET claimed_at = now(), next_sync_at = now() - interval '1 second'")
        with psycopg.connect(Floor("floor", ground).environ()["BENCH_DATABASE"], autocommit=True) as db:

            def by_us(user: str, rt: object = rt) -> None:
                [done] = sync.run(user, "tick", runtime=rt)  # type: ignore[arg-type]
                assert done.outcome == "ok", done

            def by_floor(user: str, db: object = db) -> None:
                floor.sync(db, user)

            def batch(who: str, go: Callable[[str], None], users: list[str]) -> None:
                before = {name: cpu([pid]) for name, pid in servers.items()}
                began = time.process_time()
                if profile and who == "ours":
                    profiler.enable()
                for user in users:
                    go(user)
                profiler.disable()
                spent[who].append((time.process_time() - began) / len(users) * 1000)
                for name, pid in servers.items():
                    served[f"{who}, {name}"].append((cpu([pid]) - before[name]) / len(users) * 1000)

            for number in range(compare.WARM_UP):
                (by_us if number % 2 else by_floor)(f"w{number}")
            for start in range(0, USERS - 2 * BATCH + 1, 2 * BATCH):
                users = [f"u{number:04}" for number in range(start, start + 2 * BATCH)]
                batch("floor", by_floor, users[:BATCH])
                batch("ours", by_us, users[BATCH:])
        rt.close()
    ratios = [ours / theirs for theirs, ours in zip(spent["floor"], spent["ours"], strict=True)]
    quarters = statistics.quantiles(ratios, n=4)
    mean = {who: statistics.fmean(each) for who, each in spent.items()}
    print(f"\n{workload.split(' at ')[0]}: {len(ratios)} pairs of batches of {BATCH}")
    print(f"  CPU to the floor's: {statistics.median(ratios):.2f} ({quarters[0]:.2f}-{quarters[2]:.2f})"
          f"   {mean['ours']:.2f} ms to {mean['floor']:.2f} ms")  # fmt: skip
    print(
        "  ms a sync, " + "; ".join(f"{what}: {statistics.fmean(each):.2f}" for what, each in served.items())
    )
    if parts:
        parts.show(rounds * (compare.WARM_UP // 2) + len(ratios) * BATCH)
    if profile:
        stats = pstats.Stats(profiler)
        stats.sort_stats("tottime").print_stats(45)
        stats.sort_stats("cumtime").print_stats(90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workloads", default="", help="those that begin with this word")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--profile", action="store_true")
    chosen = parser.parse_args()
    sys.path.insert(0, str(HERE / "contestants"))
    with grounds() as ground:
        connect_everybody(ground)
        parts = Parts() if chosen.parts else None
        if parts:
            parts.watch_a_sync()
        for workload in WORKLOADS:
            if workload.startswith(chosen.workloads):
                batches(ground, workload, chosen.rounds, chosen.profile, parts)


if __name__ == "__main__":
    main()
