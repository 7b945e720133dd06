"""A request and its reply on their way through the sandbox, and what a provider can be asked."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

from lifelogger.sandbox.grants import Token
from lifelogger.sandbox.ledger import Entry

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
    later: Callable[[], Awaitable[Reply]] | None = None
    """What is answered instead, after something that takes its time; outside of any transaction."""


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


def bearer(call: Call) -> str:
    scheme, _, token = call.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def basic(call: Call) -> tuple[str, str]:
    """Client id and secret of HTTP Basic; empty when there are none."""
    scheme, _, text = call.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return "", ""
    try:
        client, _, secret = base64.b64decode(text, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return "", ""
    return client, secret


def whole(value: object) -> TypeGuard[int]:
    """Whether something is a whole number from 0 to `MOST`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST
