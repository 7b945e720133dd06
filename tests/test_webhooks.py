"""Webhooks from end to end: the sandbox's clouds call our web server, and a sync brings what they hint at."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import dramatiq
import pytest
import uvicorn
from dramatiq.brokers.redis import RedisBroker

import lifelogger.broker
from lifelogger import sync, webhooks
from lifelogger.broker import make_broker
from lifelogger.errors import Refused
from lifelogger.runtime import Runtime
from lifelogger.sandbox.server import listen, url_of
from lifelogger.web.app import create_app
from tests.live import NOON, change, connect, connection, journal, rows, stored, ticked, truth, tuned
from tests.sandbox.control import Control
from tests.servers import wait_until

PROVIDERS = ("strava", "fitbit", "oura")
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
    """Our web server in a thread, and a runtime that knows its address."""
    listener = listen()
    rt = tuned(live, web={"public_url": url_of(listener)})
    app = create_app(rt, broker)
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    wait_until(lambda: server.started, "the web server")
    yield rt
    server.should_exit = True
    thread.join()


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
@pytest.mark.parametrize("provider", PROVIDERS)
def test_subscriptions_are_made_once_and_known(served: Runtime, sandbox: Control, provider: str) -> None:
    connect(served, sandbox, "alice", provider=provider)

    made = webhooks.keep(served, provider)

    topics = served.providers[provider].webhook_topics(served.settings.providers[provider])
    assert sorted(each.topic for each in made) == sorted(topics)
    assert {each.callback for each in made} == {webhooks.callback(served, provider)}
    assert webhooks.keep(served, provider) == made
    row = webhooks.known(served)[provider]
    assert (len(row.subscriptions), row.fault, row.checked_at) == (len(made), None, served.clock())


@ON_SQLITE
@pytest.mark.parametrize("provider", PROVIDERS)
def test_what_was_ended_elsewhere_is_repaired(served: Runtime, sandbox: Control, provider: str) -> None:
    connect(served, sandbox, "alice", provider=provider)
    made = webhooks.keep(served, provider)
    known = served.providers[provider]
    known.unsubscribe(webhooks.asker(served, known), served.settings.providers[provider], made[0])

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

    fault = webhooks.known(served)["strava"].fault
    assert fault is not None
    (taken,) = webhooks.keep(served, "strava", take_over=True)
    assert taken.callback == webhooks.callback(served, "strava")
    assert webhooks.known(served)["strava"].fault is None


@ON_SQLITE
def test_one_provider_in_trouble_keeps_no_other_waiting(served: Runtime, sandbox: Control) -> None:
    for provider in PROVIDERS:
        connect(served, sandbox, "alice", provider=provider)
    sandbox.fault("GET /googlehealthapi/webhooks/webhooks_public_keyset.json", status=500)

    webhooks.keep_all(served)

    assert {name: bool(row.subscriptions) for name, row in webhooks.known(served).items()} == {
        "strava": True,
        "fitbit": False,
        "oura": True,
    }
    assert webhooks.known(served)["fitbit"].fault


def test_without_an_address_there_are_no_webhooks(live: Runtime, sandbox: Control) -> None:
    webhooks.keep_all(live)

    assert sandbox.ledger() == []
    with pytest.raises(webhooks.NoWebhooks, match=r"web\.public_url"):
        webhooks.keep(live, "strava")


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


NAMED = {
    "fitbit": ("sleep", ["GET /dataTypes/{type}/dataPoints:reconcile"]),
    "oura": ("daily_readiness", ["GET /daily_readiness"]),
}


@ON_SQLITE
@pytest.mark.parametrize("provider", NAMED)
def test_only_the_streams_that_an_event_names_are_read(
    served: Runtime, sandbox: Control, provider: str
) -> None:
    """One request each; and the poll of all comes when it would have come."""
    stream, routes = NAMED[provider]
    (connected,) = connect(served, sandbox, "alice", provider=provider)
    assert connected["provider_user_id"]
    while any(run.requests and each_unread(served) for run in sync.run("alice", runtime=served)):
        pass
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


def each_unread(rt: Runtime) -> bool:
    from lifelogger.store.models import Stream

    return any(row.backlog_until for row in rows(rt, Stream.__table__, "alice"))


@ON_SQLITE
def test_a_poll_that_is_due_is_not_put_off_by_hints(served: Runtime, sandbox: Control) -> None:
    connect(served, sandbox, "alice", provider="oura")
    sync.run("alice", runtime=served)
    sandbox.step(1000)
    change(served, news_at=served.clock(), news_streams=["sleep"], next_sync_at=served.clock())
    before = last(sandbox)

    ticked(served, "alice")

    assert len({*spent(sandbox, before)}) == 7


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
@pytest.mark.parametrize("provider", PROVIDERS)
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
def test_who_left_is_asked_about_and_then_polled_no_more(served: Runtime, sandbox: Control) -> None:
    connect(served, sandbox, "alice")
    sync.run("alice", runtime=served)
    webhooks.keep(served, "strava")
    sandbox.revoke("alice")
    delivered(sandbox)
    wait_until(lambda: sent(served), "the message")
    sandbox.step(1)

    sync.run("alice", "news", runtime=served)

    row = connection(served, "alice")
    assert (row.status, row.next_sync_at) == ("needs_reauth", None)
    assert row.deauthorised_at is not None


@ON_SQLITE
def test_who_only_seems_to_have_left_stays(served: Runtime, sandbox: Control) -> None:
    connect(served, sandbox, "alice")
    sync.run("alice", runtime=served)
    change(served, deauthorised_at=NOON, news_at=NOON, next_sync_at=served.clock())

    sync.run("alice", "news", runtime=served)

    row = connection(served, "alice")
    assert (row.status, row.deauthorised_at) == ("active", None)
