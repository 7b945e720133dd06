"""One user, three clouds: the trouble of one is not the others', and each has its own row, cost and time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import delete, select, update

from lifelogger import planner, sync
from lifelogger.connections import note_news
from lifelogger.errors import LockLost
from lifelogger.planner import Allowance
from lifelogger.providers import strava
from lifelogger.runtime import Runtime
from lifelogger.settings import MAIN
from lifelogger.store.models import Connection, Record, Stream, SyncRun
from lifelogger.sweep import Sweep
from lifelogger.tokens import MOST_TROUBLE, Tokens
from tests.conftest import CLOCK
from tests.live import NOON, connect, in_background, rows, ticked, tuned
from tests.sandbox.control import Control

QUARTER, DAY = 900, 86_400
ONCE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For what no database has a part in."""

PROVIDERS = ("fitbit", "oura", "strava")
EACH = pytest.mark.parametrize("one", PROVIDERS)
LIST = {
    "fitbit": "GET /dataTypes/{type}/dataPoints:reconcile",
    "oura": "GET /daily_activity",
    "strava": "GET /athlete/activities",
}
"""What a sync asks each for first."""
TOKEN = {"fitbit": "POST /token", "oura": "POST /oauth/token", "strava": "POST /oauth/token"}
COST = {"fitbit": 10, "oura": 7, "strava": 1}
"""Requests of a poll without news: docs/providers."""


@pytest.fixture
def short(live: Runtime) -> Runtime:
    """No history: one sync reads all there is."""
    return tuned(live, sync={"history_days": 7})


def joined(live: Runtime, sandbox: Control, person: str = "alice") -> None:
    for provider in PROVIDERS:
        connect(live, sandbox, person, provider=provider)


def connections(live: Runtime, person: str = "alice") -> dict[str, Any]:
    with live.store.read() as db:
        found = db.execute(select(Connection.__table__).where(Connection.user_id == person))
        return {row.provider: row for row in found}


def by_provider(live: Runtime, table: Any, person: str = "alice") -> dict[str, list[Any]]:
    """A user's rows of one table, by provider."""
    names = {row.id: provider for provider, row in connections(live, person).items()}
    found: dict[str, list[Any]] = {name: [] for name in names.values()}
    for row in rows(live, table.__table__, person):
        found[names[row.connection_id]].append(row)
    return found


def set_one(live: Runtime, one: str, **values: Any) -> None:
    """Write into a connection of Alice's."""
    with live.store.write() as db:
        db.execute(
            update(Connection).where(Connection.user_id == "alice", Connection.provider == one).values(values)
        )


def counted(sandbox: Control, after: int = 0) -> Counter[str]:
    """What was asked of each cloud, token calls aside."""
    return Counter(entry["provider"] for entry in sandbox.ledger(after=after) if entry["kind"] == "read")


# One is in trouble ------------------------------------------------------------------------------------

Trouble = Callable[[Control, str], Any]
TROUBLES: dict[str, tuple[Trouble, str]] = {
    "down": (lambda sandbox, one: sandbox.fault(LIST[one], provider=one, status=500), "failed"),
    "cut off": (lambda sandbox, one: sandbox.fault(LIST[one], provider=one, cut="middle"), "failed"),
    "nonsense": (lambda sandbox, one: sandbox.fault(LIST[one], provider=one, body="[{"), "failed"),
    "limited": (lambda sandbox, one: sandbox.fault(LIST[one], provider=one, status=429), "deferred"),
    "refused": (lambda sandbox, one: sandbox.fault("*", provider=one, status=403), "deferred"),
    "revoked": (lambda sandbox, one: sandbox.revoke("alice", provider=one), "needs_reauth"),
}
IN_TURN = [
    pytest.param(one, trouble, marks=[pytest.mark.slow] if (number - place) % len(PROVIDERS) else [])
    for number, trouble in enumerate(TROUBLES)
    for place, one in enumerate(PROVIDERS)
]
"""Each trouble at one provider, each provider in two; all others with the slow tests."""


