"""What every simulated provider is to the server: who asks, what it costs, what is answered, and OAuth.

A provider is one further module with one subclass, which says what it is called, what it can be asked and
how it shows an activity, if it does. All else is done here in the most common way, for a provider to
do otherwise.
Faults, holds and the ledger are around it and not its business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any, ClassVar, NamedTuple

from lifelogger.sandbox.activities import Activities, Shown, View
from lifelogger.sandbox.calls import Call, Mistake, Reply, Route, basic, bearer, json_reply, whole
from lifelogger.sandbox.changes import Change, Edit
from lifelogger.sandbox.clock import Clock
from lifelogger.sandbox.consent import Consent
from lifelogger.sandbox.days import local
from lifelogger.sandbox.grants import Grant, Grants, Token
from lifelogger.sandbox.hooks import Event, Hooks, Subscription
from lifelogger.sandbox.ledger import OTHER, PAGE, READ, TOKEN, USED_TWICE, Ledger
from lifelogger.sandbox.people import Activity, People, Person
from lifelogger.sandbox.state import State

ONE = timedelta(days=1)
FIRST, LAST = date(2, 1, 1), date(9998, 1, 1)
"""Days before and after everything."""
NEAR = 2 * ONE
"""So far from the date that its key begins with an item is at most, whatever the zone."""


class Refusal(Exception):
    """A request that is answered with an error. An empty note: it can happen to everybody."""

    def __init__(self, status: int, note: str, reply: Reply | None = None) -> None:
        super().__init__(note)
        self.status, self.note, self.reply = status, note, reply


class Item(NamedTuple):
    """One item of a stream, and where it stands, whatever is done to it."""

    key: str
    value: Any
    """As the provider lists it."""
    order: Any
    """By what its stream is sorted."""
    found: Mapping[str, str] = {}
    """What a provider's filters look at."""


class Provider(ABC):
    """A simulated cloud. Used from the event loop's thread alone; never waits."""

    name: ClassVar[str]
    title: ClassVar[str]
    base: ClassVar[str] = ""
    """The path of its API."""
    scopes: ClassVar[Sequence[str]]
    usual_scopes: ClassVar[Sequence[str]] = ()
    """What is granted when nothing else is said; empty: all."""
    separator: ClassVar[str] = " "
    """Between scopes, on its page."""
    streams: ClassVar[Sequence[str]] = ("activities",)
    """The lists it has, by name."""
    activity_stream: ClassVar[str] = "activities"
    """The one that has the activities; empty: none has."""
    activity_path: ClassVar[tuple[str, ...]] = ()
    """Where in an item of it the activity's own fields are."""
    defaults: ClassVar[Mapping[str, Any]] = {"access_token_seconds": 3600}
    """Settings that the control API can change, and what they are at first."""
    choices: ClassVar[Mapping[str, Sequence[str]]] = {}
    """What the settings can be that are words."""
    pools: ClassVar[Mapping[str, tuple[int, ...]]]
    """What it counts, and its windows in seconds. A request of one pool counts in those after it, too."""
    first_limits: ClassVar[Mapping[str, tuple[int, ...]]]
    """Requests per pool and window, as a new application gets them."""

    hook_streams: ClassVar[Sequence[str]] = ()
    """The streams that it sends webhooks of; empty: it sends none."""
    hook_retries: ClassVar[Sequence[float]] = ()
    """After how many seconds a delivery that was not taken is tried again, each time."""
    hook_timeout: ClassVar[float] = 10
    """Seconds that it waits for a reply."""
    hook_gone: ClassVar[bool] = False
    """Whether a 410 ends the subscription."""

    def __init__(
        self, state: State, clock: Clock, people: People, activities: Activities, ledger: Ledger
    ) -> None:
        self.state = state
        self.clock = clock
        self.people = people
        self.activities = activities
        self.changes = activities.changes
        self.ledger = ledger
        self.grants = Grants(state, self.name)
        self.consent = Consent(self.grants, people, self.title, self.scopes, self.separator)
        self.routes = self.make_routes()
        self.hooks = Hooks(self)
        self.load()

    def load(self) -> None:
        """Take up what the state knows, and forget everything else."""
        first = {pool: list(numbers) for pool, numbers in self.first_limits.items()}
        self.settings = {**self.defaults, **self.state.get(f"{self.name}.settings", {})}
        self.limits: dict[str, list[int]] = self.state.get(f"{self.name}.limits", first)
        self.secrets: dict[str, str] = self.state.get(f"{self.name}.secrets", {})
        self.hooks.load()

    # What a provider says for itself

    @abstractmethod
    def make_routes(self) -> Sequence[Route]:
        """All that it can be asked."""

    def item(self, activity: Activity) -> Any:
        """An activity as the provider lists it. Raises `Mistake` where there are none."""
        raise Mistake(f"{self.title} shows no activities")

    def start_in(self, fields: Mapping[str, Any]) -> int | None:
        """The start (epoch seconds) that edited fields move an activity to; None: they do not."""
        return None

    def account(self, person: Person) -> dict[str, Any]:
        """Who a person is at this provider; their id comes first."""
        return {"id": person.user_id}

    def failure(self, status: int) -> Reply:
        """An error as this provider words it."""
        return json_reply(status, {"error": status})

    def invalid(self, parameter: str) -> Reply:
        """What is said of a parameter that is missing, or cannot be."""
        return self.failure(400)

    def missing(self, scope: str) -> Reply:
        """What is said to a token without a scope."""
        return self.failure(403)

    def denied(self, call: Call, status: int, error: str) -> Reply:
        """What is said to an application that gets no token, by OAuth's word for it."""
        return json_reply(status, {"error": error})

    def headers(self, call: Call) -> dict[str, str]:
        """Headers of whatever is replied to this request."""
        return {}

    # Webhooks

    def hook_event(self, event: Event, to: Subscription) -> Any:
        """What a subscription is told of an event; None: nothing."""
        return None

    def hook_headers(self, body: bytes, to: Subscription, now: float, *, forged: bool) -> dict[str, str]:
        """What a delivery proves itself by; a forged one does it as well as a stranger can."""
        return {}

    # Routes and settings

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

    def configure(self, changes: Mapping[str, Any]) -> None:
        """Change settings. Raises `Mistake`."""
        for name, value in changes.items():
            self.check_setting(name, value)
        self.settings.update(changes)
        self.state.put(f"{self.name}.settings", self.settings)

    def check_setting(self, name: str, value: object) -> None:
        """Raises `Mistake` unless a setting can have this value: it is of the kind of its default."""
        if name not in self.defaults:
            raise Mistake(f"no setting {name!r}: one of {', '.join(self.defaults)}")
        choices = self.choices.get(name, ())
        default = self.defaults[name]
        if isinstance(default, bool):
            fits, kind = isinstance(value, bool), "true or false"
        elif isinstance(default, int):
            fits, kind = whole(value), "a whole number"
        elif isinstance(default, list):
            words = value if isinstance(value, list) else [None]
            fits, kind = (
                all(isinstance(each, str) and each in self.people.by_id for each in words),
                "a list of people",
            )
        else:
            fits, kind = value in choices, f"one of {', '.join(choices)}"
        if not fits:
            raise Mistake(f"{name}: {value!r} is not {kind}")

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

    # Who asks, and what it costs

    def identify(self, call: Call) -> None:
        """Find out who asks: `client`, `token`, and the person in the entry."""
        kind = self.kind(call)
        if kind == PAGE:
            call.client = call.asked("client_id") or ""
            call.entry.person = call.asked("person")
        elif kind == TOKEN:
            call.client = call.form.get("client_id") or basic(call)[0]
            # A refresh tells its refresh token, a revocation either of the two.
            refresh = call.form.get("refresh_token", "")
            either = call.form.get("token") or call.asked("access_token") or ""
            call.token = self.grants.find(refresh or either, "refresh") or self.grants.find(either, "access")
        else:
            call.token = self.grants.find(bearer(call), "access")
        if call.token:
            call.entry.person = call.token.grant.person
        if kind != PAGE and not call.client:
            # A token that was never given out tells no application. Whoever sent it is most likely
            # the one that signed in last, and shall not get requests for free.
            named = self.named(call)
            known = named if named in self.secrets else self.grants.newest_client()
            call.client = call.token.grant.client if call.token else known
        call.entry.client = call.client or None

    def named(self, call: Call) -> str:
        """The application in whose name a request is made that has no person's token; empty: it says none."""
        return call.form.get("client_id") or call.asked("client_id") or ""

    def count(self, call: Call) -> None:
        """Count the request into the windows of its arrival. Belongs into a transaction."""
        if self.kind(call) != PAGE:
            call.pools = self.counted(next(iter(self.pools)))
            call.refused = self.spend(call.client, call.pools, call.now)

    def usage_note(self, call: Call) -> str:
        """The used windows for the ledger."""
        now = self.clock.now()
        return " ".join(f"{pool} {pair(self.usage(call.client, pool, now))}" for pool in call.pools)

    def knows_client(self, client: str, secret: str) -> bool:
        """Whether the secret is the application's; the first one that an application shows becomes it."""
        if not client or not secret:
            return False
        if client not in self.secrets:
            self.secrets[client] = secret
            self.state.put(f"{self.name}.secrets", self.secrets)
        return self.secrets[client] == secret

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

    # What is answered

    def answer(self, call: Call) -> Reply:
        """Do what is asked. Belongs into a transaction."""
        try:
            if call.refused:
                raise Refusal(429, "")
            if call.route is None:
                raise Refusal(404, "no such route")
            if call.route.kind == READ:
                self.check_token(call)
            return call.route.answer(call)
        except Refusal as refusal:
            call.entry.note = refusal.note
            return refusal.reply or self.failure(refusal.status)

    def check_token(self, call: Call) -> None:
        """Raises `Refusal` when the token of a read does not work."""
        token = call.token
        if token is None:
            raise Refusal(401, "unknown access token" if bearer(call) else "no access token")
        if token.grant.revoked or expired(token, self.clock.now()):
            raise Refusal(401, "")

    def asker(self, call: Call, *scopes: str) -> Person:
        """Whose data is asked for. Raises `Refusal` unless the token has one of these scopes, if any."""
        assert call.token is not None
        grant = call.token.grant
        if scopes and not set(scopes) & set(grant.scopes):
            raise Refusal(403, f"scope {scopes[0]} is missing", self.missing(scopes[0]))
        return self.people.by_id[grant.person]

    # Streams

    def points(self, person: Person, stream: str, first: date, last: date, now: float) -> Iterator[Item]:
        """What a stream has of some days at a moment, oldest first, had nobody changed it.

        Others may be among it. Only activities are known here; they come where they were moved to.
        """
        view = self.view(person, now)
        after = local(person, first, 0) - 1 if first > FIRST else None
        before = local(person, last + ONE, 0) if last < LAST else None
        for one in view.between(after, before):
            yield Item(str(one.activity.key), self.item(one.moved), one.start)

    def tombstone(self, stream: str, value: Any) -> Any:
        """What a list shows in place of an item that was deleted; None: nothing."""
        return None

    def is_tombstone(self, stream: str, value: Any) -> bool:
        """Whether what a list shows stands for something deleted."""
        return False

    def view(self, person: Person, now: float) -> View:
        return self.activities.view(self.name, self.activity_stream, person, now)

    def shown(self, one: Shown) -> Any:
        """An activity's item, with all that was done to it."""
        return one.change.apply(self.item(one.moved))

    def listed(self, person: Person, stream: str, first: date, last: date, now: float) -> Iterable[Item]:
        """What a stream shows of some days at a moment, with all that was done to it."""
        points = self.points(person, stream, first, last, now)
        changes = self.changes.of(self.name, stream, person)
        return self._changed(stream, points, changes) if changes else points

    def truth(self, person: Person, stream: str, now: float) -> list[Item]:
        """All there is of a stream, newest first."""
        found = sorted(self.listed(person, stream, FIRST, LAST, now), key=lambda item: item.order)
        return [item for item in reversed(found) if not self.is_tombstone(stream, item.value)]

    def change(self, person: Person, stream: str, key: str, edits: Sequence[Edit] = (), **values: Any) -> Any:
        """Change an item by hand; returns what it is then, None when it is deleted. `values` are fields of
        `Change`. Raises `Mistake` when there is no such item. Belongs into a transaction."""
        item = self.find(person, stream, key)
        change = self.changes.of(self.name, stream, person).get(key, Change())
        if edits or values:
            change = self.changes.change(self.name, stream, person, key, edits, **values)
        if stream == self.activity_stream:
            item = self.find(person, stream, key)  # it may start at another time now
        return None if change.deleted else change.apply(item.value)

    def find(self, person: Person, stream: str, key: str) -> Item:
        """An item without what was done to it, deleted or not. Raises `Mistake` when there is none."""
        now = self.clock.now()
        if stream == self.activity_stream:
            activity = self.activities.find(int(key), now) if key.isdecimal() else None
            if activity and activity.owner == person.index:
                change = self.changes.of(self.name, stream, person).get(key, Change())
                start = activity.start if change.start is None else change.start
                return Item(key, self.item(Shown(start, activity, change).moved), start)
        else:
            for item in self.points(person, stream, *days_of(key), now):
                if item.key == key and not self.is_tombstone(stream, item.value):
                    return item
        raise Mistake(f"key: {person.user_id} has no {key!r} among their {stream} at {self.title}")

    def _changed(self, stream: str, points: Iterable[Item], changes: Mapping[str, Change]) -> Iterator[Item]:
        for item in points:
            change = changes.get(item.key)
            if change is None:
                yield item
            elif not change.deleted:
                yield item._replace(value=change.apply(item.value))
            elif (left := self.tombstone(stream, item.value)) is not None:
                yield item._replace(value=left)

    # Authorisation

    def connect(self, person: Person, client: str, scopes: Sequence[str] | None) -> dict[str, Any]:
        """Grant at once what a person would on the page; the tokens as an import line has them."""
        asked = tuple(scopes) if scopes is not None else tuple(self.usual_scopes or self.scopes)
        for scope in asked:
            if scope not in self.scopes:
                raise Mistake(f"no scope {scope!r}: one of {', '.join(self.scopes)}")
        now = self.clock.now()
        tokens = self.issue(self.grants.open(client, person.user_id, asked, now), now)
        return {
            "access_token": tokens["access_token"],
            "refresh_token": tokens["refresh_token"],
            "expires_at": int(now) + tokens["expires_in"],
            "scopes": list(asked),
            "provider_user_id": str(next(iter(self.account(person).values()))),
        }

    def authorize(self, call: Call) -> Reply:
        """The page on which a person lets an application in."""
        try:
            return self.consent.answer(call)
        except Mistake as error:
            note = f"{error}: missing or not one that can be"
            raise Refusal(400, note, self.invalid(str(error))) from None

    def token(self, call: Call) -> Reply:
        """Tokens for a code, or for a refresh token."""
        client, secret = call.form.get("client_id", ""), call.form.get("client_secret", "")
        grant_type = call.form.get("grant_type")
        if not self.knows_client(client, secret):
            return self._deny(call, 401, "invalid_client", "wrong client id or secret")
        if grant_type == "authorization_code":
            return self._redeem(call, client)
        if grant_type == "refresh_token":
            return self._refresh(call, client)
        return self._deny(call, 400, "unsupported_grant_type", "unknown grant_type")

    def service_account(self, client: str) -> dict[str, str]:
        """A new key of an account that acts for an application. Raises `Mistake` where there are none."""
        raise Mistake(f"{self.title} has no service accounts")

    def revoke(self, call: Call) -> Reply:
        """The end of a grant. An unknown token is answered like a known one (RFC 7009, 2.2)."""
        if call.token:
            self.grants.revoke(call.token.grant.person, self.clock.now(), call.token.grant.client)
        return json_reply(200, {})

    def proved(self, call: Call) -> bool:
        """Whether whoever shows a code is the one that asked for it, as far as the provider looks."""
        return True

    def issue(self, grant: Grant, now: float, refresh: str | None = None) -> dict[str, Any]:
        """What an application is told that gets a new access token, and a refresh token if it has none."""
        seconds = int(self.settings["access_token_seconds"])
        return {
            "token_type": "Bearer",
            "access_token": self.grants.issue(grant, "access", int(now) + seconds),
            "expires_in": seconds,
            "refresh_token": refresh or self.grants.issue(grant, "refresh"),
            "scope": " ".join(grant.scopes),
        }

    def renew(self, refresh: Token, now: float) -> dict[str, Any]:
        """A new pair, each time: the old refresh token is used up. Old access tokens live to their end."""
        self.grants.replace(refresh.grant, "refresh", now)
        return self.issue(refresh.grant, now)

    def welcome(self, person: Person) -> dict[str, Any]:
        """What is told of a person beside their first tokens."""
        return {}

    def _redeem(self, call: Call, client: str) -> Reply:
        now = self.clock.now()
        code = self.grants.redeem(call.form.get("code", ""), client, now) if self.proved(call) else None
        if code is None:
            return self._deny(call, 400, "invalid_grant", "unknown, used, old or unproved code")
        call.entry.person = code.person
        tokens = self.issue(self.grants.open(client, code.person, code.scopes, now), now)
        return json_reply(200, {**tokens, **self.welcome(self.people.by_id[code.person])})

    def _refresh(self, call: Call, client: str) -> Reply:
        token = call.token if call.form.get("refresh_token") else None
        note = ""
        if token is None or token.grant.client != client:
            note = "unknown refresh token"
        elif token.replaced:
            note = USED_TWICE
        elif not token.grant.revoked:
            return json_reply(200, self.renew(token, self.clock.now()))
        return self._deny(call, 400, "invalid_grant", note)

    def _deny(self, call: Call, status: int, error: str, note: str) -> Reply:
        call.entry.note = note
        return self.denied(call, status, error)


def days_of(key: str) -> tuple[date, date]:
    """Where to look for an item: near the date that its key begins with, or everywhere."""
    try:
        day = date.fromisoformat(key[:10])
    except ValueError:
        return FIRST, LAST
    return max(day, FIRST + NEAR) - NEAR, min(day, LAST - NEAR) + NEAR


def expired(token: Token, now: float) -> bool:
    return token.expires_at is not None and token.expires_at <= now


def pair(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def utc(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
