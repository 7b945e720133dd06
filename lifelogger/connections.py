"""Users and their connections: adding them, importing many, and asking for a sync."""

from __future__ import annotations

import logging
import math
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from sqlalchemy import ColumnElement, and_, bindparam, case, false, func, or_, select, update
from sqlalchemy import Connection as Database

from lifelogger.errors import LifeloggerError
from lifelogger.providers.base import Event, shown, split_scopes
from lifelogger.runtime import Runtime
from lifelogger.settings import MAIN
from lifelogger.store import Prepared
from lifelogger.store.models import Connection, Stream, SyncRun, User

log = logging.getLogger(__name__)


class ImportRefused(LifeloggerError):
    """Lines of an import are wrong; nothing was written. `faults` has a sentence for each."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class AccountTaken(LifeloggerError):
    """The account at the provider is another user's, or the user has another account there."""


PLAIN = r"^[^\x00-\x1f\x7f-\x9f]+$"
"""Ids without control characters: databases refuse some, terminals obey others."""
ID_RULE = "1 to 200 printable characters"
LONGEST_TOKEN = 10_000


class Line(BaseModel):
    """One line of `lifelogger connections import`."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    user_id: str = Field(min_length=1, max_length=200, pattern=PLAIN)
    provider: str
    application: str | None = None
    """Whose client id the tokens were given to; None: as the connection has it, or the main one."""
    access_token: SecretStr = Field(min_length=1, max_length=LONGEST_TOKEN)
    refresh_token: SecretStr | None = Field(default=None, max_length=LONGEST_TOKEN)
    expires_at: datetime
    scopes: list[str] = Field(default_factory=list)
    provider_user_id: str | None = Field(default=None, max_length=200, pattern=PLAIN)

    @field_validator("scopes", mode="before")
    @classmethod
    def from_one_string(cls, value: Any) -> Any:
        return list(split_scopes(value) or ()) if isinstance(value, str) else value

    @field_validator("provider_user_id", mode="before")
    @classmethod
    def from_number(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("access_token", "refresh_token")
    @classmethod
    def for_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not re.fullmatch(r"[\x21-\x7e]*", value.get_secret_value()):
            raise ValueError("a token is printable ASCII without spaces (RFC 6750, 2.1)")
        return value

    @field_validator("expires_at")
    @classmethod
    def with_offset(cls, value: datetime) -> datetime:
        if value.tzinfo is None:
            raise ValueError("an ISO time needs an offset; epoch seconds do not")
        try:
            return value.astimezone(UTC)
        except OverflowError:
            raise ValueError("out of range") from None


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did, in connections."""

    added: int
    replaced: int