@ONCE
@pytest.mark.parametrize(("one", "trouble"), IN_TURN)
def test_the_trouble_of_one_neither_stops_nor_delays_the_others(
    short: Runtime, sandbox: Control, one: str, trouble: str
) -> None:
    joined(short, sandbox)
    happens, outcome = TROUBLES[trouble]
    happens(sandbox, one)

    ticked(short, "alice")

    runs, there = by_provider(short, SyncRun), connections(short)
    stored, asked = by_provider(short, Record), counted(sandbox)
    assert {name: [run.outcome for run in found] for name, found in runs.items()} == {
        name: [outcome if name == one else "ok"] for name in PROVIDERS
    }
    assert {name: found[0].requests for name, found in runs.items()} == {
        name: asked[name] for name in PROVIDERS
    }
    assert stored[one] == []
    interval = timedelta(seconds=short.settings.sync.interval_seconds)
    for name in set(PROVIDERS) - {one}:
        assert (runs[name][0].requests, runs[name][0].inserted) == (COST[name], len(stored[name]))
        assert stored[name]
        assert (there[name].status, there[name].failures, there[name].wait_reason) == ("active", 0, None)
        assert there[name].next_sync_at == NOON + interval * 0.9
    assert [row.claimed_at for row in there.values()] == [None] * 3
    reason = there[one].status_reason if outcome == "needs_reauth" else there[one].wait_reason
    assert reason == runs[one][0].message
    assert there[one].failures == (outcome == "failed")
    if outcome == "needs_reauth":
        assert (there[one].status, there[one].next_sync_at) == ("needs_reauth", None)
    else:
        assert there[one].next_sync_at > NOON


@ONCE
def test_an_account_without_a_profile_is_its_own_matter(short: Runtime, sandbox: Control) -> None:
    """`ACCOUNT_NOT_LINKED`: the person can mend it, and reads the others meanwhile."""
    sandbox.settings("fitbit", not_linked=["alice"])
    joined(short, sandbox)

    runs = {run.provider: run for run in ticked(short, "alice")}

    assert {name: run.outcome for name, run in runs.items()} == {
        "fitbit": "deferred", "oura": "ok", "strava": "ok"
    }  # fmt: skip
    assert connections(short)["fitbit"].next_sync_at == NOON + timedelta(days=1)


@ONCE
@EACH
def test_what_failed_lately_comes_last(short: Runtime, sandbox: Control, one: str) -> None:
    """It may take as long as a time-out: nobody waits for that a second time."""
    joined(short, sandbox)
    set_one(short, one, failures=1)

    ticked(short, "alice")

    asked = [entry["provider"] for entry in sandbox.ledger(kind="read")]
    assert asked[-COST[one] :] == [one] * COST[one]
    assert connections(short)[one].failures == 0


@ONCE
@EACH
def test_one_that_is_spent_is_planned_when_its_own_window_opens(
    short: Runtime, sandbox: Control, one: str
) -> None:
    """The others are polled at their own times."""
    joined(short, sandbox)
    sandbox.fault(LIST[one], provider=one, status=429, headers={"Retry-After": "2000"}, times=1)
    sync.run("alice", runtime=short)
    before = sandbox.ledger()[-1]["id"]
    sandbox.step(QUARTER)

    planned: list[str] = []
    planner.tick("sync", short.clock(), planned.append, runtime=short)
    runs = sync.run("alice", "tick", runtime=short)

    assert planned == ["alice"]
    assert {run.provider for run in runs} == set(PROVIDERS) - {one}
    assert counted(sandbox, before) == {name: COST[name] for name in PROVIDERS if name != one}


# One is gone, or somebody else's ----------------------------------------------------------------------


def taken_over(live: Runtime, one: str) -> None:
    """What a newer sync does when it begins."""
    set_one(live, one, fence=Connection.fence + 1)


