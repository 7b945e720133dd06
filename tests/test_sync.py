"""The engine against a simulated Strava: promises 2, 6, 7, 12, and promise 1 where it meets the store."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, insert, text

from lifelogger import pacing, planner, status, sweep, sync
from lifelogger.budget import Budget, CountUnknown
from lifelogger.connections import note_news, under_way
from lifelogger.errors import LockLost
from lifelogger.habits import HALF_LIFE_DAYS, Habits
from lifelogger.providers import strava
from lifelogger.runtime import Runtime
from lifelogger.store.models import Connection, Pace, Record
from lifelogger.store.pages import Counts
from tests.live import (
    LIST,
    NOON,
    TOKEN,
    asked,
    change,
    connect,
    connection,
    in_background,
    journal,
    quarantined,
    rows,
    stored,
    stream,
    ticked,
    truth,
    tuned,
    wipe,
)
from tests.sandbox.control import Control

DAY = 86_400
QUARTER = 900
ONCE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For what no database has a part in."""


@pytest.fixture
def pages_of_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strava's largest page has ten activities: Alice's three months are some seven pages."""
    monkeypatch.setattr(strava, "LARGEST_PAGE", 10)


# Promise 6: exactly once in the store ----------------------------------------------------------------


def test_a_poll_without_news_changes_nothing_and_costs_one_request(live: Runtime, sandbox: Control) -> None:
    """Promise 6: a second sync writes no row anew; docs/providers/strava.md: it is one request."""
    connect(live, sandbox, "alice")
    sync.run("alice", runtime=live)
    before = rows(live, Record.__table__, "alice")
    sandbox.step(QUARTER)

    (run,) = sync.run("alice", runtime=live)

    assert rows(live, Record.__table__, "alice") == before
    assert (run.requests, run.counts.inserted, run.counts.updated, run.counts.deleted) == (1, 0, 0, 0)


@ONCE
def test_a_newcomer_costs_one_request_a_poll_and_two_once_a_day(live: Runtime, sandbox: Control) -> None:
    """docs/providers/strava.md: somebody whose first activity lies within the look-back."""
    for activity in truth(sandbox, "chiyo"):
        sandbox.delete(int(activity))
    sandbox.add("chiyo", start=NOON - timedelta(days=1))
    connect(live, sandbox, "chiyo")
    (first,) = sync.run("chiyo", runtime=live)

    costs = []
    for pause in (QUARTER, QUARTER, DAY, QUARTER):
        sandbox.step(pause)
        costs += [run.requests for run in sync.run("chiyo", runtime=live)]

    assert first.requests == 2
    assert costs == [1, 1, 2, 1]
    assert stored(live, "chiyo") == truth(sandbox, "chiyo")


@ONCE
def test_what_a_newcomer_uploads_before_their_first_activity_arrives_within_a_day(
    live: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 6: saving the second request loses nothing for longer than a day."""
    monkeypatch.setattr(strava, "SPARE", 0)  # so many new ones that one page does not hold them
    for activity in truth(sandbox, "chiyo"):
        sandbox.delete(int(activity))
    first = sandbox.add("chiyo", start=NOON - timedelta(days=1))
    connect(live, sandbox, "chiyo")
    sync.run("chiyo", runtime=live)
    sandbox.add("chiyo", start=NOON - timedelta(days=3), uploaded=NOON + timedelta(minutes=5))

    sandbox.step(QUARTER)
    sync.run("chiyo", runtime=live)
    soon = stored(live, "chiyo")
    sandbox.step(DAY)
    sync.run("chiyo", runtime=live)

    assert soon.keys() == {str(first)}
    assert stored(live, "chiyo") == truth(sandbox, "chiyo")


