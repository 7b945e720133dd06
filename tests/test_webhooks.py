"""Webhooks from end to end: the sandbox's clouds call our web server, and a sync brings what they hint at."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import dramatiq
import pytest
from dramatiq.brokers.redis import RedisBroker
from pydantic import SecretStr
from sqlalchemy import select
from starlette.testclient import TestClient

import lifelogger.broker
from lifelogger import cli, leaving, pacing, sync, webhooks
from lifelogger.broker import make_broker
from lifelogger.connections import import_lines, note_hint, note_news
from lifelogger.errors import Refused, Unavailable
from lifelogger.providers.base import Event, Usage
from lifelogger.runtime import Runtime
from lifelogger.store.models import Connection, Receipt, Record, Stream
from lifelogger.tokens import Tokens
from lifelogger.web.app import create_app
from tests.live import (
    NOON,
    change,
    connect,
    connection,
    journal,
    rows,
    stored,
    ticked,
    truth,
    tuned,
    web_server,
)
from tests.processes import worker
from tests.sandbox.control import Control
from tests.servers import wait_until

SLOW = pytest.mark.slow
PROVIDERS = ("strava", "fitbit", "oura")
EACH = ("strava", *(pytest.param(other, marks=SLOW) for other in ("fitbit", "oura")))
"""A first look at one of the others is ten lists instead of one."""
SERVING = ("sqlite",)
ON_SQLITE = pytest.mark.parametrize("database_url", SERVING, indirect=True)


@pytest.fixture
def endpoints(endpoints: dict[str, Any], sandbox: Control) -> dict[str, Any]:
    keys = f"{sandbox.url}/fitbit/googlehealthapi/webhooks/webhooks_public_keyset.json"
    google = {"project": "sandbox", "service_account": "sandbox", "webhook_keys_url": keys}
    return {**endpoints, "fitbit": {**endpoints["fitbit"], **google}}


@pytest.fixture
def broker(live: Runtime, monkeypatch: pytest.MonkeyPatch) -> RedisBroker:
    made = make_broker(live.settings, mutex=lambda: live.mutex)
    assert isinstance(made, RedisBroker)
    monkeypatch.setitem(vars(lifelogger.broker), "broker", made)
    monkeypatch.setattr(dramatiq.broker, "global_broker", made)
    return made


@pytest.fixture
def served(live: Runtime, broker: RedisBroker) -> Iterator[Runtime]:
    with web_server(live, broker) as rt:
        yield rt


def sent(rt: Runtime) -> int:
    """How many messages of webhooks were sent."""
    number: Any = rt.redis.llen("lifelogger:now")
    return int(number)


def delivered(sandbox: Control, provider: str = "strava", number: int = 1) -> list[dict[str, Any]]:
    """All deliveries, once so many are over."""
    found: list[dict[str, Any]] = []

    def over() -> bool:
        found[:] = [each for each in sandbox.webhooks(provider)["deliveries"] if each["done"]]
        return len(found) >= number

    wait_until(over, f"{number} deliveries")
    return found


def spent(sandbox: Control, after: int, person: str = "alice") -> list[str]:
    """The routes of all requests about a person since."""
    return [each["route"] for each in sandbox.ledger(person=person, after=after)]


def last(sandbox: Control) -> int:
    return max((each["id"] for each in sandbox.ledger()), default=0)


# Subscriptions -------------------------------------------------------------------------------------


@ON_SQLITE
@pytest.mark.parametrize("provider", EACH)
def test_subscriptions_are_made_once_and_known(served: Runtime, sandbox: Control, provider: str) -> None:
    connect(served, sandbox, "alice", provider=provider)

    made = webhooks.keep(served, provider)

    topics = served.providers[provider].webhook_topics(served.settings.providers[provider])
    assert sorted(each.topic for each in made) == sorted(topics)
    assert {each.callback for each in made} == {webhooks.callback(served, provider)}
    assert webhooks.keep(served, provider) == made
    row = webhooks.known(served)[provider]
    assert (len(row["subscriptions"]), row["fault"], row["checked_at"]) == (len(made), None, served.clock())


@ON_SQLITE
@pytest.mark.parametrize("provider", EACH)
def test_what_was_ended_elsewhere_is_repaired(served: Runtime, sandbox: Control, provider: str) -> None:
    connect(served, sandbox, "alice", provider=provider)
    made = webhooks.keep(served, provider)
    known = served.providers[provider]
    known.unsubscribe(
        webhooks.Asker(served, served.application(provider)), served.settings.providers[provider], made[0]
    )

    again = webhooks.keep(served, provider)

    assert sorted(each.topic for each in again) == sorted(each.topic for each in made)
    assert webhooks.remove(served, provider) == len(made)
    assert sandbox.webhooks(provider)["subscriptions"] == []


@ON_SQLITE
def test_subscriptions_are_renewed_before_they_end(served: Runtime, sandbox: Control) -> None:
    connect(served, sandbox, "alice", provider="oura")
    made = webhooks.keep(served, "oura")
    end = made[0].expires_at
    assert end is not None
    sandbox.set_clock(end - webhooks.RENEW_BEFORE)

    again = webhooks.keep(served, "oura")

    assert sorted(each.id for each in again) == sorted(each.id for each in made)
    assert all(each.expires_at is not None and each.expires_at > end for each in again)


@ON_SQLITE
def test_the_only_subscription_is_not_taken_from_another_installation(
    served: Runtime, sandbox: Control
) -> None:
    """Unless somebody says so."""
    connect(served, sandbox, "alice")
    base = served.settings.web.public_url.replace("127.0.0.1", "localhost")
    webhooks.keep(tuned(served, web={"public_url": base}), "strava")

    with pytest.raises(Refused):
        webhooks.keep(served, "strava")

    assert webhooks.known(served)["strava"]["fault"]
    (taken,) = webhooks.keep(served, "strava", take_over=True)
    assert taken.callback == webhooks.callback(served, "strava")
    assert webhooks.known(served)["strava"]["fault"] is None


@ON_SQLITE
def test_one_provider_in_trouble_keeps_no_other_waiting(served: Runtime, sandbox: Control) -> None:
    for provider in PROVIDERS:
        connect(served, sandbox, "alice", provider=provider)
    sandbox.fault("GET /googlehealthapi/webhooks/webhooks_public_keyset.json", status=500)

    webhooks.keep_all(served)

    assert {name: bool(row["subscriptions"]) for name, row in webhooks.known(served).items()} == {
        "strava": True,
        "fitbit": False,
        "oura": True,
    }
    assert webhooks.known(served)["fitbit"]["fault"]


def test_without_an_address_there_are_no_webhooks(live: Runtime, sandbox: Control) -> None:
    webhooks.keep_all(live)

    assert sandbox.ledger() == []
    with pytest.raises(webhooks.NoWebhooks, match=r"web\.public_url"):
        webhooks.keep(live, "strava")


@SLOW
@ON_SQLITE
def test_the_command_line_makes_shows_and_ends_them(
    served: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    connect(served, sandbox, "alice")
    monkeypatch.setattr(cli, "_runtime", lambda: served)

    def call(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            cli.main(["webhooks", *arguments])
        said = capsys.readouterr()
        assert end.value.code in (0, 1)
        return said.out if end.value.code == 0 else f"refused: {said.err}"

    address = webhooks.callback(served, "strava")
    assert call("list") == "No subscriptions: `lifelogger webhooks subscribe PROVIDER` makes them.\n"
    assert call("subscribe", "strava") == f"1 subscription to {address}\n"
    assert address is not None
    assert address in call("list")
    told = json.loads(call("list", "--json"))
    assert [each["callback"] for each in told["strava"]["subscriptions"]] == [address]
    assert call("remove", "strava") == "1 subscription ended.\n"
    assert call("subscribe", "nobody").startswith("refused: no provider")


def google_account(rt: Runtime, account: Any) -> Runtime:
    fitbit = rt.settings.providers["fitbit"].model_copy(
        update={"service_account": SecretStr(json.dumps(account))}
    )
    settings = rt.settings.model_copy(update={"providers": {**rt.settings.providers, "fitbit": fitbit}})
    return replace(rt, settings=settings)


@ON_SQLITE
def test_a_service_account_proves_itself_by_its_key(served: Runtime, sandbox: Control) -> None:
    """RFC 7523: the sandbox has the public half, and gives a token for an hour."""
    rt = google_account(served, sandbox.service_account())
    sandbox.step(7200)  # on our clock, whatever the machine's says

    (made,) = webhooks.keep(rt, "fitbit")

    assert made.callback == webhooks.callback(rt, "fitbit")
    asked = [each["route"] for each in sandbox.ledger()]
    assert asked.count("POST /token") == asked.count("GET /v4/projects/{project}/subscribers") + 1
    assert webhooks.remove(rt, "fitbit") == 1


@SLOW
@ON_SQLITE
@pytest.mark.parametrize("wrong", ["another key", "another account", "no key"])
def test_a_service_account_that_cannot_prove_itself_gets_nothing(
    served: Runtime, sandbox: Control, wrong: str
) -> None:
    account, other = sandbox.service_account(), sandbox.service_account()
    if wrong == "another account":
        account["client_email"] = "nobody@sandbox.iam.gserviceaccount.com"
    else:
        account["private_key"] = other["private_key"] if wrong == "another key" else "-----BEGIN"

    with pytest.raises(Refused) as refused:
        webhooks.keep(google_account(served, account), "fitbit")

    assert "PRIVATE" not in str(refused.value)
    assert sandbox.webhooks("fitbit")["subscriptions"] == []
    assert webhooks.known(served)["fitbit"]["fault"] == str(refused.value)


# What an event costs -------------------------------------------------------------------------------


@ON_SQLITE
def test_an_activity_costs_one_request(served: Runtime, sandbox: Control) -> None:
    connect(served, sandbox, "alice")
    sync.run("alice", runtime=served)
    webhooks.keep(served, "strava")
    sandbox.step(120)
    before = last(sandbox)

    news = sandbox.add("alice", fields={"name": "This morning's run"})
    delivered(sandbox)
    wait_until(lambda: sent(served), "the message")
    sync.run("alice", "news", runtime=served)

    assert str(news) in stored(served, "alice")
    assert spent(sandbox, before) == ["GET /athlete/activities"]
    assert journal(served, "alice")[-1].trigger == "news"


@ON_SQLITE
def test_when_an_event_last_came_is_known_to_the_minute(served: Runtime, sandbox: Control) -> None:
    """One row of all: a burst must not wait for it."""
    connect(served, sandbox, "alice")
    webhooks.keep(served, "strava")
    assert webhooks.known(served)["strava"]["heard_at"] is None
    seen = []
    for number, seconds in enumerate((0, 59, 1), 1):
        sandbox.step(seconds)
        sandbox.add("alice")
        delivered(sandbox, number=number)
        seen.append(webhooks.known(served)["strava"]["heard_at"])

    now = served.clock()
    assert seen == [now - timedelta(minutes=1), now - timedelta(minutes=1), now]
    webhooks.keep(served, "strava")
    assert webhooks.known(served)["strava"]["heard_at"] == now


NAMED = {
    "fitbit": ("sleep", ["GET /dataTypes/{type}/dataPoints:reconcile"]),
    "oura": ("daily_readiness", ["GET /daily_readiness"]),
}


@SLOW
@ON_SQLITE
@pytest.mark.parametrize("provider", NAMED)
def test_only_the_streams_that_an_event_names_are_read(
    served: Runtime, sandbox: Control, provider: str
) -> None:
    """One request each; and the poll of all comes when it would have come."""
    stream, routes = NAMED[provider]
    (connected,) = connect(served, sandbox, "alice", provider=provider)
    assert connected["provider_user_id"]
    sync.run("alice", runtime=tuned(served, sync={"history_days": 8}))
    webhooks.keep(served, provider)
    due = connection(served, "alice").next_sync_at
    sandbox.step(120)
    before = last(sandbox)
    key = sandbox.items("alice", stream, provider=provider)[0]["key"]

    sandbox.change_item("alice", stream, key, provider=provider, fields={"changed": True})
    delivered(sandbox, provider)
    wait_until(lambda: sent(served), "the message")
    sync.run("alice", "news", runtime=served)

    assert spent(sandbox, before) == routes
    row = connection(served, "alice")
    assert (row.news_at, row.news_streams) == (None, None)
    assert row.next_sync_at == due
    assert any(
        '"changed":' in str(raw) or "'changed'" in str(raw) for raw in stored(served, "alice").values()
    )


@SLOW
@ON_SQLITE
def test_a_poll_that_is_due_is_not_put_off_by_hints(served: Runtime, sandbox: Control) -> None:
    connect(served, sandbox, "alice", provider="oura")
    sync.run("alice", runtime=served)
    sandbox.step(1000)
    change(served, "alice", news_at=served.clock(), news_streams=["sleep"], next_sync_at=served.clock())
    before = last(sandbox)

    ticked(served, "alice")

    assert len({*spent(sandbox, before)}) == 7


@ON_SQLITE
def test_of_the_next_day_a_part_alone_is_spent_on_what_this_one_put_off(
    served: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 9: else, with more news than requests, nothing would be there within seconds any more."""
    monkeypatch.setattr(pacing, "LATE_SHARE", 0.001)
    people = ("alice", "bruno", "chiyo")
    connect(served, sandbox, *people)
    for person in people:
        sync.run(person, runtime=served)
    sandbox.step(300)
    pools = served.application("strava").pools
    spent_day = {pool.name: Usage((100, 1000), (30, 1000)) for pool in pools}
    served.budget.settle(served.budget.take(pools), usage=spent_day, date=served.clock())

    def told(person: str, number: int) -> sync.Run:
        account = connection(served, person).provider_user_id
        event = Event(account, ("activities",), item=str(number))
        assert hint(served, person, [event]) == person
        (run,) = sync.run(person, "news", runtime=served)
        return run

    runs = [told(person, number) for number, person in enumerate(people)]
    waiting = [connection(served, person).next_sync_at for person in people]
    midnight = waiting[0]
    sandbox.set_clock(midnight + timedelta(hours=1))
    again = told("chiyo", 9)

    assert [run.outcome for run in runs] == ["deferred"] * 3
    assert waiting == [midnight + timedelta(days=days) for days in range(3)]
    assert midnight - midnight.replace(hour=0, minute=0, second=0) < timedelta(seconds=5)
    assert "longer" not in str(runs[0].message)
    assert "wait longer" in str(runs[1].message)
    assert again.outcome == "ok"