def disconnected(live: Runtime, one: str) -> None:
    with live.store.write() as db:
        db.execute(delete(Connection).where(Connection.user_id == "alice", Connection.provider == one))


@EACH
@pytest.mark.parametrize("happens", [taken_over, disconnected])
def test_one_that_is_gone_or_taken_over_ends_alone(
    short: Runtime, sandbox: Control, one: str, happens: Callable[[Runtime, str], None]
) -> None:
    """Promises 1 and 11: of it nothing is written any more, not even its journal; the others go on."""
    joined(short, sandbox)
    with sandbox.hold(LIST[one], times=1) as gate:
        syncing = in_background(ticked, short, "alice")
        gate.wait_until_reached()
        happens(short, one)
    runs = {run.provider: run.outcome for run in syncing.result(20)}

    assert runs == {name: "interrupted" if name == one else "ok" for name in PROVIDERS}
    there, stored = connections(short), by_provider(short, Record)
    for name in set(PROVIDERS) - {one}:
        assert (there[name].claimed_at, there[name].last_sync_at) == (None, NOON)
        assert stored[name]
    assert not stored.get(one)
    assert [run.outcome for run in by_provider(short, SyncRun).get(one, [])] == (
        ["running"] if one in there else []  # the newer sync has written it down as interrupted
    )


