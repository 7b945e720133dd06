"""The contract of a provider: what one file in this folder has to say, and nothing else.

A provider turns requests into pages of records. It knows nothing of the database, the queue, the
locks, the budgets' counting or any other provider: it is given an `Http` that already asks the
budget, carries the token and turns trouble into the errors of `lifelogger.errors`.
"""

from __future__ import annotations

import hmac
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar, Protocol, TypeVar
from urllib.parse import urlencode

from lifelogger.errors import BadRecord, Forged, Refused, Unavailable

Json = Any
"""A parsed JSON value: hostile until a provider has looked at it."""
Day = TypeVar("Day", bound=date)

MOST_REPLIES = 200
"""Replies of one list before we conclude that it has no end."""
LONGEST = timedelta(days=366)
"""Nothing that is recorded as one item lasts longer."""


class Http(Protocol):
    """What a provider may do with the network. Every call costs one request of the budget."""

    def get(self, path: str, **params: str | int) -> Json:
        """Return the parsed JSON reply. Raises `Wait`, `SignInAgain` or `Refused`."""

    def post(self, path: str, body: Json) -> Json:
        """Send `body` as JSON; the rest as `get`."""


@dataclass(frozen=True, slots=True)
class Stream:
    """One kind of data of a connection, read with a cursor of its own."""

    name: str
    kind: str
    """The shape of its records: a key of docs/records.md, like `activity`."""
    scopes: tuple[str, ...] = ()
    """The stream is on when any one of these was granted; empty: it needs none."""
    optional: bool = False
    """Nothing of it is asked for unless the provider's `extra_streams` name it in the settings."""
    poll_cost: int = 1
    """Requests that a poll of it costs when there is no news."""

    def wanted(self, settings: Endpoints) -> bool:
        return not self.optional or self.name in settings.extra_streams


@dataclass(frozen=True, slots=True)
class Window:
    """The span of a stream to read: from `since` on, up to `until` (None: as new as there is)."""

    since: datetime
    until: datetime | None = None
    expect: int | None = None
    """How many records we hold of this span: a hint for the page size. None: unknown, many."""
    floor: datetime | None = None
    """The oldest record there is, as of a recent reading to the very end: a page that reaches
    it need not be followed by another. None: not known, read until the provider says so."""
    now: datetime | None = None
    """When the reading began, for a cloud that wants to be told an end of what it shall list."""

    @property
    def newest(self) -> datetime:
        """The end that such a cloud is told."""
        if self.until is None and self.now is None:
            raise ValueError("a window needs an end, or a now")
        return self.until or self.now  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Page:
    """Items as the provider sent them, and how far down they are complete."""

    items: Sequence[Json]
    reached: datetime | None
    """Everything of the window at or after this instant has been yielded now. None: not known
    yet (more pages of the same span follow), so nothing may be concluded from what is missing."""
    end: bool = False
    """The provider has nothing older at all, in the window or before it."""


@dataclass(frozen=True, slots=True)
class Record:
    """One normalised item. What the provider did not say is None; nothing is invented.

    Instants are UTC; `utc_offset_s` is the person's offset then, in seconds; `local_date` is the
    civil date in the person's zone and is never derived from an instant of another zone.
    """

    external_id: str
    kind: str
    ordered_at: datetime
    """Where the item lies in its stream: its start, or for a civil day that date at 00:00 UTC.
    Only for windows and order; what a person is shown is `start_at` or `local_date`."""
    start_at: datetime | None = None
    end_at: datetime | None = None
    utc_offset_s: int | None = None
    local_date: date | None = None
    type: str | None = None
    """Our vocabulary: docs/records.md."""
    provider_type: str | None = None
    title: str | None = None
    duration_s: float | None = None
    moving_s: float | None = None
    distance_m: float | None = None
    elevation_gain_m: float | None = None
    energy_j: float | None = None
    work_j: float | None = None
    heart_rate_avg_bpm: float | None = None
    heart_rate_max_bpm: float | None = None
    steps: int | None = None
    active_energy_j: float | None = None
    """Energy above what the body spends at rest."""
    heart_rate_min_bpm: float | None = None
    heart_rate_resting_bpm: float | None = None
    hrv_rmssd_ms: float | None = None
    """Heart rate variability: root mean square of successive differences."""
    spo2_avg_pct: float | None = None
    breaths_per_min: float | None = None
    score_pct: float | None = None
    """The provider's own score of the day or night, 0 to 100."""
    is_main_sleep: bool | None = None
    """False for a nap."""
    asleep_s: float | None = None
    awake_s: float | None = None
    light_sleep_s: float | None = None
    deep_sleep_s: float | None = None
    rem_sleep_s: float | None = None
    weight_kg: float | None = None


@dataclass(frozen=True, slots=True)
class Pool:
    """A set of request limits that the same requests spend from, all windows at once."""

    name: str
    key: str
    """Who shares it, for example `strava:<client id>:reads`."""
    limits: tuple[str, ...]
    """As in the settings: `("100/15 minutes", "1000/day")`."""
    reports: bool
    """Whether replies carry the usage in their headers."""
    title: str = ""
    """What a person knows it by; empty: the provider, which begins its key, and its name."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a reply's headers say of a pool, in the order of the pool's windows."""

    limits: tuple[int, ...]
    used: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Grant:
    """A token reply (RFC 6749, section 5.1), checked. Fields a provider left out are None."""

    access_token: str = field(repr=False)
    refresh_token: str | None = field(repr=False)
    expires_at: datetime
    scopes: tuple[str, ...] | None = None
    provider_user_id: str | None = None


@dataclass(frozen=True, slots=True)
class RevokeRequest:
    """What is POSTed to the `revoke_url` to end a grant (RFC 7009): each part may hold a token."""

    form: Mapping[str, str] = field(default_factory=dict, repr=False)
    query: Mapping[str, str] = field(default_factory=dict, repr=False)
    authenticated: bool = True
    """Whether the client's id and secret go along, as HTTP Basic (RFC 6749, 2.3.1)."""


@dataclass(frozen=True, slots=True)
class Call:
    """What came to our webhook address, as it came. Nothing of it is to be trusted yet."""

    method: str
    headers: Mapping[str, str] = field(repr=False)
    """Names are in lower case."""
    query: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Known:
    """What a provider's webhooks can be checked with, from our own store."""

    now: datetime
    subscriptions: frozenset[str] = frozenset()
    """The ids of the subscriptions that the provider told."""
    keys: Json = None
    """What `webhook_keys` returned last."""


@dataclass(frozen=True, slots=True)
class Event:
    """Where a provider says that there is news: no data, only where to look."""

    owner: str
    """The provider's id of the person."""
    streams: tuple[str, ...] = ()
    """The streams that it is in; empty: it may be in any."""
    item: str | None = None
    """The external id of the item that it is about, for a provider that has `item`."""
    span: tuple[datetime, datetime] | None = None
    """The time [since, until) that its data are of. Without `item` and `span` it is of the latest."""
    deauthorised: bool = False
    """The person took the grant back, it says: the next request finds out."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What a call means, once it is believed, and how it is answered."""

    events: tuple[Event, ...] = ()
    reply: Json = None
    status: int = 200
    signature: str | None = None
    """What no other call has: the same once more is not acted upon. None: it was not signed."""


@dataclass(frozen=True, slots=True)
class Subscription:
    """One subscription as the provider tells it."""

    id: str
    topic: str
    """What it is to: one of `webhook_topics`."""
    callback: str
    """Where its events go."""
    expires_at: datetime | None = None


class Ask(Protocol):
    """Requests of the application itself, with no person's token. Raises `Wait` or `Refused`."""

    @property
    def now(self) -> datetime: ...

    def __call__(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
        data: Mapping[str, str] | None = None,
        json: Json = None,
    ) -> Json: ...


class Secret(Protocol):
    """A setting that is not shown."""

    def get_secret_value(self) -> str: ...


class Endpoints(Protocol):
    """The part of the settings of an application at a provider that its module reads."""

    @property
    def suffix(self) -> str: ...
    @property
    def client_id(self) -> str: ...
    @property
    def client_secret(self) -> Secret: ...
    @property
    def api_url(self) -> str: ...
    @property
    def token_url(self) -> str: ...
    @property
    def webhook_secret(self) -> Secret: ...
    @property
    def webhook_keys_url(self) -> str: ...
    @property
    def project(self) -> str: ...
    @property
    def service_account(self) -> Secret: ...
    @property
    def authorize_url(self) -> str: ...
    @property
    def budget(self) -> tuple[str, ...]: ...
    @property
    def overall_budget(self) -> tuple[str, ...]: ...
    @property
    def user_budget(self) -> tuple[str, ...]: ...
    @property
    def extra_streams(self) -> tuple[str, ...]: ...


class Provider(ABC):
    """One cloud. Subclass it in a file of this folder; `docs/adding-a-provider.md` has the steps."""

    name: ClassVar[str]
    title: ClassVar[str]
    scopes: ClassVar[tuple[str, ...]]
    """What we ask the person for."""
    streams: ClassVar[tuple[Stream, ...]]
    scope_separator: ClassVar[str] = " "
    one_subscription: ClassVar[bool] = False
    """Whether an application can have one subscription to its webhooks only."""
    pkce: ClassVar[bool] = False
    """Whether its sign-in takes a proof key (RFC 7636), which makes a stolen code worthless."""
    revokes_access: ClassVar[bool] = False
    """Whether a grant is ended by its access token, which must not have expired, and not by either."""

    @abstractmethod
    def pages(self, http: Http, stream: Stream, window: Window) -> Iterator[Page]:
        """Yield the items of `window`, the newest first, each page with how far it reaches.

        Ends when the window is complete; the last page's `reached` is then at or before
        `window.since`. Items outside the window may be among them: they were paid for.
        """

    def item(self, http: Http, stream: Stream, external_id: str, owner: str | None) -> Json:
        """One item as a list has it, for what a webhook names and no poll reads; costs one request.

        None: the person (`owner` is the provider's id of them) has none of this key. Raises as `Http.get`.
        """
        raise Refused(f"{self.title} has no way to ask for one item")

    @abstractmethod
    def record(self, stream: Stream, item: Json) -> Record:
        """Normalise one item. Raises `BadRecord`: that item is quarantined, the page goes on."""

    @abstractmethod
    def external_id(self, stream: Stream, item: Json) -> str | None:
        """The item's key in its stream, even of an item that `record` refuses; None: unreadable."""

    @abstractmethod
    def pools(self, settings: Endpoints, connection_id: int, *, token: bool = False) -> tuple[Pool, ...]:
        """The pools that one request of this connection spends from (`token`: a token call)."""

    def pool(
        self,
        settings: Endpoints,
        name: str,
        limits: tuple[str, ...],
        *,
        reports: bool,
        connection_id: int | None = None,
    ) -> Pool:
        """A pool of the application, or with `connection_id` one of this connection alone."""
        owner = "" if connection_id is None else f":{connection_id}"
        title = f"{self.name}{settings.suffix} {name}"
        return Pool(name, f"{self.name}:{settings.client_id}:{name}{owner}", limits, reports, title)

    def poll_cost(self, settings: Endpoints) -> int:
        """Requests that a poll without news costs: what the planner reckons with."""
        return sum(stream.poll_cost for stream in self.streams if stream.wanted(settings))

    def shared_pools(self, settings: Endpoints) -> tuple[Pool, ...]:
        """Of those the ones that all connections spend from together: they say how many can be served."""
        others = self.pools(settings, 1)
        return tuple(pool for pool in self.pools(settings, 0) if pool in others)

    def usage(self, headers: Mapping[str, str]) -> dict[str, Usage]:
        """What a reply's headers say of each pool, by pool name; empty when they say nothing."""
        return {}

    def retry_at(self, headers: Mapping[str, str], now: datetime) -> datetime | None:
        """When a refused request may be tried again (Retry-After, RFC 9110, 10.2.3), if told."""
        told = headers.get("Retry-After", "")
        return now + timedelta(seconds=int(told)) if told.isdecimal() and len(told) < 7 else http_date(told)

    def spent_pools(self, headers: Mapping[str, str]) -> tuple[str, ...]:
        """The pools, by name, that a 429 is about; empty: it does not say, so all are taken for spent."""
        return ()

    def refusal(self, status: int, reply: Json) -> str | None:
        """What a refused request's body says to the person, as half a sentence; None: nothing."""
        return None

    def refuses_account(self, status: int, reply: Json) -> bool:
        """Whether a refusal is of the account, whatever is asked of it: then nothing else is asked."""
        return False

    # OAuth: the standard (RFC 6749), with the places where clouds differ as methods.

    def authorize_address(
        self, settings: Endpoints, *, redirect_uri: str, state: str, challenge: str | None = None
    ) -> str:
        """Where the person is sent to grant access; `challenge` is the proof key's (S256)."""
        proof = {} if challenge is None else {"code_challenge": challenge, "code_challenge_method": "S256"}
        extra = [each for each in self.streams if each.optional and each.wanted(settings)]
        scopes = dict.fromkeys((*self.scopes, *(scope for each in extra for scope in each.scopes[:1])))
        query = {
            "client_id": settings.client_id,
            "response_type": "code",
            "redirect_uri": redirect_uri,
            "scope": self.scope_separator.join(scopes),
            "state": state,
            **proof,
            **self.authorize_extras(),
        }
        return f"{settings.authorize_url}?{urlencode(query)}"

    def authorize_extras(self) -> dict[str, str]:
        """Further parameters of the authorize address."""
        return {}

    def grant(self, reply: Json, now: datetime) -> Grant:
        """Check a token reply. Raises `Unavailable` when it is not one: the old tokens stay."""
        try:
            access, refresh = reply["access_token"], reply.get("refresh_token")
            expires = reply.get("expires_at")
            until = instant(expires) if expires else now + timedelta(seconds=int(reply["expires_in"]))
            if not (isinstance(access, str) and access and isinstance(refresh, str | None)):
                raise TypeError
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, BadRecord):
            raise Unavailable("the token reply could not be understood") from None
        return Grant(access, refresh, until, split_scopes(reply.get("scope")), self.grantee(reply))

    def grantee(self, reply: Json) -> str | None:
        """The provider's id of the person, when the token reply names it."""
        return None

    def account(self, http: Http) -> str | None:
        """The provider's id of the person, asked for when the token reply did not name it."""
        return None

    def grant_is_dead(self, status: int, reply: Json) -> bool:
        """Whether a refused refresh is final: `invalid_grant` (RFC 6749, section 5.2)."""
        return status in (400, 401) and isinstance(reply, dict) and reply.get("error") == "invalid_grant"

    def revocation(self, access: str, refresh: str | None) -> RevokeRequest:
        """The request that ends a grant: the refresh token lives longest, so it is the one shown."""
        return RevokeRequest({"token": refresh or access})

    def is_revoked(self, status: int, reply: Json) -> bool:
        """Whether the answer says that the grant is no more; it may have ended before (RFC 7009, 2.2)."""
        unknown = status == 400 and isinstance(reply, dict) and reply.get("error") == "invalid_token"
        return 200 <= status < 300 or unknown

    # Webhooks. A provider without topics has none.

    def webhook_topics(self, settings: Endpoints) -> tuple[str, ...]:
        """What has to be subscribed to: a subscription for each."""
        return ()

    def webhook(self, settings: Endpoints, call: Call, known: Known) -> Heard:
        """What a call to our address means. Raises `Forged` unless it is the provider's, and of now."""
        raise Forged(f"{self.title} has no webhooks")

    def webhook_keys(self, ask: Ask, settings: Endpoints) -> Json:
        """The public keys that the provider signs with, where it does."""
        return None

    def subscriptions(self, ask: Ask, settings: Endpoints) -> list[Subscription]:
        """All subscriptions of the application, whoever made them."""
        return []

    def subscribe(self, ask: Ask, settings: Endpoints, topic: str, callback: str) -> None:
        """Make one. The provider calls `callback` before this returns, and wants the right answer."""
        raise Refused(f"{self.title} has no webhooks")

    def renew(self, ask: Ask, settings: Endpoints, subscription: Subscription) -> None:
        """Put off its end."""
        raise Refused(f"{self.title}'s subscriptions have no end")

    def unsubscribe(self, ask: Ask, settings: Endpoints, subscription: Subscription) -> None:
        """End it."""
        raise Refused(f"{self.title} has no webhooks")


def webhook_secret(settings: Endpoints) -> str:
    """What only we and the provider know: the setting, or else one made of the client's secret.

    Raises `Forged` when there is neither: nobody could prove anything.
    """
    secret, ours = settings.webhook_secret.get_secret_value(), settings.client_secret.get_secret_value()
    if not (secret or ours):
        raise Forged("there is no secret to check webhooks with")
    return secret or hmac.new(ours.encode(), b"lifelogger webhooks", "sha256").hexdigest()


def same(given: str, expected: str) -> bool:
    """Whether two secrets are the same, in constant time."""
    return hmac.compare_digest(given.encode(errors="surrogatepass"), expected.encode(errors="surrogatepass"))


def parsed(body: bytes) -> Json:
    """The JSON of a call whose sender is known. Raises `Forged`: the provider sends no such thing."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise Forged("it is not JSON") from None


def split_scopes(value: Json) -> tuple[str, ...] | None:
    """Scopes as a provider or a callback writes them: separated by spaces or commas."""
    return tuple(value.replace(",", " ").split()) if isinstance(value, str) else None


def http_date(told: str) -> datetime | None:
    """A date as HTTP has it in headers (RFC 9110, 5.6.7); None: it is none."""
    try:
        date = parsedate_to_datetime(told)
    except (ValueError, TypeError, OverflowError):
        return None
    return date.replace(tzinfo=UTC) if date.tzinfo is None else date.astimezone(UTC)


# What providers need to read lists.


def whole_list(
    what: str,
    ask: Callable[[dict[str, str]], Json],
    items: str,
    token: str,
    *,
    asked_as: str,
    absent: Json = None,
) -> list[Json]:
    """All items of a list (of `what`) that comes in several replies, each with a token for the next one.

    `ask` makes a request with some more parameters: none at first, then the token, which is `asked_as`
    so. A reply without `items` has those of `absent`. Raises `Unavailable` when a reply is no part of a
    list, or the list does not end.
    """
    found: list[Json] = []
    more: dict[str, str] = {}
    for _ in range(MOST_REPLIES):
        reply = ask(more)
        told = reply if isinstance(reply, dict) else {items: None}
        part, after = told.get(items, absent), told.get(token)
        if not isinstance(part, list) or not isinstance(after, str | None):
            raise Unavailable(f"the reply to {what} is not a list")
        found += part
        if not after:
            return found
        more = {asked_as: after}
    raise Unavailable(f"the list of {what} does not end")


def told_id(http: Http, path: str, name: str) -> str | None:
    """The person's id in the reply at `path`; None: it cannot be told, for which nobody is kept out."""
    try:
        reply = http.get(path)
    except Refused:
        return None
    return plain_id(reply.get(name)) if isinstance(reply, dict) else None


def plain_id(value: Json) -> str | None:
    """An id that can be a key: printable, without spaces, not too long. None: it is none."""
    return value if isinstance(value, str) and re.fullmatch(r"[!-~]{1,200}", value) else None


# What providers need to read hostile JSON. Each raises `BadRecord` naming the field.


def instant(value: Json, name: str = "time") -> datetime:
    """An instant from epoch seconds or from ISO 8601 with an offset or Z, as UTC."""
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return datetime.fromtimestamp(value, UTC)
        if isinstance(value, str):
            parsed = datetime.fromisoformat(value)
            if parsed.tzinfo is not None:
                return parsed.astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        pass
    raise BadRecord(f"{name}: not an instant: {shown(value)}")


def number(item: Mapping[str, Json], name: str) -> float | None:
    """A finite number, or None where the provider says nothing."""
    value = item.get(name)
    if value is None:
        return None
    if type(value) not in (float, int) or not -1e15 <= value <= 1e15:
        raise BadRecord(f"{name}: not a number: {shown(value)}")
    return float(value)


def scaled(value: float | None, factor: float) -> float | None:
    """In our unit, without what binary fractions add: 1234 mm are 1.234 m."""
    return None if value is None else round(value * factor, 6)


def joules(kilocalories: float | None) -> float | None:
    """Energy in our unit: 4,184 J are a kilocalorie."""
    return scaled(kilocalories, 4184)


