"""Webhooks as the clouds send them: who subscribed, what happened, and deliveries that are tried again.

What an event looks like, how it is signed and how often it is tried is the provider's. Deliveries go to this
machine only: the sandbox must not knock at anybody else's door.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlencode, urlsplit

from lifelogger.sandbox.calls import Mistake, compact
from lifelogger.sandbox.people import Person

if TYPE_CHECKING:
    from lifelogger.sandbox.provider import Provider

LOOK_SECONDS = 0.05
"""How often it is looked for what is due, in real time."""
SLOW_SECONDS = 600
"""How often nights and days are looked at, in the sandbox's time; activities are at every look."""
LONGEST_LOOK = timedelta(days=7)
"""So far back goes what a clock that jumps brings."""
KEPT = 10_000
"""Deliveries that are remembered."""


@dataclass(slots=True)
class Subscription:
    """Where an application wants to be told, and what of."""

    id: str
    client: str
    callback: str
    secret: str
    about: list[str]
    created: float
    expires: float | None = None


class Event(NamedTuple):
    """Something that happened to an item of a person's stream."""

    person: Person
    stream: str
    key: str
    what: str
    """`create`, `update`, `delete`; `revoke`: the person took the grant back."""
    at: float


@dataclass(slots=True)
class Delivery:
    """One event on its way to one subscription."""

    id: int
    subscription: str
    url: str
    person: str
    stream: str
    what: str
    body: bytes
    due: float
    """When it is tried next, on the sandbox's clock."""
    tries: int = 0
    status: int | None = None
    """Of the last reply; 0: none came."""
    done: bool = False
    forged: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    """As it was sent last."""

    def describe(self) -> dict[str, Any]:
        return {**asdict(self), "body": self.body.decode()}


@dataclass(slots=True)
class Mischief:
    """What goes wrong with the next deliveries."""

    lost: int = 0
    """So many are never sent."""
    doubled: int = 0
    """So many are sent twice."""
    late: float = 0.0
    """All are sent so many seconds later."""
    reordered: int = 0
    """So many are gathered, and then sent in reverse."""
    gathered: list[Delivery] = field(default_factory=list)