def import_lines(rt: Runtime, lines: Iterable[str]) -> Imported:
    """Store connections from JSON lines: all of them, or, when any line is wrong, none.

    Connecting again replaces the tokens and keeps the data. Raises `ImportRefused`.
    """
    wanted: dict[int, Line] = {}
    faults: list[str] = []
    places: dict[tuple[str, ...], int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            parsed = Line.model_validate_json(line)
        except ValidationError as error:
            faults += [f"line {number}: {field_of(each['loc'])}: {each['msg']}" for each in error.errors()]
            continue
        if parsed.provider not in rt.providers:
            faults.append(
                f"line {number}: provider: {shown(parsed.provider)} is none of {', '.join(rt.providers)}"
            )
        elif unknown := unknown_application(rt, parsed.provider, parsed.application or MAIN):
            faults.append(f"line {number}: application: {unknown}")
        for place in places_of(parsed):
            if place in places:
                faults.append(
                    f"line {number}: {place[-1]} is connected to {place[0]} by line {places[place]} already"
                )
            places.setdefault(place, number)
        wanted[number] = parsed
    if not faults:
        with rt.store.read() as db:
            faults += [
                f"line {number}: user {line.user_id}: {taken}"
                for number, line in wanted.items()
                if (taken := owner_conflict(db, line))
            ]
    if faults:
        raise ImportRefused(faults)
    # Encrypted before anybody waits for us, and in one order: two imports never wait for each other.
    prepared = [(line, sealed(rt, line)) for line in sorted(wanted.values(), key=lambda each: each.user_id)]
    added = 0
    with rt.store.write() as db:
        for each, grant in prepared:
            added += save(rt, db, each, grant)
    return Imported(added, len(wanted) - added)


def unknown_application(rt: Runtime, provider: str, name: str) -> str | None:
    """Why a connection cannot belong to an application of a provider; None when it can."""
    settings = rt.settings.providers.get(provider)
    there = (MAIN, *settings.applications) if settings else (MAIN,)
    return None if name in there else f"{shown(name)} is none of {', '.join(there)}"


def field_of(location: tuple[int | str, ...]) -> str:
    """The place of a fault in its line; a name that is not ours as it may stand in a message."""
    first, *rest = location or ("line",)
    known = first == "line" or first in Line.model_fields
    return ".".join(map(str, (first, *rest))) if known else shown(first)


def places_of(line: Line) -> list[tuple[str, ...]]:
    """What only one line may have: a user's place at a provider, and an account there."""
    places: list[tuple[str, ...]] = [(line.provider, "user", line.user_id)]
    if line.provider_user_id is not None:
        places.append((line.provider, "account", line.provider_user_id))
    return places


def owner_conflict(db: Database, line: Line) -> str | None:
    """Why a line's account cannot be this user's; None when it can."""
    if line.provider_user_id is None:
        return None
    owner = db.scalar(
        select(Connection.user_id).where(
            Connection.provider == line.provider, Connection.provider_user_id == line.provider_user_id
        )
    )
    if owner is not None and owner != line.user_id:
        return f"the {line.provider} account {line.provider_user_id} is connected to another user"
    account = db.scalar(
        select(Connection.provider_user_id).where(
            Connection.provider == line.provider, Connection.user_id == line.user_id
        )
    )
    if account is not None and account != line.provider_user_id:
        # Their records and cursors would be taken for those of one person.
        return f"the user is connected to another {line.provider} account, {account}"
    return None


def may_be_id(text: str) -> bool:
    """Whether a user can have this id: it has what `ID_RULE` says."""
    return 0 < len(text) <= 200 and re.fullmatch(PLAIN, text) is not None


def add_user(rt: Runtime, user_id: str) -> bool:
    """Store a user; False when there is one of that id already."""
    with rt.store.write() as db:
        return ensure_user(rt, db, user_id)


def ensure_user(rt: Runtime, db: Database, user_id: str) -> bool:
    statement = (
        rt.store.insert(User.__table__).values(id=user_id, created_at=rt.clock()).on_conflict_do_nothing()
    )
    return bool(db.execute(statement).rowcount == 1)


def sealed(rt: Runtime, line: Line) -> dict[str, Any]:
    """The columns of a connection that was just made, its tokens encrypted."""
    now = rt.clock()
    return {
        "status": "active",
        "status_reason": None,
        "told_at": None,
        "scopes": line.scopes or list(rt.providers[line.provider].scopes),
        "access_token": rt.vault.encrypt(line.access_token.get_secret_value()),
        "refresh_token": rt.vault.encrypt(line.refresh_token.get_secret_value())
        if line.refresh_token
        else None,
        "token_expires_at": line.expires_at,
        "refreshing_until": None,
        "next_sync_at": now,
        "claimed_at": None,
        "news_at": now,  # whoever connects wants to see the data
        "news_streams": None,
        "news_about": None,
        "deauthorised_at": None,
        "wait_reason": None,
        "failures": 0,
        "updated_at": now,
    }


def save(rt: Runtime, db: Database, line: Line, grant: dict[str, Any] | None = None) -> bool:
    """Store one connection, due at once; True when it is new. Raises `AccountTaken`.

    `grant` is what `sealed` returned, where many are stored in one transaction.
    """
    conflict = owner_conflict(db, line)
    if conflict:
        raise AccountTaken(conflict)
    grant = grant or sealed(rt, line)
    ensure_user(rt, db, line.user_id)
    ended = Connection.status == "needs_reauth"
    application = func.coalesce(line.application, Connection.application)
    known = db.scalar(
        update(Connection)
        .where(Connection.user_id == line.user_id, Connection.provider == line.provider)
        .values(
            **grant,
            provider_user_id=func.coalesce(line.provider_user_id, Connection.provider_user_id),
            application=application,
            # A sync that spends from the other application's budget ends.
            fence=Connection.fence + case((Connection.application != application, 1), else_=0),
            status_at=case((ended, grant["updated_at"]), else_=Connection.status_at),
            status_change=case((ended, None), else_=Connection.status_change),
        )
        .returning(Connection.id)
    )
    if known is not None:  # what was refused under the old grant is asked for again
        db.execute(
            update(Stream).where(Stream.connection_id == known).values(off_reason=None, off_until=None)
        )
        return False
    db.execute(
        rt.store.insert(Connection.__table__).values(
            user_id=line.user_id,
            provider=line.provider,
            provider_user_id=line.provider_user_id,
            application=line.application or MAIN,
            # Not from 0: SQLite gives a number that is free again to the next connection, and a sync of the
            # one that is gone must not take it for its own.
            fence=secrets.randbits(40),
            created_at=grant["updated_at"],
            **grant,
        )
    )
    return True


ASKED_EVERY = timedelta(minutes=1)
"""How often a person's wish has a sync begin at most."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What becomes of a person's "sync now"."""

    connections: int
    """How many will look."""
    at: datetime
    """When they do: now, or when the person's last wish is a minute old."""
    runs: tuple[int, ...]
    """The runs under way that it joins: they look again before they end."""


def note_wish(rt: Runtime, user_id: str) -> Wish:
    """Write down that a person wants to see what is new: as `note_news`, but for a look once a minute."""
    now = rt.clock()
    with rt.store.write() as db:
        last = db.scalar(select(User.asked_at).where(User.id == user_id).with_for_update())
        at = now if last is None else max(now, last if last > now else last + ASKED_EVERY)
        noted = _note(rt, db, user_id, now, at)
        if noted:
            db.execute(update(User).where(User.id == user_id).values(asked_at=at))
        running = (
            select(SyncRun.id)
            .join_from(SyncRun, Connection, SyncRun.connection_id == Connection.id)
            .where(Connection.user_id == user_id, SyncRun.outcome == "running")
        )
        return Wish(noted, at, tuple(db.scalars(running.order_by(SyncRun.id))))


def note_news(rt: Runtime, user_id: str) -> int:
    """Write down that somebody knows of news, before any message is sent: a skip then loses nothing.

    Returns how many connections will look. One that failed keeps its time.
    """
    now = rt.clock()
    with rt.store.write() as db:
        return _note(rt, db, user_id, now, now)


def _note(rt: Runtime, db: Database, user_id: str, now: datetime, at: datetime) -> int:
    """Write down news of now, to be looked at from `at` on."""
    active = (Connection.user_id == user_id, Connection.status == "active", served(rt))
    noted = db.execute(update(Connection).where(*active).values(news_at=now, news_streams=None)).rowcount
    db.execute(
        update(Connection)
        .where(
            *active,
            Connection.failures == 0,
            Connection.next_sync_at > at,
            Connection.claimed_at.is_(None),
        )
        .values(next_sync_at=at)
    )
    return noted


def served(rt: Runtime) -> ColumnElement[bool]:
    """Whether a connection's application is in the settings, and its provider switched on."""
    return or_(
        false(),
        *(
            and_(Connection.provider == provider, Connection.application == name)
            for provider, name in (each.key for each in rt.applications())
        ),
    )


MOST_NAMED = 10
"""Items of a stream that are remembered and asked for one by one when webhooks name them: anybody can. What
is named beyond them is found by the poll and by a round over the past."""


def note_hint(
    db: Database, provider: str, events: Sequence[Event], now: datetime, application: str = MAIN
) -> str | None:
    """Write down where webhooks say that there is news of one person; returns the user to send a message for.

    What one application is told of is nothing to the connections of another.
    None: the account is nobody's, or its sync is under way, on its way, or has to wait for its turn: a look
    in a minute is all that hints are worth, since anybody can send those that are not signed. What is
    written down is met by the running sync or by a later tick.
    """
    deauthorised = any(event.deauthorised for event in events)
    row = db.execute(
        select(Connection.__table__)
        .where(Connection.provider == provider, Connection.provider_user_id == events[0].owner)
        .where(Connection.application == application)
        .with_for_update()
    ).first()
    if row is None:
        return None
    if row.status != "active":
        # Nothing is read of it any more. Whether its person left, or only has to sign in again, is found out
        # by `leaving.end_deauthorised`.
        if deauthorised and row.deauthorised_at is None:
            db.execute(update(Connection).where(Connection.id == row.id).values(deauthorised_at=now))
        return None
    anywhere = row.news_at is not None and row.news_streams is None  # as whoever wants to see it all has it
    named = {name for event in events for name in event.streams}
    streams = None if anywhere else sorted({*(row.news_streams or ()), *named})
    about = narrowed(row.news_about or dict.fromkeys(row.news_streams or (), LATEST), events)
    at = max(now, row.hint_after or now)
    free = row.failures == 0 and row.claimed_at is None and row.next_sync_at is not None
    told = row.news_at is not None and row.next_sync_at is not None and row.next_sync_at <= at
    if told and free and (streams, about) == (row.news_streams, row.news_about) and not deauthorised:
        return None  # all of it is written down: a burst costs no more writes
    values: dict[str, Any] = {
        "news_at": now,
        "news_streams": streams,
        "news_about": about,
    }
    if deauthorised:
        values["deauthorised_at"] = now
    if free and row.next_sync_at > at:
        values["next_sync_at"] = at
    db.execute(update(Connection).where(Connection.id == row.id).values(values))
    return row.user_id if free and at <= now and not told else None


LATEST: dict[str, Any] = {"latest": True}
"""Of a stream in `news_about`: its news is among what a poll reads."""


def narrowed(about: Mapping[str, dict[str, Any]], events: Sequence[Event]) -> dict[str, dict[str, Any]]:
    """Where in each stream there is news, with what these events say of it; as it is stored.

    `items` are external ids, `span` is [since, until) in epoch seconds, and `latest` says that it may also be
    anywhere in what a poll reads: an event named nothing, or too much.
    """
    found = dict(about)
    for event in events:
        for name in event.streams:
            known = found.get(name, {})
            items = list(dict.fromkeys((*known.get("items", ()), *([event.item] if event.item else ()))))
            spans = [known["span"]] if "span" in known else []
            if event.span is not None:
                spans.append([math.floor(event.span[0].timestamp()), math.ceil(event.span[1].timestamp())])
            joined: dict[str, Any] = {}
            if items:
                joined["items"] = items[:MOST_NAMED]
            if spans:
                joined["span"] = [min(since for since, _ in spans), max(until for _, until in spans)]
            nothing = event.item is None and event.span is None
            if known.get("latest") or nothing or len(items) > MOST_NAMED:
                joined["latest"] = True
            found[name] = joined
    return found


def under_way(rt: Runtime, provider: str, application: str = MAIN) -> int:
    """How many connections of an application are claimed: a message is on its way, or its sync runs."""
    with rt.store.read() as db:
        [(claimed,)] = CLAIMED(db, provider=provider, application=application, now=rt.clock())
    return int(claimed)


CLAIMED = Prepared(
    select(func.count()).where(
        Connection.provider == bindparam("provider"),
        Connection.application == bindparam("application"),
        Connection.claimed_at.is_not(None),
        Connection.next_sync_at > bindparam("now"),  # else its lease is over, and nobody has heard of it
    )
)
