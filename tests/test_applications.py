"""Several applications of one provider: budgets by client id, and connections that belong to one."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from queue import Queue
from typing import Any

import pytest
import requests
from alembic import command
from dramatiq.brokers.stub import StubBroker
from pydantic import SecretStr
from sqlalchemy import event, select, text
from starlette.testclient import TestClient
from typer.testing import CliRunner

import lifelogger.broker
from lifelogger import cli, leaving, pacing, planner, plans, status, sync, webhooks
from lifelogger.budget import BudgetSpent, Usage
from lifelogger.connecting import application_for, connect, set_out
from lifelogger.connections import CLAIMED, ImportRefused, import_lines, note_news, under_way
from lifelogger.doctor import examine
from lifelogger.errors import Forged, LifeloggerError, Unavailable
from lifelogger.providers.base import Call
from lifelogger.runtime import Runtime
from lifelogger.settings import MAIN, Application
from lifelogger.store import counts
from lifelogger.store.migrate import run as migrating
from lifelogger.store.models import Pace, Receipt, Revocation
from lifelogger.tokens import Tokens
from lifelogger.web.app import create_app
from lifelogger.web.login import login_token
from tests.live import (
    LIST,
    NOON,
    TOKEN,
    change,
    connection,
    in_background,
    journal,
    stored,
    truth,
    tuned,
    web_server,
    wipe,
)
from tests.live import connect as let_in
from tests.sandbox.control import Control
from tests.servers import wait_until
from tests.web.people import HERE

ONCE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
SECOND = {"client_id": "two", "client_secret": "its own"}
TWO = {"client_id": "two", "client_secret": "its own", "application": "second"}
"""What somebody who connects at the second application has, and what an import says of it."""
HOUR = 3600
REVOKE = "POST /oauth/revoke"


@pytest.fixture
def endpoints(endpoints: dict[str, Any]) -> dict[str, Any]:
    """Each provider has a second application, at Google of a second project."""
    found = {name: {**each, "applications": {"second": SECOND}} for name, each in endpoints.items()}
    google = found["fitbit"]
    google |= {"project": "first", "service_account": "sandbox"}
    google["webhook_keys_url"] = f"{google['api_url']}/googlehealthapi/webhooks/webhooks_public_keyset.json"
    google["applications"] = {"second": {**SECOND, "project": "second", "service_account": "its own"}}
    return found


def let_in_at_second(live: Runtime, sandbox: Control, *people: str, provider: str = "strava") -> None:
    lines = sandbox.connect(*people, provider=provider, client_id="two", client_secret="its own")
    import_lines(live, [json.dumps({**line, "application": "second"}) for line in lines])


def without_second(live: Runtime) -> Runtime:
    """The same, once somebody has taken the second application out of the settings."""
    providers = {
        name: each.model_copy(update={"applications": {}}) for name, each in live.settings.providers.items()
    }
    return dataclasses.replace(live, settings=live.settings.model_copy(update={"providers": providers}))


def tick(live: Runtime, threads: int = 4) -> list[str]:
    """Plan, and sync who is planned, some at a time; returns who that was."""
    planned: list[str] = []
    planner.tick("sync_active_users", None, planned.append, runtime=live)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda user_id: sync.run(user_id, "tick", runtime=live), planned))
    return planned


def clients(sandbox: Control, **filters: Any) -> list[tuple[str, str]]:
    """Who asked as which application, in the order of the ledger."""
    return [(entry["person"], entry["client"]) for entry in sandbox.ledger(**filters)]


# Budgets ---------------------------------------------------------------------------------------------


def test_each_client_id_stays_within_its_own_windows_while_all_are_used_fully(
    live: Runtime, sandbox: Control
) -> None:
    """Promise 3 for two applications at once: six requests each in a quarter of an hour, and not one more."""
    sandbox.limits(reads=(6, 1000), overall=(100, 1000))
    rt = tuned(live, sync={"interval_seconds": 60, "history_days": 0}, schedule={"reserve": 0.0})
    people = [person["user_id"] for person in sandbox.people()]
    let_in(rt, sandbox, *people[:3])
    let_in_at_second(rt, sandbox, *people[3:])
    sandbox.set_clock(NOON.replace(minute=0))

    for _ in range(30):
        tick(rt)
        sandbox.step(60)

    windows = [
        each
        for each in sandbox.summary()["windows"]
        if (each["provider"], each["pool"], each["seconds"]) == ("strava", "reads", 900)
    ]
    used = {(each["client_id"], each["start"] % HOUR): each["used"] for each in windows}
    assert used == {(client, start): 6 for client in ("sandbox", "two") for start in (0, 900)}
    assert set(clients(sandbox, route=LIST)) == {
        *((person, "sandbox") for person in people[:3]),
        *((person, "two") for person in people[3:]),
    }
    assert {entry["status"] for entry in sandbox.ledger(route=LIST)} == {200}, "nothing was refused"


@ONCE
def test_an_application_has_the_budget_that_its_table_says(live: Runtime, sandbox: Control) -> None:
    """Of a provider that tells no usage, the settings are all that is known."""
    budgets = {"main": ("30/5 minutes",), "second": ("12/5 minutes",)}
    oura = live.settings.providers["oura"]
    second = oura.applications["second"].model_copy(update={"budget": budgets["second"]})
    mine = oura.model_copy(update={"budget": budgets["main"], "applications": {"second": second}})
    settings = live.settings.model_copy(update={"providers": {**live.settings.providers, "oura": mine}})
    rt = tuned(dataclasses.replace(live, settings=settings), sync={"history_days": 0})
    people = [person["user_id"] for person in sandbox.people()]
    let_in(rt, sandbox, *people[:3], provider="oura")
    let_in_at_second(rt, sandbox, *people[3:], provider="oura")
    for name in budgets:  # nobody had counted before
        rt.budget.settle(rt.budget.take(rt.application("oura", name).pools), date=rt.clock())

    for person in people:
        sync.run(person, runtime=rt)

    limits = {"main": 30, "second": 12}
    asked = Counter(entry["client"] for entry in sandbox.ledger(provider="oura", kind="read"))
    assert asked["sandbox"] == 7 * 3, "there was enough for all three"
    assert asked["two"] == limits["second"] - 1, "one was counted before"
    waits = {person: connection(rt, person).wait_reason for person in people}
    assert [waits[person] for person in people[:3]] == [None] * 3
    assert "oura/second requests: 12 of 12 requests used" in (waits[people[4]] or "")


def test_one_that_is_exhausted_does_not_hold_up_the_other(live: Runtime, sandbox: Control) -> None:
    let_in(live, sandbox, "alice")
    let_in_at_second(live, sandbox, "bruno")
    sandbox.spend(100, client_id="two")

    assert set(tick(live)) == {"alice", "bruno"}, "the count of neither is known"
    ended = {person: journal(live, person)[-1].outcome for person in ("alice", "bruno")}

    assert ended == {"alice": "ok", "bruno": "deferred"}
    assert "429" in journal(live, "bruno")[-1].message
    sandbox.step(60)
    for person in ("alice", "bruno"):
        note_news(live, person)
    assert tick(live) == ["alice"]
    reason = "strava/second reads: 101 of 100 requests used in the 15 minutes to 12:15 UTC"
    with pytest.raises(BudgetSpent, match=reason):
        live.budget.take(live.application("strava", "second").pools)
    sandbox.step(900)
    assert "bruno" in tick(live)
    assert journal(live, "bruno")[-1].outcome == "ok"


@ONCE
def test_one_whose_count_was_lost_does_not_hold_up_the_other(live: Runtime, sandbox: Control) -> None:
    """Promise 3: of an unknown count one request at a time goes out, and nobody else's waits for it."""
    people = [person["user_id"] for person in sandbox.people()]
    let_in(live, sandbox, *people[:2])
    let_in_at_second(live, sandbox, *people[2:])
    main = live.application("strava").pools
    told = {"reads": Usage((100, 1000), (1, 1)), "overall": Usage((200, 2000), (1, 1))}
    live.budget.settle(live.budget.take(main), usage=told, date=live.clock())

    planned: list[str] = []
    planner.tick("sync_active_users", None, planned.append, runtime=live)

    assert sorted(planned) == sorted([*people[:2], people[2]]), "of the unknown one's a single one asks"