class Hooks:
    """The webhooks of one provider. Used from the event loop's thread alone."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self.load()

    def load(self) -> None:
        """Take up what the state knows, and forget everything else."""
        known = self.provider.state.get(f"{self.provider.name}.hooks", [])
        self.subscriptions = {each["id"]: Subscription(**each) for each in known}
        self.deliveries: deque[Delivery] = deque(maxlen=KEPT)
        self.mischief = Mischief()
        self.numbers = itertools.count(1)
        self.looked_at = self.looked_slowly_at = self.provider.clock.now()
        self.told: set[tuple[str, str]] = set()
        self.slow: deque[tuple[Person, float, float]] = deque()

    # Subscriptions

    def add(self, subscription: Subscription) -> None:
        if not self.subscriptions:
            self.looked_at = self.looked_slowly_at = self.provider.clock.now()
        self.subscriptions[subscription.id] = subscription
        self.keep()

    def remove(self, id_: str) -> bool:
        found = self.subscriptions.pop(id_, None)
        self.keep()
        return found is not None

    def keep(self) -> None:
        told = [asdict(each) for each in self.subscriptions.values()]
        self.provider.state.put(f"{self.provider.name}.hooks", told)

    def of(self, client: str) -> list[Subscription]:
        now = self.provider.clock.now()
        alive = [each for each in self.subscriptions.values() if each.expires is None or each.expires > now]
        return [each for each in alive if each.client == client]

    # What happens

    def happened(self, person: Person, stream: str, key: str, what: str) -> None:
        """Tell whoever subscribed, and was let in by the person."""
        if what == "create":
            self.told.add((stream, key))
        event = Event(person, stream, key, what, self.provider.clock.now())
        self.queue(event)

    def queue(self, event: Event, forged: bool = False) -> int:
        """Put deliveries on their way; returns how many."""
        clients = {client for name, client in self.provider.grants.live() if name == event.person.user_id}
        number = 0
        for client in clients:
            for each in self.of(client):
                content = self.provider.hook_event(event, each)
                if content is not None:
                    number += 1
                    self.send(each, event, compact(content), forged)
        return number

    def send(self, to: Subscription, event: Event, body: bytes, forged: bool = False) -> None:
        mischief, now = self.mischief, self.provider.clock.now()
        made = Delivery(
            next(self.numbers), to.id, to.callback, event.person.user_id, event.stream, event.what, body,
            now + mischief.late, forged=forged,
        )  # fmt: skip
        if forged:
            self.deliveries.append(made)
        elif mischief.lost > 0:
            mischief.lost -= 1
        elif mischief.reordered > 0:
            mischief.reordered -= 1
            mischief.gathered.append(made)
            if not mischief.reordered:
                self.deliveries.extend(reversed(mischief.gathered))
                mischief.gathered = []
        else:
            self.deliveries.append(made)
            if mischief.doubled > 0:
                mischief.doubled -= 1
                self.deliveries.append(Delivery(**{**asdict(made), "id": next(self.numbers)}))

    def look(self) -> None:
        """Find what appeared since the last look: uploads at once, nights and days now and then."""
        now, since = self.provider.clock.now(), self.looked_at
        if not self.subscriptions:
            return
        self.looked_at = now
        people = {name for name, _ in self.provider.grants.live()}
        for name in people if now > since else ():
            person = self.provider.people.by_id[name]
            view = self.provider.view(person, now) if self.provider.activity_stream else None
            if view is None or view.begin <= since:
                continue
            for one in view.shown:
                place = (self.provider.activity_stream, str(one.activity.key))
                if since < one.activity.uploaded <= now and place not in self.told:
                    self.queue(Event(person, *place, "create", now))
        if abs(now - self.looked_slowly_at) >= SLOW_SECONDS:
            since, self.looked_slowly_at = min(self.looked_slowly_at, now), now
            self.slow += [(self.provider.people.by_id[name], since, now) for name in sorted(people)]
        if self.slow:  # one of them a look: all at once would keep replies waiting
            for event in self._changed(*self.slow.popleft()):
                self.queue(event)

    def _changed(self, person: Person, since: float, now: float) -> Iterator[Event]:
        """What is otherwise than it was, in all streams but that of activities."""
        end = datetime.fromtimestamp(now, UTC)
        begin = max(datetime.fromtimestamp(since, UTC), end - LONGEST_LOOK)
        days = (begin.date() - timedelta(days=2), end.date() + timedelta(days=1))
        for stream in self.provider.hook_streams:
            if stream == self.provider.activity_stream:
                continue
            before, after = (
                {item.key: item.value for item in self.provider.points(person, stream, *days, moment)}
                for moment in (begin.timestamp(), now)
            )
            for key, value in after.items():
                if before.get(key) != value:
                    gone = self.provider.is_tombstone(stream, value)
                    yield Event(
                        person,
                        stream,
                        key,
                        "delete" if gone else "update" if key in before else "create",
                        now,
                    )

    # Deliveries

    async def deliver(self) -> None:
        """Try whatever is due, once, in order."""
        now = self.provider.clock.now()
        due = [each for each in self.deliveries if not each.done and each.due <= now]
        for each in due:
            await self._try(each)

    async def _try(self, delivery: Delivery) -> None:
        to = self.subscriptions.get(delivery.subscription)
        if to is None:
            delivery.done = True
            return
        now = self.provider.clock.now()
        headers = self.provider.hook_headers(delivery.body, to, now, forged=delivery.forged)
        delivery.headers = headers
        delivery.tries += 1
        delivery.status, _ = await call(
            "POST", delivery.url, delivery.body, headers, self.provider.hook_timeout
        )
        rest = self.provider.hook_retries[delivery.tries - 1 :]
        if 200 <= delivery.status < 300 or delivery.forged or not rest:
            delivery.done = True
        elif delivery.status == 410 and self.provider.hook_gone:
            delivery.done = True
            self.remove(to.id)
        else:
            delivery.due = now + rest[0]

    def forge(self, person: Person, stream: str, number: int) -> int:
        """Send what somebody else may have written: of the right form, without what only we can know."""
        event = Event(person, stream, "1", "create", self.provider.clock.now())
        return sum(self.queue(event, forged=True) for _ in range(number))


def here(url: str) -> str:
    """A callback on this machine. Raises `Mistake` for any other."""
    try:
        parts = urlsplit(url)
        host, fits = parts.hostname or "", parts.scheme in ("http", "https") and (parts.port or 1) > 0
    except ValueError:
        host, fits = "", False
    if not fits or not (host in ("localhost", "::1") or host.startswith("127.")):
        raise Mistake("the sandbox calls this machine only")
    return url


async def call(
    method: str, url: str, body: bytes | None, headers: Mapping[str, str], seconds: float
) -> tuple[int, Any]:
    """Call an application; its status (0: it did not answer in time) and its JSON, if it is some."""
    return await asyncio.to_thread(_call, method, url, body, dict(headers), seconds)


async def challenge(url: str, query: Mapping[str, str], seconds: float) -> tuple[int, Any]:
    """Ask an application whether a callback is its own."""
    joint = "&" if urlsplit(url).query else "?"
    return await call("GET", f"{url}{joint}{urlencode(query)}", None, {}, seconds)


def _call(
    method: str, url: str, body: bytes | None, headers: dict[str, str], seconds: float
) -> tuple[int, Any]:
    parts = urlsplit(here(url))
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=seconds)
    try:
        target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        connection.request(method, target, body, {"Content-Type": "application/json", **headers})
        reply = connection.getresponse()
        text = reply.read(100_000)
    except (OSError, http.client.HTTPException):
        return 0, None
    finally:
        connection.close()
    try:
        return reply.status, json.loads(text)
    except ValueError:
        return reply.status, None


async def run(providers: Mapping[str, Provider]) -> None:
    """Look and deliver for as long as the sandbox runs; no provider waits for another."""

    async def one(hooks: Hooks) -> None:
        while True:
            hooks.look()
            await hooks.deliver()
            await asyncio.sleep(LOOK_SECONDS)

    await asyncio.gather(*(one(provider.hooks) for provider in providers.values()))
