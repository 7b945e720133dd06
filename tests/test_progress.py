"""How far a first import is: exact while it goes on, and honest about how long it still takes."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import event

from lifelogger import client, progress, status, sync
from lifelogger.providers import strava
from lifelogger.runtime import Runtime
from lifelogger.store.models import Stream, SyncRun
from tests.live import change, connect, journal, stored, stream, ticked, truth, tuned
from tests.sandbox.control import Control
from tests.test_status import connect as connected
from tests.test_status import store

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture
def slow(live: Runtime, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """A page of five at a time, and one page of the past in each sync."""
    monkeypatch.setattr(strava, "LARGEST_PAGE", 5)
    return tuned(live, sync={"history_pages": 1, "history_days": 100})


def the_import(rt: Runtime, user_id: str = "alice") -> dict[str, Any] | None:
    found = status.user(rt, user_id)
    assert found is not None
    [connection] = found["connections"]
    told: dict[str, Any] | None = connection["import"]
    return told


def test_an_import_is_followed_from_its_first_page_to_its_last(slow: Runtime, sandbox: Control) -> None:
    connect(slow, sandbox, "alice")
    seen = [the_import(slow)]
    sync.run("alice", runtime=slow)
    while (now := the_import(slow)) is not None:
        row = stream(slow, "alice")
        runs = journal(slow, "alice")
        assert now["reached"] == row.backlog_until
        assert now["goes_to"] == row.backlog_since
        assert now["records"] == len(stored(slow, "alice"))
        assert now["requests"] == sum(run.requests for run in runs)
        seen.append(now)
        sandbox.step(900)
        ticked(slow, "alice")

    assert stored(slow, "alice") == truth(sandbox, "alice")
    shares = [each["share"] for each in seen if each]
    assert shares == sorted(shares)
    assert len(set(shares)) > 3
    assert shares[0] == 0.0
    assert shares[-1] < 1.0
    assert client.imports("alice", runtime=slow) == []


def test_before_the_first_sync_it_says_where_it_goes(slow: Runtime, sandbox: Control) -> None:
    connect(slow, sandbox, "alice")

    [told] = client.imports("alice", runtime=slow)

    assert (told.provider, told.reached, told.share, told.left_s) == ("strava", None, 0.0, None)
    assert told.goes_to == slow.clock() - timedelta(days=100)
    assert the_import(slow)["sentence"].startswith("The past is not imported yet: it goes back to ")  # type: ignore[index]


def test_how_long_it_takes_is_unknown_until_a_second_sync_and_then_about_right(
    slow: Runtime, sandbox: Control
) -> None:
    """A page in 15 minutes: what it said halfway is what it took, about."""
    connect(slow, sandbox, "alice")
    sync.run("alice", runtime=slow)
    first = the_import(slow)
    assert first is not None
    assert first["left_s"] is None
    assert first["sentence"].endswith("How long it still takes cannot be told yet.")
    told: list[tuple[datetime, int]] = []
    while (now := the_import(slow)) is not None:
        if now["left_s"] is not None:
            told.append((slow.clock(), now["left_s"]))
            assert "It takes about " in now["sentence"]
        sandbox.step(900)
        ticked(slow, "alice")

    done = slow.clock()
    assert len(told) > 3
    at, left = told[len(told) // 2]
    # The list may end before the span does: the past of the sandbox's people is 90 days, not 100.
    assert timedelta(seconds=left) / (done - at) == pytest.approx(1, abs=0.6)
    assert all(later[1] != 0 for later in told)


def test_who_has_to_sign_in_again_is_not_promised_anything(slow: Runtime, sandbox: Control) -> None:
    connect(slow, sandbox, "alice")
    for _ in range(3):
        ticked(slow, "alice")
        sandbox.step(900)
    change(slow, "alice", status="needs_reauth", status_reason="ended", next_sync_at=None)

    told = the_import(slow)

    assert told is not None
    assert told["left_s"] is None
    assert told["sentence"].endswith("It goes on when they have signed in again.")


# The arithmetic ---------------------------------------------------------------------------------------------


def run_of(minutes: float, days: float | None) -> Any:
    """A sync that ended so many minutes ago and read so many days of the past."""
    read = None if days is None else days * 86400
    return SimpleNamespace(ended_at=NOW - timedelta(minutes=minutes), history_s=read)


@pytest.mark.parametrize(
    ("runs", "minutes"),
    [
        ([], None),
        ([run_of(0, 50)], None),
        ([run_of(15, 50), run_of(0, 10)], 15 * 10),
        ([run_of(30, 50), run_of(15, 10), run_of(0, 10)], 30 * 5),
        ([run_of(60, 50), run_of(45, 10)], 60 * 10),
        ([run_of(30, 50), run_of(15, None), run_of(0, 0)], None),
        ([run_of(0, 50), run_of(0, 10)], None),
    ],
    ids=["none", "one", "two", "three", "it waits since", "nothing read", "no time passed"],
)
def test_what_is_left_takes_as_long_as_the_syncs_before_with_their_waiting(
    runs: list[Any], minutes: int | None
) -> None:
    expected = None if minutes is None else minutes * 60

    assert progress.still(runs, (100 * DAY).total_seconds(), NOW) == expected


UNREAD = {"backlog_since": NOW - 40 * DAY}


@pytest.mark.parametrize(
    ("row", "here", "goes_to"),
    [
        (None, 0.0, NOW - 100 * DAY),
        ({"cursor": None}, 0.0, NOW - 100 * DAY),
        ({"cursor": NOW}, 1.0, None),
        ({"cursor": NOW, **UNREAD, "backlog_until": NOW - 10 * DAY}, 0.25, NOW - 40 * DAY),
        ({"cursor": NOW, **UNREAD, "backlog_until": NOW - 39.9999 * DAY}, 0.9999, NOW - 40 * DAY),
        ({"cursor": NOW - DAY, **UNREAD, "backlog_until": NOW}, 0.0, NOW - 40 * DAY),
    ],
    ids=["no row", "never read", "all", "a quarter", "nearly all", "a clock set back"],
)  # fmt: skip
def test_the_share_is_one_of_time_and_whole_only_at_the_end(
    row: dict[str, Any] | None, here: float, goes_to: datetime | None
) -> None:
    nothing = {"cursor": None, "backlog_since": None, "backlog_until": None}
    found = progress.span(row and SimpleNamespace(**{**nothing, **row}), NOW, 100)

    assert (found.share, found.goes_to) == (here, goes_to)


def test_only_the_last_day_tells_the_pace(runtime: Runtime) -> None:
    rt = replace(runtime, clock=lambda: NOW)
    ann = connected(rt, "ann")
    store(rt, Stream, ann, cursor=NOW, backlog_since=NOW - 110 * DAY, backlog_until=NOW - 10 * DAY)
    for hours, days in ((50, 900), (30, 900), (2, 900), (1, 10)):
        ended = NOW - timedelta(hours=hours)
        store(rt, SyncRun, ann, started_at=ended, ended_at=ended, history_s=days * 86400.0, requests=3)

    [told] = client.imports("ann", runtime=rt)

    assert told.left_s == 10 * 2 * 3600
    assert told.requests == 12
    assert (told.reached, told.goes_to) == (NOW - 10 * DAY, NOW - 110 * DAY)


def test_a_stream_that_is_off_is_not_waited_for(runtime: Runtime) -> None:
    rt = replace(runtime, clock=lambda: NOW)
    ann = connected(rt, "ann")
    left = {"backlog_since": NOW - 40 * DAY, "backlog_until": NOW - 20 * DAY}
    store(rt, Stream, ann, name="refused", cursor=NOW, off_reason="refused", **left)
    store(rt, Stream, ann, cursor=NOW)

    assert client.imports("ann", runtime=rt) == []
    assert status.overview(rt)["importing"] == 0


def test_a_stream_that_is_read_no_more_is_not_waited_for(runtime: Runtime) -> None:
    """One of `extra_streams` that was taken out of the settings halfway would be imported for ever."""
    rt = replace(runtime, clock=lambda: NOW)
    ann = connected(rt, "ann")
    left = {"backlog_since": NOW - 40 * DAY, "backlog_until": NOW - 20 * DAY}
    store(rt, Stream, ann, name="taken_out", cursor=NOW, **left)
    store(rt, Stream, ann, cursor=NOW)

    assert client.imports("ann", runtime=rt) == []
    assert status.overview(rt)["importing"] == 0


# How many ---------------------------------------------------------------------------------------------------


def test_the_overview_counts_the_connections_that_still_import(runtime: Runtime) -> None:
    rt = replace(runtime, clock=lambda: NOW)
    left = {"cursor": NOW, "backlog_since": NOW - 40 * DAY, "backlog_until": NOW - 20 * DAY}
    ann, bob, cy = connected(rt, "ann"), connected(rt, "bob"), connected(rt, "cy")
    for name in ("activities", "more"):
        store(rt, Stream, ann, name=name, **left)
        store(rt, Stream, cy, name=name, **left)
    store(rt, Stream, bob, cursor=NOW)
    change(rt, "cy", status="needs_reauth", status_reason="ended", next_sync_at=None)

    now = status.overview(rt)

    assert (now["importing"], now["providers"]["strava"]["importing"]) == (1, 1)


def test_counting_them_reads_an_index_of_those_alone(runtime: Runtime) -> None:
    if not runtime.store.is_sqlite:
        pytest.skip("a table this small is read whole")
    asked: list[tuple[str, Any]] = []
    listen = ("before_cursor_execute", lambda *told: asked.append((told[2], told[3])))
    event.listen(runtime.store.engine, *listen)
    status.overview(runtime, budgets=False)
    event.remove(runtime.store.engine, *listen)

    [(statement, parameters)] = [each for each in asked if "backlog_until" in each[0]]
    with runtime.store.read() as db:
        plan = [row[-1] for row in db.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)]

    assert "SCAN streams USING INDEX ix_streams_unread" in plan
    assert "SEARCH connections USING INTEGER PRIMARY KEY (rowid=?)" in plan
