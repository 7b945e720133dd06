"""Request budgets: never more than a provider allows in any of its own windows, with any number of workers.

    ticket = budget.take(pools)      # before a request: charged in every window of every pool, or BudgetSpent
    budget.settle(ticket, usage=…)   # after it: what the reply said corrects what was counted

A **pool** is what requests spend from together ("reads", "overall"); it has one or several **windows**. The
definitions are those of the `limits` library, and so is the Redis storage. Its strategies are not used: they
begin a window at its first hit, keep a new count for a changed amount, count refusals, and hit one limit
after the other. Here one script (`budget.lua`) charges all windows or none.

How it counts:

- Windows begin at multiples of their length since the epoch, **on the provider's clock**. The clock is that
  of Redis, one for all workers. Every reply's `Date` bounds how far the provider's is ahead of it; until one
  came, a second either way. A request is charged to each window that the provider's clock may be in.
- The start is in the counter's key, the amount is not: a limit changed in mid-window keeps its count. A
  limit that a reply reports wins over the settings, whether it grew or shrank.
- A request is **in flight** from `take` to `settle`, or until its lease ends when nobody settles it. A
  window that opens meanwhile begins with the requests in flight: they count in both. One that got no answer
  stays for its lease, as the provider may have counted it. When a reply may belong to either of two windows
  (it was under way at the boundary) it can only raise the older: taken for the newer, the last count of the
  one would close the other.
- With `most` as the highest usage that replies reported of a window, and `others` as the requests which may
  have been counted after that reply was written, the truth lies between `most` and `most + others`, whatever
  the order in which replies arrive. A count outside is set to `most + others`: below, because others spend
  from the same budget; above, because a request was never counted. A count between stays.
- A count is **unknown** when it was lost, or when the window may have been open before counting began:
  Redis is new, was emptied, was restarted or failed over (an old snapshot looks like a count), or evicted
  the counter; or no reply has told the provider's time yet. Then one request at a time goes out
  (`Ticket.probe`) until a reply tells; all others get `CountUnknown`. Where replies do not report, what we
  counted is all there is to know.
- A 429 closes what it shows as spent; if it shows nothing, its pools until it says, or else to the end of
  their shortest window.

What nobody can promise: that a probe does not find the window spent, and that no other program sends
between a reply and our next request.
"""

from __future__ import annotations

import json
import logging
import math
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from importlib import resources
from typing import Any

from limits import RateLimitItem, parse_many
from limits.storage import RedisStorage
from redis.backoff import NoBackoff
from redis.retry import Retry

from lifelogger import redis_url
from lifelogger.errors import BudgetSpent, Unavailable
from lifelogger.providers.base import Pool, Usage

__all__ = ["Budget", "BudgetSpent", "CountUnknown", "Pool", "Ticket", "Usage", "Window"]

log = logging.getLogger(__name__)

LEASE_SECONDS = 90.0
"""How long a request counts as in flight when nobody settles it: longer than any request may take."""
TIMEOUT_SECONDS = 5.0
DAY = 86_400
PROBE_PATIENCE = timedelta(seconds=1)
"""After which one may ask again while another request learns the count."""


class CountUnknown(BudgetSpent):
    """How much is spent is being learned from the one request that is out; `until` is a moment away."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right to send one request. Settle it whatever became of the request."""

    pools: tuple[Pool, ...]
    taken: float
    """When, in epoch seconds on our clock."""
    probe: bool
    """Whether this request is the one that tells an unknown count."""
    id: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Window:
    """One window of a pool as it stands now."""

    pool: Pool
    seconds: int
    start: datetime
    end: datetime
    """On the provider's clock, as `start`: what a person reads in its documents. Plan with `opens`."""
    opens: datetime
    """When the next window has opened for certain, on our clock."""
    limit: int
    """The provider's own, if a reply told it, else that of the settings."""
    used: int
    """Including what is in flight; a lower bound while not `known`."""
    in_flight: int
    """Requests of the pool that are out now."""
    known: bool
    """Whether `used` can be trusted: see `CountUnknown`."""
    remaining: int
    """How many requests may go out now, as far as this window is concerned."""
    closed_until: datetime | None
    """Set while the provider refuses requests of this pool, whatever was counted."""
    reserve: int = 0
    """How many requests of the whole window others may want ..."""
    held: int = 0
    """... and of them those that are kept for the rest of it."""


