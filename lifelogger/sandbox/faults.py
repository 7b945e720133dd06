"""What goes wrong on purpose: faults break replies, holds keep requests open until they are released.

Both choose requests by person, and by a pattern over method and route (`GET /athlete/activities`, `GET /*`,
`*`) or over the method and the very path (`GET /activities/123`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from random import Random
from typing import Any

from lifelogger.sandbox.calls import Mistake

UNSET: Any = object()
FRAMING = ("content-length", "transfer-encoding")
CUTS = ("before", "middle", "after")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, as far as faults and holds look at it."""

    provider: str
    route: str
    """Its route's label; empty when there is no such route."""
    path: str
    """Method and path, below the base of the API."""
    person: str | None


@dataclass(slots=True, kw_only=True)
class Choice:
    """Which requests are meant."""

    id: int
    match: str
    provider: str | None = None
    person: str | None = None
    times: int | None = None
    """How many requests; None: all that come."""
    skip: int = 0
    """How many to let pass first."""
    share: float = 1
    """How many of those that fit then are meant: 0.02 are two in a hundred, by chance, each time the same."""
    seen: int = 0
    hits: int = 0

    def takes(self, asked: Asked) -> bool:
        """Whether it is this one's turn; counts what it lets pass."""
        if (self.times is not None and self.hits >= self.times) or not self.fits(asked):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.seen += 1
        if self.share < 1 and Random(f"{self.match}/{self.share}/{self.seen}").random() >= self.share:
            return False
        self.hits += 1
        return True

    def fits(self, asked: Asked) -> bool:
        return (
            (fnmatchcase(asked.route, self.match) or fnmatchcase(asked.path, self.match))
            and self.provider in (None, asked.provider)
            and self.person in (None, asked.person)
        )


@dataclass(slots=True, kw_only=True)
class Fault(Choice):
    """A broken reply. With nothing but `headers`, `delay` or `trickle` the true answer is given, altered."""

    status: int | None = None
    body: str | None = None
    """Sent as it is."""
    json: Any = UNSET
    headers: dict[str, str | None] | None = None
    """Set in the reply, or taken away where None."""
    delay: float = 0
    """Real seconds before anything happens."""
    cut: str | None = None
    """The connection ends without a reply, `before` the request is carried out or `after` that, or in
    the `middle` of the body."""
    redirect: str | None = None
    trickle: float = 0
    """Real seconds between two bytes of the body."""
    size: int | None = None
    """Bytes of a body that says nothing."""
    endless: bool = False
    """Lists never end: their first page comes again and again."""
    count: bool = True
    """Whether the request counts toward the limits."""

    @property
    def replaces(self) -> bool:
        """Whether the request is answered without being carried out."""
        replaced = (self.status, self.body, self.redirect, self.size)
        return any(value is not None for value in replaced) or self.json is not UNSET or self.cut == "before"

    def describe(self) -> dict[str, Any]:
        """As the control API lists it."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in values.items() if value is not UNSET}


@dataclass(slots=True, kw_only=True)
class Hold(Choice):
    """Keeps requests open."""

    released: asyncio.Event = field(default_factory=asyncio.Event)

    def describe(self) -> dict[str, Any]:
        return {"id": self.id, "match": self.match, "person": self.person, "reached": self.hits}


@dataclass
class Faults:
    """All faults and holds there are, by id."""

    faults: dict[int, Fault] = field(default_factory=dict)
    holds: dict[int, Hold] = field(default_factory=dict)
    last: int = 0

    def add_fault(self, values: dict[str, Any]) -> Fault:
        """Raises `Mistake` on a value that cannot be."""
        fault = Fault(**self._checked(values, FAULT_TYPES))
        if fault.cut is not None and fault.cut not in CUTS:
            raise Mistake(f"cut: {fault.cut!r} is none of {', '.join(CUTS)}")
        if fault.status is not None and not 200 <= fault.status <= 599:
            raise Mistake(f"status: {fault.status} is not between 200 and 599")
        if not any((fault.replaces, fault.cut, fault.headers, fault.delay, fault.trickle, fault.endless)):
            raise Mistake("a fault does something: status, body, json, headers, delay, cut, redirect, …")
        texts = [fault.redirect, *(fault.headers or {}), *(fault.headers or {}).values()]
        if any(text is not None and not is_header(text) for text in texts):
            raise Mistake(f"headers: {texts!r} cannot stand in the head of a reply")
        if any(name.lower() in FRAMING for name in fault.headers or {}):
            raise Mistake(f"headers: {' and '.join(FRAMING)} are the server's; see `cut` for a short body")
        self.faults[fault.id] = fault
        return fault

    def add_hold(self, values: dict[str, Any]) -> Hold:
        hold = Hold(**self._checked(values, CHOICE_TYPES))
        self.holds[hold.id] = hold
        return hold

    def release(self, ids: Iterable[int]) -> None:
        for id_ in ids:
            self.holds.pop(id_).released.set()

    def fault(self, asked: Asked) -> Fault | None:
        return next((fault for fault in self.faults.values() if fault.takes(asked)), None)

    def hold(self, asked: Asked) -> Hold | None:
        return next((hold for hold in self.holds.values() if hold.takes(asked)), None)

    def clear(self) -> None:
        self.faults.clear()
        self.release(list(self.holds))

    def _checked(self, values: dict[str, Any], types: dict[str, tuple[type, ...]]) -> dict[str, Any]:
        if not isinstance(values.get("match"), str):
            raise Mistake("match: which requests? For example `GET /athlete/activities` or `*`")
        for name, value in values.items():
            if name not in types:
                raise Mistake(f"no option {name!r}: one of {', '.join(types)}")
            if name != "json" and value is not None and type(value) not in types[name]:
                raise Mistake(f"{name}: {value!r} is not {' or '.join(one.__name__ for one in types[name])}")
            if name in POSITIVE and value is not None and value < 0:
                raise Mistake(f"{name}: {value!r} is less than 0")
            if name == "share" and value is not None and not 0 < value <= 1:
                raise Mistake(f"share: {value!r} is not more than 0 and at most 1")
        self.last += 1
        given = {name: value for name, value in values.items() if value is not None or name == "json"}
        return {"id": self.last, **given}


def is_header(text: object) -> bool:
    """Whether something is text that HTTP can carry in a header."""
    return isinstance(text, str) and text.isprintable() and all(ord(letter) < 256 for letter in text)


CHOICE_TYPES: dict[str, tuple[type, ...]] = {
    "match": (str,),
    "provider": (str,),
    "person": (str,),
    "times": (int,),
    "skip": (int,),
    "share": (int, float),
}
FAULT_TYPES: dict[str, tuple[type, ...]] = {
    **CHOICE_TYPES,
    "status": (int,),
    "body": (str,),
    "json": (object,),
    "headers": (dict,),
    "delay": (int, float),
    "cut": (str,),
    "redirect": (str,),
    "trickle": (int, float),
    "size": (int,),
    "endless": (bool,),
    "count": (bool,),
}
POSITIVE = ("times", "skip", "delay", "trickle", "size")