# What lies below the look-back ----------------------------------------------------------------------


def settle(rt: Runtime, sandbox: Control, provider: str = "strava") -> None:
    """Alice is synced whole, webhooks are on, and the last look is long over."""
    connect(rt, sandbox, "alice", provider=provider)
    sync.run("alice", runtime=rt)
    webhooks.keep(rt, provider)
    sandbox.step(300)


def look(rt: Runtime, sandbox: Control, number: int, provider: str = "strava") -> list[str]:
    """Once so many events are delivered in all: what the look at them asks for."""
    before = last(sandbox)
    delivered(sandbox, provider, number)
    sync.run("alice", "news", runtime=rt)
    return spent(sandbox, before)


LONG_AGO = NOON - timedelta(days=40)
DETAIL, LIST = "GET /activities/{id}", "GET /athlete/activities"


def test_an_old_activity_that_is_changed_or_deleted_costs_one_request(
    served: Runtime, sandbox: Control
) -> None:
    old, gone = (sandbox.add("alice", start=LONG_AGO - timedelta(hours=each)) for each in (0, 5))
    settle(served, sandbox)

    sandbox.edit(old, fields={"name": "What it was"})
    assert look(served, sandbox, 1) == [DETAIL]
    sandbox.step(120)
    sandbox.delete(gone)
    assert look(served, sandbox, 2) == [DETAIL]

    assert stored(served, "alice") == truth(sandbox, "alice")
    assert stored(served, "alice")[str(old)]["name"] == "What it was"
    changes = [(run.inserted, run.updated, run.deleted) for run in journal(served, "alice")[-2:]]
    assert changes == [(0, 1, 0), (0, 0, 1)]
    (emptied,) = [each for each in records(served, "alice") if each.external_id == str(gone)]
    assert (emptied.title, emptied.raw, emptied.deleted_at) == (None, None, served.clock())
    row = connection(served, "alice")
    assert (row.news_at, row.news_streams, row.news_about) == (None, None, None)


