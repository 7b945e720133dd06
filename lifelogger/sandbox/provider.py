"""What every simulated provider is to the server: routes, who asks, what it costs, what is answered.

A provider is one further module with one subclass. Faults, holds and the ledger are around it and not
its business.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, NamedTuple, TypeGuard

from lifelogger.sandbox.activities import Activities, Shown
from lifelogger.sandbox.clock import Clock
from lifelogger.sandbox.grants import Grants, Token
from lifelogger.sandbox.ledger import OTHER, Entry, Ledger
from lifelogger.sandbox.people import People, Person
from lifelogger.sandbox.state import State

MOST = 10**9
"""The largest number that a setting, a limit or a count can be given."""
JSON = "application/json; charset=utf-8"


class Mistake(Exception):
    """What the control API was asked makes no sense; the message says why."""


@dataclass(slots=True)
class Reply:
    """An answer before it is sent."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = JSON


def json_reply(status: int, value: Any) -> Reply:
    return Reply(status, compact(value))


def compact(value: Any) -> bytes:
    """JSON without spaces; escaped, so that half a surrogate pair can be served too."""
    return json.dumps(value, separators=(",", ":")).encode()


@dataclass(slots=True)
class Call:
    """A request on its way through the sandbox. What is asked in vain is empty or None."""

    entry: Entry
    """How the ledger writes it down; its note says what was wrong."""
    method: str
    path: str
    """Below the provider's name."""
    headers: Mapping[str, str]
    """Names are in lower case."""
    query: Mapping[str, Sequence[str]]
    form: Mapping[str, str]
    now: float
    """When it came, on the sandbox's clock."""
    body: bytes = b""
    route: Route | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    """What the route's path has in braces."""
    client: str = ""
    """The application it counts for."""
    token: Token | None = None
    """The token it shows, working or not."""
    pools: tuple[str, ...] = ()
    """What it was counted into."""
    refused: bool = False
    """More was asked than the limits allow."""
    endless: bool = False
    """A fault wants lists that never end."""

    def asked(self, name: str) -> str | None:
        """The first value of a parameter of the query."""
        values = self.query.get(name)
        return values[0] if values else None


class Route(NamedTuple):
    """One thing a provider can be asked."""

    label: str
    """How faults, holds and the ledger call it: `GET /activities/{id}`."""
    kind: str
    method: str
    pattern: re.Pattern[str]
    answer: Callable[[Call], Reply]


def route(kind: str, label: str, answer: Callable[[Call], Reply], base: str = "") -> Route:
    """A route at the path of its label below `base`; `{id}` stands for a number, `{word}` for a segment."""
    method, path = label.split(" ", 1)
    pattern = re.escape(base + path).replace(r"\{id\}", r"(?P<id>\d{1,19})")
    pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", pattern)
    return Route(label, kind, method, re.compile(pattern), answer)


