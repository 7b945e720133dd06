"""Rounds over what is older than the look-back: what they bring, and that they take nothing from others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import event, insert, update

from lifelogger import pacing, plans, progress, recheck, status, sweep, sync
from lifelogger.connections import note_hint, note_news
from lifelogger.providers import strava
from lifelogger.providers.base import Event
from lifelogger.runtime import Runtime
from lifelogger.settings import MAIN
from lifelogger.store.models import Pace, Record, Stream
from tests.live import (
    LIST,
    NOON,
    asked,
    begin_rounds,
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
)
from tests.sandbox.control import Control

DAY, QUARTER = 86_400, 900
YEAR = timedelta(days=365)
ONCE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For what no database has a part in."""


@pytest.fixture
def pages_of_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alice's three months are some seven pages."""
    monkeypatch.setattr(strava, "LARGEST_PAGE", 10)


def imported(live: Runtime, sandbox: Control, *people: str) -> None:
    """These people are connected, and all of their past is here."""
    connect(live, sandbox, *people)
    for person in people:
        while not stored(live, person) or stream(live, person).backlog_until:
            assert [run.outcome for run in sync.run(person, runtime=live)] == ["ok"]
            sandbox.step(60)
    sandbox.step(QUARTER)


def tick(live: Runtime, sandbox: Control, person: str = "alice") -> sync.Run:
    """A poll that was planned, a quarter of an hour after the one before."""
    change(live, person, next_sync_at=live.clock())
    (run,) = ticked(live, person)
    sandbox.step(QUARTER)
    return run


def whole_round(live: Runtime, sandbox: Control, person: str = "alice") -> list[sync.Run]:
    begin_rounds(live, person)
    runs = [tick(live, sandbox, person)]
    while stream(live, person).recheck_until:
        runs.append(tick(live, sandbox, person))
        assert len(runs) < 50
    return runs


def paced(live: Runtime, **values: Any) -> None:
    """A tick has reckoned so with Strava's budget."""
    with live.store.write() as db:
        db.execute(insert(Pace).values(provider="strava", priced_at=live.clock(), **values))


@contextmanager
def statements(live: Runtime) -> Iterator[list[str]]:
    """What the database is asked meanwhile."""
    ran: list[str] = []

    def note(_: Any, __: Any, statement: str, *more: Any) -> None:
        ran.append(statement)

    event.listen(live.store.engine, "before_cursor_execute", note)
    yield ran
    event.remove(live.store.engine, "before_cursor_execute", note)


# What a round brings ---------------------------------------------------------------------------------


def test_an_edit_and_a_deletion_of_years_ago_arrive(live: Runtime, sandbox: Control) -> None:
    """Promise 6: what no webhook told, at any age; and what was uploaded late, before all that we had."""
    edited, gone = (sandbox.add("alice", start=NOON - years * YEAR) for years in (3, 4))
    imported(live, sandbox, "alice")
    sandbox.edit(edited, fields={"name": "Renamed"})
    sandbox.delete(gone)
    late = sandbox.add("alice", start=NOON - 4.5 * YEAR)
    tick(live, sandbox)
    unseen = stored(live, "alice")

    (run,) = whole_round(live, sandbox)

    assert unseen[str(edited)]["name"] != "Renamed"
    assert {str(gone)} == unseen.keys() - truth(sandbox, "alice").keys()
    assert str(late) in stored(live, "alice")
    assert stored(live, "alice") == truth(sandbox, "alice")
    assert (run.outcome, run.counts.inserted, run.counts.updated, run.counts.deleted) == ("ok", 1, 1, 1)
    row = stream(live, "alice")
    assert row.recheck_began_at <= row.recheck_ended_at <= row.recheck_at - timedelta(days=29)


def test_what_is_older_than_history_and_still_here_is_read_again(live: Runtime, sandbox: Control) -> None:
    """Years pass: what was imported once is older than `history_days` then."""
    old = sandbox.add("alice", start=NOON - timedelta(days=110))
    imported(tuned(live, sync={"history_days": 120}), sandbox, "alice")
    live = tuned(live, sync={"history_days": 30})
    sandbox.edit(old, fields={"name": "Renamed"})

    whole_round(live, sandbox)

    assert stored(live, "alice") == truth(sandbox, "alice")