@ONCE
def test_a_claim_and_what_is_on_its_way_are_the_applications_own(live: Runtime, sandbox: Control) -> None:
    let_in(live, sandbox, "alice")
    let_in_at_second(live, sandbox, "bruno", "chiyo")
    allowances = {("strava", MAIN): planner.Allowance(9, 9), ("strava", "second"): planner.Allowance(1, 1)}

    with live.store.write() as db:
        claimed = planner.claim(live, db, allowances, live.clock())

    assert len(claimed) == 2
    assert (under_way(live, "strava"), under_way(live, "strava", "second")) == (1, 1)


def test_a_tick_reads_the_order_of_an_application_from_an_index(live: Runtime) -> None:
    """Promise 9: as cheap with several as with one."""
    seen: list[tuple[str, Any]] = []

    def note(_: Any, __: Any, statement: str, parameters: Any, *more: Any) -> None:
        seen.append((statement, parameters))

    event.listen(live.store.engine, "before_cursor_execute", note)
    with live.store.write() as db:
        planner.claim(live, db, {("strava", "second"): planner.Allowance(9, 9, 9)}, live.clock())
        db.execute(CLAIMED.statement, {"provider": "strava", "application": "second", "now": live.clock()})
    event.remove(live.store.engine, "before_cursor_execute", note)

    asked = [each for each in seen if each[0].lstrip().startswith("SELECT")]
    explain = "EXPLAIN QUERY PLAN " if live.store.is_sqlite else "EXPLAIN "
    found = []
    with live.store.write() as db:  # a transaction, for whose length they are set
        if not live.store.is_sqlite:  # an empty table is read as it is, whatever there is beside it
            db.execute(text("SET LOCAL enable_seqscan = off"))
            db.execute(text("SET LOCAL enable_bitmapscan = off"))
        for statement, parameters in asked:
            plan = " ".join(str(row) for row in db.exec_driver_sql(explain + statement, parameters))
            assert "TEMP B-TREE" not in plan
            assert "Sort" not in plan
            names = [name for name in ("news", "due", "claimed") if f"ix_connections_{name}" in plan]
            found.append(names[0])
    assert found == ["news", "due", "due", "claimed"]


