"""The change feed: ordered, nothing missed under concurrent writers, each record once as it is now."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection as Database
from sqlalchemy import MetaData, Table, delete, insert, select, update

from lifelogger import client
from lifelogger.connections import import_lines
from lifelogger.providers.base import Record as Normal
from lifelogger.runtime import Runtime
from lifelogger.status import as_json
from lifelogger.store import Store, feed
from lifelogger.store.migrate import downgrade, upgrade
from lifelogger.store.models import Connection, Record, User
from lifelogger.store.pages import Item, delete_missing, write_items
from tests.feed_consumer import Copied, Copy, follow
from tests.live import in_background
from tests.processes import ROOT
from tests.servers import wait_until

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
PEOPLE = ("ann", "bob", "cy", "dee")


@pytest.fixture
def rt(runtime: Runtime) -> Runtime:
    """With four people who are connected."""
    rt = replace(runtime, clock=lambda: NOW)
    lines = [
        {"user_id": person, "provider": "strava", "access_token": "a", "expires_at": 1900000000}
        for person in PEOPLE
    ]
    import_lines(rt, map(json.dumps, lines))
    return rt


def item(key: int, title: str = "Morning") -> Item:
    start = NOW - timedelta(days=1, minutes=key)
    return Item(
        str(key), {"id": key, "name": title}, Normal(str(key), "activity", ordered_at=start, title=title)
    )


@contextmanager
def page_of(rt: Runtime, user_id: str) -> Iterator[tuple[Database, int]]:
    """A transaction of a sync: it owns the connection's row, as the fence has it."""
    with rt.store.write() as db:
        number = db.execute(
            update(Connection)
            .where(Connection.user_id == user_id)
            .values(updated_at=NOW)
            .returning(Connection.id)
        ).scalar_one()
        yield db, number


def write(rt: Runtime, user_id: str, *items: Item) -> None:
    with page_of(rt, user_id) as (db, number):
        write_items(rt.store, db, number, "activities", items, NOW)


def lose(rt: Runtime, user_id: str, *present: str) -> None:
    """The provider lists no others any more."""
    with page_of(rt, user_id) as (db, number):
        delete_missing(
            db, number, "activities", since=NOW - timedelta(days=9), until=None, present=present, now=NOW
        )


def erase(rt: Runtime, user_id: str) -> None:
    with page_of(rt, user_id) as (db, number):
        feed.mark_erased(db, user_id, "strava", NOW)
        db.execute(delete(Record).where(Record.connection_id == number))


def told(page: client.Changes) -> list[tuple[str, str, str | None]]:
    return [(change["action"], change["user_id"], change["external_id"]) for change in page.changes]


# What is told ----------------------------------------------------------------------------------------------


def test_everything_there_is_comes_in_the_order_it_was_written(rt: Runtime) -> None:
    write(rt, "bob", item(1))
    write(rt, "ann", item(1), item(2))

    page = client.changes(runtime=rt)

    assert told(page) == [("upsert", "bob", "1"), ("upsert", "ann", "1"), ("upsert", "ann", "2")]
    assert client.changes(page.next, runtime=rt) == ([], page.next)


def test_an_upsert_brings_the_record_as_one_reads_it(rt: Runtime) -> None:
    write(rt, "ann", item(1))

    [change] = client.changes(runtime=rt).changes

    assert [change["record"]] == client.records("ann", runtime=rt)
    assert (change["provider"], change["stream"], change["at"]) == ("strava", "activities", NOW)


def test_each_record_comes_once_as_it_is_now(rt: Runtime) -> None:
    write(rt, "ann", item(1), item(2))
    write(rt, "ann", item(1, "Evening"))

    page = client.changes(runtime=rt)

    assert [(change["external_id"], change["record"]["title"]) for change in page.changes] == [  # type: ignore[index]
        ("2", "Morning"),
        ("1", "Evening"),
    ]


def test_what_did_not_change_is_not_told_again(rt: Runtime) -> None:
    write(rt, "ann", item(1))
    cursor = client.newest_cursor(runtime=rt)

    write(rt, "ann", item(1))
    lose(rt, "ann", "1")

    assert client.changes(cursor, runtime=rt) == ([], cursor)


def test_a_deletion_is_a_change_without_its_record(rt: Runtime) -> None:
    write(rt, "ann", item(1), item(2))
    cursor = client.newest_cursor(runtime=rt)

    lose(rt, "ann", "2")

    [change] = client.changes(cursor, runtime=rt).changes
    assert (change["action"], change["external_id"], change["record"]) == ("delete", "1", None)


def test_an_erasure_is_told_and_what_comes_after_it_is_new(rt: Runtime) -> None:
    write(rt, "ann", item(1), item(2))
    cursor = client.newest_cursor(runtime=rt)

    erase(rt, "ann")
    write(rt, "ann", item(2))

    page = client.changes(cursor, runtime=rt)
    assert told(page) == [("erase", "ann", None), ("upsert", "ann", "2")]
    assert page.changes[0]["provider"] == "strava"