@pytest.mark.usefixtures("pages_of_ten")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_round_that_dies_at_a_page_goes_on_there(
    live: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """In its second page's transaction, or right after it: nothing is lost, nothing read twice in vain."""
    live = tuned(live, sync={"history_pages": 100})
    imported(live, sandbox, "alice")
    old = [int(key) for key in list(truth(sandbox, "alice"))[-30:]]
    for activity in old[::3]:
        sandbox.edit(activity, fields={"name": "Renamed"})
    for activity in old[1::3]:
        sandbox.delete(activity)
    begin_rounds(live, "alice")
    before = len(asked(sandbox))
    write, pages = sweep.Sweep._store, iter(range(9))

    def dying(self: sweep.Sweep, page: Any, **more: Any) -> None:
        last = next(pages) == 2  # the first is the poll's
        if last and when == "before":
            monkeypatch.setattr(sweep, "write_items", dies)
        write(self, page, **more)
        if last:
            dies()

    monkeypatch.setattr(sweep.Sweep, "_store", dying)
    broken = tick(live, sandbox)
    monkeypatch.undo()
    monkeypatch.setattr(strava, "LARGEST_PAGE", 10)
    resting = stream(live, "alice")
    quiet = tick(live, sandbox)
    sandbox.set_clock(resting.recheck_at)
    resumed = tick(live, sandbox)

    assert (broken.outcome, connection(live, "alice").failures) == ("ok", 0)
    assert "read again later" in (broken.message or "")
    assert resting.recheck_until is not None
    assert resting.recheck_at >= NOON + sync.RECHECK_RESTS
    assert (quiet.requests, resumed.outcome) == (1, "ok")
    assert stored(live, "alice") == truth(sandbox, "alice")
    read = [each["before"] for each in asked(sandbox)[before:] if "before" in each and each["page"] == "1"]
    assert len(read) - len(set(read)) == (1 if when == "before" else 0)


def test_a_round_that_was_taken_over_writes_nothing(live: Runtime, sandbox: Control) -> None:
    """Promise 1: as every page, under the fence."""
    imported(live, sandbox, "alice")
    before, row = stored(live, "alice"), stream(live, "alice")
    sandbox.delete(int(list(before)[-1]))
    begin_rounds(live, "alice")
    with sandbox.hold(LIST) as gate:
        working = in_background(tick, live, sandbox)
        gate.wait_until_reached(1)
        second = sandbox.hold(LIST)
        gate.release()
        second.wait_until_reached(1)
        sync.begin(live, "alice", "asked")
        second.release()

    assert working.result(20).outcome == "interrupted"
    assert stored(live, "alice") == before
    assert stream(live, "alice").recheck_began_at is row.recheck_began_at is None


def dies(*_: Any) -> None:
    raise SystemError("the worker is killed here")


@ONCE
@pytest.mark.usefixtures("pages_of_ten")
def test_a_list_that_breaks_off_concludes_no_deletion_and_rests(live: Runtime, sandbox: Control) -> None:
    imported(live, sandbox, "alice")
    before = stored(live, "alice")
    begin_rounds(live, "alice")
    sandbox.fault(LIST, status=500, skip=2)

    broken = tick(live, sandbox)
    sandbox.clear_faults()
    quiet = tick(live, sandbox)

    assert (broken.outcome, broken.counts.deleted, connection(live, "alice").failures) == ("ok", 0, 0)
    assert stored(live, "alice") == before
    assert (broken.requests, quiet.requests) == (3, 1)
    assert connection(live, "alice").wait_reason is None


@ONCE
def test_a_refusal_of_old_data_is_not_one_of_the_stream(live: Runtime, sandbox: Control) -> None:
    """What is new is still read at each poll."""
    imported(live, sandbox, "alice")
    begin_rounds(live, "alice")
    sandbox.fault(LIST, status=403, skip=1, times=1)

    refused = tick(live, sandbox)
    new = sandbox.add("alice")
    tick(live, sandbox)

    assert refused.outcome == "ok"
    assert stream(live, "alice").off_reason is None
    assert str(new) in stored(live, "alice")


@ONCE
def test_an_old_record_that_turned_bad_is_quarantined_and_kept(live: Runtime, sandbox: Control) -> None:
    """Promise 7 holds in a round."""
    imported(live, sandbox, "alice")
    before = stored(live, "alice")
    sandbox.edit(int(list(before)[-1]), fields={"distance": "far"})

    runs = whole_round(live, sandbox)

    assert (sum(run.counts.quarantined for run in runs), sum(run.counts.deleted for run in runs)) == (1, 0)
    assert len(quarantined(live, "alice")) == 1
    assert stored(live, "alice") == before


# When it begins --------------------------------------------------------------------------------------


@ONCE
def test_rounds_begin_by_themselves_spread_over_the_period_and_no_more_often(
    live: Runtime, sandbox: Control
) -> None:
    people = [person["user_id"] for person in sandbox.people()]
    imported(live, sandbox, *people)
    firsts = sorted(stream(live, person).recheck_at for person in people)
    whole = timedelta(days=30)
    gaps = [later - sooner for sooner, later in pairwise(firsts)]

    began, costs = [], []
    for _ in range(45):
        sandbox.step(2 * DAY)
        note_news(live, "alice")  # or a poll may be far away
        change(live, "alice", news_at=None)
        costs.append(tick(live, sandbox).requests)
        row = stream(live, "alice")
        began += [row.recheck_began_at] if row.recheck_began_at not in (None, *began) else []

    assert all(NOON < first < NOON + whole + timedelta(hours=1) for first in firsts)
    assert min(gaps) > whole / len(people) / 3, "not all at once"
    assert len(began) == 3
    assert all(later - sooner >= whole for sooner, later in pairwise(began))
    assert sum(costs) == 45 + 2 * 3


@ONCE
def test_a_first_import_comes_before_any_round(live: Runtime, sandbox: Control, pages_of_ten: None) -> None:
    live = tuned(live, sync={"history_pages": 1})
    connect(live, sandbox, "alice")
    tick(live, sandbox)
    during = stream(live, "alice")
    begin_rounds(live, "alice")

    read = []
    while stream(live, "alice").backlog_until:
        tick(live, sandbox)
        read.append(stream(live, "alice").recheck_began_at)

    assert during.recheck_at is None
    assert len(read) > 3
    assert set(read) == {None}
    assert tick(live, sandbox).requests == 2
    assert stream(live, "alice").backlog_until is None


@ONCE
def test_what_webhooks_name_beyond_ten_comes_with_a_round_that_begins_at_once(
    live: Runtime, sandbox: Control
) -> None:
    """Of whoever names more and more, one a day."""
    old = [sandbox.add("alice", start=NOON - timedelta(days=100 + day)) for day in range(15)]
    imported(live, sandbox, "alice")
    due = stream(live, "alice").recheck_at
    for activity in old:
        sandbox.edit(activity, fields={"name": "Renamed"})
    owner = connection(live, "alice").provider_user_id

    def name(keys: list[int]) -> None:
        with live.store.write() as db:
            events = [Event(owner, ("activities",), str(key)) for key in keys]
            note_hint(db, "strava", events, live.clock())
        sync.run("alice", "news", runtime=live)

    name(old[:10])
    ten = stream(live, "alice").recheck_at
    sandbox.step(3600)
    name(old)
    fifteen = stream(live, "alice").recheck_at
    run = tick(live, sandbox)
    sandbox.step(3600)
    name(old)

    assert (ten, fifteen) == (due, live.clock() - timedelta(seconds=3600 + QUARTER))
    assert run.counts.updated == 5
    assert stored(live, "alice") == truth(sandbox, "alice")
    assert stream(live, "alice").recheck_at > live.clock() + timedelta(days=29)


@ONCE
def test_switched_off_nothing_is_read_again(live: Runtime, sandbox: Control) -> None:
    live = tuned(live, sync={"recheck_days": 0})
    imported(live, sandbox, "alice")
    never = stream(live, "alice").recheck_at
    begin_rounds(live, "alice")

    assert never is None
    assert [tick(live, sandbox).requests for _ in range(3)] == [1, 1, 1]
    assert stream(live, "alice").recheck_began_at is None


@ONCE
def test_who_waits_for_an_answer_does_not_wait_for_a_round(live: Runtime, sandbox: Control) -> None:
    """It is a tick's work: not a person's, nor a webhook's."""
    imported(live, sandbox, "alice")
    begin_rounds(live, "alice")

    (wish,) = sync.run("alice", runtime=live)
    sandbox.step(QUARTER)

    assert wish.requests == 1
    assert tick(live, sandbox).requests > 1


@ONCE
def test_a_poll_without_a_due_step_asks_the_database_nothing_more(live: Runtime, sandbox: Control) -> None:
    imported(live, sandbox, "alice")
    off = tuned(live, sync={"recheck_days": 0})
    with statements(live) as before:
        tick(off, sandbox)
    with statements(live) as after:
        (run,) = [tick(live, sandbox)]

    assert stream(live, "alice").recheck_at > live.clock()
    assert run.requests == 1
    assert after == before


# What is spare ---------------------------------------------------------------------------------------


@ONCE
@pytest.mark.usefixtures("pages_of_ten")
def test_without_budget_it_is_next_time_and_no_word_is_lost_about_it(live: Runtime, sandbox: Control) -> None:
    """Neither deferred nor failed: the poll was good, and keeps its time."""
    live = tuned(live, sync={"history_pages": 2})
    imported(live, sandbox, "alice")
    begin_rounds(live, "alice")
    tick(live, sandbox)
    before = stream(live, "alice")
    reads = read_window(live)
    sandbox.spend(reads.limit - reads.used - reads.held - 1)

    short = tick(live, sandbox)
    told, after = journal(live, "alice")[-1], stream(live, "alice")

    assert (short.outcome, short.requests, told.message) == ("ok", 1, None)
    assert connection(live, "alice").wait_reason is None
    assert before.recheck_until is not None
    assert after.recheck_until == before.recheck_until
    assert tick(live, sandbox).requests > 1, "it goes on in the next window"


@ONCE
@pytest.mark.usefixtures("pages_of_ten")
def test_the_polls_of_the_next_tick_and_all_that_is_claimed_are_left(live: Runtime, sandbox: Control) -> None:
    """Promise 4: nobody's poll pays for a round."""
    imported(live, sandbox, "alice", "bruno")
    paced(live, wanted=96.0 * 70, offered=96.0 * 80)
    begin_rounds(live, "alice")
    change(live, "bruno", claimed_at=live.clock(), next_sync_at=live.clock() + timedelta(minutes=10))
    sandbox.spend(13)

    run = tick(live, sandbox)

    assert run.requests == 1, "what is left is wanted"
    begin_rounds(live, "alice")
    change(live, "alice", next_sync_at=live.clock())
    (run,) = ticked(live, "alice")
    assert run.requests > 1
    assert read_window(live).remaining >= 70 + read_window(live).held


def read_window(live: Runtime) -> Any:
    """The 15 minutes of Strava's read limit, with what is held for others."""
    return live.budget.windows(pools_of(live), leave_share=live.settings.schedule.reserve)[0]


@ONCE
def test_of_a_day_that_polls_use_up_rounds_take_their_share_and_all_have_turns(
    live: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 9: 4 of 400 requests a day, a page each."""
    monkeypatch.setattr(strava, "LARGEST_PAGE", 20)
    people = [person["user_id"] for person in sandbox.people()]
    imported(live, sandbox, *people)
    paced(live, price=1.0, offered=400.0, wanted=400.0, connections=float(len(people)))
    for person in people:
        begin_rounds(live, person)

    before = len(asked(sandbox))
    outcomes = []
    for _ in range(24):
        for person in people:
            change(live, person, next_sync_at=live.clock())
            outcomes += [run.outcome for run in ticked(live, person)]
        sandbox.step(2 * 3600)

    old = [each for each in sandbox.ledger(route=LIST)[before:] if "before=" in each["query"]]
    assert set(outcomes) == {"ok"}
    assert {each["person"] for each in old} == set(people)
    assert len(old) <= 2 * 4


@ONCE
@pytest.mark.usefixtures("pages_of_ten")
def test_a_round_in_turns_ends_with_everything_read(live: Runtime, sandbox: Control) -> None:
    """Page by page, weeks apart; the oldest record is its end, without a request that shows it."""
    imported(live, sandbox, "alice")
    paced(live, price=1.0, offered=100.0, connections=20.0)
    items = list(truth(sandbox, "alice"))
    old = [row for row in rows(live, Record.__table__, "alice") if row.ordered_at < NOON - WEEK]
    sandbox.edit(int(items[-1]), fields={"name": "Renamed"})
    sandbox.delete(int(items[-2]))
    begin_rounds(live, "alice")

    steps = []
    while not stream(live, "alice").recheck_ended_at:
        change(live, "alice", next_sync_at=live.clock())
        (run,) = ticked(live, "alice")
        row = stream(live, "alice")
        steps.append(run.requests)
        assert row.recheck_at - live.clock() >= timedelta(days=20), "everybody else's turn comes before"
        sandbox.set_clock(row.recheck_at)
    tick(live, sandbox)

    assert stored(live, "alice") == truth(sandbox, "alice")
    assert len(steps) == -(-len(old) // 9), "pages overlap in the second of their border"
    assert steps[0] == 2


@ONCE
def test_a_page_of_several_requests_costs_several_turns(
    live: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported(live, sandbox, "alice")
    paced(live, price=1.0, offered=100.0, connections=1.0)
    begin_rounds(live, "alice")
    pages = strava.Strava.pages

    def dear(self: strava.Strava, http: Any, of: Any, window: Any) -> Any:
        for page in pages(self, http, of, window):
            if window.until is not None:
                http.get("/athlete/activities", per_page=1)
                http.get("/athlete/activities", per_page=1)
            yield page

    monkeypatch.setattr(strava.Strava, "pages", dear)
    began_at, run = live.clock(), tick(live, sandbox)

    with live.store.read() as db:
        assert pacing.read(db, "strava").recheck_at == began_at + timedelta(days=3)
    assert run.requests == 4


@ONCE
def test_a_turn_that_the_budget_refused_is_free_again(live: Runtime, sandbox: Control) -> None:
    imported(live, sandbox, "alice")
    paced(live, price=1.0, offered=100.0, connections=1.0)
    begin_rounds(live, "alice")
    reads = read_window(live)
    sandbox.spend(reads.limit - reads.used - reads.held - 1)

    refused, resumed = tick(live, sandbox), tick(live, sandbox)

    assert (refused.outcome, refused.requests) == ("ok", 1)
    assert (resumed.outcome, resumed.requests) == ("ok", 2)


@ONCE
def test_with_a_share_of_nothing_a_used_day_has_no_rounds(live: Runtime, sandbox: Control) -> None:
    live = tuned(live, sync={"recheck_share": 0.0})
    imported(live, sandbox, "alice")
    paced(live, price=1.0, offered=800.0, connections=20.0)
    begin_rounds(live, "alice")

    assert [tick(live, sandbox).requests for _ in range(3)] == [1, 1, 1]


def test_a_turn_is_taken_by_one(live: Runtime) -> None:
    paced(live)
    hour = timedelta(hours=1)
    with live.store.write() as db:
        first = [recheck.take_turn(db, "strava", MAIN, NOON, NOON + hour) for _ in range(2)]
        early = recheck.take_turn(db, "strava", MAIN, NOON + hour / 2, NOON + 2 * hour)
        later = recheck.take_turn(db, "strava", MAIN, NOON + hour, NOON + 2 * hour)
        nobodys = recheck.take_turn(db, "oura", MAIN, NOON, NOON + hour)

    assert (first, early, later, nobodys) == ([True, False], False, True, False)


def test_pricing_leaves_the_turn_alone(live: Runtime, sandbox: Control) -> None:
    """It writes the row that syncs write, too."""
    imported(live, sandbox, "alice")
    paced(live, price=1.0, recheck_at=NOON + timedelta(hours=5))
    with live.store.write() as db:
        db.execute(update(Pace).values(priced_at=NOON - timedelta(days=1)))

    pacing.price(live, "strava", live.budget.windows(pools_of(live)), live.clock())

    with live.store.read() as db:
        pace = pacing.read(db, "strava")
    assert pace.priced_at == live.clock()
    assert pace.recheck_at == NOON + timedelta(hours=5)
    assert pace.connections == 1


def pools_of(live: Runtime) -> Any:
    return live.providers["strava"].shared_pools(live.settings.providers["strava"])


# How far, and how long -------------------------------------------------------------------------------

WEEK = timedelta(days=7)


def a_round(began: float, until: float | None, due: float, oldest: float | None = 107) -> Any:
    """A row: when it began, where it is, when it goes on, and the oldest record, in days before noon."""

    def ago(days: float | None) -> datetime | None:
        return None if days is None else NOON - timedelta(days=days)

    return SimpleNamespace(
        recheck_began_at=ago(began), recheck_until=ago(until), recheck_at=ago(due), oldest=ago(oldest)
    )


@pytest.mark.parametrize(
    ("row", "share", "days"),
    [
        (a_round(0, None, -30), 1, 30),
        (a_round(0, 32, 0), 0.25, 0),
        (a_round(10, 42, -40, oldest=117), 0.25, 200),
        (a_round(10, 42, 2, oldest=117), 0.25, 40),
        (a_round(0, 7, -1), 0, None),
        (a_round(0, 500, -1), 0.9999, 1),
        (a_round(0, 50, -1, oldest=None), 0.9999, 1),
    ],
    ids=[
        "over",
        "just begun",
        "waits for its turn",
        "waits since",
        "nothing yet",
        "below all",
        "nothing held",
    ],
)
def test_how_long_a_round_takes_is_told_by_what_it_has_done(
    row: Any, share: float, days: float | None
) -> None:
    assert recheck.share(row, WEEK) == pytest.approx(share)
    told = recheck.round_s([row], WEEK, NOON)
    assert told == (None if days is None else pytest.approx(days * DAY, rel=0.001))


def test_it_is_the_middle_of_all_that_tell(live: Runtime) -> None:
    untold = SimpleNamespace(recheck_began_at=None, recheck_until=None, recheck_at=NOON, oldest=None)
    found = [untold, *(a_round(0, None, -days) for days in (30, 31, 900))]

    assert recheck.round_s(found, WEEK, NOON) == 31 * DAY
    assert recheck.round_s([untold], WEEK, NOON) is None


def test_a_page_that_lies_within_minutes_tells_a_long_time_and_stops_no_tick() -> None:
    """Somebody's whole first page may be of one morning: of years that is next to nothing."""
    minute = 1 / 24 / 60
    row = a_round(0, 7 + minute, -3650, oldest=7 + 50 * 365)

    told = recheck.round_s([row], WEEK, NOON)

    assert told == pytest.approx(3650 * DAY * 50 * 365 / minute, rel=0.001)
    assert status.span(told)


def test_the_turns_come_to_the_share() -> None:
    assert recheck.turn(800, 0.01) == timedelta(hours=3)
    assert recheck.turn(800, 0) is None
    assert recheck.turn(1, 1e-9) == recheck.LONGEST
    assert recheck.of_seconds(1e300) == recheck.LONGEST


@ONCE
def test_the_status_says_how_long_a_round_takes_and_when_there_is_none(
    live: Runtime, sandbox: Control
) -> None:
    def told(rt: Runtime) -> dict[str, Any]:
        found: dict[str, Any] = status.overview(rt, budgets=False)["providers"]["strava"]["recheck"]
        return found

    imported(live, sandbox, "alice")
    unknown = told(live)
    whole_round(live, sandbox)
    pacing.price(live, "strava", live.budget.windows(pools_of(live)), live.clock())
    monthly = told(live)
    change_pace(live, price=1.0, recheck_s=400.0 * DAY)
    slow = told(live)

    what = "What is older than 7 days is"
    assert unknown == {
        "on": True,
        "round_s": None,
        "sentence": f"{what} read again for edits and deletions; how long that takes cannot be told yet.",
    }
    assert (monthly["on"], monthly["round_s"]) == (True, pytest.approx(30 * DAY, rel=0.001))
    assert monthly["sentence"] == f"{what} read again for edits and deletions, all of it in about 30 days."
    assert slow["sentence"].endswith("in about 400 days.")
    never = told(tuned(live, sync={"recheck_share": 0.0}))
    assert (never["on"], never["round_s"]) == (False, None)
    assert (
        never["sentence"] == f"{what} not read again: polls need all requests, and sync.recheck_share is 0."
    )
    off = told(tuned(live, sync={"recheck_days": 0}))
    assert (off["on"], off["sentence"]) == (False, f"{what} not read again: sync.recheck_days is 0.")


def change_pace(live: Runtime, **values: Any) -> None:
    with live.store.write() as db:
        db.execute(update(Pace).values(values))


@pytest.mark.usefixtures("pages_of_ten")
def test_for_a_user_it_is_told_how_far_it_is_and_when_the_last_one_ended(
    live: Runtime, sandbox: Control
) -> None:
    """Promise 12, the same in status and plan."""
    live = tuned(live, sync={"history_pages": 2})

    def told() -> dict[str, Any]:
        user = status.user(live, "alice")
        assert user is not None
        found: dict[str, Any] = user["connections"][0]["recheck"]
        assert plans.of_user(live, "alice")[0]["recheck"] == found
        return found

    connect(live, sandbox, "alice")
    first = told()
    imported(live, sandbox, "alice")
    waiting = told()
    begin_rounds(live, "alice")
    due = told()
    seen = []
    while not seen or stream(live, "alice").recheck_until:
        tick(live, sandbox)
        seen.append(told())
    over = seen.pop()

    what = "What is older than 7 days is"
    assert first["sentence"] == f"{what} read again once all of it is here."
    assert waiting["sentence"] == f"{what} read again from 2026-12-13 on, as far as requests are left."
    assert due["sentence"] == f"{what} read again as soon as requests are left for it."
    shares = [each["share"] for each in seen]
    assert len(shares) >= 2
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] < 1
    assert seen[0]["sentence"] == (
        f"{what} being read again since 2026-11-24: {status.percent(shares[0])} so far."
    )
    assert (over["began_at"], over["share"]) == (None, 1)
    assert over["sentence"] == (
        f"{what} read again from 2026-12-24 on, as far as requests are left. "
        "The last round ended on 2026-11-24."
    )
    begin_rounds(live, "alice")
    tick(live, sandbox)
    assert told()["sentence"].endswith("so far. The last round ended on 2026-11-24.")


def test_a_connections_round_is_that_of_its_streams() -> None:
    """Under way as long as one of them is; those that have not begun yet count as nothing."""

    def of(**row: Any) -> Any:
        nothing = {"recheck_at": NOON, "recheck_until": None, "recheck_began_at": None}
        oldest = {"recheck_ended_at": None, "oldest": NOON - timedelta(days=107)}
        return SimpleNamespace(**{**nothing, **oldest, **row})

    hour = timedelta(hours=1)
    over = of(recheck_began_at=NOON, recheck_ended_at=NOON + hour, recheck_at=NOON + timedelta(days=30))
    half = of(recheck_began_at=NOON, recheck_until=NOON - timedelta(days=57), recheck_at=NOON + hour)
    last = of(recheck_began_at=NOON - timedelta(days=30), recheck_ended_at=NOON - timedelta(days=29))

    assert progress.together([over, half, last, of()], WEEK) == progress.Round(NOON, 0.375, None, NOON)
    assert progress.together([over, last], WEEK) == progress.Round(None, 1, last.recheck_ended_at, NOON)
    assert progress.together([of(recheck_at=None)], WEEK) == progress.Round(None, 1, None, None)


def test_a_stream_that_is_not_read_is_not_waited_for(live: Runtime, sandbox: Control) -> None:
    """One that was refused, or was taken out of the settings."""
    imported(live, sandbox, "alice")
    whole_round(live, sandbox)
    number = connection(live, "alice").id
    row = {"connection_id": number, "recheck_at": NOON, "recheck_began_at": NOON, "recheck_until": NOON}
    with live.store.write() as db:
        db.execute(insert(Stream).values(name="taken_out", **row))
        [told] = progress.rounds(live, db, [SimpleNamespace(id=number, provider="strava")]).values()

    assert (told.began_at, told.share) == (None, 1)
    assert told.ended_at is not None