@ONCE
def test_each_application_has_a_price_of_its_own(live: Runtime, sandbox: Control) -> None:
    let_in(live, sandbox, "alice")
    let_in_at_second(live, sandbox, "bruno")
    window = live.budget.windows(live.application("strava").pools)[0]
    day = dataclasses.replace(window, seconds=86400, limit=2)

    scarce = pacing.price(live, "strava", [day], NOON, "second")
    enough = pacing.price(live, "strava", [dataclasses.replace(day, limit=10_000)], NOON)

    assert (scarce.scarce, enough.scarce) == (True, False)
    with live.store.read() as db:
        assert pacing.read(db, "strava") == enough
        assert pacing.read(db, "strava", "second") == scarce
    sync.run("bruno", runtime=live)
    sync.run("alice", runtime=live)
    assert connection(live, "bruno").next_sync_at > connection(live, "alice").next_sync_at, "hers is free"


@ONCE
def test_few_connections_among_many_are_all_known(
    live: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draw of numbers would hardly meet them, and they would seem to be nobody."""
    monkeypatch.setattr(pacing, "LOOKED_AT", 3)
    let_in_at_second(live, sandbox, "bruno", "chiyo")
    change(live, "chiyo", id=10_000_000)

    with live.store.read() as db:
        sample = pacing.drawn(db, "strava", NOON, "second")

    assert (len(sample.connections), sample.number) == (2, 2)


@ONCE
def test_history_leaves_requests_to_the_syncs_of_its_own_application_only(
    live: Runtime, sandbox: Control
) -> None:
    sandbox.limits(reads=(4, 1000))
    people = [person["user_id"] for person in sandbox.people()]
    let_in(live, sandbox, *people[:4])
    let_in_at_second(live, sandbox, people[4])
    for person in people[:4]:
        change(live, person, claimed_at=NOON, next_sync_at=NOON + timedelta(minutes=10))

    sync.run(people[4], runtime=tuned(live, schedule={"reserve": 0.0}))

    run = journal(live, people[4])[-1]
    assert (run.outcome, run.message) == ("ok", None)
    assert run.history_s > 0


@ONCE
def test_webhooks_that_bring_news_are_noted_for_their_application(live: Runtime, sandbox: Control) -> None:
    let_in(live, sandbox, "alice")
    let_in_at_second(live, sandbox, "bruno")
    tick(live)
    sync.run("bruno", runtime=live)
    sandbox.step(HOUR)
    sandbox.add("bruno")
    change(live, "bruno", news_at=live.clock(), news_streams=["activities"], next_sync_at=live.clock())

    sync.run("bruno", "news", runtime=live)

    with live.store.read() as db:
        paces = select(Pace.application, Pace.heard_at).where(Pace.provider == "strava")
        heard = {row.application: row.heard_at for row in db.execute(paces)}
    assert heard == {"main": None, "second": live.clock()}


# Tokens ----------------------------------------------------------------------------------------------


def test_tokens_are_refreshed_and_revoked_by_the_client_they_were_given_to(
    live: Runtime, sandbox: Control
) -> None:
    let_in(live, sandbox, "alice")
    let_in_at_second(live, sandbox, "bruno")
    sandbox.step(6 * HOUR - 600)

    assert Tokens(live).refresh_expiring()["refreshed"] == 2
    sync.run("bruno", runtime=live)
    for person in ("alice", "bruno"):
        leaving.disconnect(live, person, "strava")

    right = {("alice", "sandbox"), ("bruno", "two")}
    for route in (TOKEN, REVOKE):
        entries = sandbox.ledger(route=route)
        assert {(entry["person"], entry["client"]) for entry in entries} == right
        assert {entry["status"] for entry in entries} == {200}
    assert sandbox.summary()["unexpected"] == 0


@ONCE
def test_an_application_whose_secret_is_wrong_keeps_no_other_from_its_tokens(
    live: Runtime, sandbox: Control
) -> None:
    people = [person["user_id"] for person in sandbox.people()]
    let_in_at_second(live, sandbox, *people[:4])
    let_in(live, sandbox, people[4])
    sandbox.step(6 * HOUR - 600)
    strava = live.settings.providers["strava"]
    wrong = strava.applications["second"].model_copy(update={"client_secret": SecretStr("wrong")})
    wrong_strava = strava.model_copy(update={"applications": {"second": wrong}})
    providers = {**live.settings.providers, "strava": wrong_strava}
    rt = dataclasses.replace(live, settings=live.settings.model_copy(update={"providers": providers}))

    outcomes = Tokens(rt).refresh_expiring()

    assert (outcomes["refreshed"], outcomes["later"]) == (1, 4)
    assert connection(rt, people[0]).status == "active", "that is not for the person to mend"


@ONCE
def test_the_other_kinds_of_provider_have_applications_as_well(live: Runtime, sandbox: Control) -> None:
    for provider in ("fitbit", "oura"):
        wipe(live)
        let_in(live, sandbox, "alice", provider=provider)
        let_in_at_second(live, sandbox, "bruno", provider=provider)
        for person in ("alice", "bruno"):
            assert [run.outcome for run in sync.run(person, runtime=live)] == ["ok"]
            leaving.disconnect(live, person, provider)
        asked = set(clients(sandbox, provider=provider, kind="read"))
        assert asked == {("alice", "sandbox"), ("bruno", "two")}


# Connecting ------------------------------------------------------------------------------------------


def agreed(live: Runtime, user_id: str, person: str, application: str | None = None) -> Any:
    """Somebody connects on the provider's page."""
    shown: Queue[str] = Queue()
    done = in_background(connect, live, user_id, "strava", shown.put, application=application, seconds=20)
    requests.get(f"{shown.get(timeout=20)}&person={person}", timeout=20)
    return done.result(20)


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages go nowhere."""
    stub = StubBroker()
    stub.declare_queue("now")
    monkeypatch.setitem(vars(lifelogger.broker), "broker", stub)


def test_whoever_is_new_goes_where_there_are_most_requests_for_each(live: Runtime, sandbox: Control) -> None:
    people = [person["user_id"] for person in sandbox.people()]
    for person in people[:4]:
        agreed(live, person, person)

    chosen = [connection(live, person).application for person in people[:4]]

    assert chosen == [MAIN, "second", MAIN, "second"], "both may send as much"
    assert [run.outcome for run in sync.run(people[1], runtime=live)] == ["ok"]
    assert set(clients(sandbox, route=LIST)) == {(people[1], "two")}
    told = {"reads": Usage((400, 4000), (1, 1)), "overall": Usage((800, 8000), (1, 1))}
    pools = live.application("strava", "second").pools
    live.budget.settle(live.budget.take(pools), usage=told, date=live.clock())
    assert application_for(live, "zoe", "strava").name == "second", "it was granted four times as much"


@ONCE
def test_whoever_connects_again_stays_with_their_application(live: Runtime, sandbox: Control) -> None:
    let_in_at_second(live, sandbox, "alice", "bruno", "chiyo")
    sync.run("alice", runtime=live)
    before = stored(live, "alice")

    assert not agreed(live, "alice", "alice").new

    assert connection(live, "alice").application == "second"
    assert stored(live, "alice") == before == truth(sandbox, "alice")
    assert application_for(live, "zoe", "strava").name == MAIN


def test_whoever_wants_another_application_moves_there_with_the_tokens(
    live: Runtime, sandbox: Control
) -> None:
    """The data stay, and what was granted before is revoked by the application that had it."""
    let_in(live, sandbox, "alice")
    sync.run("alice", runtime=live)
    before, seen = stored(live, "alice"), max(entry["id"] for entry in sandbox.ledger())

    assert not agreed(live, "alice", "alice", "second").new

    row = connection(live, "alice")
    assert row.application == "second"
    leaving.revoke_waiting(live)
    assert clients(sandbox, route=REVOKE) == [("alice", "sandbox")]
    sandbox.step(HOUR)
    assert [run.outcome for run in sync.run("alice", runtime=live)] == ["ok"]
    assert set(clients(sandbox, route=LIST, after=seen)) == {("alice", "two")}
    assert stored(live, "alice") == before
    with live.store.read() as db:
        assert db.execute(select(Receipt.kind, Receipt.deleted, Receipt.revocation)).all() == [
            ("moved", {}, "done")
        ]
        assert db.scalars(select(Revocation.id)).all() == []


def test_a_former_grant_that_is_still_to_be_revoked_loses_no_tokens_of_the_next(
    live: Runtime, sandbox: Control
) -> None:
    """Both were the same connection's, and the tokens of a refresh under way wait in Redis by its number."""
    let_in(live, sandbox, "alice")
    agreed(live, "alice", "alice", "second")
    sandbox.step(48 * HOUR)
    with sandbox.hold(TOKEN) as gate:
        working = in_background(sync.run, "alice", runtime=live)
        gate.wait_until_reached()
        leaving.erase(live, "alice")
    working.result(20)
    assert len(live.redis.keys("*escrow*")) == 1

    assert leaving.revoke_waiting(live) == 1, "the former"
    assert len(live.redis.keys("*escrow*")) == 1, "the refresh token that the other one holds is spent"
    sandbox.step(300)
    assert leaving.revoke_waiting(live) == 1

    assert clients(sandbox, route=REVOKE, status=200) == [("alice", "sandbox"), ("alice", "two")]
    assert live.redis.keys("*escrow*") == []


def test_a_sync_that_runs_while_its_connection_moves_spends_nothing_of_the_other_budget(
    live: Runtime, sandbox: Control
) -> None:
    """Not even if its token is refused meanwhile: the new one belongs to the other application."""
    let_in(live, sandbox, "alice")
    sandbox.fault(LIST, status=401, times=1)
    with sandbox.hold(LIST) as gate:
        working = in_background(sync.run, "alice", "tick", runtime=live)
        change(live, "alice", claimed_at=live.clock())
        gate.wait_until_reached()
        let_in_at_second(live, sandbox, "alice")
    runs = working.result(20)

    assert [entry["status"] for entry in sandbox.ledger(route=LIST)] == [401]
    assert [run.outcome for run in runs] == ["interrupted"]
    assert "two" not in dict(clients(sandbox, kind="read")).values()
    row = connection(live, "alice")
    assert (row.application, row.wait_reason, row.failures) == ("second", None, 0)
    assert row.refreshing_until is None
    assert row.next_sync_at <= live.clock(), "due at once"
    assert [run.outcome for run in ticked_by_news(live)] == ["ok"]
    assert sandbox.ledger(kind="read")[-1]["client"] == "two"


def ticked_by_news(live: Runtime) -> list[sync.Run]:
    planned: list[str] = []
    planner.serve_news(planned.append, runtime=live)
    assert planned == ["alice"]
    return sync.run("alice", "tick", runtime=live)


@ONCE
def test_an_application_that_is_not_there_is_refused_by_name(live: Runtime) -> None:
    with pytest.raises(LifeloggerError, match='strava: the application "third" is none of main, second'):
        set_out(live, "alice", "strava", "http://127.0.0.1/callback", application="third")


@ONCE
def test_one_that_was_taken_away_meanwhile_connects_nobody(live: Runtime, sandbox: Control) -> None:
    from lifelogger.connecting import come_back

    attempt, _ = set_out(live, "alice", "strava", "http://127.0.0.1/callback", application="second")

    with pytest.raises(Unavailable, match="its application, strava/second, is not in the settings"):
        come_back(without_second(live), attempt, {"code": "c"})


@ONCE
def test_a_large_store_is_not_counted_for_whoever_connects(live: Runtime, sandbox: Control) -> None:
    let_in(live, sandbox, "alice")
    assert counts.recount(live.store, live.clock, large=1)
    let_in_at_second(live, sandbox, "bruno", "chiyo")

    with live.store.read() as db:
        assert counts.of_applications(db, "strava") == {MAIN: 1}, "as it was counted"
        assert counts.of_applications(db, "oura") == {}
        assert counts.count(db, live.clock()).providers["strava"].applications == {MAIN: 1, "second": 2}


def test_an_import_says_whose_tokens_they_are(live: Runtime, sandbox: Control) -> None:
    let_in(live, sandbox, "alice")
    let_in_at_second(live, sandbox, "bruno")
    again = sandbox.connect("bruno", client_id="two", client_secret="its own")
    import_lines(live, [json.dumps(line) for line in again])  # which says nothing of it

    assert [connection(live, person).application for person in ("alice", "bruno")] == [MAIN, "second"]
    fence = connection(live, "alice").fence
    let_in_at_second(live, sandbox, "alice")
    assert connection(live, "alice").application == "second"
    assert connection(live, "alice").fence == fence + 1
    with live.store.read() as db:
        assert db.scalars(select(Revocation.id)).all() == [], "whoever imports may only have named it wrongly"


@ONCE
def test_an_import_of_an_application_that_is_not_there_is_refused(live: Runtime, sandbox: Control) -> None:
    (line,) = sandbox.connect("alice")

    with pytest.raises(ImportRefused) as refused:
        import_lines(live, [json.dumps({**line, "application": "third"})])

    assert refused.value.faults == ['line 1: application: "third" is none of main, second']


# Webhooks --------------------------------------------------------------------------------------------


@pytest.fixture
def served(live: Runtime) -> Iterator[Runtime]:
    broker = StubBroker()
    broker.declare_queue("now")
    with web_server(live, broker) as rt:
        yield rt


@ONCE
@pytest.mark.parametrize("provider", ["strava", "fitbit", "oura"])
def test_each_application_subscribes_for_itself(served: Runtime, sandbox: Control, provider: str) -> None:
    """With its own secret, to its own address; ending one's leaves the other's."""
    let_in(served, sandbox, "alice", provider=provider)
    let_in_at_second(served, sandbox, "bruno", provider=provider)

    webhooks.keep_all(served)
    webhooks.keep_all(served)

    base = served.settings.web.public_url
    found = webhooks.known(served)
    for path in (provider, f"{provider}/second"):
        assert {each["callback"] for each in found[path]["subscriptions"]} == {f"{base}/webhooks/{path}"}
        assert found[path]["fault"] is None
    made = sandbox.webhooks(provider)["subscriptions"]
    assert {each["client"] for each in made} == {"sandbox", "two"}
    own = [
        entry for entry in sandbox.ledger(provider=provider, kind="other") if "keyset" not in entry["path"]
    ]
    assert Counter(entry["client"] for entry in own) == {"sandbox": len(own) / 2, "two": len(own) / 2}
    assert webhooks.remove(served, provider, "second") == len(made) / 2
    assert {each["client"] for each in sandbox.webhooks(provider)["subscriptions"]} == {"sandbox"}
    assert len(webhooks.known(served)[provider]["subscriptions"]) == len(made) / 2


@ONCE
@pytest.mark.parametrize("provider", ["strava", "oura"])
def test_what_one_application_is_told_is_nothing_to_the_connections_of_another(
    served: Runtime, sandbox: Control, provider: str
) -> None:
    let_in(served, sandbox, "alice", provider=provider)
    let_in_at_second(served, sandbox, "bruno", provider=provider)
    for person in ("alice", "bruno"):
        sync.run(person, runtime=served)
    webhooks.keep_all(served)
    sandbox.step(HOUR)
    for person in ("alice", "bruno"):
        sandbox.add(person)

    def deliveries() -> dict[str, Any]:
        return {each["person"]: each for each in sandbox.webhooks(provider)["deliveries"] if each["done"]}

    wait_until(lambda: len(deliveries()) == 2, "the deliveries")
    sandbox.disturb_webhooks(provider, lost=1000)
    wait_until(lambda: all(each["done"] for each in sandbox.webhooks(provider)["deliveries"]), "their end")
    for person in ("alice", "bruno"):
        assert connection(served, person).news_at == served.clock(), "each was told of their own"
        change(served, person, news_at=None, news_streams=None, news_about=None)

    told = deliveries()
    for person, here, there in (("alice", MAIN, "second"), ("bruno", "second", MAIN)):
        headers = {name.lower(): value for name, value in told[person]["headers"].items()}
        call = Call("POST", headers, {}, told[person]["body"].encode())
        with pytest.raises(Forged):
            webhooks.hear(served, provider, call, there)
        assert connection(served, person).news_at is None
        assert webhooks.hear(served, provider, call, here)[0].events


@ONCE
def test_an_event_that_an_application_may_send_leaves_anothers_person_alone(
    served: Runtime, sandbox: Control
) -> None:
    """Strava signs nothing: whoever knows the subscription of one could name the people of the other."""
    let_in(served, sandbox, "alice")
    let_in_at_second(served, sandbox, "bruno")
    tick(served)
    sync.run("bruno", runtime=served)
    webhooks.keep_all(served)
    (mine,) = webhooks.known(served)["strava/second"]["subscriptions"]
    before = connection(served, "alice")
    owner = int(before.provider_user_id)
    left = {"object_type": "athlete", "object_id": owner, "aspect_type": "update", "owner_id": owner,
            "updates": {"authorized": "false"}, "subscription_id": int(mine["id"])}  # fmt: skip
    new = {**left, "object_type": "activity", "aspect_type": "create", "object_id": 7, "updates": {}}

    for said in (left, new):
        heard, users = webhooks.hear(
            served, "strava", Call("POST", {}, {}, json.dumps(said).encode()), "second"
        )
        assert (len(heard.events), users) == (1, [])

    assert connection(served, "alice") == before


@ONCE
def test_an_address_of_no_application_is_none(served: Runtime) -> None:
    base = served.settings.web.public_url
    for path, answer in (
        ("strava", 401),
        ("strava/second", 401),
        ("strava/third", 404),
        ("strava/main", 401),
        ("strava?application=third", 401),  # the path alone says whose it is
    ):
        assert requests.post(f"{base}/webhooks/{path}", json={}, timeout=20).status_code == answer


# An application that is not there any more -------------------------------------------------------------


def test_connections_of_one_that_was_taken_away_wait_and_say_so(live: Runtime, sandbox: Control) -> None:
    """Promise 12; nobody else's is touched, and they go on when it is back."""
    migrating(live.store, lambda config: command.stamp(config, "head"))
    let_in(live, sandbox, "alice")
    let_in_at_second(live, sandbox, "bruno")
    before = connection(live, "bruno")
    rt = without_second(live)
    sandbox.step(6 * HOUR - 600)

    assert tick(rt) == ["alice"]
    assert sync.run("bruno", runtime=rt) == []
    assert note_news(rt, "bruno") == 0
    assert Tokens(rt).refresh_expiring()["refreshed"] == 1
    assert planner.serve_news(lambda _: None, runtime=rt) == 0
    webhooks.keep_all(rt)

    assert connection(live, "bruno") == before
    assert clients(sandbox, person="bruno") == []
    why = "Waiting: its application, strava/second, is not in the settings. It goes on when that is back."
    assert [each["sentence"] for each in status.users(rt, search="bruno")[0]["connections"]] == [why]
    assert plans.of_user(rt, "bruno")[0]["why"] == why
    assert plans.of_user(rt, "alice")[0]["why"] != why
    (main, second) = status.overview(rt)["providers"]["strava"]["applications"]
    assert (main["name"], main["connections"], second["name"]) == (MAIN, 1, "second")
    assert second["sentence"] == "1 connection: waiting until it is in the settings again."
    assert (second["budget"], second["webhooks"]) == (None, None)
    (finding,) = [each for each in examine(rt) if each.part == "strava/second"]
    assert finding.ok is False
    assert finding.sentence == (
        "1 connection of an application that is not in the settings: nothing is synced of them until "
        "[providers.strava.applications.second] is back."
    )
    with pytest.raises(Unavailable, match="strava/second, is not in the settings"):
        Tokens(rt).refresh(before.id, margin=timedelta(hours=1))

    assert "bruno" in tick(live)
    assert stored(live, "bruno") == truth(sandbox, "bruno")


@ONCE
def test_who_leaves_one_that_was_taken_away_is_revoked_when_it_is_back(
    live: Runtime, sandbox: Control
) -> None:
    let_in_at_second(live, sandbox, "bruno")

    (said,) = leaving.disconnect(without_second(live), "bruno", "strava")["connections"]

    assert said["revocation"] == "pending"
    assert sandbox.ledger(route=REVOKE) == []
    sandbox.step(120)
    assert leaving.revoke_waiting(live) == 1
    assert clients(sandbox, route=REVOKE) == [("bruno", "two")]


@ONCE
def test_whoever_connects_again_after_that_goes_to_one_that_is_there(live: Runtime, sandbox: Control) -> None:
    let_in_at_second(live, sandbox, "alice")
    rt = without_second(live)

    assert not agreed(rt, "alice", "alice").new

    assert connection(rt, "alice").application == MAIN
    assert [run.outcome for run in sync.run("alice", runtime=rt)] == ["ok"]


# What people see -------------------------------------------------------------------------------------


def shown(rt: Runtime, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(cli, "_runtime", lambda: rt)
    monkeypatch.setattr(cli.out, "width", 200)
    done = CliRunner().invoke(cli.app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.stdout


@ONCE
def test_the_command_line_tells_of_each_where_there_are_several(
    live: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_in(live, sandbox, "alice")
    let_in_at_second(live, sandbox, "bruno")
    tick(live)

    spent = json.loads(shown(live, monkeypatch, "budget", "--json"))
    everything = json.loads(shown(live, monkeypatch, "status", "--json"))["providers"]
    planned = json.loads(shown(live, monkeypatch, "plan", "--json"))["providers"]

    paths = ["fitbit", "fitbit/second", "oura", "oura/second", "strava", "strava/second"]
    assert sorted(spent) == sorted(planned) == paths
    assert [each["used"] for each in spent["strava/second"] if each["pool"] == "reads"] == [
        len(clients(sandbox, route=LIST, client="two"))
    ] * 2
    assert everything["strava"]["budget"] == spent["strava"]
    both = everything["strava"]["applications"]
    assert [(each["name"], each["connections"], each["budget"]) for each in both] == [
        ("main", 1, spent["strava"]),
        ("second", 1, spent["strava/second"]),
    ]
    assert [each["user_id"] for each in planned["strava/second"]["next"]] == ["bruno"]
    assert planned["strava/second"]["title"] == "Strava (second)"
    words = shown(live, monkeypatch, "status")
    assert "Application main: 1 connection." in words
    assert "Application second: 1 connection." in words
    assert (
        json.loads(shown(live, monkeypatch, "status", "bruno", "--json"))["connections"][0]["application"]
        == "second"
    )
    alone = without_second(live)
    change(live, "bruno", application=MAIN)
    assert "Application" not in shown(alone, monkeypatch, "status")
    assert status.overview(alone)["providers"]["strava"]["applications"] == []
    assert sorted(json.loads(shown(alone, monkeypatch, "budget", "--json"))) == ["fitbit", "oura", "strava"]


@ONCE
def test_the_pages_tell_of_each_where_there_are_several(live: Runtime, sandbox: Control) -> None:
    let_in(live, sandbox, "alice")
    let_in_at_second(live, sandbox, "bruno")
    token, _ = login_token(live.settings)
    broker = StubBroker()
    broker.declare_queue("now")
    visitor = TestClient(create_app(live, broker), base_url=HERE, headers={"origin": HERE})
    visitor.post("/login", data={"token": token})

    overview, plan = visitor.get("/").text, visitor.get("/plan").text

    assert "Application second" in overview
    assert "Strava (second)" in plan
    assert "<dt>Application</dt><dd>second</dd>" in visitor.get("/users/bruno").text
    assert "<dt>Application</dt>" not in visitor.get("/users/alice").text


@ONCE
def test_doctor_looks_at_each(live: Runtime) -> None:
    strava = live.settings.providers["strava"]
    bare = Application(client_id="two")
    mine = strava.model_copy(update={"applications": {"second": bare}})
    providers = {**live.settings.providers, "strava": mine}
    rt = dataclasses.replace(live, settings=live.settings.model_copy(update={"providers": providers}))

    found = {each.sentence for each in examine(rt) if each.part == "strava/second"}

    assert (
        "providers.strava.applications.second.client_secret is not set: tokens cannot be refreshed." in found
    )
    assert any("webhooks" in each.lower() for each in found)