@ON_SQLITE
def test_an_old_activity_that_is_uploaded_late_is_asked_for_once_the_list_has_not_shown_it(
    served: Runtime, sandbox: Control
) -> None:
    settle(served, sandbox)

    late = sandbox.add("alice", start=LONG_AGO)
    assert look(served, sandbox, 1) == [LIST, DETAIL]

    assert str(late) in stored(served, "alice")
    assert stored(served, "alice") == truth(sandbox, "alice")


@ON_SQLITE
def test_the_one_that_was_asked_for_is_as_the_list_has_it(served: Runtime, sandbox: Control) -> None:
    """Else whichever of both is read next would write it anew, and readers of changes would be told."""
    old = sandbox.add("alice", start=LONG_AGO)
    settle(served, sandbox)
    sandbox.edit(old, fields={"name": "What it was"})
    assert look(served, sandbox, 1) == [DETAIL]

    sandbox.step(900)
    runs = sync.run("alice", runtime=tuned(served, sync={"lookback_days": 60}))

    assert LIST in [entry["route"] for entry in sandbox.ledger(person="alice")][-1:]
    assert not any(run.counts.changed for run in runs)


@ON_SQLITE
def test_several_at_once_are_asked_for_one_by_one_and_paid_for_by_waiting(
    served: Runtime, sandbox: Control
) -> None:
    three = [sandbox.add("alice", start=LONG_AGO - timedelta(days=each)) for each in range(3)]
    settle(served, sandbox)

    for each in three:
        sandbox.edit(each, fields={"name": "What it was"})
    assert look(served, sandbox, 3) == [DETAIL] * 3

    assert stored(served, "alice") == truth(sandbox, "alice")
    assert connection(served, "alice").hint_after == served.clock() + timedelta(minutes=3)


@SLOW
@ON_SQLITE
def test_whoever_names_more_has_the_list_read_and_ten_of_them(served: Runtime, sandbox: Control) -> None:
    """What is stored does not grow with what is sent."""
    settle(served, sandbox)
    before = stored(served, "alice")
    for number in range(1, 1001):
        hint(served, "alice", [Event(owner_of(served), ("activities",), str(number))])

    row = connection(served, "alice")
    assert row.news_about == {"activities": {"items": [str(n) for n in range(1, 11)], "latest": True}}
    started = last(sandbox)
    sync.run("alice", "news", runtime=served)

    assert spent(sandbox, started) == [LIST] + [DETAIL] * 10
    assert stored(served, "alice") == before
    assert connection(served, "alice").hint_after == served.clock() + timedelta(minutes=11)


@ON_SQLITE
def test_what_a_poll_brings_before_its_turn_is_waited_for_too(served: Runtime, sandbox: Control) -> None:
    """Or ten could be named before each poll, and ten after it."""
    old = [str(sandbox.add("alice", start=LONG_AGO - timedelta(days=each))) for each in range(10)]
    settle(served, sandbox)
    named = [Event(owner_of(served), ("activities",), each) for each in old]
    began, asked = served.clock(), []

    for wait in (0, 520):  # the second time the poll is due
        sandbox.step(wait)
        hint(served, "alice", named)
        started = last(sandbox)
        ticked(served, "alice")
        asked.append(spent(sandbox, started))

    assert asked == [[DETAIL] * 10, [LIST] + [DETAIL] * 10]
    assert connection(served, "alice").hint_after == began + timedelta(minutes=10 + 10)


@ON_SQLITE
def test_an_activity_of_somebody_else_is_not_taken(served: Runtime, sandbox: Control) -> None:
    """A forger names one that everybody may see."""
    settle(served, sandbox)
    before = stored(served, "alice")
    sandbox.fault(DETAIL, json={"id": 77, "athlete": {"id": 1}, "start_date": "2026-11-24T10:00:00Z"})
    hint(served, "alice", [Event(owner_of(served), ("activities",), "77")])

    sync.run("alice", "news", runtime=served)

    assert journal(served, "alice")[-1].outcome == "ok"
    assert stored(served, "alice") == before


@ON_SQLITE
def test_one_that_is_refused_switches_nothing_off(served: Runtime, sandbox: Control) -> None:
    old = sandbox.add("alice", start=LONG_AGO)
    settle(served, sandbox)
    sandbox.edit(old, fields={"name": "What it was"})
    delivered(sandbox)
    sandbox.fault(DETAIL, status=403)

    sync.run("alice", "news", runtime=served)

    run = journal(served, "alice")[-1]
    assert (run.outcome, run.message, run.requests) == ("ok", None, 1)
    assert str(old) in stored(served, "alice")


@ON_SQLITE
def test_one_that_always_fails_is_given_up(served: Runtime, sandbox: Control) -> None:
    """It may be forged; nobody's polls are stopped by it."""
    old = sandbox.add("alice", start=LONG_AGO)
    settle(served, sandbox)
    hint(served, "alice", [Event(owner_of(served), ("activities",), str(old))])
    sandbox.fault(DETAIL, times=None, status=500)

    outcomes = []
    for _ in range(4):
        change(served, "alice", next_sync_at=served.clock())
        outcomes += [run.outcome for run in ticked(served, "alice")]

    assert outcomes == ["failed", "failed", "failed", "ok"]
    assert connection(served, "alice").news_about is None


@ON_SQLITE
def test_an_outage_however_long_loses_no_old_one(served: Runtime, sandbox: Control) -> None:
    """What always fails is given up, and nothing only because all did."""
    old = sandbox.add("alice", start=LONG_AGO)
    settle(served, sandbox)
    sandbox.edit(old, fields={"name": "What it was"})
    delivered(sandbox)
    sandbox.fault(DETAIL, times=3, status=503)
    sandbox.fault(LIST, times=2, status=503)

    outcomes = []
    for _ in range(6):
        change(served, "alice", next_sync_at=served.clock())
        outcomes += [run.outcome for run in ticked(served, "alice")]

    assert outcomes == ["failed"] * 5 + ["ok"]
    assert stored(served, "alice")[str(old)]["name"] == "What it was"


