"""Promises 6 and 7 where pages meet the tables: exactly once however often, bad data costs one record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import insert, select, text

from lifelogger import sync
from lifelogger.providers.base import Record as Normal
from lifelogger.store import Store
from lifelogger.store.models import Connection, Quarantined, Record, Stream, User
from lifelogger.store.pages import ENDLESS, Counts, Item, delete_missing, listed, statements, write_items
from tests.conftest import make_tables

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
LATER = NOW + timedelta(minutes=15)
ANN, BOB = 1, 2

_streams = (f"stream {number}" for number in count())


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    """With two connections, of Ann and of Bob."""
    store = Store(database_url)
    make_tables(store)
    with store.write() as db:
        for number, user_id in ((ANN, "ann"), (BOB, "bob")):
            db.execute(insert(User).values(id=user_id, created_at=NOW))
            db.execute(
                insert(Connection).values(
                    id=number,
                    user_id=user_id,
                    provider="strava",
                    status="active",
                    scopes=[],
                    access_token=b"sealed",
                    token_expires_at=NOW,
                    created_at=NOW,
                    updated_at=NOW,
                )
            )
    yield store
    store.close()


def item(key: int, title: str = "Morning", day: int = 1, **raw: Any) -> Item:
    start = NOW - timedelta(days=day)
    record = Normal(
        str(key), "activity", ordered_at=start, start_at=start, title=title, distance_m=5000.5, type="running"
    )
    return Item(str(key), {"id": key, "name": title, **raw}, record)


def bad(key: int | None, fault: Any = "far") -> Item:
    return Item(
        None if key is None else str(key), {"id": key, "distance": fault}, reason="distance: no number"
    )


def write(
    store: Store, *items: Item, now: datetime = NOW, connection: int = ANN, stream: str = "activities"
) -> Counts:
    with store.write() as db:
        return write_items(store, db, connection, stream, items, now)


def rows(store: Store, table: Any = Record, stream: str | None = None) -> list[dict[str, Any]]:
    query = select(table.__table__).order_by(table.id)
    if stream is not None:
        query = query.where(table.stream == stream)
    with store.read() as db:
        return [dict(row._mapping) for row in db.execute(query)]


def titles(store: Store) -> dict[str, str | None]:
    return {row["external_id"]: row["title"] for row in rows(store)}


# New, changed, unchanged ------------------------------------------------------------------------------------


def test_new_items_are_stored_with_their_values_and_their_payload(store: Store) -> None:
    counts = write(store, item(1, weird=[None, {"a": 1}]), item(2, "Evening"))

    assert counts == Counts(inserted=2)
    [first, second] = rows(store)
    assert (first["external_id"], first["title"], first["distance_m"]) == ("1", "Morning", 5000.5)
    assert (first["ordered_at"], first["created_at"]) == (NOW - timedelta(days=1), NOW)
    assert first["raw"] == {"id": 1, "name": "Morning", "weird": [None, {"a": 1}]}
    assert first["heart_rate_avg_bpm"] is None
    assert second["title"] == "Evening"


def test_an_unchanged_item_is_not_written_again(store: Store) -> None:
    write(store, item(1))
    before = rows(store)

    assert write(store, item(1), now=LATER) == Counts()

    assert rows(store) == before


def test_an_item_whose_keys_come_in_another_order_is_unchanged(store: Store) -> None:
    [one] = [item(1)]
    write(store, one)

    turned = Item(one.external_id, dict(reversed(one.raw.items())), one.record)

    assert list(turned.raw) != list(one.raw)
    assert write(store, turned, now=LATER) == Counts()


def test_an_edit_replaces_values_and_payload_and_keeps_the_row(store: Store) -> None:
    write(store, item(1), item(2))
    [before, other] = rows(store)

    assert write(store, item(1, "Renamed"), item(2), now=LATER) == Counts(updated=1)

    [after, same] = rows(store)
    assert after["title"] == after["raw"]["name"] == "Renamed"
    assert (after["id"], after["created_at"], after["updated_at"]) == (before["id"], NOW, LATER)
    assert same == other


def test_an_edit_that_only_the_payload_shows_is_one_too(store: Store) -> None:
    write(store, item(1, kudos=1))

    assert write(store, item(1, kudos=2)) == Counts(updated=1)

    assert rows(store)[0]["raw"]["kudos"] == 2


def test_a_value_that_is_gone_is_emptied(store: Store) -> None:
    write(store, item(1))

    write(store, Item("1", {"id": 1}, Normal("1", "activity", ordered_at=NOW)))

    assert rows(store)[0]["title"] is None
    assert rows(store)[0]["ordered_at"] == NOW


def test_of_an_item_that_stands_twice_on_a_page_the_last_counts(store: Store) -> None:
    assert write(store, item(1, "Old"), item(2), item(1, "New")) == Counts(inserted=2)

    assert titles(store) == {"1": "New", "2": "Morning"}


def test_an_empty_page_is_nothing(store: Store) -> None:
    assert write(store) == Counts()


def test_connections_and_streams_are_apart(store: Store) -> None:
    write(store, item(1, "Ann's"))

    assert write(store, item(1, "Bob's"), connection=BOB) == Counts(inserted=1)
    assert write(store, item(1, "Ann's sleep"), stream="sleeps") == Counts(inserted=1)

    assert [row["title"] for row in rows(store)] == ["Ann's", "Bob's", "Ann's sleep"]


def test_pages_of_more_than_a_thousand_items(store: Store) -> None:
    page = [item(key) for key in range(1200)]
    assert write(store, *page) == Counts(inserted=1200)
    assert write(store, *page) == Counts()

    page[700] = item(700, "Renamed")
    assert write(store, *page, item(5000)) == Counts(inserted=1, updated=1)

    with store.write() as db:
        assert delete(db, present={"700"}) == 1200
    assert [row["external_id"] for row in rows(store) if row["deleted_at"] is None] == ["700"]


# The quarantine ---------------------------------------------------------------------------------------------


def test_a_bad_item_is_kept_with_its_reason_and_the_rest_of_the_page_is_stored(store: Store) -> None:
    assert write(store, item(1), bad(2), item(3)) == Counts(inserted=2, quarantined=1)

    [kept] = rows(store, Quarantined)
    assert (kept["external_id"], kept["reason"]) == ("2", "distance: no number")
    assert kept["payload"] == {"id": 2, "distance": "far"}
    assert set(titles(store)) == {"1", "3"}


def test_a_bad_item_is_counted_once(store: Store) -> None:
    assert write(store, bad(2), bad(2)) == Counts(quarantined=1)
    assert write(store, bad(2), now=LATER) == Counts()

    assert [row["created_at"] for row in rows(store, Quarantined)] == [NOW]


def test_a_mended_item_leaves_the_quarantine(store: Store) -> None:
    write(store, bad(2), bad(3))
    write(store, bad(2), connection=BOB)

    assert write(store, item(2)) == Counts(inserted=1)

    assert [(row["connection_id"], row["external_id"]) for row in rows(store, Quarantined)] == [
        (ANN, "3"),
        (BOB, "2"),
    ]


def test_a_record_outlives_an_edit_that_cannot_be_read(store: Store) -> None:
    write(store, item(1))

    assert write(store, bad(1)) == Counts(quarantined=1)

    assert titles(store) == {"1": "Morning"}


def test_items_without_a_readable_key_are_told_apart_by_what_they_say(store: Store) -> None:
    assert write(store, bad(None, 1), bad(None, 2), bad(None, 1)) == Counts(quarantined=2)


# The payload ------------------------------------------------------------------------------------------------

texts = st.text(st.characters(codec=None), max_size=20) | st.sampled_from(
    ["\x00", "a\x00b", "\ud800", "\udfff"]
)
numbers = (
    st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([2**63, -(2**70), 10**400, 1e-320, -0.0, 1.0])
)
leaves = st.none() | st.booleans() | numbers | texts
payloads = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)
on_this_store = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def exactly(value: Any) -> str:
    """Equal only for what means the same in JSON: 1, 1.0 and true are three things."""
    return json.dumps(value, sort_keys=True)


@on_this_store
@given(raws=st.lists(payloads, min_size=1, max_size=8))
def test_a_payload_comes_back_as_it_was_meant(store: Store, raws: list[Any]) -> None:
    stream = next(_streams)
    good = [
        Item(str(key), {"item": raw}, Normal(str(key), "activity", ordered_at=NOW))
        for key, raw in enumerate(raws)
    ]
    refused = [Item(None, {"refused": raw, "number": key}, reason="bad") for key, raw in enumerate(raws)]

    write(store, *good, *refused, stream=stream)

    assert [exactly(row["raw"]) for row in rows(store, stream=stream)] == [exactly(each.raw) for each in good]
    assert [exactly(row["payload"]) for row in rows(store, Quarantined, stream)] == [
        exactly(each.raw) for each in refused
    ]
    assert write(store, *good, *refused, stream=stream) == Counts()


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_a_payload_nested_deeply_comes_back(store: Store, opening: str) -> None:
    closing = "]" if opening == "[" else "}"
    deep = json.loads(opening * 400 + "null" + closing * 400)

    write(store, Item("1", deep, Normal("1", "activity", ordered_at=NOW)))

    assert rows(store)[0]["raw"] == deep


# Deletions --------------------------------------------------------------------------------------------------


def delete(
    db: Any,
    *,
    since: int = 30,
    until: int | None = None,
    present: set[str] = frozenset(),  # type: ignore[assignment]
) -> int:
    """In days before now."""
    return delete_missing(
        db,
        ANN,
        "activities",
        since=NOW - timedelta(days=since),
        until=None if until is None else NOW - timedelta(days=until),
        present=present,
        now=LATER,
    )


def test_what_is_missing_is_emptied_and_its_row_stays_as_a_mark(store: Store) -> None:
    write(store, item(1), item(2))

    with store.write() as db:
        assert delete(db, present={"2"}) == 1

    [gone, there] = rows(store)
    assert (gone["external_id"], gone["kind"], gone["deleted_at"], gone["updated_at"]) == (
        "1",
        "activity",
        LATER,
        LATER,
    )
    assert gone["ordered_at"] == NOW - timedelta(days=1)
    left = {name for name, value in gone.items() if value is not None}
    assert left == {
        "id",
        "connection_id",
        "stream",
        "external_id",
        "kind",
        "ordered_at",
        "deleted_at",
        "created_at",
        "updated_at",
        "change",
    }
    assert there["deleted_at"] is None
    assert there["raw"] is not None


def test_only_the_span_that_was_read_is_judged(store: Store) -> None:
    """The span is [since, until): here from 5 days ago, and before 2 days ago."""
    write(store, *(item(day, day=day) for day in range(1, 8)))

    with store.write() as db:
        assert delete(db, since=5, until=2) == 3

    assert [row["external_id"] for row in rows(store) if row["deleted_at"]] == ["3", "4", "5"]


def test_a_deletion_is_counted_once(store: Store) -> None:
    write(store, item(1))
    with store.write() as db:
        delete(db)
    before = rows(store)

    with store.write() as db:
        assert delete(db) == 0

    assert rows(store) == before


def test_only_that_stream_of_that_connection_is_judged(store: Store) -> None:
    write(store, item(1), connection=BOB)
    write(store, item(1), stream="sleeps")

    with store.write() as db:
        assert delete(db) == 0


def test_what_comes_back_is_whole_again(store: Store) -> None:
    write(store, item(1))
    with store.write() as db:
        delete(db)

    assert write(store, item(1), now=LATER) == Counts(updated=1)

    [back] = rows(store)
    assert (back["title"], back["deleted_at"], back["created_at"]) == ("Morning", None, NOW)
    assert back["raw"] == {"id": 1, "name": "Morning"}


# Twice is once ----------------------------------------------------------------------------------------------

some_items = st.builds(item, st.integers(1, 4), st.sampled_from(["a", "b"])) | st.builds(
    bad, st.integers(1, 4) | st.none(), st.sampled_from(["far", "near"])
)
some_pages = st.lists(st.lists(some_items, max_size=5), max_size=4)


def stored(store: Store, stream: str) -> tuple[Any, Any]:
    """What there is, without when and under which number it came."""
    return (
        sorted(
            (row["external_id"], row["title"], exactly(row["raw"])) for row in rows(store, Record, stream)
        ),
        sorted(
            (str(row["external_id"]), exactly(row["payload"]), row["reason"])
            for row in rows(store, Quarantined, stream)
        ),
    )


@on_this_store
@given(pages=some_pages)
def test_any_pages_twice_are_the_same_as_once(store: Store, pages: list[list[Item]]) -> None:
    once, twice = next(_streams), next(_streams)

    for page in pages:
        write(store, *page, stream=once)
    for page in [*pages, *pages]:
        write(store, *page, stream=twice)

    assert stored(store, once) == stored(store, twice)


@on_this_store
@given(page=st.lists(some_items, max_size=6))
def test_any_page_again_changes_nothing(store: Store, page: list[Item]) -> None:
    stream = next(_streams)
    write(store, *page, stream=stream)
    before = rows(store, Record, stream), rows(store, Quarantined, stream)

    assert write(store, *page, stream=stream, now=LATER) == Counts()

    assert (rows(store, Record, stream), rows(store, Quarantined, stream)) == before


def test_keys_are_what_they_are_whatever_is_in_them(store: Store) -> None:
    """They go to the database as one text, whose own signs may be in a key."""
    keys = ['"', "\\", "{a,b}", "NULL", ",", "é\n", "' OR 1=1 --", "a b"]
    items = [Item(key, {"id": key}, replace(item(1).record, external_id=key)) for key in keys]

    assert write(store, *items).inserted == len(keys)
    assert write(store, *items) == Counts()
    assert sorted(row["external_id"] for row in rows(store)) == sorted(keys)


EACH_POLL = {
    "what is held": (
        statements(False).held,
        {"of": ANN, "stream": "activities", "keys": listed(map(str, range(13)), False), "until": ENDLESS},
    ),
    "the streams": (sync.STREAMS, {"of": ANN}),
    "who is taken": (
        sync.taking_at_once((("strava", "main"),), False),
        {"user": "ann", "by": "tick", "now": NOW, "lease_ends": NOW, "hint_after": NOW,
         "lookback": timedelta(days=9)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EACH_POLL)
def test_what_each_poll_asks_is_planned_once(store: Store, name: str) -> None:
    """To plan a statement takes PostgreSQL longer than to run it, and it is planned anew as long as the plan
    for any value seems to cost more than one for these."""
    if store.is_sqlite:
        pytest.skip("SQLite keeps no plans")
    for connection in (ANN, BOB):
        write(store, *(item(key, day=key) for key in range(2000)), connection=connection)
    with store.write() as db:
        db.execute(insert(Stream).values(connection_id=ANN, name="activities"))
        db.execute(text("ANALYZE"))
    statement, values = EACH_POLL[name]
    with store.at_once() as db:
        for _ in range(20):  # psycopg prepares what comes often, PostgreSQL plans that five times at first
            statement(db, **{"since": NOW - timedelta(days=9), **values})
        plans = db.execute(text("SELECT generic_plans, custom_plans FROM pg_prepared_statements"
                                " WHERE statement LIKE '%ordered_at >=%'")).all()  # fmt: skip
    [(generic, custom)] = plans
    assert custom == 5
    assert generic > 5