def test_an_erased_user_is_told_though_no_row_of_theirs_is_left(rt: Runtime) -> None:
    write(rt, "ann", item(1))
    with page_of(rt, "ann") as (db, _):
        feed.mark_erased(db, "ann", None, NOW)
        db.execute(delete(User).where(User.id == "ann"))

    [change] = client.changes(runtime=rt).changes
    assert (change["action"], change["user_id"], change["provider"]) == ("erase", "ann", None)


def test_pages_of_any_size_together_are_the_whole(rt: Runtime) -> None:
    for number in range(3):
        write(rt, PEOPLE[number], item(number), item(number + 10))
        erase(rt, PEOPLE[number - 1])
    whole = told(client.changes(runtime=rt))

    for limit in (1, 2, 3, 5, 1000):
        cursor, found = "", []
        while (page := client.changes(cursor, limit=limit, runtime=rt)).changes:
            assert len(page.changes) <= limit
            found += told(page)
            cursor = page.next
        assert found == whole


def test_of_one_user_only_theirs_comes_and_the_cursor_goes_on_over_the_others(rt: Runtime) -> None:
    write(rt, "ann", item(1))
    write(rt, "bob", item(1), item(2))
    erase(rt, "cy")

    page = client.changes(user_id="ann", runtime=rt)

    assert told(page) == [("upsert", "ann", "1")]
    assert page.next == client.newest_cursor(runtime=rt)
    assert client.changes(user_id="nobody", runtime=rt) == ([], page.next)


def test_one_can_begin_at_a_time(rt: Runtime) -> None:
    write(rt, "bob", item(1))
    write(rt, "ann", item(1))
    with page_of(rt, "ann") as (db, number):
        write_items(rt.store, db, number, "activities", [item(2)], NOW + timedelta(hours=2))

    def since(hours: int, user_id: str = "ann") -> list[str | None]:
        cursor = client.cursor_since(user_id, NOW + timedelta(hours=hours), runtime=rt)
        page = client.changes(cursor, user_id=user_id, runtime=rt)
        return [change["external_id"] for change in page.changes]

    assert [since(hours) for hours in (0, 1, 2, 3)] == [["1", "2"], ["2"], ["2"], []]
    assert since(1, "bob") == since(1, "nobody") == []
    erase(rt, "bob")
    assert since(0, "bob") == [None]
    with pytest.raises(ValueError, match="since needs a time zone"):
        client.cursor_since("ann", NOW.replace(tzinfo=None), runtime=rt)


@pytest.mark.parametrize("cursor", ["2", "-1", "x", "1.0", " 1", "٣", "9" * 30, "1\0"])
def test_a_cursor_of_another_database_is_refused(rt: Runtime, cursor: str) -> None:
    """One beyond the newest change is from before a backup was restored, and others came since."""
    write(rt, "ann", item(1))

    with pytest.raises(client.CursorUnknown, match="begin without a cursor"):
        client.changes(cursor, runtime=rt)


# Nothing is missed ------------------------------------------------------------------------------------------


def test_a_slow_writer_is_not_overtaken(rt: Runtime) -> None:
    """With a sequence the quick one would be seen first, and the slow one's lower number never."""
    with ThreadPoolExecutor(1) as pool:
        with page_of(rt, "ann") as (db, number):
            write_items(rt.store, db, number, "activities", [item(1)], NOW)
            quick = pool.submit(write, rt, "bob", item(2))
            wait([quick], timeout=0.5)  # it may not get through: if it did, this is where it would be seen
            before = client.changes(runtime=rt)
        quick.result(20)

    after = client.changes(before.next, runtime=rt)
    assert told(before) + told(after) == [("upsert", "ann", "1"), ("upsert", "bob", "2")]


def test_a_sync_without_news_waits_for_no_writer(rt: Runtime) -> None:
    """On PostgreSQL; SQLite has one writer at a time."""
    if rt.store.is_sqlite:
        pytest.skip("one writer at a time")
    write(rt, "bob", item(2))

    with page_of(rt, "ann") as (db, number):
        write_items(rt.store, db, number, "activities", [item(1)], NOW)
        in_background(write, rt, "bob", item(2)).result(20)


def test_a_writer_that_fails_leaves_no_trace(rt: Runtime) -> None:
    before = client.newest_cursor(runtime=rt)

    with suppress(ZeroDivisionError), page_of(rt, "ann") as (db, number):
        write_items(rt.store, db, number, "activities", [item(1)], NOW)
        raise ZeroDivisionError

    assert client.changes(runtime=rt) == ([], before)


class Writers:
    """Eight of them, each in a thread: new records, edits, deletions, erasures, of the same few people."""

    def __init__(self, rt: Runtime, rounds: int) -> None:
        self.rt, self.rounds = rt, rounds
        self.pool = ThreadPoolExecutor(8)
        self.done: list[Future[None]] = []

    def __enter__(self) -> Writers:
        self.done = [self.pool.submit(self.work, seed) for seed in range(8)]
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()

    def work(self, seed: int) -> None:
        chance = random.Random(seed)
        for turn in range(self.rounds):
            person, what = chance.choice(PEOPLE), chance.random()
            keys = chance.sample(range(30), chance.randint(1, 6))
            if what < 0.7:
                write(self.rt, person, *(item(key, f"{seed} {turn}") for key in keys))
            elif what < 0.95:
                lose(self.rt, person, *map(str, range(20)))
            else:
                erase(self.rt, person)

    def finished(self) -> bool:
        return all(each.done() for each in self.done)

    def check(self) -> None:
        for each in self.done:
            each.result(0)


def truth(rt: Runtime) -> Copied:
    return {
        (person, each["provider"], each["stream"], each["external_id"]): json.dumps(
            as_json(each), sort_keys=True
        )
        for person in PEOPLE
        for each in client.records(person, limit=1000, runtime=rt)
    }


def test_a_consumer_that_dies_anywhere_ends_equal_to_the_store(rt: Runtime, tmp_path: Path) -> None:
    """It dies between reading and keeping, and begins again from what it kept."""
    chance = random.Random(3)

    class Killed(Exception):
        pass

    class Mortal(Copy):
        def take(self, page: client.Changes) -> None:
            if chance.random() < 0.3:
                raise Killed
            super().take(page)

    path, deaths, more = tmp_path / "copy.db", 0, True
    with Writers(rt, rounds=40) as writers:
        while more:
            over, mortal = writers.finished(), Mortal(path)
            try:
                more = follow(mortal, rt, limit=chance.choice([1, 7, 50])) or not over
            except Killed:
                deaths += 1
            mortal.db.close()
    writers.check()

    assert Copy(path).contents() == truth(rt) != {}
    assert deaths > 5


@pytest.mark.slow
def test_a_consumer_killed_at_random_while_eight_write_ends_equal_to_the_store(
    rt: Runtime, tmp_path: Path
) -> None:
    """The same with a process and SIGKILL."""
    chance, path = random.Random(5), tmp_path / "copy.db"
    command = [sys.executable, "-m", "tests.feed_consumer", str(path)]
    kills, stop = 0, threading.Event()
    with Writers(rt, rounds=1200) as writers:
        while not writers.finished():
            with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as consumer:
                assert consumer.stdout is not None
                assert consumer.stdout.readline() == b"following\n"
                stop.wait(chance.uniform(0, 0.5))
                consumer.kill()
                kills += 1
    writers.check()
    with subprocess.Popen(command, cwd=ROOT) as consumer:
        newest = client.newest_cursor(runtime=rt)
        wait_until(lambda: Copy(path).cursor == newest, "the consumer")
        consumer.kill()

    assert Copy(path).contents() == truth(rt) != {}
    assert kills > 5


# What was there before -------------------------------------------------------------------------------------


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    store = Store(database_url)
    yield store
    store.close()


def test_records_from_before_the_feed_come_in_it(store: Store) -> None:
    """Up from the tables without numbers, down again, and up once more, with rows in them."""
    upgrade(store, "0002")
    put_records(store, 3)

    upgrade(store)
    assert numbers(store) == ([1, 2, 3], 3)
    downgrade(store, "0002")
    with store.read() as db:
        assert len(db.execute(select(Record.id, Record.raw)).all()) == 3
    upgrade(store)

    assert numbers(store) == ([1, 2, 3], 3)
    with store.write() as db:
        assert list(feed.take(db, 2)) == [4, 5]


def test_without_records_the_feed_begins_at_nothing(store: Store) -> None:
    upgrade(store)

    assert numbers(store) == ([], 0)


def numbers(store: Store) -> tuple[list[int], int]:
    with store.read() as db:
        return list(db.scalars(select(Record.change).order_by(Record.id))), feed.newest(db)


def put_records(store: Store, number: int) -> None:
    person: dict[str, Any] = {"user_id": "ann", "provider": "strava", "status": "active", "scopes": []}
    times = {"created_at": NOW, "updated_at": NOW}
    with store.write() as db:
        db.execute(insert(User).values(id="ann", created_at=NOW))
        owner = insert(Connection).values(
            **person, **times, access_token=b"", token_expires_at=NOW, fence=0, failures=0
        )
        connection = db.scalar(owner.returning(Connection.id))
        for key in range(number):
            db.execute(
                old_records(store).insert().values(
                    connection_id=connection, stream="activities", external_id=str(key), kind="activity",
                    ordered_at=NOW, raw={"id": key}, **times,
                )
            )  # fmt: skip


def old_records(store: Store) -> Any:
    """The table without the column that it had not yet."""
    kept = [column._copy() for column in Record.__table__.columns if column.name != "change"]
    return Table("records", MetaData(), *kept)
