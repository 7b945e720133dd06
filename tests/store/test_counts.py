"""A small store is counted for whoever asks; a large one beforehand, for a small share of the time."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select, update

from lifelogger import status
from lifelogger.runtime import Runtime
from lifelogger.store import counts
from lifelogger.store.models import Connection, Counted
from tests.test_status import connect

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
REASON = "Strava is down"


@pytest.fixture
def rt(runtime: Runtime) -> Runtime:
    return dataclasses.replace(runtime, clock=lambda: NOW)


def test_a_small_store_keeps_no_count(rt: Runtime) -> None:
    connect(rt, "ann")

    assert not counts.recount(rt.store, rt.clock)
    connect(rt, "bob")

    told = status.overview(rt)
    assert (told["users"], told["counted_at"]) == (2, NOW)


def test_of_a_large_store_the_last_count_is_told_with_its_time(rt: Runtime) -> None:
    connect(rt, "ann", wait_reason=REASON, next_sync_at=NOW + timedelta(hours=1))
    counted = status.overview(rt)

    assert counts.recount(rt.store, rt.clock, large=2)
    connect(rt, "bob")
    later = dataclasses.replace(rt, clock=lambda: NOW + timedelta(minutes=3))

    told = status.overview(later)
    assert told["now"] == NOW + timedelta(minutes=3)
    assert {**told, "now": NOW} == counted


def test_it_is_counted_again_when_the_last_count_is_old_for_what_it_cost(rt: Runtime) -> None:
    connect(rt, "ann")
    counts.recount(rt.store, rt.clock, large=1)
    with rt.store.write() as db:
        db.execute(update(Counted).values(seconds=2.0))
    connect(rt, "bob")

    counts.recount(rt.store, lambda: NOW + timedelta(seconds=199), large=1)
    assert status.overview(rt)["users"] == 1
    counts.recount(rt.store, lambda: NOW + timedelta(seconds=200), large=1)
    assert status.overview(rt)["users"] == 2


def test_a_store_that_became_small_keeps_none(rt: Runtime) -> None:
    connect(rt, "ann")
    counts.recount(rt.store, rt.clock, large=1)

    counts.recount(rt.store, lambda: NOW + timedelta(days=1), large=10)

    with rt.store.read() as db:
        assert db.execute(select(Counted.id)).all() == []
        assert db.execute(select(Connection.id)).first() is not None
    assert status.overview(rt)["counted_at"] == NOW