class Provider(ABC):
    """A simulated cloud. Used from the event loop's thread alone; never waits."""

    name: ClassVar[str]
    title: ClassVar[str]
    base: ClassVar[str]
    """The path of its API."""
    defaults: ClassVar[Mapping[str, Any]]
    """Settings that the control API can change, and what they are at first."""
    pools: ClassVar[Mapping[str, tuple[int, ...]]]
    """What it counts, and its windows in seconds. A request of one pool counts in those after it, too."""

    def __init__(
        self, state: State, clock: Clock, people: People, activities: Activities, ledger: Ledger
    ) -> None:
        self.state = state
        self.clock = clock
        self.people = people
        self.activities = activities
        self.ledger = ledger
        self.grants = Grants(state, self.name)
        self.routes: Sequence[Route] = ()
        self.load()

    def load(self) -> None:
        """Take up what the state knows, and forget everything else."""
        self.settings = {**self.defaults, **self.state.get(f"{self.name}.settings", {})}
        self.limits: dict[str, list[int]] = self.state.get(f"{self.name}.limits", self.first_limits())
        self.secrets: dict[str, str] = self.state.get(f"{self.name}.secrets", {})

    def find_route(self, method: str, path: str) -> tuple[Route | None, Mapping[str, str]]:
        for one in self.routes:
            if one.method == method and (match := one.pattern.fullmatch(path)):
                return one, match.groupdict()
        return None, {}

    def has_route(self, match: str) -> bool:
        """Whether a pattern over labels or paths (`GET /activities/12*`) can mean a request at all."""
        method, _, path = match.replace("*", "1").partition(" ")
        routes = [self.find_route(method, base + path)[0] for base in ("", self.base)]
        return any(routes) or any(fnmatchcase(one.label, match) for one in self.routes)

    def kind(self, call: Call) -> str:
        return call.route.kind if call.route else OTHER

    def knows_client(self, client: str, secret: str) -> bool:
        """Whether the secret is the application's; the first one that an application shows becomes it."""
        if not client or not secret:
            return False
        if client not in self.secrets:
            self.secrets[client] = secret
            self.state.put(f"{self.name}.secrets", self.secrets)
        return self.secrets[client] == secret

    def configure(self, changes: Mapping[str, Any]) -> None:
        """Change settings. Raises `Mistake`."""
        for name, value in changes.items():
            self.check_setting(name, value)
        self.settings.update(changes)
        self.state.put(f"{self.name}.settings", self.settings)

    def limit(self, changes: Mapping[str, Any]) -> None:
        """Change the limits of pools. Raises `Mistake`."""
        for pool, numbers in changes.items():
            lengths = self.pools.get(pool)
            if lengths is None:
                raise Mistake(f"no pool {pool!r}: one of {', '.join(self.pools)}")
            if not isinstance(numbers, list) or len(numbers) != len(lengths) or not all(map(whole, numbers)):
                raise Mistake(f"{pool}: {numbers!r} is not a whole number for each of {lengths} seconds")
        self.limits.update(changes)
        self.state.put(f"{self.name}.limits", self.limits)

    def counted(self, pool: str) -> tuple[str, ...]:
        """The pools that a request of one pool counts in. Raises `Mistake`."""
        names = tuple(self.pools)
        if pool not in names:
            raise Mistake(f"no pool {pool!r}: one of {', '.join(names)}")
        return names[names.index(pool) :]

    def pool(self, client: str, pool: str) -> str:
        """How the ledger calls a pool of an application."""
        return f"{self.name}:{client}:{pool}"

    def spend(self, client: str, pools: Sequence[str], now: float, number: int = 1) -> bool:
        """Count requests; return whether more was asked than allowed. Belongs into a transaction."""
        over = False
        for pool in pools:
            for seconds, limit in zip(self.pools[pool], self.limits[pool], strict=True):
                used = self.ledger.spend(self.pool(client, pool), seconds, now, number)
                over = over or used > limit
        return over

    def usage(self, client: str, pool: str, now: float) -> list[int]:
        """What is used of each window of a pool."""
        name = self.pool(client, pool)
        return [self.ledger.used(name, seconds, now) for seconds in self.pools[pool]]

    @abstractmethod
    def first_limits(self) -> dict[str, list[int]]:
        """Requests per pool and window, as a new application gets them."""

    @abstractmethod
    def check_setting(self, name: str, value: object) -> None:
        """Raises `Mistake` unless a setting can have this value."""

    @abstractmethod
    def identify(self, call: Call) -> None:
        """Find out who asks: `client`, `token`, and the person in the entry."""

    @abstractmethod
    def count(self, call: Call) -> None:
        """Count the request into the windows of its arrival. Belongs into a transaction."""

    @abstractmethod
    def answer(self, call: Call) -> Reply:
        """Do what is asked. Belongs into a transaction."""

    @abstractmethod
    def failure(self, status: int) -> Reply:
        """An error as this provider words it."""

    @abstractmethod
    def headers(self, call: Call) -> dict[str, str]:
        """Headers of whatever is replied to this request."""

    @abstractmethod
    def usage_note(self, call: Call) -> str:
        """The used windows for the ledger."""

    @abstractmethod
    def connect(self, person: Person, client: str, scopes: Sequence[str] | None) -> dict[str, Any]:
        """Grant at once what a person would on the page; the tokens as an import line has them."""

    @abstractmethod
    def account(self, person: Person) -> dict[str, Any]:
        """Who a person is at this provider."""

    @abstractmethod
    def item(self, shown: Shown) -> Any:
        """An activity as the provider lists it."""

    @abstractmethod
    def start_in(self, fields: Mapping[str, Any]) -> int | None:
        """The start (epoch seconds) that edited fields move an activity to; None: they do not."""


def whole(value: object) -> TypeGuard[int]:
    """Whether something is a whole number from 0 to `MOST`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST
