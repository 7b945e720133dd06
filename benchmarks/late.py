"""How much of a day should go to news that the day before put off: a model, for many worlds in a moment.

    benchmarks/.venv/bin/python benchmarks/late.py                 # five worlds of 2,000 athletes
    benchmarks/.venv/bin/python benchmarks/late.py --athletes 2600 --seeds 11 12

The worlds are those of `freshness.py`, where webhooks tell of more news than the day has requests. A request
brings all that is known of a person. There is no engine here, no poll and no window of 15 minutes: see
`freshness.py --webhooks`.

Needs numpy.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import Any

import freshness
import numpy as np
from freshness import DAILY, DAY, TOLD_AFTER_S

UNWATCHED, DAYS = 6, 20
ROUNDS = 10
"""Requests of a day that rounds over the past take."""


def delays(events: Sequence[tuple[float, float, int]], share: float) -> Any:
    """Seconds from upload to store, where late news get `share` of a day's requests at most."""
    found: list[float] = []
    waiting: dict[int, list[float]] = {}
    spent, today = 0, -1

    def serve(person: int, now: float) -> None:
        for at in waiting.pop(person, []):
            if UNWATCHED * DAY <= at < (DAYS - 2) * DAY:
                found.append(now - at)

    for told, at, person in events:
        while told // DAY > today:
            today += 1
            late = sorted(waiting, key=lambda each: waiting[each][0])[: int(share * DAILY)]
            for each in late:
                serve(each, today * DAY)
            spent = ROUNDS + len(late)
        waiting.setdefault(person, []).append(at)
        if spent < DAILY:
            serve(person, told)
            spent += 1
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--athletes", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--shares", type=float, nargs="+", default=[1, 0.4, 0.35, 0.3, 0.2])
    told = parser.parse_args()
    print("| late news | within a minute | mean, h | median, s | p95, h |")
    print("| --- | ---: | ---: | ---: | ---: |")
    worlds = []
    for seed in told.seeds:
        uploads = freshness.lives(seed, told.athletes, 120, DAYS).uploads
        dice = random.Random(1)
        worlds.append(
            sorted(
                (at + dice.expovariate(1 / TOLD_AFTER_S), at, person)
                for person, mine in enumerate(uploads)
                for at in mine
                if 0 <= at < DAYS * DAY
            )
        )
    for share in told.shares:
        each = [delays(events, share) for events in worlds]
        columns = (
            [f"{(one < 60).mean():.0%}" for one in each],
            [f"{one.mean() / 3600:.1f}" for one in each],
            [f"{np.median(one):,.1f}" for one in each],
            [f"{np.percentile(one, 95) / 3600:.0f}" for one in each],
        )
        print(f"| {share:.0%} of the day |", " | ".join("; ".join(column) for column in columns), "|")


if __name__ == "__main__":
    main()