@SLOW
@ON_SQLITE
@pytest.mark.parametrize("until", [LONG_AGO + timedelta(days=1), NOON], ids=["old", "into the look-back"])
def test_a_span_that_always_fails_is_given_up_too(
    served: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch, until: datetime
) -> None:
    settle(served, sandbox, "fitbit")
    hint(served, "alice", [Event(owner_of(served), ("sleep",), span=(LONG_AGO, until))], "fitbit")
    pages = type(served.providers["fitbit"]).pages

    def failing(self: Any, http: Any, stream: Any, window: Any) -> Any:
        if window.since <= LONG_AGO:
            raise Unavailable("it has something there that it cannot give")
        return pages(self, http, stream, window)

    monkeypatch.setattr(type(served.providers["fitbit"]), "pages", failing)
    outcomes = []
    for _ in range(4):
        change(served, "alice", next_sync_at=served.clock())
        outcomes += [run.outcome for run in sync.run("alice", "news", runtime=served)]

    assert outcomes == ["failed", "failed", "failed", "ok"]
    assert connection(served, "alice").news_about is None


@SLOW
@ON_SQLITE
def test_a_wish_brings_the_old_ones_too(served: Runtime, sandbox: Control) -> None:
    old = sandbox.add("alice", start=LONG_AGO)
    settle(served, sandbox)
    sandbox.edit(old, fields={"name": "What it was"})
    delivered(sandbox)
    note_news(served, "alice")

    sync.run("alice", runtime=served)

    assert stored(served, "alice") == truth(sandbox, "alice")


OLD = {
    "oura": [("daily_readiness", "GET /daily_readiness/{document}"), ("sleep", "GET /sleep/{document}")],
    "fitbit": [
        ("sleep", "GET /dataTypes/{type}/dataPoints:reconcile"),
        ("exercise", "GET /dataTypes/{type}/dataPoints:reconcile"),
        ("steps", "POST /dataTypes/{type}/dataPoints:dailyRollUp"),
        ("weight", "GET /dataTypes/{type}/dataPoints:reconcile"),
    ],
}


@SLOW
@pytest.mark.parametrize(("provider", "stream", "route"), [(p, *each) for p in OLD for each in OLD[p]])
def test_old_documents_and_points_cost_one_request(
    served: Runtime, sandbox: Control, provider: str, stream: str, route: str
) -> None:
    """Oura names the document, Google the time that it is of."""
    settle(served, sandbox, provider)
    keys = [each["key"] for each in sandbox.items("alice", stream, provider=provider)]
    changed, gone = keys[-5], keys[-25]
    cursor = {each.name: each.cursor for each in rows(served, Stream.__table__, "alice")}

    sandbox.change_item("alice", stream, changed, provider=provider, fields={"changed": True})
    assert look(served, sandbox, 1, provider) == [route]
    sandbox.step(120)
    sandbox.change_item("alice", stream, gone, provider=provider, deleted=True)
    assert look(served, sandbox, 2, provider) == [route]

    counts = [(run.inserted, run.updated, run.deleted) for run in journal(served, "alice")[-2:]]
    assert counts == [(0, 1, 0), (0, 0, 1)]
    mine = [each.raw for each in records(served, "alice") if each.stream == stream and not each.deleted_at]
    there = [each["item"] for each in sandbox.items("alice", stream, provider=provider)]
    assert sorted(map(canonical, mine)) == sorted(map(canonical, there))
    assert {each.name: each.cursor for each in rows(served, Stream.__table__, "alice")} == cursor


@SLOW
@ON_SQLITE
def test_a_span_that_reaches_into_the_look_back_is_read_with_it(served: Runtime, sandbox: Control) -> None:
    settle(served, sandbox, "fitbit")
    keys = [each["key"] for each in sandbox.items("alice", "sleep", provider="fitbit")]
    sandbox.change_item("alice", "sleep", keys[40], provider="fitbit", fields={"changed": True})
    delivered(sandbox, "fitbit")
    span, unread = (LONG_AGO, served.clock()), backlogs(served)
    hint(served, "alice", [Event(owner_of(served), ("sleep",), span=span)], "fitbit")
    before = last(sandbox)

    sync.run("alice", "news", runtime=served)

    assert spent(sandbox, before)[:1] == ["GET /dataTypes/{type}/dataPoints:reconcile"]
    assert journal(served, "alice")[-1].updated == 1
    assert backlogs(served) == unread


def backlogs(rt: Runtime) -> list[Any]:
    return [(each.backlog_since, each.backlog_until) for each in rows(rt, Stream.__table__, "alice")]


def records(rt: Runtime, user_id: str) -> list[Any]:
    return rows(rt, Record.__table__, user_id)


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def owner_of(rt: Runtime) -> str:
    return str(connection(rt, "alice").provider_user_id)


def hint(rt: Runtime, user_id: str, events: list[Event], provider: str = "strava") -> str | None:
    """What a webhook that was believed writes down."""
    with rt.store.write() as db:
        return note_hint(db, provider, events, rt.clock())


# What goes wrong on the way ------------------------------------------------------------------------


@ON_SQLITE
def test_with_all_webhooks_lost_it_arrives_by_polling(served: Runtime, sandbox: Control) -> None:
    connect(served, sandbox, "alice")
    sync.run("alice", runtime=served)
    webhooks.keep(served, "strava")
    sandbox.disturb_webhooks(lost=1000)
    news = sandbox.add("alice")
    sandbox.step(900)

    ticked(served, "alice")

    assert sandbox.webhooks()["deliveries"] == []
    assert stored(served, "alice") == truth(sandbox, "alice")
    assert str(news) in stored(served, "alice")


@ON_SQLITE
@pytest.mark.parametrize("mischief", [{"doubled": 3}, {"reordered": 3}, {"late": 300}])
def test_doubled_reordered_and_late_events_end_in_the_truth(
    served: Runtime, sandbox: Control, mischief: dict[str, float]
) -> None:
    connect(served, sandbox, "alice")
    sync.run("alice", runtime=served)
    webhooks.keep(served, "strava")
    sandbox.disturb_webhooks(**mischief)

    first = sandbox.add("alice")
    second = sandbox.add("alice", fields={"name": "before"})
    sandbox.edit(second, fields={"name": "after"})
    if "late" in mischief:
        sandbox.step(300)
    delivered(sandbox, number=3)
    wait_until(lambda: sent(served), "the message")
    sync.run("alice", "news", runtime=served)

    assert str(first) in stored(served, "alice")
    assert stored(served, "alice") == truth(sandbox, "alice")
    assert sent(served) == 1