@EACH
def test_one_that_is_gone_at_the_very_end_ends_alone(
    short: Runtime, sandbox: Control, one: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its last page and its journal row."""
    joined(short, sandbox)
    finish = sync.ConnectionSync._finish

    def late(self: sync.ConnectionSync, until: Any) -> None:
        if self.journal.provider == one:
            disconnected(short, one)
        finish(self, until)

    monkeypatch.setattr(sync.ConnectionSync, "_finish", late)

    runs = {run.provider: run.outcome for run in ticked(short, "alice")}

    assert runs == {name: "interrupted" if name == one else "ok" for name in PROVIDERS}
    assert {row.claimed_at for row in connections(short).values()} == {None}


def test_a_lost_lock_stops_all(short: Runtime, sandbox: Control) -> None:
    """Promise 1: the user is somebody else's now, whichever connection notices."""
    joined(short, sandbox)
    with sandbox.hold(LIST["fitbit"], times=1) as gate:
        syncing = in_background(ticked, short, "alice")
        gate.wait_until_reached()
        short.redis.delete("lifelogger:lock:sync:alice")
        short.mutex.renew_once()

    with pytest.raises(LockLost):
        syncing.result(20)
    assert counted(sandbox) == {"fitbit": 1}
    assert rows(short, Record.__table__, "alice") == []


def test_a_lock_lost_between_two_rounds_is_no_new_round(
    short: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 1: there is news, but whoever has the user now is not to be taken over from."""
    connect(short, sandbox, "alice")
    before = connections(short)["strava"].fence
    finish = sync.ConnectionSync._finish

    def last(self: sync.ConnectionSync, until: Any) -> None:
        sandbox.step(1)
        note_news(short, "alice")
        finish(self, until)
        short.redis.delete("lifelogger:lock:sync:alice")
        short.mutex.renew_once()

    monkeypatch.setattr(sync.ConnectionSync, "_finish", last)

    with pytest.raises(LockLost):
        sync.run("alice", runtime=short)
    assert connections(short)["strava"].fence == before + 1


# Nobody waits for another's history -------------------------------------------------------------------


@ONCE
@EACH
@pytest.mark.slow
def test_who_has_no_history_left_is_done_before_anothers_is_read(
    live: Runtime, sandbox: Control, one: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its journal is closed and its claim is over; one in trouble, too, does not wait to say so."""
    (failing,) = {"fitbit", "oura"} - {one} if one != "strava" else {"fitbit"}
    joined(live, sandbox)
    for _ in range(30):
        sync.run("alice", runtime=tuned(live, sync={"history_days": 120}))
        sandbox.step(QUARTER)
    with live.store.write() as db:  # this one begins anew, and has all to read
        db.execute(delete(Stream).where(Stream.connection_id == connections(live)[one].id))
    sandbox.fault(LIST[failing], provider=failing, status=500)
    seen: list[dict[str, Any]] = []
    read_history = Sweep.read_history

    def noting(self: Sweep) -> Iterator[None]:
        seen.append({name: row.claimed_at for name, row in connections(live).items()})
        return read_history(self)

    monkeypatch.setattr(Sweep, "read_history", noting)

    runs = {run.provider: run.outcome for run in ticked(live, "alice")}

    assert runs == {name: "failed" if name == failing else "ok" for name in PROVIDERS}
    assert seen
    assert all((claimed is not None) == (name == one) for each in seen for name, claimed in each.items())


@ONCE
def test_history_is_not_read_for_long_at_a_time(
    live: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow cloud with years to tell keeps a worker, and its user's news, for 20 seconds and a page."""
    monkeypatch.setattr(strava, "LARGEST_PAGE", 10)
    write = Sweep._store

    def slow(self: Sweep, page: Any, **more: Any) -> None:
        write(self, page, **more)
        CLOCK.step(8)

    monkeypatch.setattr(Sweep, "_store", slow)
    connect(live, sandbox, "alice")

    pages = []
    while not pages or rows(live, Stream.__table__, "alice")[0].backlog_until:
        (run,) = sync.run("alice", runtime=live)
        assert run.outcome == "ok"
        pages.append(run.requests)
        if len(pages) == 1:
            assert connections(live)["strava"].next_sync_at == live.clock() + sync.FIRST_RETRY

    assert pages[0] == 1 + 3
    assert len(pages) > 2
    assert {row.external_id for row in rows(live, Record.__table__, "alice")} == {
        str(item["id"]) for item in sandbox.truth("alice")
    }


@ONCE
def test_history_that_the_budget_refuses_waits_for_the_next_poll(
    live: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To come back sooner would be to poll again first, and spend on that what history is waiting for."""
    monkeypatch.setattr(strava, "LARGEST_PAGE", 10)
    live = tuned(live, sync={"interval_seconds": DAY})
    sandbox.limits(reads=(3, 1000))
    connect(live, sandbox, "alice")

    (run,) = ticked(live, "alice")

    assert run.outcome == "ok"
    assert "History goes on later" in (run.message or "")
    assert connections(live)["strava"].next_sync_at == NOON + timedelta(days=0.9)


@ONCE
@pytest.mark.slow
def test_first_imports_end_although_polls_could_use_the_whole_budget(
    live: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five people, each due at every tick, and a day's budget for a quarter of that."""
    monkeypatch.setattr(strava, "LARGEST_PAGE", 10)
    sandbox.set_clock(NOON.replace(hour=0))
    sandbox.limits(reads=(100, 150))
    people = [person["user_id"] for person in sandbox.people()]
    connect(live, sandbox, *people)

    for _ in range(96):
        planned: list[str] = []
        planner.tick("sync", live.clock(), planned.append, runtime=live)
        for person in planned:
            sync.run(person, "tick", runtime=live)
        sandbox.step(QUARTER)

    left = [row.backlog_until for person in people for row in rows(live, Stream.__table__, person)]
    assert left == [None] * 5
    assert 110 <= counted(sandbox)["strava"] <= 150  # what was kept for others has flowed back by midnight


@ONCE
def test_all_streams_together_have_the_same_seconds(
    live: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose pages are few each: one stream's two, one of the next, and no more."""
    write, pages = Sweep._store, list[str]()

    def slow(self: Sweep, page: Any, **more: Any) -> None:
        write(self, page, **more)
        pages.append(self.stream.name)
        CLOCK.step(8)

    monkeypatch.setattr(Sweep, "_store", slow)
    connect(live, sandbox, "alice", provider="oura")

    sync.run("alice", runtime=tuned(live, sync={"history_days": 240}))

    assert pages[7:] == [pages[0], pages[0], pages[1]]


@ONCE
def test_history_leaves_alone_what_nobody_else_spends(live: Runtime, sandbox: Control) -> None:
    """One person's limit at Fitbit is no other's: who is claimed beside them needs nothing of it."""
    people = [f"user{number}" for number in range(40)]
    connect(live, sandbox, "alice", provider="fitbit")
    with live.store.write() as db:
        sealed = connections(live)["fitbit"]._mapping
        for person in people:
            db.execute(live.store.insert(Connection.__table__.metadata.tables["users"]).values(
                id=person, created_at=NOON))  # fmt: skip
            other = {**sealed, "user_id": person, "provider_user_id": person, "claimed_at": NOON,
                     "next_sync_at": NOON + timedelta(minutes=10)}  # fmt: skip
            del other["id"]
            db.execute(live.store.insert(Connection.__table__).values(other))

    (run,) = ticked(live, "alice")

    assert run.message is None
    assert run.requests > 20


def test_no_providers_line_is_behind_anothers(live: Runtime, sandbox: Control) -> None:
    """Whoever has one connection is not served after all those who have another: news first, then in turn."""
    people = [person["user_id"] for person in sandbox.people()]
    connect(live, sandbox, *people[:3], provider="fitbit")
    connect(live, sandbox, *people[3:], provider="strava")
    with live.store.write() as db:
        db.execute(update(Connection).where(Connection.user_id != people[4]).values(news_at=None))
        plenty = {(name, MAIN): Allowance(10, 10) for name in PROVIDERS}

        users = planner.claim(live, db, plenty, NOON)

    assert users[0] == people[4]
    assert users.index(people[3]) == 2
    assert sorted(users) == sorted(people)


# Tokens -----------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("trouble", ["down", "revoked"])
def test_the_tokens_of_all_three_are_refreshed_ahead_of_time(
    short: Runtime, sandbox: Control, one: str, trouble: str
) -> None:
    """One that cannot be is left to the next firing, or to its person, and stops no other."""
    joined(short, sandbox)
    with short.store.write() as db:  # this one is the first to be tried
        soon = NOON + timedelta(minutes=20)
        db.execute(update(Connection).values(token_expires_at=soon))
        db.execute(
            update(Connection)
            .where(Connection.provider == one)
            .values(token_expires_at=soon - timedelta(seconds=5))
        )
    if trouble == "down":
        sandbox.fault(TOKEN[one], provider=one, status=503)
    else:
        sandbox.revoke("alice", provider=one)
    old = {name: row.access_token for name, row in connections(short).items()}

    outcomes = Tokens(short).refresh_expiring()
    sandbox.clear_faults()
    again = Tokens(short).refresh_expiring()

    there = connections(short)
    counts = {"refreshed": 2, "busy": 0, "later": 1, "needs_reauth": 0}
    if trouble == "down":
        assert (outcomes, again) == (counts, {**counts, "refreshed": 1, "later": 0})
    else:
        assert outcomes == {**counts, "later": 0, "needs_reauth": 1}
        assert there[one].status == "needs_reauth"
    for name in set(PROVIDERS) - ({one} if trouble == "revoked" else set()):
        assert there[name].access_token != old[name]
        assert there[name].token_expires_at > soon


@ONCE
@EACH
def test_a_cloud_whose_tokens_do_not_come_keeps_no_others_waiting(
    short: Runtime, sandbox: Control, one: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five refreshes time out, a minute each; there is no time for all of them, and they would come first."""
    people = [person["user_id"] for person in sandbox.people()]
    connect(short, sandbox, *people, provider=one)
    for other in set(PROVIDERS) - {one}:
        connect(short, sandbox, people[0], provider=other)
    with short.store.write() as db:
        for provider in PROVIDERS:
            db.execute(
                update(Connection)
                .where(Connection.provider == provider)
                .values(token_expires_at=NOON + timedelta(minutes=15 if provider == one else 20))
            )
    ask = Tokens.ask
    assert {provider for _, _, provider in Tokens(short).expiring(NOON + timedelta(hours=1))[:3]} == set(
        PROVIDERS
    )

    def slow(self: Tokens, row: Any, ahead: bool) -> Any:
        CLOCK.step(60 if row.provider == one else 0)
        return ask(self, row, ahead)

    monkeypatch.setattr(Tokens, "ask", slow)
    sandbox.fault(TOKEN[one], provider=one, status=500)

    outcomes = Tokens(short).refresh_expiring()

    assert outcomes == {"refreshed": 2, "busy": 0, "later": 5, "needs_reauth": 0}
    assert len(sandbox.ledger(kind="token", provider=one)) == MOST_TROUBLE


# When each is asked again -----------------------------------------------------------------------------


@ONCE
@EACH
@pytest.mark.parametrize("status", [429, 503])
def test_a_cloud_that_says_when_is_believed(short: Runtime, sandbox: Control, one: str, status: int) -> None:
    """`Retry-After` is written down as its time, and nobody else's."""
    joined(short, sandbox)
    sandbox.fault(LIST[one], provider=one, status=status, headers={"Retry-After": "420"}, times=1)

    ticked(short, "alice")

    due = {name: row.next_sync_at - NOON for name, row in connections(short).items()}
    assert timedelta(seconds=420) <= due.pop(one) <= timedelta(seconds=422)
    assert set(due.values()) == {timedelta(seconds=0.9 * short.settings.sync.interval_seconds)}


@ONCE
@EACH
def test_two_that_fail_together_do_not_come_back_together(short: Runtime, sandbox: Control, one: str) -> None:
    """The back-off has jitter."""
    people = [person["user_id"] for person in sandbox.people()]
    connect(short, sandbox, *people, provider=one)
    sandbox.fault(LIST[one], provider=one, status=500)

    for person in people:
        ticked(short, person)

    waits = [(connections(short, person)[one].next_sync_at - NOON) / sync.FIRST_RETRY for person in people]
    assert all(0.8 <= wait <= 1.2 for wait in waits)
    assert len(set(waits)) == len(people)


# What a poll costs ------------------------------------------------------------------------------------


def test_a_poll_without_news_costs_what_the_documents_say(short: Runtime, sandbox: Control) -> None:
    """The ledger and the journal agree, provider by provider, and the planner reckons with the same."""
    joined(short, sandbox)
    ticked(short, "alice")
    sandbox.step(QUARTER)
    ticked(short, "alice")
    before = sandbox.ledger()[-1]["id"]
    sandbox.step(QUARTER)

    ticked(short, "alice")

    polls = {name: runs[-1] for name, runs in by_provider(short, SyncRun).items()}
    assert counted(sandbox, before) == COST == {name: run.requests for name, run in polls.items()}
    settings = short.settings.providers
    assert {name: each.poll_cost(settings[name]) for name, each in short.providers.items()} == COST
    assert {run.outcome for run in polls.values()} == {"ok"}


@ONCE
def test_a_list_whose_history_fails_keeps_no_other_list_waiting(live: Runtime, sandbox: Control) -> None:
    """What is read of a connection's past does not depend on the order of its streams."""
    past = tuned(live, sync={"history_days": 100})
    connect(past, sandbox, "alice", provider="fitbit")
    sandbox.fault("POST /dataTypes/steps/dataPoints:dailyRollUp", provider="fitbit", status=500, skip=1)

    (run,) = sync.run("alice", runtime=past)

    left = {row.name for row in rows(past, Stream.__table__, "alice") if row.backlog_until is not None}
    assert run.outcome == "ok"
    assert "History goes on later" in (run.message or "")
    assert left == {"steps"}
