"""What a sync costs in one thread, as a ratio to the floor's, and where that goes.

    benchmarks/.venv/bin/python -m benchmarks.cost [--profile]

The floor's sync and ours take turns in batches, in one process with one thread: no queue, no planner, and
nobody else who could run between them. Each batch tells its CPU time, so a busy machine matters little. With
`--profile` what Python's profiler saw follows; its own cost is in those figures, so read them as shares.
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
from collections.abc import Callable

from benchmarks import compare
from benchmarks.compare import HERE, USERS, WORKLOADS, Floor, Ground, connect_everybody, copy, cpu, grounds

BATCH = 10


def batches(ground: Ground, workload: str, rounds: int, profile: bool) -> None:
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
    if profile:
        stats = pstats.Stats(profiler)
        stats.sort_stats("tottime").print_stats(45)
        stats.sort_stats("cumtime").print_stats(90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workloads", default="", help="those that begin with this word")
    parser.add_argument("--profile", action="store_true")
    chosen = parser.parse_args()
    sys.path.insert(0, str(HERE / "contestants"))
    with grounds() as ground:
        connect_everybody(ground)
        for workload in WORKLOADS:
            if workload.startswith(chosen.workloads):
                batches(ground, workload, chosen.rounds, chosen.profile)


if __name__ == "__main__":
    main()