@ON_SQLITE
def test_news_during_a_sync_is_met_when_the_minute_is_over(served: Runtime, sandbox: Control) -> None:
    """Promise 2: no second message is sent for it, and none is needed."""
    from lifelogger import planner
    from tests.live import in_background

    connect(served, sandbox, "alice")
    sync.run("alice", runtime=served)
    webhooks.keep(served, "strava")
    sandbox.add("alice")
    delivered(sandbox)
    with sandbox.hold("GET /athlete/activities") as gate:
        running = in_background(sync.run, "alice", "news", runtime=served)
        gate.wait_until_reached()
        gate_news = sandbox.add("alice")
        sandbox.step(1)  # the second one is known of later than the first
        sandbox.edit(gate_news, fields={"name": "renamed"})
        delivered(sandbox, number=3)
        gate.release()
    running.result(20)

    planned: list[str] = []
    assert planner.serve_news(planned.append, runtime=served) == 0
    sandbox.step(60)
    assert planner.serve_news(planned.append, runtime=served) == 1
    sync.run("alice", "tick", runtime=served)
    assert stored(served, "alice") == truth(sandbox, "alice")
    assert connection(served, "alice").news_at is None


@ON_SQLITE
@pytest.mark.parametrize("provider", EACH)
def test_forged_events_cost_one_look_at_most(served: Runtime, sandbox: Control, provider: str) -> None:
    """Of those that are signed none at all."""
    connect(served, sandbox, "alice", provider=provider)
    sync.run("alice", runtime=served)
    webhooks.keep(served, provider)
    stream = {"strava": "activities", "fitbit": "sleep", "oura": "sleep"}[provider]
    before = stored(served, "alice")

    number = sandbox.forge_webhooks("alice", 20, provider=provider, stream=stream)
    delivered(sandbox, provider, number)

    assert number == 20
    assert stored(served, "alice") == before
    assert bool(connection(served, "alice").news_at) is (provider == "strava")
    assert sent(served) == (1 if provider == "strava" else 0)


# Leaving -------------------------------------------------------------------------------------------


@ON_SQLITE
def test_who_left_is_asked_about_and_then_gone(served: Runtime, sandbox: Control) -> None:
    """Promise 11: by one request, since anybody can send such an event; a receipt stays."""
    connect(served, sandbox, "alice")
    sync.run("alice", runtime=served)
    webhooks.keep(served, "strava")
    sandbox.revoke("alice")
    delivered(sandbox)
    wait_until(lambda: sent(served), "the message")
    sandbox.step(1)

    sync.run("alice", "news", runtime=served)

    with served.store.read() as db:
        assert db.scalars(select(Connection.id)).all() == []
        assert db.scalars(select(Record.id)).all() == []
        assert db.scalars(select(Receipt.kind)).all() == ["deauthorised"]


@ON_SQLITE
def test_who_left_is_found_out_by_whichever_request_comes_first(served: Runtime, sandbox: Control) -> None:
    """Here by the refreshing of tokens, which no sync has to follow."""
    connect(served, sandbox, "alice")
    sync.run("alice", runtime=served)
    sandbox.revoke("alice")
    change(served, "alice", deauthorised_at=NOON, token_expires_at=NOON)

    Tokens(served).refresh_expiring()
    leaving.end_deauthorised(served)

    with served.store.read() as db:
        assert db.scalars(select(Connection.id)).all() == []
        assert db.scalars(select(Receipt.kind)).all() == ["deauthorised"]


@ON_SQLITE
def test_who_only_seems_to_have_left_stays(served: Runtime, sandbox: Control) -> None:
    connect(served, sandbox, "alice")
    sync.run("alice", runtime=served)
    change(served, "alice", deauthorised_at=NOON, news_at=NOON, next_sync_at=served.clock())

    sync.run("alice", "news", runtime=served)

    row = connection(served, "alice")
    assert (row.status, row.deauthorised_at) == ("active", None)


def test_who_left_and_was_found_out_before_the_event_came_is_gone_too(
    served: Runtime, sandbox: Control
) -> None:
    """A poll met the dead grant first, and took it for one that has to be renewed: one token call tells."""
    connect(served, sandbox, "alice")
    sync.run("alice", runtime=served)
    webhooks.keep(served, "strava")
    sandbox.disturb_webhooks(late=60)
    sandbox.revoke("alice")
    sync.run("alice", runtime=served)
    assert connection(served, "alice").status == "needs_reauth"

    sandbox.step(60)
    delivered(sandbox)
    wait_until(lambda: connection(served, "alice").deauthorised_at, "the event")
    before = max(each["id"] for each in sandbox.ledger())
    leaving.end_deauthorised(served)

    asked = [each["route"] for each in sandbox.ledger(after=before)]
    assert asked == ["POST /oauth/token"]
    with served.store.read() as db:
        assert db.scalars(select(Connection.id)).all() == []
        assert db.scalars(select(Record.id)).all() == []
        assert db.scalars(select(Receipt.kind)).all() == ["deauthorised"]