class Budget:
    """The request budgets of all providers in one Redis; safe to share between threads.

    `clock` gives epoch seconds and is for tests: without it Redis tells the time, to all workers the same.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "lifelogger",
        lease: float = LEASE_SECONDS,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._lease = lease
        self._clock = clock
        connections = redis_url.pool(
            url,
            timeout=TIMEOUT_SECONDS,
            connect_timeout=TIMEOUT_SECONDS,
            # Once more at once: a pooled connection may be from before a restart. The script knows
            # a take that it has already done.
            retry=Retry(NoBackoff(), 1),
        )
        # The storage makes no connection of its own, so it need not know where they go.
        self._storage = _Storage("redis://", connection_pool=connections, key_prefix=f"{prefix}:budget")

    def take(
        self,
        pools: Sequence[Pool],
        *,
        leave: float = 0,
        own: Collection[Pool] = (),
        leave_share: float = 0,
        pace: float | None = None,
    ) -> Ticket:
        """Charge one request to every window of `pools`.

        `leave` requests (except in the pools that are one's `own`), and of this share of each window's limit
        (0 to 1) what belongs to the time to come, must remain afterwards: what background work keeps free for
        others, who name none. Of windows of a day it is not more than they used of late. With `pace` (the
        seconds between two rounds of that work) the rest is spread evenly over each window: of half a day
        half may be spent, and one round's worth ahead. Raises `BudgetSpent`, or `CountUnknown`, having
        charged nothing; its `until` is when the last of the windows that refuse has opened.
        Raises `Unavailable` when Redis cannot count: then nothing may be sent.
        """
        id = uuid.uuid4().hex
        reply = self._call(
            "take",
            pools,
            lambda pool: {"own": pool in own},
            id=id,
            leave=leave,
            leave_share=leave_share,
            pace=pace,
        )
        if "refusal" in reply:
            raise _refusal(reply["refusal"], pools, _instant(reply["now"]))
        return Ticket(tuple(pools), float(reply["taken"]), reply["probe"], id)

    def settle(
        self,
        ticket: Ticket,
        *,
        usage: Mapping[str, Usage] | None = None,
        date: datetime | None = None,
        limited: bool | Collection[str] = False,
        retry_at: datetime | None = None,
        answered: bool = True,
    ) -> datetime | None:
        """Tell what became of a request; return until when its pools are closed if this reply closed them.

        `usage` is what the headers say, by name of the pool; `date` is the header `Date`; `limited` says
        that the reply was a 429 (for all pools, or for those named); `retry_at` is when the provider wants
        to be asked again, on its clock: `date` + Retry-After, or a reset header. `answered` is False when
        no reply came. Raises `Unavailable` when Redis does not answer: the reply may be used all the same,
        its ticket just stays in flight until the lease ends.
        """
        told = {}
        for pool in ticket.pools:
            reported = (usage or {}).get(pool.name)
            if reported is None or not pool.limits:
                continue
            if len(reported.limits) == len(reported.used) == len(pool.limits):
                told[pool.name] = {"reported": reported.limits, "used": reported.used}
            else:
                log.warning(
                    "%s: replies tell of %d windows, the settings of %d (%s): the reply is not used",
                    _title(pool),
                    len(reported.used),
                    len(pool.limits),
                    ", ".join(pool.limits),
                )
        everything = limited is True or (not limited and retry_at is not None)
        named = () if isinstance(limited, bool) else limited
        reply = self._call(
            "settle",
            ticket.pools,
            lambda pool: {"limited": everything or pool.name in named, **told.get(pool.name, {})},
            id=ticket.id,
            taken=ticket.taken,
            date=date and date.timestamp(),
            retry_at=retry_at and retry_at.timestamp(),
            answered=answered,
        )
        return _up(_instant(reply["opens"])) if "opens" in reply else None

    def windows(self, pools: Sequence[Pool], *, leave_share: float = 0) -> list[Window]:
        """How the current windows of `pools` stand, in their order; changes nothing. Raises `Unavailable`.

        `leave_share` as in `take`: it says what is held for others.
        """
        reply = self._call("windows", pools, leave_share=leave_share)
        now = _instant(reply["now"])
        return [_window(row, pools[row["pool"] - 1], now) for row in reply["windows"]]

    def _call(
        self,
        verb: str,
        pools: Sequence[Pool],
        details: Callable[[Pool], dict[str, Any]] = lambda pool: {},
        **arguments: Any,
    ) -> dict[str, Any]:
        call = {
            "verb": verb,
            "now": self._clock and self._clock(),
            "lease": self._lease,
            "pools": [
                {
                    "limits": _spelled(pool.limits),
                    "reports": pool.reports,
                    **details(pool),
                }
                for pool in pools
            ],
            **{name: value for name, value in arguments.items() if value is not None},
        }
        if call["now"] is None:
            del call["now"]
        return self._storage.run([pool.key for pool in pools], call)


class _Storage(RedisStorage):
    """The `limits` storage with our script: its connection and prefix, its counters readable with `get`."""

    DEPENDENCIES = {"redis": RedisStorage.DEPENDENCIES["redis"]}  # noqa: RUF012
    """Where Valkey's client is installed as well, it would be imported for nothing."""

    def initialize_storage(self, _uri: str) -> None:
        super().initialize_storage(_uri)
        script = resources.files("lifelogger").joinpath("budget.lua").read_bytes()
        self._script = self.get_connection().register_script(script)

    def run(self, roots: Sequence[str], call: dict[str, Any]) -> dict[str, Any]:
        """Run the script. Raises `Unavailable` for whatever Redis has against it."""
        trouble = None
        try:
            answer = self._script([self.prefixed_key(root) for root in roots], [json.dumps(call)])
        except self.base_exceptions as error:
            trouble = f"{type(error).__name__}: {error!s:.200}"
        if trouble is not None:  # raised here, so that the error has no cause: see errors.py
            raise Unavailable(f"Redis cannot count requests now, so none is sent ({trouble})")
        found: dict[str, Any] = json.loads(answer)
        return found


@lru_cache(maxsize=1024)
def _items(limits: tuple[str, ...]) -> tuple[RateLimitItem, ...]:
    return tuple(item for limit in limits for item in parse_many(limit))


@lru_cache(maxsize=1024)
def _spelled(limits: tuple[str, ...]) -> list[dict[str, int]]:
    """The limits as the script reads them."""
    return [{"seconds": item.get_expiry(), "amount": item.amount} for item in _items(limits)]


def _instant(stamp: str | float) -> datetime:
    return datetime.fromtimestamp(float(stamp), UTC)


def _up(instant: datetime) -> datetime:
    """The next whole second: whoever comes back then is never early by a rounding."""
    return datetime.fromtimestamp(math.ceil(instant.timestamp()), UTC)


def _title(pool: Pool) -> str:
    return pool.title or f"{pool.key.split(':')[0]} {pool.name}"


def _clock_time(instant: datetime) -> str:
    return f"{instant:%H:%M:%S}".removesuffix(":00") + " UTC"


def _span(item: RateLimitItem) -> str:
    name = item.GRANULARITY.name
    return name if item.multiples == 1 else f"{item.multiples} {name}s"


def _refusal(row: dict[str, Any], pools: Sequence[Pool], now: datetime) -> BudgetSpent:
    pool, opens = pools[row["pool"] - 1], _up(_instant(row["opens"]))
    if row["kind"] == "unknown":
        return CountUnknown(
            f"{_title(pool)}: how much is used is being learned from one request", now + PROBE_PATIENCE
        )
    if row["kind"] == "closed":
        return BudgetSpent(f"{_title(pool)}: the provider refuses requests until {_clock_time(opens)}", opens)
    item, used, limit = _items(pool.limits)[row["window"] - 1], int(row["used"]), int(row["limit"])
    window = f"in the {_span(item)} to {_clock_time(_instant(row['stop']))}"
    reason = f"{_title(pool)}: {used} of {limit} requests used {window}"
    if row["kind"] == "held":
        reason += f"; the last {limit - used} are held for others"
    return BudgetSpent(reason, opens, limit if item.get_expiry() >= DAY else None)


def _window(row: dict[str, Any], pool: Pool, now: datetime) -> Window:
    closed = _instant(row["closed"]) if "closed" in row else None
    limit, used, in_flight = int(row["limit"]), int(row["used"]), int(row["flying"])
    remaining = max(0, limit - used)
    if closed is not None and closed <= now:
        closed = None
    if closed is not None:
        remaining = 0
    elif not row["known"]:
        remaining = min(remaining, 0 if in_flight else 1)
    return Window(
        pool=pool,
        seconds=_items(pool.limits)[row["window"] - 1].get_expiry(),
        start=_instant(row["start"]),
        end=_instant(row["stop"]),
        opens=_up(_instant(row["opens"])),
        limit=limit,
        used=used,
        in_flight=in_flight,
        known=row["known"],
        remaining=remaining,
        closed_until=closed and _up(closed),
        reserve=int(row["reserve"]),
        held=int(row["held"]),
    )
