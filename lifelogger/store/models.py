"""The tables. Words as in the docs: user, connection, stream, record, sync run, tick.

Times are UTC instants; columns carry their unit in their name. Tokens are stored encrypted only.
"""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from typing import Any, ClassVar

from sqlalchemy import (
    DDL,
    BigInteger,
    Date,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    event,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from lifelogger.settings import MAIN

BigKey = BigInteger().with_variant(Integer, "sqlite")  # only INTEGER counts by itself on SQLite


class Utc(TypeDecorator[datetime]):
    """An instant. SQLite keeps no offset, so it is written as UTC and read back as UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"an instant without an offset: {value}")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Payload(TypeDecorator[Any]):
    """JSON exactly as meant: kept as text, since PostgreSQL's `jsonb` refuses `\\u0000`.

    None is SQL's NULL, or where `none_is_null` the JSON `null`, which is an item like another.
    """

    impl = Text
    cache_ok = True

    def __init__(self, *, none_is_null: bool = False) -> None:
        super().__init__()
        self.none_is_null = none_is_null

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        if value is None and not self.none_is_null:
            return None
        return json.dumps(value, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {datetime: Utc, date: Date, str: Text, bytes: LargeBinary}


class User(Base):
    """The person whose data is synced; the id is the host application's."""

    __tablename__ = "users"

    id: Mapped[str] = mapped_column(String(200), primary_key=True)
    created_at: Mapped[datetime]
    asked_at: Mapped[datetime | None]
    """When the sync that they asked for last begins, or began."""


# Two indexes, so that each of the planner's two questions is one range of one of them, however many wait.
STALE = text("next_sync_at IS NOT NULL AND news_at IS NULL")
NEWS = text("next_sync_at IS NOT NULL AND news_at IS NOT NULL")
CLAIMED = text("claimed_at IS NOT NULL")
ACTIVE = text("status = 'active'")
LEFT = text("status = 'needs_reauth' AND deauthorised_at IS NOT NULL")
UNTOLD = text("status = 'needs_reauth' AND told_at IS NULL")
UNNUMBERED = text("status_at IS NOT NULL AND status_change IS NULL")
NUMBERED = text("status_change IS NOT NULL")
UNREAD = text("backlog_until IS NOT NULL")


class Connection(Base):
    """One user's authorisation at one provider.

    `next_sync_at` is when the planner may take it; None while it is not polled at all. A claim
    moves it on by a lease and sets `claimed_at`. `news_at` says that somebody knows of news
    (a webhook, a person, a first connection) which no sync has brought yet. `wait_reason` is the
    sentence that explains a `next_sync_at` which is a deferral.
    """

    __tablename__ = "connections"
    __table_args__ = (
        UniqueConstraint("user_id", "provider"),
        UniqueConstraint("provider", "provider_user_id"),
        Index("ix_connections_due", "provider", "application", "next_sync_at", sqlite_where=STALE,
              postgresql_where=STALE),
        Index("ix_connections_news", "provider", "application", "next_sync_at", sqlite_where=NEWS,
              postgresql_where=NEWS),
        Index("ix_connections_claimed", "provider", "application", "claimed_at", sqlite_where=CLAIMED,
              postgresql_where=CLAIMED),
        Index("ix_connections_untold", "id", sqlite_where=UNTOLD, postgresql_where=UNTOLD),
        Index("ix_connections_deauthorised", "id", sqlite_where=LEFT, postgresql_where=LEFT),
        Index("ix_connections_expires", "provider", "application", "token_expires_at", sqlite_where=ACTIVE,
              postgresql_where=ACTIVE),
        Index("ix_connections_unnumbered", "id", sqlite_where=UNNUMBERED, postgresql_where=UNNUMBERED),
        Index("ix_connections_status_change", "status_change", unique=True, sqlite_where=NUMBERED,
              postgresql_where=NUMBERED),
    )  # fmt: skip

    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    provider: Mapped[str] = mapped_column(String(50))
    application: Mapped[str] = mapped_column(String(50), server_default=MAIN)
    """Whose client id its tokens were given to: a name in the provider's settings."""
    provider_user_id: Mapped[str | None] = mapped_column(String(200))
    status: Mapped[str] = mapped_column(String(20))
    """`active`, or `needs_reauth`: the person has to sign in again."""
    status_reason: Mapped[str | None]
    scopes: Mapped[list[str]] = mapped_column(Payload)
    access_token: Mapped[bytes]
    refresh_token: Mapped[bytes | None]
    token_expires_at: Mapped[datetime]
    refreshing_until: Mapped[datetime | None]
    """A refresh is under way until then, unless its worker is gone."""
    next_sync_at: Mapped[datetime | None]
    claimed_at: Mapped[datetime | None]
    news_at: Mapped[datetime | None]
    news_streams: Mapped[list[str] | None] = mapped_column(Payload, nullable=True)
    """The streams that the news is in, as a provider's webhooks named them; None: it may be in any."""
    news_about: Mapped[dict[str, dict[str, Any]] | None] = mapped_column(Payload, nullable=True)
    """Where in these streams, by name: `connections.narrowed`."""
    hint_after: Mapped[datetime | None]
    """Before that no webhook makes us look again, whoever sent it."""
    deauthorised_at: Mapped[datetime | None]
    """When a webhook said that the person took the grant back, which no sync has found to be so yet."""
    wait_reason: Mapped[str | None]
    failures: Mapped[int] = mapped_column(default=0)
    """Failed syncs in a row: the back-off's exponent."""
    fence: Mapped[int] = mapped_column(BigInteger, default=0)
    """The number of the newest sync; a write by an older one is refused."""
    last_sync_at: Mapped[datetime | None]
    """When a sync last ended well."""
    told_at: Mapped[datetime | None]
    """When the host was told that the person has to sign in again; None: not yet, or they need not."""
    status_at: Mapped[datetime | None]
    """When the status last changed; None: it is as it was at first."""
    status_change: Mapped[int | None] = mapped_column(BigInteger)
    """The number of that change in the feed; None: there was none, or it has no number yet."""
    habits: Mapped[bytes | None]
    """When news of theirs come: see `lifelogger.habits`."""
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class Stream(Base):
    """How far one kind of data of a connection has been read.

    Everything from `backlog_until` up to `cursor` is known; what lies in
    [`backlog_since`, `backlog_until`) is still to be read, newest first. Both None: nothing is.
    What lies below the look-back is read again in rounds, of which the `recheck_` columns tell.
    """

    __tablename__ = "streams"
    __table_args__ = (
        UniqueConstraint("connection_id", "name"),
        Index("ix_streams_unread", "connection_id", sqlite_where=UNREAD, postgresql_where=UNREAD),
    )

    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    connection_id: Mapped[int] = mapped_column(ForeignKey("connections.id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(String(50))
    off_reason: Mapped[str | None]
    """Why it is not read (a scope that was not granted); None: it is on."""
    off_until: Mapped[datetime | None]
    """When a stream that the provider refused is tried again."""
    cursor: Mapped[datetime | None]
    """When the last reading began, by our clock: never a time that a record claims."""
    backlog_since: Mapped[datetime | None]
    backlog_until: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
    """When the list was last read down to its very end."""
    recheck_at: Mapped[datetime | None]
    """When the next page of a round may be read, or the first of a new one; None: not known yet."""
    recheck_until: Mapped[datetime | None]
    """Everything from here up to the look-back was read again in this round; None: no round is under way."""
    recheck_began_at: Mapped[datetime | None]
    """When this round began, or if none is under way the last one."""
    recheck_ended_at: Mapped[datetime | None]
    """When the last whole round ended."""


class Record(Base):
    """One stored item: the normalised columns are those of `providers.base.Record`."""

    __tablename__ = "records"
    __table_args__ = (
        UniqueConstraint("connection_id", "stream", "external_id"),
        Index("ix_records_order", "connection_id", "stream", "ordered_at"),
        Index("ix_records_change_of", "connection_id", "change"),
        Index("ix_records_kind", "connection_id", "kind", "ordered_at"),
        Index("ix_records_time", "connection_id", "ordered_at"),
        Index("ix_records_change", "change", unique=True),
        Index("ix_records_deleted", "connection_id", sqlite_where=text("deleted_at IS NOT NULL"),
              postgresql_where=text("deleted_at IS NOT NULL")),
    )  # fmt: skip

    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    connection_id: Mapped[int] = mapped_column(ForeignKey("connections.id", ondelete="CASCADE"))
    stream: Mapped[str] = mapped_column(String(50))
    external_id: Mapped[str] = mapped_column(String(200))
    kind: Mapped[str] = mapped_column(String(20))
    ordered_at: Mapped[datetime]
    start_at: Mapped[datetime | None]
    end_at: Mapped[datetime | None]
    utc_offset_s: Mapped[int | None]
    local_date: Mapped[date | None]
    type: Mapped[str | None] = mapped_column(String(50))
    provider_type: Mapped[str | None]
    title: Mapped[str | None]
    duration_s: Mapped[float | None]
    moving_s: Mapped[float | None]
    distance_m: Mapped[float | None]
    elevation_gain_m: Mapped[float | None]
    energy_j: Mapped[float | None]
    work_j: Mapped[float | None]
    heart_rate_avg_bpm: Mapped[float | None]
    heart_rate_max_bpm: Mapped[float | None]
    steps: Mapped[int | None]
    active_energy_j: Mapped[float | None]
    heart_rate_min_bpm: Mapped[float | None]
    heart_rate_resting_bpm: Mapped[float | None]
    hrv_rmssd_ms: Mapped[float | None]
    spo2_avg_pct: Mapped[float | None]
    breaths_per_min: Mapped[float | None]
    score_pct: Mapped[float | None]
    is_main_sleep: Mapped[bool | None]
    asleep_s: Mapped[float | None]
    awake_s: Mapped[float | None]
    light_sleep_s: Mapped[float | None]
    deep_sleep_s: Mapped[float | None]
    rem_sleep_s: Mapped[float | None]
    weight_kg: Mapped[float | None]
    raw: Mapped[Any] = mapped_column(Payload, nullable=True)
    """The provider's item, unchanged in meaning; None once it was deleted there."""
    digest: Mapped[str | None] = mapped_column(String(64))
    """SHA-256 of the raw item: an item that did not change is not written again."""
    deleted_at: Mapped[datetime | None]
    """When we learned that the provider no longer has it; the values are gone then too."""
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    change: Mapped[int] = mapped_column(BigInteger)
    """The number of its newest write: `store.feed`."""


class Feed(Base):
    """The newest change number, in the only row: who writes records holds its lock until the commit."""

    __tablename__ = "feed"

    id: Mapped[int] = mapped_column(primary_key=True)
    newest: Mapped[int] = mapped_column(BigInteger)


_THE_ROW = DDL("INSERT INTO feed (id, newest) VALUES (1, 0)")  # type: ignore[no-untyped-call]
event.listen(Feed.__table__, "after_create", _THE_ROW)


class Erasure(Base):
    """The mark that a user's records are gone for good: it belongs to nobody, so it outlives them."""

    __tablename__ = "erasures"

    change: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=False)
    user_id: Mapped[str] = mapped_column(String(200))
    provider: Mapped[str | None] = mapped_column(String(50))
    """Whose records went; None: those of all."""
    erased_at: Mapped[datetime] = mapped_column(index=True)


class ApiKey(Base):
    """What a program shows to read through the API: never the key itself."""

    __tablename__ = "api_keys"
    __table_args__ = (UniqueConstraint("name"), UniqueConstraint("digest"))

    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    digest: Mapped[str] = mapped_column(String(64))
    """SHA-256 of the key."""
    scopes: Mapped[list[str]] = mapped_column(Payload)
    user_id: Mapped[str | None] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    """The only user it may ask about; None: all."""
    created_at: Mapped[datetime]
    last_used_at: Mapped[datetime | None]


class Endpoint(Base):
    """How far another application has been told of changes: an address of `notify.urls`."""

    __tablename__ = "endpoints"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    """SHA-256 of the address, which may be a secret."""
    cursor: Mapped[int] = mapped_column(BigInteger)
    """The number of the last change that it took."""
    failures: Mapped[int] = mapped_column(default=0)
    """Failed deliveries in a row: the back-off's exponent."""
    next_try_at: Mapped[datetime | None]
    reason: Mapped[str | None]
    """What went wrong the last time."""
    delivered_at: Mapped[datetime | None]
    created_at: Mapped[datetime]


class Quarantined(Base):
    """An item that could not be normalised, kept with the reason."""

    __tablename__ = "quarantine"
    __table_args__ = (UniqueConstraint("connection_id", "stream", "digest"),)

    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    connection_id: Mapped[int] = mapped_column(ForeignKey("connections.id", ondelete="CASCADE"))
    stream: Mapped[str] = mapped_column(String(50))
    external_id: Mapped[str | None] = mapped_column(String(200))
    digest: Mapped[str] = mapped_column(String(64))
    reason: Mapped[str]
    payload: Mapped[Any] = mapped_column(Payload(none_is_null=True))
    created_at: Mapped[datetime]


class SyncRun(Base):
    """The journal: one row per connection and sync."""

    __tablename__ = "sync_runs"
    __table_args__ = (
        Index("ix_sync_runs_connection", "connection_id", "id"),
        Index("ix_sync_runs_started", "started_at"),
    )

    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    connection_id: Mapped[int] = mapped_column(ForeignKey("connections.id", ondelete="CASCADE"))
    trigger: Mapped[str] = mapped_column(String(20))
    """What asked for it: `tick`, `asked`, or `news` (a webhook)."""
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str] = mapped_column(String(20))
    """`running`, `ok`, `deferred`, `failed`, `needs_reauth`, or `interrupted` (its worker is gone)."""
    message: Mapped[str | None]
    requests: Mapped[int] = mapped_column(default=0)
    inserted: Mapped[int] = mapped_column(default=0)
    updated: Mapped[int] = mapped_column(default=0)
    deleted: Mapped[int] = mapped_column(default=0)
    quarantined: Mapped[int] = mapped_column(default=0)
    history_s: Mapped[float | None]
    """How much of the past it read, in seconds of that past, all streams together; None: it did not end."""


class Receipt(Base):
    """That somebody left: one row for each connection that went. It names nobody.

    `number` is what whoever left was given; all rows of one leave-taking share it.
    """

    __tablename__ = "receipts"

    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    number: Mapped[str] = mapped_column(String(40), index=True)
    kind: Mapped[str] = mapped_column(String(20))
    """`disconnected`, `erased` (the user, too), `deauthorised` (at the provider), or `moved`: the grant alone
    went, as the connection has one with another application."""
    provider: Mapped[str | None] = mapped_column(String(50))
    """None: an erased user who had no connection."""
    deleted: Mapped[dict[str, int]] = mapped_column(Payload)
    """How many rows went, by table."""
    revocation: Mapped[str | None] = mapped_column(String(20))
    """`pending`, `done`, `given_up`, `not_offered`, or None: there was nothing to revoke."""
    created_at: Mapped[datetime]


class Revocation(Base):
    """A grant still to be ended at its provider: the sealed tokens that it takes, and nothing of the person.

    Gone as soon as the provider has agreed, or has not for too long.
    """

    __tablename__ = "revocations"

    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    receipt_id: Mapped[int] = mapped_column(ForeignKey("receipts.id", ondelete="CASCADE"))
    provider: Mapped[str] = mapped_column(String(50))
    application: Mapped[str] = mapped_column(String(50), server_default=MAIN)
    connection_id: Mapped[int] = mapped_column(BigInteger)
    """The connection that is gone: newer tokens of it may still wait in Redis."""
    access_token: Mapped[bytes]
    refresh_token: Mapped[bytes | None]
    token_expires_at: Mapped[datetime]
    attempts: Mapped[int] = mapped_column(default=0)
    next_attempt_at: Mapped[datetime] = mapped_column(index=True)
    created_at: Mapped[datetime]


class Tick(Base):
    """One firing of the schedule: the primary key lets each happen once."""

    __tablename__ = "ticks"

    name: Mapped[str] = mapped_column(String(50), primary_key=True)
    due_at: Mapped[datetime] = mapped_column(primary_key=True)
    fired_at: Mapped[datetime] = mapped_column(index=True)
    planned: Mapped[int | None]
    """How many users' syncs it sent; None: it died before it sent any."""


class Counted(Base):
    """How much there is in a large store, in the only row, if there is one: see `store.counts`."""

    __tablename__ = "counts"

    id: Mapped[int] = mapped_column(primary_key=True)
    counted_at: Mapped[datetime]
    seconds: Mapped[float]
    """How long it took."""
    value: Mapped[Any] = mapped_column(Payload)


class Pace(Base):
    """How an application's requests are spent: see `lifelogger.pacing`."""

    __tablename__ = "paces"

    provider: Mapped[str] = mapped_column(String(50), primary_key=True)
    application: Mapped[str] = mapped_column(String(50), primary_key=True, server_default=MAIN)
    price: Mapped[float] = mapped_column(default=0.0)
    """The hours that news must be spared from waiting by one request; 0: there are enough for everybody."""
    rate: Mapped[float] = mapped_column(default=1.0)
    """News a day of the average connection."""
    hours: Mapped[list[float] | None] = mapped_column(Payload, nullable=True)
    """Their shares of the hours of the people's day; None: not known."""
    curve: Mapped[list[float] | None] = mapped_column(Payload, nullable=True)
    """Polls that are best made in each hour of the day, in UTC; None: spread evenly."""
    wanted: Mapped[float] = mapped_column(default=0.0)
    """Requests a day that are worth the price ..."""
    offered: Mapped[float] = mapped_column(default=0.0)
    """... and that polls may spend."""
    longest_s: Mapped[float] = mapped_column(default=0.0)
    """How long nobody should be left unpolled."""
    priced_at: Mapped[datetime | None]
    heard_at: Mapped[datetime | None]
    """When a webhook last brought us to news."""
    deaf: Mapped[bool] = mapped_column(default=False)
    """Webhooks that used to come have stopped."""
    connections: Mapped[float] = mapped_column(default=0.0)
    """How many are polled, as far as a sample tells."""
    recheck_s: Mapped[float | None]
    """How long a round over what is older than the look-back takes, as the sample has it."""
    recheck_at: Mapped[datetime | None]
    """Where requests are scarce: before that nobody's round has another one."""


class Webhook(Base):
    """What we know of an application's webhooks: the subscriptions told, and the keys that sign them."""

    __tablename__ = "webhooks"

    provider: Mapped[str] = mapped_column(String(50), primary_key=True)
    application: Mapped[str] = mapped_column(String(50), primary_key=True, server_default=MAIN)
    subscriptions: Mapped[list[dict[str, Any]]] = mapped_column(Payload)
    """Each with `id`, `topic`, `callback` and `expires_at`, as of `checked_at`."""
    keys: Mapped[Any] = mapped_column(Payload, nullable=True)
    """The provider's public keys, as it publishes them."""
    checked_at: Mapped[datetime]
    fault: Mapped[str | None]
    """Why the last check did not end well."""
    heard_at: Mapped[datetime | None]
    """When an event was last believed, to the minute."""


class WebhookCall(Base):
    """A signed webhook that was taken: the primary key lets each have its effect once."""

    __tablename__ = "webhook_calls"
    __table_args__ = (Index("ix_webhook_calls_received", "received_at"),)

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    received_at: Mapped[datetime]