@ON_SQLITE
def test_who_has_to_sign_in_again_has_not_left_because_somebody_says_so(
    served: Runtime, sandbox: Control
) -> None:
    """Their grant lives: the pair that the proof brings is kept, and works when they come back."""
    connect(served, sandbox, "alice")
    sync.run("alice", runtime=served)
    change(served, "alice", status="needs_reauth", next_sync_at=None)
    sandbox.settings(provider="strava", rotate="always")
    sandbox.step(1)
    assert hint(served, "alice", [Event(owner_of(served), deauthorised=True)]) is None

    assert leaving.end_deauthorised(served) == []

    row = connection(served, "alice")
    assert (row.status, row.deauthorised_at, row.news_at) == ("needs_reauth", None, None)
    change(served, "alice", status="active", token_expires_at=NOON, next_sync_at=served.clock())
    assert [run.outcome for run in sync.run("alice", runtime=served)] == ["ok"]


@ON_SQLITE
def test_nobody_is_erased_while_the_provider_cannot_be_asked(served: Runtime, sandbox: Control) -> None:
    connect(served, sandbox, "alice")
    sandbox.revoke("alice")
    sync.run("alice", runtime=served)
    sandbox.step(1)
    hint(served, "alice", [Event(owner_of(served), deauthorised=True)])
    sandbox.fault("POST /oauth/token", times=1, status=503)

    assert leaving.end_deauthorised(served) == []
    assert connection(served, "alice").deauthorised_at is not None
    assert len(leaving.end_deauthorised(served)) == 1


@ON_SQLITE
def test_without_a_token_to_ask_with_nobody_is_taken_to_have_left(served: Runtime, sandbox: Control) -> None:
    connect(served, sandbox, "alice")
    change(served, "alice", status="needs_reauth", refresh_token=None, next_sync_at=None)
    sandbox.step(1)
    hint(served, "alice", [Event(owner_of(served), deauthorised=True)])

    assert leaving.end_deauthorised(served) == []
    assert connection(served, "alice").deauthorised_at is None


@ON_SQLITE
def test_a_worker_that_is_killed_once_it_has_asked_erases_nobody(served: Runtime, sandbox: Control) -> None:
    """The pair that it brought is kept, that the grant lives is not written down yet: it is asked again."""
    connect(served, sandbox, "alice")
    sync.run("alice", runtime=served)
    change(served, "alice", status="needs_reauth", next_sync_at=None)
    sandbox.step(1)
    hint(served, "alice", [Event(owner_of(served), deauthorised=True)])
    sandbox.step(1)
    assert not Tokens(served).has_ended(connection(served, "alice").id)  # and there it ends

    assert leaving.end_deauthorised(served) == []

    assert stored(served, "alice") == truth(sandbox, "alice")
    assert connection(served, "alice").deauthorised_at is None


@SLOW
@ON_SQLITE
@pytest.mark.parametrize(
    "ended",
    [{"scopes": []}, {"refresh_token": None, "token_expires_at": NOON}],
    ids=["nothing granted", "nothing to refresh with"],
)
@pytest.mark.parametrize("finds_out", ["sync", "refresh"])
def test_an_end_that_no_provider_told_is_no_proof_that_somebody_left(
    served: Runtime, sandbox: Control, ended: dict[str, Any], finds_out: str
) -> None:
    """A forger said so before, and nothing was asked since."""
    connect(served, sandbox, "alice")
    sync.run("alice", runtime=served)
    sandbox.step(60)
    change(served, "alice", **ended)
    hint(served, "alice", [Event(owner_of(served), deauthorised=True)])
    sandbox.step(1)

    if finds_out == "refresh":
        Tokens(served).refresh_expiring()
        leaving.end_deauthorised(served)
    sync.run("alice", runtime=served)

    row = connection(served, "alice")
    assert (row.status, row.deauthorised_at) == ("needs_reauth", None)
    assert stored(served, "alice") == truth(sandbox, "alice")


# Whose account it is ---------------------------------------------------------------------------------

IDENTITY = {"strava": "GET /athlete", "fitbit": "GET /identity", "oura": "GET /personal_info"}


def connect_unnamed(rt: Runtime, sandbox: Control, person: str, provider: str, user_id: str) -> str:
    """As an import without `provider_user_id`; returns that."""
    (line,) = sandbox.connect(person, provider=provider)
    name = str(line.pop("provider_user_id"))
    import_lines(rt, [json.dumps({**line, "user_id": user_id})])
    return name


@ON_SQLITE
@pytest.mark.parametrize("provider", EACH)
def test_an_account_that_was_imported_without_its_name_is_asked_for_it_once(
    served: Runtime, sandbox: Control, provider: str
) -> None:
    """Else no webhook would find it."""
    name = connect_unnamed(served, sandbox, "alice", provider, "alice")

    for _ in range(3):
        sync.run("alice", runtime=served)
        sandbox.step(86_400)

    assert connection(served, "alice").provider_user_id == name
    routes = [each["route"] for each in sandbox.ledger(person="alice")]
    assert sum(route.endswith(IDENTITY[provider].split()[1]) for route in routes) == 1


@SLOW
def test_an_account_of_two_users_stays_with_the_first(served: Runtime, sandbox: Control) -> None:
    """The second one is synced like before, and asks once a day."""
    connect(served, sandbox, "alice")
    connect_unnamed(served, sandbox, "alice", "strava", "again")

    for _ in range(2):
        assert [run.outcome for run in sync.run("again", runtime=served)] == ["ok"]
        sandbox.step(900)

    assert connection(served, "again").provider_user_id is None
    assert stored(served, "again") == truth(sandbox, "alice")
    assert [each["route"] for each in sandbox.ledger(person="alice")].count("GET /athlete") == 1


@ON_SQLITE
def test_who_cannot_be_asked_for_the_name_now_is_synced_all_the_same(
    served: Runtime, sandbox: Control
) -> None:
    connect_unnamed(served, sandbox, "alice", "strava", "alice")
    sandbox.fault("GET /athlete", status=503)

    assert [run.outcome for run in sync.run("alice", runtime=served)] == ["ok"]
    assert stored(served, "alice") == truth(sandbox, "alice")