@pytest.mark.usefixtures("pages_of_ten")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_page_and_its_cursor_commit_together(
    live: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Promise 6: the sync dies in the third page's transaction, or right after it; nothing is read twice."""
    connect(live, sandbox, "alice")
    write = sweep.Sweep._store
    left = iter(range(3))

    def dying(self: sweep.Sweep, page: Any, **more: Any) -> None:
        last = next(left, None) == 2
        if last and when == "before":
            monkeypatch.setattr(sweep, "write_items", dies)
        write(self, page, **more)
        if last:
            dies()

    monkeypatch.setattr(sweep.Sweep, "_store", dying)
    (broken,) = sync.run("alice", runtime=live)
    monkeypatch.undo()
    monkeypatch.setattr(strava, "LARGEST_PAGE", 10)
    kept, known_down_to = stored(live, "alice"), stream(live, "alice").backlog_until
    sandbox.step(QUARTER)
    (resumed,) = sync.run("alice", runtime=live)

    assert (broken.outcome, resumed.outcome) == ("failed", "ok")
    everything = truth(sandbox, "alice")
    assert kept == {
        key: item for key, item in everything.items() if began(item) >= known_down_to - timedelta(seconds=1)
    }
    assert len(kept) == (19 if when == "before" else 28)  # pages overlap in the second of their border
    assert stored(live, "alice") == everything
    historical = [query["before"] for query in asked(sandbox) if "before" in query and query["page"] == "1"]
    read_twice = [2] if when == "before" else []  # the page that was not stored
    assert [n for n, before in enumerate(historical) if before in historical[:n]] == read_twice


def test_a_poll_without_news_that_dies_at_its_end_is_asked_again(
    live: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 6: how far it came is written with its end, or not at all."""
    connect(live, sandbox, "alice")
    sync.run("alice", runtime=live)
    before, kept = stream(live, "alice"), stored(live, "alice")
    sandbox.step(QUARTER)
    monkeypatch.setattr(sync, "run_together", dies)

    with pytest.raises(RuntimeError, match="dies here"):
        sync.run("alice", runtime=live)
    monkeypatch.undo()
    died = stream(live, "alice")
    (again,) = sync.run("alice", runtime=live)

    assert died == before
    assert [run.outcome for run in journal(live, "alice")] == ["ok", "interrupted", "ok"]
    assert (again.outcome, again.requests, again.counts) == ("ok", 1, Counts())
    assert stream(live, "alice").cursor == live.clock()
    assert stored(live, "alice") == kept == truth(sandbox, "alice")


@pytest.mark.usefixtures("pages_of_ten")
def test_overlapping_and_duplicate_pages_change_nothing(live: Runtime, sandbox: Control) -> None:
    """Promise 6: the third page has six of the second one again, and some of its own twice."""
    connect(live, sandbox, "alice")
    sync.run("alice", runtime=live)
    expected = rows(live, Record.__table__, "alice")
    items = sandbox.truth("alice")
    wipe(live)
    connect(live, sandbox, "alice")
    sandbox.fault(LIST, json=[*items[12:28], *items[18:22]], skip=2, times=1)

    sync.run("alice", runtime=live)

    again = rows(live, Record.__table__, "alice")
    assert [row.external_id for row in again] == [row.external_id for row in expected]
    assert stored(live, "alice") == truth(sandbox, "alice")


def test_an_item_without_a_readable_key_is_not_taken_for_a_deletion(live: Runtime, sandbox: Control) -> None:
    """Promises 6 and 7: it may be any of those that seem to be missing; once readable, it is."""
    gone, blurred = (sandbox.add("alice", start=NOON - timedelta(days=day)) for day in (1, 2))
    connect(live, sandbox, "alice")
    sync.run("alice", runtime=live)
    before = stored(live, "alice")
    sandbox.edit(blurred, fields={"id": "blurred"})

    (unsure,) = sync.run("alice", runtime=live)
    kept = stored(live, "alice")
    sandbox.edit(blurred, fields={"id": blurred})
    sandbox.delete(gone)
    (sure,) = sync.run("alice", runtime=live)

    assert (unsure.counts.deleted, unsure.counts.quarantined) == (0, 1)
    assert kept == before
    assert sure.counts.deleted == 1
    assert stored(live, "alice") == truth(sandbox, "alice")


@ONCE
@pytest.mark.parametrize("start", ["9999-12-31T23:59:59Z", "9998-12-31T23:59:59Z", "0001-01-01T00:00:00Z"])
def test_a_date_at_the_end_of_time_costs_one_record(live: Runtime, sandbox: Control, start: str) -> None:
    """Promise 7: also where a second or the activity's length more is no date any more."""
    items = [{**sandbox.truth("alice")[0], "start_date": start, "elapsed_time": 300 * DAY}]
    sandbox.fault(LIST, json=items, times=1)
    connect(live, sandbox, "alice")

    (run,) = sync.run("alice", runtime=live)

    assert run.outcome == "ok"
    assert run.counts.quarantined == 1


@pytest.mark.usefixtures("pages_of_ten")
@ONCE
def test_activities_of_the_same_second_are_all_read_at_the_border_of_two_pages(
    live: Runtime, sandbox: Control
) -> None:
    """Promise 6: twelve start at one second, and a page has ten."""
    for _ in range(12):
        sandbox.add("alice", start=NOON - timedelta(days=20), elapsed=60)
    for hour in range(4):
        sandbox.add("alice", start=NOON - timedelta(hours=hour + 1), elapsed=60)
    connect(live, sandbox, "alice")

    sync.run("alice", runtime=live)

    assert stored(live, "alice") == truth(sandbox, "alice")


@pytest.mark.usefixtures("pages_of_ten")
def test_short_pages_that_are_not_the_last_lose_nothing(live: Runtime, sandbox: Control) -> None:
    """Promise 6: Strava cuts pages first and then drops what the token may not see."""
    sandbox.settings(short_pages=True)
    connect(live, sandbox, "alice")

    sync.run("alice", runtime=live)
    sandbox.step(QUARTER)
    (again,) = sync.run("alice", runtime=live)

    assert stored(live, "alice") == truth(sandbox, "alice")
    assert again.counts.deleted == 0


@ONCE
def test_a_list_without_end_is_an_error_and_not_for_ever(live: Runtime, sandbox: Control) -> None:
    """Promise 12: the first page again and again ends, and the journal says why; what came is kept."""
    connect(live, sandbox, "alice", "bruno")
    sync.run("bruno", runtime=live)
    sandbox.fault(LIST, endless=True)

    (imported,) = sync.run("alice", runtime=live)
    live = tuned(live, sync={"lookback_days": 200})  # a poll that would have to see the end
    sandbox.step(DAY)
    (polled,) = sync.run("bruno", runtime=live)

    assert (imported.outcome, polled.outcome) == ("ok", "failed")
    assert "does not end" in (imported.message or "")
    assert "does not end" in (polled.message or "")
    assert max(imported.requests, polled.requests) < 10
    assert connection(live, "bruno").next_sync_at > live.clock()
    assert len(stored(live, "alice")) > 50


def test_a_hidden_start_and_missing_fields_are_stored_as_they_are(live: Runtime, sandbox: Control) -> None:
    """Promise 6: local midnight and a second is what Strava shows; what it does not say is unknown."""
    midnight = datetime(2026, 11, 22, 23, 0, 1, tzinfo=UTC)
    hidden = sandbox.add("alice", start=midnight)
    bare = sandbox.add(
        "alice",
        remove=["name", "sport_type", "type", "distance", "elapsed_time", "utc_offset", "moving_time"],
    )
    connect(live, sandbox, "alice")

    sync.run("alice", runtime=live)

    found = {row.external_id: row for row in rows(live, Record.__table__, "alice")}
    assert stored(live, "alice") == truth(sandbox, "alice")
    assert found[str(hidden)].local_date.isoformat() == "2026-11-23"
    empty = found[str(bare)]
    assert [empty.title, empty.type, empty.distance_m, empty.end_at, empty.local_date] == [None] * 5
    assert empty.start_at is not None


# Promise 7: bad data costs one record ----------------------------------------------------------------


def test_a_bad_record_is_quarantined_and_the_rest_of_its_page_is_stored(
    live: Runtime, sandbox: Control
) -> None:
    """Promise 7: with payload and reason; mended, it moves to the records, wherever it was bad."""
    faults = {"distance": "far", "start_date": "yesterday", "elapsed_time": -1, "sport_type": 7}
    bad = {}
    for day, (name, value) in enumerate(faults.items(), 1):
        bad[name] = sandbox.add("alice", start=NOON - timedelta(days=day))
        sandbox.edit(bad[name], fields={name: value})
    connect(live, sandbox, "alice")
    whole = truth(sandbox, "alice")

    (run,) = sync.run("alice", runtime=live)
    kept = quarantined(live, "alice")
    good = stored(live, "alice")
    (again,) = sync.run("alice", runtime=live)
    for day, (name, activity) in enumerate(bad.items(), 1):
        start = f"{NOON - timedelta(days=day):%Y-%m-%dT%H:%M:%SZ}"
        sandbox.edit(activity, fields={name: start if name == "start_date" else None})
    sandbox.step(QUARTER)
    sync.run("alice", runtime=live)

    assert (run.outcome, run.counts.quarantined, again.counts.quarantined) == ("ok", 4, 0)
    assert good == {key: item for key, item in whole.items() if int(key) not in bad.values()}
    assert {row.external_id: row.payload for row in kept} == {
        str(key): whole[str(key)] for key in bad.values()
    }
    assert all(name in row.reason for row in kept for name, key in bad.items() if row.external_id == str(key))
    assert quarantined(live, "alice") == []
    assert stored(live, "alice") == truth(sandbox, "alice")


@ONCE
def test_a_number_too_large_for_any_field_costs_one_record(live: Runtime, sandbox: Control) -> None:
    """Promise 7: 1e999 is JSON, but no number here; nothing that is stored turns into Infinity."""
    good, bad = sandbox.truth("alice")[:2]
    page = json.dumps([good, {**bad, "distance": 10.125, "id": 77}]).replace("10.125", "1e999")
    sandbox.fault(LIST, body=page, times=1)
    connect(live, sandbox, "alice")

    sync.run("alice", runtime=live)

    (kept,) = quarantined(live, "alice")
    assert str(good["id"]) in stored(live, "alice")
    assert "Infinity" not in json.dumps(kept.payload)


def test_deeply_nested_items_do_not_stop_a_sync(live: Runtime, sandbox: Control) -> None:
    """Promise 7: as deep as a parser takes, and no deeper than the store can write."""
    kept, lost = sandbox.truth("alice")[:2]
    kept, lost = {**kept, "laps": nested(450)}, {**lost, "laps": nested(700)}
    sandbox.fault(LIST, json=[kept, lost], times=1)
    connect(live, sandbox, "alice")

    (run,) = sync.run("alice", runtime=live)

    assert (run.outcome, run.counts.quarantined) == ("ok", 1)
    assert stored(live, "alice")[str(kept["id"])] == kept
    (bad,) = quarantined(live, "alice")
    assert (bad.external_id, bad.reason) == (str(lost["id"]), "nested more than 500 levels deep")


def nested(levels: int) -> list[Any]:
    deep: list[Any] = []
    for _ in range(levels):
        deep = [deep]
    return deep


# Budgets in mid-import -------------------------------------------------------------------------------


def test_a_spent_budget_defers_the_connection_until_its_window_opens(
    live: Runtime, sandbox: Control, pages_of_ten: None
) -> None:
    """Promises 3 and 12: what came is kept; it waits with a reason, no worker does, and goes on then."""
    live = tuned(live, sync={"lookback_days": 60})
    sandbox.limits(reads=(3, 1000))
    connect(live, sandbox, "alice")

    (cut,) = sync.run("alice", runtime=live)
    kept, waiting = stored(live, "alice"), connection(live, "alice")
    (again,) = sync.run("alice", runtime=live)
    sandbox.limits(reads=(100, 1000))
    sandbox.set_clock(waiting.next_sync_at)
    (resumed,) = ticked(live, "alice")

    assert (cut.outcome, cut.requests, journal(live, "alice")[0].outcome) == ("deferred", 3, "deferred")
    assert len(kept) == 28
    assert kept.items() <= truth(sandbox, "alice").items()
    assert waiting.next_sync_at == NOON.replace(minute=15) + timedelta(seconds=1)  # a clock may be a bit off
    assert "15 minute" in waiting.wait_reason
    assert waiting.failures == 0
    assert (again.outcome, again.requests) == ("deferred", 0)
    assert resumed.outcome == "ok"
    assert stored(live, "alice") == truth(sandbox, "alice")
    assert connection(live, "alice").wait_reason is None


@ONCE
def test_history_that_a_budget_cuts_goes_on_in_the_next_windows(
    live: Runtime, sandbox: Control, pages_of_ten: None
) -> None:
    """Promises 4 and 6: with three requests a window each sync is fresh, reads on, and nothing twice."""
    sandbox.limits(reads=(3, 1000))
    connect(live, sandbox, "alice")

    outcomes = []
    while not outcomes or stream(live, "alice").backlog_until:
        outcomes += [run.outcome for run in ticked(live, "alice")]
        sandbox.step(QUARTER)
        assert len(outcomes) < 20

    assert set(outcomes) == {"ok"}
    assert stored(live, "alice") == truth(sandbox, "alice")
    historical = [query["before"] for query in asked(sandbox) if "before" in query]
    assert [int(before) for before in historical] == sorted(map(int, historical), reverse=True)
    assert sandbox.summary()["by_status"] == {"200": len(asked(sandbox))}


@ONCE
def test_the_newest_comes_first_and_history_after_it(
    live: Runtime, sandbox: Control, pages_of_ten: None
) -> None:
    """Field notes, 10: this week's records are there before anything older is asked for."""
    connect(live, sandbox, "alice")
    with sandbox.hold(LIST) as gate:
        working = in_background(sync.run, "alice", runtime=live)
        gate.wait_until_reached(1)
        nothing = stored(live, "alice")
    working.result(20)
    wipe(live)
    connect(live, sandbox, "alice")
    sandbox.fault(LIST, status=500, skip=1)

    sync.run("alice", runtime=live)

    week = {key for key, item in truth(sandbox, "alice").items() if began(item) >= NOON - timedelta(days=7)}
    assert nothing == {}
    assert week <= stored(live, "alice").keys()
    bounds = [int(query.get("before", 2**40)) for query in asked(sandbox)[:7]]
    assert all(later >= earlier for later, earlier in pairwise(bounds))


def test_a_first_import_leaves_other_people_their_fresh_data(
    live: Runtime, sandbox: Control, pages_of_ten: None
) -> None:
    """Field notes, 10: the history keeps off the requests of everybody who is claimed."""
    everybody = [person["user_id"] for person in sandbox.people()]
    sandbox.limits(reads=(10, 1000))
    connect(live, sandbox, *everybody)
    for person in everybody:
        change(live, person, claimed_at=NOON, next_sync_at=NOON + timedelta(minutes=10))

    ticked(live, "alice")
    used = len(asked(sandbox))
    fresh = [run.outcome for person in everybody[1:] for run in ticked(live, person)]

    assert used > 1  # some history was read
    assert fresh == ["ok"] * 4
    for person in everybody:
        week = {k for k, item in truth(sandbox, person).items() if began(item) >= NOON - timedelta(days=7)}
        assert week <= stored(live, person).keys()


@ONCE
def test_a_429_defers_and_closes_for_everybody(live: Runtime, sandbox: Control) -> None:
    """Promise 3: whatever we counted, the provider's no is believed by all."""
    connect(live, sandbox, "alice", "bruno")
    sandbox.fault(LIST, status=429, times=1)

    (refused,) = sync.run("alice", runtime=live)
    (other,) = sync.run("bruno", runtime=live)

    assert (refused.outcome, other.outcome) == ("deferred", "deferred")
    assert len(asked(sandbox)) == 1
    assert connection(live, "bruno").next_sync_at >= NOON.replace(minute=15)


@ONCE
def test_what_others_spend_of_our_budget_is_believed(
    live: Runtime, sandbox: Control, pages_of_ten: None
) -> None:
    """Promise 3: 98 of 100 were spent elsewhere, and no request of ours is refused."""
    live = tuned(live, sync={"lookback_days": 60})
    sandbox.spend(98)
    connect(live, sandbox, "alice")

    (run,) = sync.run("alice", runtime=live)

    assert (run.outcome, run.requests) == ("deferred", 2)
    assert sandbox.summary()["by_status"] == {"200": 2}


# Errors ----------------------------------------------------------------------------------------------


@ONCE
@pytest.mark.parametrize("fault", [{"delay": 5}, {"trickle": 0.05}], ids=str)
def test_a_reply_that_takes_too_long_is_tried_again_later_and_costs_nothing_that_is_stored(
    live: Runtime, sandbox: Control, fault: dict[str, Any]
) -> None:
    """Promise 12: failed with a reason, and whole the next time. More of it in providers/contract.py."""
    impatient = tuned(
        live,
        http={"read_timeout_seconds": 0.2, "total_timeout_seconds": 0.4},
    )
    connect(live, sandbox, "alice")
    sync.run("alice", runtime=live)
    before = stored(live, "alice")
    sandbox.step(QUARTER)
    sandbox.fault(LIST, times=1, **fault)

    (broken,) = ticked(impatient, "alice")
    waiting = connection(live, "alice")
    sandbox.step(QUARTER)
    (mended,) = ticked(live, "alice")

    assert (broken.outcome, waiting.failures) == ("failed", 1)
    assert waiting.wait_reason
    assert waiting.wait_reason == journal(live, "alice")[1].message
    assert before == stored(live, "alice") == truth(sandbox, "alice")
    assert (mended.outcome, connection(live, "alice").failures) == ("ok", 0)


def test_a_back_off_doubles_and_is_written_down(live: Runtime, sandbox: Control) -> None:
    """Promise 12: with jitter, and an end at six hours; a good sync forgets it."""
    connect(live, sandbox, "alice")
    sandbox.fault(LIST, status=500)

    waits = []
    for _ in range(6):
        started = live.clock()
        ticked(live, "alice")
        due = connection(live, "alice").next_sync_at
        waits.append((due - started) / sync.FIRST_RETRY)
        sandbox.set_clock(due)
    change(live, "alice", failures=40)
    started = live.clock()
    ticked(live, "alice")

    assert all(0.8 * 2**n <= wait <= 1.2 * 2**n for n, wait in enumerate(waits))
    assert len({round(wait / 2**n, 6) for n, wait in enumerate(waits)}) > 1
    assert connection(live, "alice").next_sync_at - started <= sync.LONGEST_RETRY * 1.2
    assert [run.outcome for run in journal(live, "alice")] == ["failed"] * 7


def test_one_failing_user_does_not_stop_another(
    live: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Field notes, 9: not even by a mistake in the provider's code, which is journalled and backed off."""
    connect(live, sandbox, "alice", "bruno")
    pages = strava.Strava.pages

    def faulty(self: strava.Strava, http: Any, *rest: Any) -> Any:
        if len(asked(sandbox)) == 0:
            http.get("/athlete/activities")
            raise ZeroDivisionError("a mistake")
        return pages(self, http, *rest)

    monkeypatch.setattr(strava.Strava, "pages", faulty)
    (broken,) = sync.run("alice", runtime=live)
    (other,) = sync.run("bruno", runtime=live)

    assert (broken.outcome, broken.requests, other.outcome) == ("failed", 1, "ok")
    assert "ZeroDivisionError" in (journal(live, "alice")[0].message or "")
    assert connection(live, "alice").next_sync_at > NOON
    assert "a mistake" in caplog.text
    assert stored(live, "bruno") == truth(sandbox, "bruno")


# The person has to sign in again ---------------------------------------------------------------------


def test_a_revoked_connection_stops_and_one_made_again_goes_on(live: Runtime, sandbox: Control) -> None:
    """Promises 5 and 11: terminal, no more polling; signed in again, data and cursors are still there."""
    connect(live, sandbox, "alice")
    sync.run("alice", runtime=live)
    before, cursor = rows(live, Record.__table__, "alice"), stream(live, "alice").cursor
    sandbox.revoke("alice")
    sandbox.step(QUARTER)

    (ended,) = sync.run("alice", runtime=live)
    told, requests = connection(live, "alice"), sandbox.summary()["requests"]
    sandbox.step(DAY)
    planned: list[str] = []
    planner.tick("sync", live.clock(), planned.append, runtime=live)
    silent = [*sync.run("alice", runtime=live), *ticked(live, "alice")]
    unasked = sandbox.summary()["requests"] == requests
    kept = rows(live, Record.__table__, "alice") == before and stream(live, "alice").cursor == cursor
    connect(live, sandbox, "alice")
    (resumed,) = ticked(live, "alice")

    assert (ended.outcome, told.status, told.next_sync_at) == ("needs_reauth", "needs_reauth", None)
    assert "Strava" in told.status_reason
    assert (planned, silent) == ([], [])
    assert unasked
    assert kept
    assert (resumed.outcome, resumed.requests) == ("ok", 1)
    assert stored(live, "alice") == truth(sandbox, "alice")


def test_a_sign_in_while_a_sync_fails_is_not_undone_by_it(live: Runtime, sandbox: Control) -> None:
    """Promise 5: the sync learns that the old authorisation is dead after the person signed in anew."""
    connect(live, sandbox, "alice")
    sandbox.revoke("alice")
    with sandbox.hold(TOKEN) as gate:
        working = in_background(sync.run, "alice", runtime=live)
        gate.wait_until_reached()
        sandbox.step(5)
        connect(live, sandbox, "alice")
    working.result(20)

    sandbox.step(QUARTER)
    ticked(live, "alice")

    assert connection(live, "alice").status == "active"
    assert stored(live, "alice") == truth(sandbox, "alice")


# Promise 2: a skip loses nothing ---------------------------------------------------------------------


def test_news_noted_while_a_sync_runs_is_brought_by_it(live: Runtime, sandbox: Control) -> None:
    """Promise 2: the message that found the lock taken is skipped; the running sync looks once more."""
    connect(live, sandbox, "alice")
    sandbox.fault(LIST, json=sandbox.truth("alice"), times=1)  # the running one's page is of before
    with sandbox.hold(LIST, times=1) as gate:
        working = in_background(sync.run, "alice", runtime=live)
        gate.wait_until_reached()
        sandbox.step(60)
        new = sandbox.add("alice")
        note_news(live, "alice")
    runs = working.result(20)

    assert [run.outcome for run in runs] == ["ok", "ok"]
    assert str(new) in stored(live, "alice")
    assert connection(live, "alice").news_at is None
    assert connection(live, "alice").next_sync_at > live.clock()


def test_who_waited_for_a_count_that_somebody_else_learned_looks_again(
    live: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 2: who asked is not kept waiting for a minute, or a tick, by a count that is known by now."""
    connect(live, sandbox, "alice")
    take, waited = Budget.take, list[bool]()

    def once_unknown(self: Budget, *pools: Any, **kept: Any) -> Any:
        if not waited:
            waited.append(True)
            raise CountUnknown("how much is used is being learned from one request", live.clock())
        return take(self, *pools, **kept)

    monkeypatch.setattr(Budget, "take", once_unknown)

    assert [run.outcome for run in sync.run("alice", runtime=live)] == ["deferred", "ok"]
    assert stored(live, "alice") == truth(sandbox, "alice")


def test_a_failed_sync_keeps_the_news(live: Runtime, sandbox: Control) -> None:
    """Promise 2: news is forgotten by the sync that brought it, and by no other."""
    connect(live, sandbox, "alice")
    sync.run("alice", runtime=live)
    sandbox.step(QUARTER)
    note_news(live, "alice")
    sandbox.fault(LIST, status=500, times=1)

    sync.run("alice", runtime=live)
    after_failure = connection(live, "alice").news_at
    sandbox.step(QUARTER)
    ticked(live, "alice")

    assert after_failure is not None
    assert connection(live, "alice").news_at is None


# Promise 1 at the write ------------------------------------------------------------------------------


def test_an_older_sync_stores_nothing_once_a_newer_one_began(live: Runtime, sandbox: Control) -> None:
    """Promise 1: its writes are fenced by a number in the database, whatever it believes of its lock."""
    connect(live, sandbox, "alice")
    with sandbox.hold(LIST) as gate:
        working = in_background(sync.run, "alice", runtime=live)
        gate.wait_until_reached()
        sync.begin(live, "alice", "asked")

    assert [run.outcome for run in working.result(20)] == ["interrupted"]
    assert stored(live, "alice") == {}
    assert [run.outcome for run in journal(live, "alice")] == ["interrupted", "running"]


def test_a_sync_that_lost_its_lock_stops_before_its_next_write(live: Runtime, sandbox: Control) -> None:
    """Promise 1: Redis forgot the lock, the renewal found out."""
    connect(live, sandbox, "alice")
    with sandbox.hold(LIST) as gate:
        working = in_background(sync.run, "alice", runtime=live)
        gate.wait_until_reached()
        live.redis.delete("lifelogger:lock:sync:alice")
        live.mutex.renew_once()

    with pytest.raises(LockLost):
        working.result(20)
    assert stored(live, "alice") == {}


def test_a_connection_deleted_while_it_is_synced_gets_no_record(live: Runtime, sandbox: Control) -> None:
    """Promise 11: erased is erased, also for the sync that has its page in hand."""
    connect(live, sandbox, "alice")
    with sandbox.hold(LIST) as gate:
        working = in_background(sync.run, "alice", runtime=live)
        gate.wait_until_reached()
        with live.store.write() as db:
            db.execute(delete(Connection))

    assert [run.outcome for run in working.result(20)] == ["interrupted"]
    with live.store.read() as db:
        assert db.scalar(text("SELECT count(*) FROM records")) == 0
    assert len(asked(sandbox)) == 1


def test_no_transaction_is_open_while_a_request_is_out(live: Runtime, sandbox: Control) -> None:
    """The trap: a slow provider must not keep the database's writers waiting."""
    connect(live, sandbox, "alice")
    sync.run("alice", runtime=live)
    for route in (LIST, TOKEN):
        sandbox.expire("alice")
        with sandbox.hold(route, times=1) as gate:
            working = in_background(sync.run, "alice", runtime=live)
            gate.wait_until_reached()
            if live.store.is_sqlite:
                with sqlite3.connect(str(live.store.url.database), timeout=0) as other:
                    other.execute("BEGIN IMMEDIATE")
            else:
                with live.store.read() as db:
                    open_ones = db.scalar(
                        text(
                            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                            "AND pid <> pg_backend_pid() AND state LIKE 'idle in transaction%'"
                        )
                    )
                assert open_ones == 0
        working.result(20)


# Everything at once ----------------------------------------------------------------------------------

step = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 70)),
    st.tuples(st.just("late"), st.integers(24, 70)),
    st.tuples(st.just("edit"), st.integers(0, 3)),
    st.tuples(st.just("delete"), st.integers(0, 3)),
    st.tuples(st.just("step"), st.sampled_from([60, QUARTER, 7 * 3600])),
    st.tuples(st.just("sync"), st.just(0)),
    st.tuples(
        st.just("fault"),
        st.sampled_from(
            [{"status": 500}, {"cut": "before"}, {"cut": "middle"}, {"body": "["}, {"status": 401}]
        ),
    ),
    st.tuples(st.just("short"), st.booleans()),
)


@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(step, min_size=4, max_size=12))
def test_whatever_happens_a_clean_sync_ends_equal_to_the_truth(
    live: Runtime, sandbox: Control, steps: list[tuple[str, Any]]
) -> None:
    """Promise 6: uploads, late ones, edits, deletions and faults in any order, within the look-back."""
    sandbox.reset()
    sandbox.freeze(NOON)
    wipe(live)
    connect(live, sandbox, "chiyo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strava, "LARGEST_PAGE", 6)
        for verb, value in steps:
            ACTS[verb](live, sandbox, value)
        sandbox.clear_faults()
        for _ in range(3):  # a back-off ends, history is read to its end, a poll confirms
            sandbox.step(6 * 3600 * 1.2)
            ticked(live, "chiyo")

    assert stored(live, "chiyo") == truth(sandbox, "chiyo")
    assert quarantined(live, "chiyo") == []
    assert sandbox.summary()["refresh_tokens_used_twice"] == 0


def recent(sandbox: Control, place: int) -> int | None:
    """An activity of the last three days."""
    since = datetime.fromtimestamp(sandbox.now(), UTC) - timedelta(days=3)
    found = [item["id"] for item in sandbox.truth("chiyo") if began(item) >= since]
    return int(found[place]) if place < len(found) else None


def add(live: Runtime, sandbox: Control, hours: int) -> None:
    sandbox.add("chiyo", start=sandbox.now() - hours * 3600, elapsed=60)


def late(live: Runtime, sandbox: Control, hours: int) -> None:
    now = sandbox.now()
    sandbox.add("chiyo", start=now - hours * 3600, elapsed=60, uploaded=now + 600)


def edit(live: Runtime, sandbox: Control, place: int) -> None:
    if activity := recent(sandbox, place):
        sandbox.edit(activity, fields={"name": f"Renamed at {sandbox.now():.0f}"})


def drop(live: Runtime, sandbox: Control, place: int) -> None:
    if activity := recent(sandbox, place):
        sandbox.delete(activity)


ACTS: dict[str, Callable[[Runtime, Control, Any], Any]] = {
    "add": add,
    "late": late,
    "edit": edit,
    "delete": drop,
    "step": lambda live, sandbox, seconds: sandbox.step(seconds),
    "sync": lambda live, sandbox, _: sync.run("chiyo", runtime=live),
    "fault": lambda live, sandbox, fault: sandbox.fault(LIST, times=1, **fault),
    "short": lambda live, sandbox, on: sandbox.settings(short_pages=on),
}


def began(item: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(item["start_date"])


def dies(*_: Any) -> None:
    raise RuntimeError("the worker dies here")


def test_the_journal_and_the_status_tell_what_a_sync_did(live: Runtime, sandbox: Control) -> None:
    """Promise 12: when it last synced, what it brought and what it cost."""
    connect(live, sandbox, "alice")
    sync.run("alice", runtime=live)

    told = status.overview(live)
    (run,) = journal(live, "alice")

    records = len(truth(sandbox, "alice"))
    assert (run.outcome, run.inserted, run.requests, run.trigger) == ("ok", records, 2, "asked")
    assert told["providers"]["strava"]["records"] == records
    assert told["providers"]["strava"]["last_sync"] == NOON


# What a person is promised beside the engine ----------------------------------------------------------


@ONCE
def test_the_reserve_is_for_whoever_asks(live: Runtime, sandbox: Control) -> None:
    """Promises 2 and 4: a poll that met the reserve is deferred until enough is free, "sync now" is not."""
    connect(live, sandbox, "alice")
    sync.run("alice", runtime=live)
    sandbox.limits(reads=(2000, 1000), overall=(9000, 9000))
    sandbox.spend(950)
    change(live, "alice", next_sync_at=NOON, news_at=None)
    sync.run("alice", "asked", runtime=live)  # its reply tells of what others spent
    change(live, "alice", next_sync_at=NOON)

    (poll,) = ticked(live, "alice")
    waiting = connection(live, "alice")
    (wish,) = sync.run("alice", "asked", runtime=live)

    assert (poll.outcome, poll.requests) == ("deferred", 0)
    assert waiting.next_sync_at.hour == 18, "by then the rest of the day has no claim to more than 50"
    assert (wish.outcome, wish.requests) == ("ok", 1)


@ONCE
def test_whoever_connects_again_is_read_at_once(live: Runtime, sandbox: Control) -> None:
    """Promise 12: a stream that was refused says so until then, and not "up to date"."""
    connect(live, sandbox, "alice")
    sandbox.fault(LIST, status=403, times=1)

    (refused,) = sync.run("alice", runtime=live)
    told = connection(live, "alice")
    connect(live, sandbox, "alice")
    (again,) = sync.run("alice", runtime=live)

    assert refused.outcome == "deferred"
    assert "refused (403)" in told.wait_reason
    assert told.next_sync_at == NOON + timedelta(days=1)
    assert (again.outcome, stored(live, "alice")) == ("ok", truth(sandbox, "alice"))


@ONCE
def test_a_sync_that_somebody_asked_for_is_claimed(live: Runtime, sandbox: Control) -> None:
    """A tick neither plans it a second time, nor is its request given to somebody's history."""
    connect(live, sandbox, "alice")
    with sandbox.hold(LIST) as gate:
        syncing = in_background(lambda: sync.run("alice", runtime=live))
        gate.wait_until_reached()
        row, claimed = connection(live, "alice"), under_way(live, "strava")
    syncing.result()

    assert (row.claimed_at, row.next_sync_at > NOON, claimed) == (NOON, True, 1)
    assert under_way(live, "strava") == 0


@ONCE
def test_a_number_of_many_digits_and_a_broken_letter_cost_one_record_at_most(
    live: Runtime, sandbox: Control
) -> None:
    """Promise 7: Python reads 4300 digits, and bytes that are no UTF-8 are somebody's title."""
    good, bad = sandbox.truth("alice")[:2]
    page = json.dumps([{**good, "name": "QQ"}, {**bad, "distance": 10.125}])
    page = page.replace("10.125", "9" * 5000)
    sandbox.fault(LIST, body=page, times=1)
    connect(live, sandbox, "alice")

    (run,) = sync.run("alice", runtime=live)

    assert (run.outcome, run.counts.quarantined) == ("ok", 1)
    assert stored(live, "alice")[str(good["id"])] == {**good, "name": "QQ"}


@ONCE
def test_a_tick_takes_what_it_claimed_and_no_more(live: Runtime, sandbox: Control) -> None:
    """Promise 9: whoever is planned for one provider does not spend another's budget out of turn."""
    connect(live, sandbox, "alice")
    change(live, "alice", news_at=None)

    unplanned = sync.run("alice", "tick", runtime=live)
    (planned,) = ticked(live, "alice")

    assert (unplanned, planned.outcome) == ([], "ok")


@ONCE
def test_what_is_new_anywhere_comes_before_history_anywhere(live: Runtime, sandbox: Control) -> None:
    """This morning's run on one cloud does not wait for years of sleep on another."""
    connect(live, sandbox, "alice", provider="oura")
    connect(live, sandbox, "alice")

    runs = sync.run("alice", runtime=live)

    asked_in_turn = [entry["provider"] for entry in sandbox.ledger(person="alice", kind="read")]
    assert [run.outcome for run in runs] == ["ok", "ok"]
    assert asked_in_turn.index("strava") < len(asked_in_turn) - 1 - asked_in_turn[::-1].index("oura")


# What it learns ---------------------------------------------------------------------------------------


def habits(live: Runtime, person: str) -> Habits:
    found = Habits.unpack(connection(live, person).habits)
    assert found is not None
    return found


@ONCE
def test_a_first_import_tells_when_somebodys_news_come(live: Runtime, sandbox: Control) -> None:
    """Promise 9: the most deserving first, and it is known at once who that is."""
    connect(live, sandbox, "alice")
    sync.run("alice", runtime=live)

    known = habits(live, "alice")
    items = truth(sandbox, "alice").values()
    ends = [datetime.fromisoformat(item["start_date"]).timestamp() + item["elapsed_time"] for item in items]
    weights = [0.5 ** ((NOON.timestamp() - end) / 86400 / HALF_LIFE_DAYS) for end in ends]
    assert sum(known.hours) == pytest.approx(sum(weights), rel=0.01)
    assert known.since == pytest.approx(min(ends), abs=1)
    assert known.offset_s == max(items, key=lambda item: item["start_date"])["utc_offset"]
    assert (known.announced, known.unannounced) == (0, 0), "nobody could have announced that"


@ONCE
def test_each_record_is_learned_from_once(live: Runtime, sandbox: Control) -> None:
    connect(live, sandbox, "alice")
    sync.run("alice", runtime=live)
    before = sum(habits(live, "alice").hours)

    sandbox.step(900)
    ticked(live, "alice")
    assert sum(habits(live, "alice").hours) == pytest.approx(before, rel=0.01)

    sandbox.add("alice")
    sandbox.step(900)
    ticked(live, "alice")
    known = habits(live, "alice")
    assert sum(known.hours) == pytest.approx(before + 1, rel=0.01)
    assert known.unannounced == pytest.approx(1, rel=0.01)


@ONCE
def test_history_that_comes_in_parts_is_no_news_that_webhooks_missed(live: Runtime, sandbox: Control) -> None:
    live = tuned(live, sync={"history_pages": 1})
    connect(live, sandbox, "alice")
    before = -1
    while (now := len(stored(live, "alice"))) != before:
        before = now
        sync.run("alice", runtime=live)
        change(live, "alice", next_sync_at=live.clock())
        ticked(live, "alice")

    assert stored(live, "alice") == truth(sandbox, "alice")
    assert habits(live, "alice").unannounced == 0
    assert len(journal(live, "alice")) > 2


@ONCE
def test_what_comes_late_is_learned_as_having_come_between_the_looks(live: Runtime, sandbox: Control) -> None:
    connect(live, sandbox, "alice")
    sync.run("alice", runtime=live)
    before = habits(live, "alice").hours

    sandbox.step(4 * 3600)
    sandbox.add("alice", start=NOON - timedelta(days=2, hours=7), elapsed=600)
    sandbox.step(4 * 3600)
    ticked(live, "alice")

    known = habits(live, "alice")
    (hour,) = [hour for hour in range(24) if known.hours[hour] - before[hour] > 0.5]
    assert hour == int((NOON + timedelta(hours=4, seconds=known.offset_s)).hour)


@ONCE
def test_webhooks_that_work_make_polls_rare_and_one_that_is_missed_makes_them_frequent(
    live: Runtime, sandbox: Control
) -> None:
    connect(live, sandbox, "alice")
    sync.run("alice", runtime=live)
    with live.store.write() as db:
        db.execute(insert(Pace).values(provider="strava", priced_at=NOON))

    for _ in range(4):
        sandbox.add("alice")
        sandbox.step(QUARTER)
        now = live.clock()
        change(live, "alice", news_at=now, news_streams=["activities"], next_sync_at=now)
        sync.run("alice", "news", runtime=live)

    known = habits(live, "alice")
    assert (known.announced, known.unannounced) == (pytest.approx(4, rel=0.01), 0)
    with live.store.read() as db:
        assert pacing.read(db, "strava").heard_at == live.clock()
    assert connection(live, "alice").next_sync_at - live.clock() > timedelta(hours=3)

    sandbox.add("alice")
    sandbox.step(QUARTER)
    change(live, "alice", next_sync_at=live.clock())
    ticked(live, "alice")
    assert habits(live, "alice").unannounced == pytest.approx(1, rel=0.01)
    assert connection(live, "alice").next_sync_at - live.clock() <= timedelta(seconds=QUARTER)


@ONCE
def test_the_next_poll_is_at_its_best_time_where_requests_are_scarce(live: Runtime, sandbox: Control) -> None:
    """Promise 9: and stored, so that a tick reads the order from an index."""
    connect(live, sandbox, "alice")
    sync.run("alice", runtime=live)
    with live.store.write() as db:
        values = {"provider": "strava", "price": 2.0, "longest_s": 7 * 86400, "priced_at": NOON}
        db.execute(insert(Pace).values(values))

    sandbox.step(900)
    ticked(live, "alice")

    with live.store.read() as db:
        pace = pacing.read(db, "strava")
    best = pacing.next_poll(pace, habits(live, "alice"), live.clock(), timedelta(minutes=15))
    due = connection(live, "alice").next_sync_at
    assert abs(due - best) <= timedelta(minutes=15), "what is packed is a little rounded"
    assert due - live.clock() > timedelta(minutes=15)
