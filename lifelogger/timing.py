"""When to poll next, so that the waiting of news and the requests together cost least.

A request has a **price**: how many hours of waiting (news times hours until they are stored) it must save.
With the news that a person's habits let us expect, the best times of all polls to come follow from it
exactly, by dynamic programming from the end: a poll at t after one at s costs the price, and what waited,

    price + sum of news(u) * (t - u) for u in [s, t) + the least cost from t on

For a steady rate this is the rule that the polling rate follows the square root of the rate of news. For a
person with habits it polls during their hour and right after it, and leaves them alone until the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from lifelogger.habits import DAY, HOUR, Crowd, Habits

SAFETY_PRICE = 0.25
"""The least price where webhooks announce the news: what a look is worth that finds almost nothing."""
ANNOUNCED = 0.2
"""A smaller share of unannounced news than that makes polls a mere safety net."""
AHEAD = 4
"""How many polls are planned to find the best time of the first."""
LEAST_AHEAD, MOST_AHEAD = 36 * HOUR, 3650 * DAY
MOST_SLOTS = 400
"""How finely those are told apart that are polled rarely."""


def next_polls(
    habits: Habits, crowd: Crowd, price: float, start: float, tick: float, *, deaf: bool = False
) -> list[float]:
    """The best times of the polls after one at `start`: those of a plan, of which only the first is kept.

    `tick` is the seconds between two polls at least, `deaf` that no webhook can be relied on. With a price of
    nothing (every poll can be served) it is the next tick.
    """
    share = 1.0 if deaf else habits.silent
    if share < ANNOUNCED:
        price = max(price, SAFETY_PRICE)
    if price <= 0:
        return [start + tick]
    rate = habits.rate(crowd, start) * share / DAY
    steady = math.sqrt(2 * price * HOUR / rate)
    slot = tick
    ahead = min(max(LEAST_AHEAD, AHEAD * steady), MOST_AHEAD)
    if ahead > MOST_SLOTS * slot:
        slot = math.ceil(ahead / MOST_SLOTS / HOUR) * HOUR
    elif HOUR % slot:  # habits know whole parts of an hour
        slot = HOUR / max(1, math.floor(HOUR / slot)) if slot < HOUR else math.ceil(slot / HOUR) * HOUR
    news = [each * share for each in habits.expected(crowd, start, slot, math.ceil(ahead / slot))]
    after = best_next(news, price * HOUR / slot)
    polls, at = [], 0
    while at < len(after):
        at = after[at]
        polls.append(start + at * slot)
    return polls


def best_next(news: Sequence[float], price: float) -> list[int]:
    """For each slot, at whose beginning a poll just was, the slot at whose beginning the next is best.

    `news` are expected in the slots; `price` is in news times slots. The end counts as a poll. The least cost
    from s on is the least of lines in the sum of news before s, which falls as s does, and the lines come in
    the order of their slopes: so a queue of the lowest ones finds all of them in one pass.
    """
    number = len(news)
    before = [0.0, *accumulate(news)]
    moment = [0.0, *accumulate(each * (at + 0.5) for at, each in enumerate(news))]
    polls: list[int] = []  # the slots of the lines: line t has the slope -t
    lines: list[float] = []  # and their values where no news is before
    first, least, found = 0, 0.0, [0] * number
    for at in range(number - 1, -1, -1):
        poll = at + 1
        line = poll * before[poll] - moment[poll] + price + least
        while len(polls) - first >= 2 and (lines[-1] - line) * (polls[-2] - polls[-1]) >= (
            lines[-2] - lines[-1]
        ) * (polls[-1] - poll):
            polls.pop()
            lines.pop()
        polls.append(poll)
        lines.append(line)
        sofar = before[at]
        while (
            len(polls) - first >= 2
            and lines[first + 1] - polls[first + 1] * sofar <= lines[first] - polls[first] * sofar
        ):
            first += 1
        least = lines[first] - polls[first] * sofar + moment[at]
        found[at] = polls[first]
    return found