# What hints leave to people --------------------------------------------------------------------------


@ON_SQLITE
def test_hints_leave_half_of_the_reserve_to_people(served: Runtime, sandbox: Control) -> None:
    """However many people a forger knows: "sync now" works when polls and hints have spent what is theirs."""
    connect(served, sandbox, "alice")
    sync.run("alice", runtime=served)
    sandbox.limits(reads=(2000, 1000), overall=(9000, 9000))
    outcomes = {}
    for others in (910, 45):  # of a day's 1,000 polls may have spent 900 at noon, and hints 950
        sandbox.spend(others)
        sync.run("alice", "asked", runtime=served)  # its reply tells of what others spent
        sandbox.step(60)
        change(served, "alice", next_sync_at=served.clock())
        (poll,) = ticked(served, "alice")
        hint(served, "alice", [Event(owner_of(served), ("activities",))])
        change(served, "alice", next_sync_at=served.clock())
        (hinted,) = sync.run("alice", "news", runtime=served)
        (asked,) = sync.run("alice", runtime=served)
        outcomes[others] = (poll.outcome, hinted.outcome, asked.outcome)

    assert outcomes == {910: ("deferred", "ok", "ok"), 45: ("deferred", "deferred", "ok")}


# With real processes -------------------------------------------------------------------------------


@ON_SQLITE
@SLOW
def test_an_upload_is_stored_within_seconds_at_the_cost_of_one_request(
    served: Runtime, sandbox: Control
) -> None:
    """A worker's command and the web server, in real time; nobody asks and no tick comes."""
    sandbox.follow_real_time()
    connect(served, sandbox, "alice")
    sync.run("alice", runtime=tuned(served, sync={"history_days": 8}))
    webhooks.keep(served, "strava")
    waits = []
    with worker("actors", "scheduler", threads=2) as command:
        for number in range(3):
            before = last(sandbox)
            change(served, "alice", hint_after=None)  # each as if the last one were longer ago
            begun = time.monotonic()
            news = sandbox.add("alice", fields={"name": f"Run {number}"})
            command.wait_until(lambda news=news: str(news) in stored(served, "alice"), "the news")
            waits.append(time.monotonic() - begun)
            command.wait_until(lambda: connection(served, "alice").claimed_at is None, "the end of the sync")
            assert spent(sandbox, before) == ["GET /athlete/activities"]

    assert max(waits) < 5


@SLOW
@pytest.mark.timeout(300)
@ON_SQLITE
def test_ten_thousand_forged_calls_cost_one_look_a_minute(served: Runtime, sandbox: Control) -> None:
    """By somebody who knows the address, the person's id, and of each signed kind an old call."""
    app = create_app(served, lifelogger.broker.broker)
    for provider in PROVIDERS:
        connect(served, sandbox, "alice", provider=provider)
        webhooks.keep(served, provider)
    few = tuned(served, sync={"history_days": 8})
    sync.run("alice", runtime=few)
    sandbox.step(60)
    for provider, stream in (("fitbit", "sleep"), ("oura", "sleep")):
        key = sandbox.items("alice", stream, provider=provider)[0]["key"]
        sandbox.change_item("alice", stream, key, provider=provider, fields={"changed": 1})
        delivered(sandbox, provider)
    sync.run("alice", "news", runtime=few)
    calls = list(hostile_calls(served, sandbox))
    records, before, seen = stored(served, "alice"), last(sandbox), connections(served)
    caller = TestClient(app, base_url=served.settings.web.public_url, raise_server_exceptions=False)

    looks = 0
    for turn in range(10_000):
        path, content, headers = calls[turn % len(calls)]
        assert caller.post(path, content=content, headers=headers).status_code in (200, 204, 401, 413)
        if turn % 1000 == 999:  # the worker takes what there is, and a minute passes now and then
            sync.run("alice", "news", runtime=few)
            looks += 1
            sandbox.step(6)

    assert looks == 10
    requests = spent(sandbox, before)
    assert set(requests) == {LIST, DETAIL}
    # The list and the two that are named; what that costs is waited for.
    assert len(requests) <= 1 + 2
    assert stored(served, "alice") == records
    assert [row[:3] for row in connections(served)] == [row[:3] for row in seen]


def connections(rt: Runtime) -> list[Any]:
    with rt.store.read() as db:
        return list(
            db.execute(
                select(Connection.provider, Connection.status, Connection.scopes).order_by(Connection.id)
            )
        )


def hostile_calls(rt: Runtime, sandbox: Control) -> Iterator[tuple[str, bytes, dict[str, str]]]:
    """Forged ones of each provider, replayed ones, and one that is too large."""
    with rt.store.read() as db:
        owners = dict(db.execute(select(Connection.provider, Connection.provider_user_id)).all())
    (subscription,) = webhooks.known(rt)["strava"]["subscriptions"]
    event = {"owner_id": int(owners["strava"]), "subscription_id": int(subscription["id"])}
    for happened in (
        {"object_type": "activity", "object_id": 1, "aspect_type": "create"},
        {"object_type": "activity", "object_id": 2, "aspect_type": "delete"},
        {"object_type": "athlete", "aspect_type": "update", "updates": {"authorized": "false"}},
    ):
        yield "/webhooks/strava", json.dumps({**event, **happened}).encode(), {}
    yield "/webhooks/strava", json.dumps({**event, "subscription_id": 1}).encode(), {}
    yield "/webhooks/strava", b"x" * 70_000, {}
    for provider in ("fitbit", "oura"):
        old = sandbox.webhooks(provider)["deliveries"][0]
        altered = {**old["headers"], "x-oura-timestamp": "1", "authorization": "Bearer guessed"}
        for headers in (old["headers"], {}, altered):
            yield f"/webhooks/{provider}", old["body"].encode(), headers