def count(value: float | None, name: str) -> int | None:
    """A whole number of things, as far as a database can hold it."""
    if value is not None and not (value == int(value) and 0 <= value < 2**31):
        raise BadRecord(f"{name}: not a count: {shown(value)}")
    return None if value is None else int(value)


def begun(item: Mapping[str, Json], name: str) -> datetime:
    """An instant of somebody's life."""
    return lived(instant(item.get(name), name), name)


def lived(when: Day, name: str) -> Day:
    """A date that no record can have would end a walk too early, or time itself: it is a bad one."""
    if not 1971 <= when.year < 3000:
        raise BadRecord(f"{name}: not when there are data: {when.isoformat()}")
    return when


def lasted(start: datetime, end: datetime, name: str, most: timedelta = LONGEST) -> float:
    """How long something lasted, in seconds."""
    if not timedelta(0) <= end - start < most:
        raise BadRecord(f"{name}: not the end of what began at {start.isoformat()}: {end.isoformat()}")
    return (end - start).total_seconds()


def utc_offset(value: float | None, name: str) -> int | None:
    """A person's offset from UTC in seconds; nobody's is more than a day."""
    if value is not None and abs(value) > 86400:
        raise BadRecord(f"{name}: more than a day: {shown(value)}")
    return None if value is None else int(value)


def date_there(moment: datetime, offset_s: int | None) -> date | None:
    """The civil date where the person was, if it is known how far that is from UTC."""
    return None if offset_s is None else (moment + timedelta(seconds=offset_s)).date()


def midnight(day: date) -> datetime:
    """Where a civil day lies in its stream."""
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


def word(words: Mapping[str, str], theirs: str | None) -> str | None:
    """Our word for theirs: `other` for one that is not known."""
    return None if theirs is None else words.get(theirs, "other")


def text(item: Mapping[str, Json], name: str, limit: int = 500) -> str | None:
    """A string without what databases refuse (NUL, lone surrogates), at most `limit` long."""
    value = item.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadRecord(f"{name}: not a text: {shown(value)}")
    return value.replace("\x00", "").encode("utf-8", "replace").decode()[:limit]


def shown(value: Json) -> str:
    """A value as it may stand in a message: short, on one line."""
    try:
        written = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        written = type(value).__name__
    return written if len(written) <= 60 else written[:57] + "…"
