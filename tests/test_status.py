"""How everything stands: the documented keys, true numbers, a sentence for each state, and no secret."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from lifelogger import status, webhooks
from lifelogger.budget import Usage
from lifelogger.connections import add_user, import_lines
from lifelogger.runtime import Runtime
from lifelogger.settings import Settings
from lifelogger.store import counts, feed
from lifelogger.store.models import Connection, Quarantined, Record, Stream, SyncRun, Tick, Webhook
from tests.servers import RedisServer

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
SOON = NOW + timedelta(minutes=13)
REASON = "strava reads: 100 of 100 requests used in the 15 minutes to 12:15 UTC"


@pytest.fixture
def rt(runtime: Runtime) -> Runtime:
    return dataclasses.replace(runtime, clock=lambda: NOW)


def connect(rt: Runtime, user_id: str, **values: Any) -> int:
    """An active connection that is not due, as its last sync left it, unless `values` say otherwise."""
    line = {
        "user_id": user_id,
        "provider": "strava",
        "access_token": "hush-access",
        "refresh_token": "hush-refresh",
        "expires_at": 1900000000,
    }
    import_lines(rt, [json.dumps(line)])
    given = {"next_sync_at": SOON, "news_at": None, "last_sync_at": NOW - timedelta(minutes=2), **values}
    with rt.store.write() as db:
        return db.scalars(
            update(Connection).where(Connection.user_id == user_id).values(**given).returning(Connection.id)
        ).one()


def store(rt: Runtime, table: Any, connection_id: int, **values: Any) -> None:
    given: dict[Any, dict[str, Any]] = {
        Record: {
            "stream": "activities",
            "external_id": "1",
            "kind": "activity",
            "ordered_at": NOW,
            "created_at": NOW,
            "updated_at": NOW,
        },
        Quarantined: {
            "stream": "activities",
            "digest": "d",
            "reason": "id: missing",
            "payload": {},
            "created_at": NOW,
        },
        Stream: {"name": "activities"},
        SyncRun: {"trigger": "tick", "started_at": NOW, "outcome": "ok"},
    }
    with rt.store.write() as db:
        if table is Record:
            given[table]["change"] = feed.take(db, 1)[0]
        db.execute(insert(table).values({"connection_id": connection_id, **given[table], **values}))


# The overview -----------------------------------------------------------------------------------------------


def test_it_has_the_documented_keys_before_anything_happened(rt: Runtime) -> None:
    """`docs`: `status --json` has at least these."""
    overview = status.overview(rt)

    assert {"users", "connections", "records", "quarantined", "last_tick", "providers"} <= set(overview)
    assert [overview[key] for key in ("users", "connections", "records", "quarantined", "last_tick")] == [
        *[0] * 4,
        None,
    ]
    assert set(overview["providers"]) == set(rt.enabled()) == {"fitbit", "oura", "strava"}
    strava = overview["providers"]["strava"]
    assert {"connections", "records", "budget", "last_sync", "waiting"} <= set(strava)
    assert (strava["connections"], strava["records"], strava["last_sync"], strava["waiting"]) == (
        0,
        0,
        None,
        0,
    )
    assert strava["waits"] == []


def test_it_counts(rt: Runtime) -> None:
    add_user(rt, "nobody yet")
    ann = connect(rt, "ann")
    bob = connect(rt, "bob", last_sync_at=NOW - timedelta(minutes=1))
    connect(rt, "carl", status="needs_reauth", next_sync_at=None)
    store(rt, Record, ann)
    store(rt, Record, ann, external_id="2", deleted_at=NOW)
    store(rt, Record, bob)
    store(rt, Quarantined, bob)

    overview = status.overview(rt)

    assert (overview["users"], overview["connections"]) == (4, 3)
    assert (overview["records"], overview["quarantined"]) == (2, 1)
    strava = overview["providers"]["strava"]
    assert (strava["connections"], strava["needs_reauth"], strava["records"]) == (3, 1, 2)
    assert strava["last_sync"] == NOW - timedelta(minutes=1)


def test_the_last_tick_is_the_one_that_fired_last(rt: Runtime) -> None:
    with rt.store.write() as db:
        for minutes, planned in ((30, 5), (0, 7), (15, 6)):
            at = NOW - timedelta(minutes=minutes)
            db.execute(insert(Tick).values(name="sync_active_users", due_at=at, fired_at=at, planned=planned))

    tick = status.overview(rt)["last_tick"]

    assert (tick["name"], tick["fired_at"], tick["planned"]) == ("sync_active_users", NOW, 7)


def test_it_tells_why_connections_wait_and_until_when(rt: Runtime) -> None:
    for user_id, minutes in (("a", 9), ("b", 3), ("c", 6)):
        connect(rt, user_id, wait_reason=REASON, next_sync_at=NOW + timedelta(minutes=minutes))
    connect(rt, "d", wait_reason="Strava is down", next_sync_at=SOON)
    connect(rt, "e", wait_reason="over by now", next_sync_at=NOW - timedelta(minutes=1))

    strava = status.overview(rt)["providers"]["strava"]

    assert strava["waiting"] == 4
    assert strava["waits"] == [
        {"reason": REASON, "until": NOW + timedelta(minutes=3), "connections": 3},
        {"reason": "Strava is down", "until": SOON, "connections": 1},
    ]


def test_it_names_the_most_frequent_reasons_only(rt: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "MOST_WAITS", 1)
    for user_id, reason in (("a", "rare"), ("b", "frequent"), ("c", "frequent")):
        connect(rt, user_id, wait_reason=reason)

    strava = status.overview(rt)["providers"]["strava"]

    assert (strava["waiting"], [wait["reason"] for wait in strava["waits"]]) == (3, ["frequent"])


def test_a_provider_that_is_switched_off_is_not_told_of(rt: Runtime) -> None:
    off = rt.settings.providers["strava"].model_copy(update={"enabled": False})
    without = dataclasses.replace(rt, settings=rt.settings.model_copy(update={"providers": {"strava": off}}))

    assert status.overview(without)["providers"] == {}


def test_it_says_what_is_simulated(rt: Runtime, settings_env: Callable[..., Settings]) -> None:
    assert status.overview(rt)["providers"]["strava"]["simulated"]

    real = dataclasses.replace(rt, settings=settings_env(providers={"strava": {"client_id": "7"}}))

    assert not status.overview(real)["providers"]["strava"]["simulated"]


def test_the_budget_is_that_of_every_window(runtime: Runtime) -> None:
    pools = runtime.providers["strava"].pools(runtime.settings.providers["strava"], 0)
    told = {"reads": Usage((100, 1000), (7, 70)), "overall": Usage((200, 2000), (8, 80))}
    runtime.budget.settle(runtime.budget.take(pools), usage=told, date=runtime.clock())

    windows = status.overview(runtime)["providers"]["strava"]["budget"]

    assert [(each["pool"], each["seconds"], each["limit"]) for each in windows] == [
        ("reads", 900, 100),
        ("reads", 86400, 1000),
        ("overall", 900, 200),
        ("overall", 86400, 2000),
    ]
    for each in windows:
        assert each["used"] + each["remaining"] == each["limit"]
        assert each["start"] < each["end"]
        assert (each["known"], each["in_flight"], each["closed_until"]) == (True, 0, None)


def test_without_redis_the_budget_is_none_and_the_rest_is_told(
    rt: Runtime, redis_server: RedisServer
) -> None:
    connect(rt, "ann")
    redis_server.stop()

    overview = status.overview(rt)

    assert overview["connections"] == 1
    assert overview["providers"]["strava"]["budget"] is None
    assert status.overview(rt, budgets=False)["providers"]["strava"]["budget"] is None


# Webhooks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "ok", "sentence"),
    [
        (None, None, "were not subscribed to yet: `lifelogger webhooks subscribe strava` does"),
        (
            {"fault": "Strava is down"},
            False,
            "failed: Strava is down. `lifelogger webhooks subscribe strava`",
        ),
        (
            {"subscriptions": []},
            False,
            "0 of 1 subscription: `lifelogger webhooks subscribe strava` mends it",
        ),
        ({"callback": "https://elsewhere.example"}, False, "0 of 1 subscription"),
        ({"expires_at": NOW.isoformat()}, False, "0 of 1 subscription"),
        ({"expires_at": SOON.isoformat()}, True, "1 subscription, no event has come yet."),
        ({"heard_at": NOW - timedelta(hours=1)}, True, "1 subscription, the last event came at 11:00 UTC."),
    ],
    ids=["unknown", "fault", "none", "elsewhere", "expired", "not yet", "heard"],
)
def test_it_says_how_webhooks_stand(
    rt: Runtime, row: dict[str, Any] | None, ok: bool | None, sentence: str
) -> None:
    if row is not None:
        callback = row.pop("callback", webhooks.callback(rt, "strava"))
        one = {"id": 1, "topic": "push", "callback": callback, "expires_at": row.pop("expires_at", None)}
        [one["topic"]] = rt.providers["strava"].webhook_topics(rt.settings.providers["strava"])
        with rt.store.write() as db:
            values = {"subscriptions": [one], "checked_at": NOW, **row}
            db.execute(insert(Webhook).values(provider="strava", **values))

    told = status.overview(rt)["providers"]["strava"]["webhooks"]

    assert (told["ok"], told["wanted"]) == (ok, 1)
    assert sentence in told["sentence"]


def test_without_an_address_it_says_what_webhooks_need(
    rt: Runtime, settings_env: Callable[..., Settings]
) -> None:
    both = {"strava": {"client_id": "7"}, "fitbit": {"client_id": "7"}}
    real = dataclasses.replace(rt, settings=settings_env(providers=both))

    providers = status.overview(real)["providers"]

    assert providers["strava"]["webhooks"]["sentence"] == (
        "No webhooks: set web.public_url to where the provider reaches this server."
    )
    assert "docs/webhooks.md" in providers["fitbit"]["webhooks"]["sentence"]


# Sentences --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"next_sync_at": SOON}, "Up to date; due again at 12:13 UTC."),
        ({"next_sync_at": NOW}, "Due: the next tick takes it, as far as the budget goes."),
        (
            {"next_sync_at": NOW + timedelta(minutes=10), "claimed_at": NOW - timedelta(minutes=1)},
            "A sync is on its way since 11:59 UTC.",
        ),
        (
            {"next_sync_at": NOW - timedelta(minutes=1), "claimed_at": NOW - timedelta(minutes=11)},
            "Due: the next tick takes it, as far as the budget goes.",
        ),
        ({"next_sync_at": SOON, "wait_reason": REASON}, f"Waiting until 12:13 UTC: {REASON}."),
        (
            {"next_sync_at": NOW + timedelta(days=1), "wait_reason": "it is spent"},
            "Waiting until 2026-11-25 12:00 UTC: it is spent.",
        ),
        (
            {"next_sync_at": NOW - timedelta(minutes=1), "wait_reason": REASON},
            "Due: the next tick takes it, as far as the budget goes.",
        ),
        (
            {
                "status": "needs_reauth",
                "status_reason": "Strava has ended the authorisation",
                "next_sync_at": None,
            },
            "Has to sign in again: Strava has ended the authorisation.",
        ),
        ({"next_sync_at": None}, "Not polled."),
    ],
)
def test_each_state_is_a_sentence(state: dict[str, Any], sentence: str) -> None:
    healthy = {"status": "active", "status_reason": None, "wait_reason": None, "claimed_at": None}

    assert status.sentence({**healthy, **state}, NOW) == sentence


# One user ---------------------------------------------------------------------------------------------------


def test_everything_about_one_user(rt: Runtime) -> None:
    ann = connect(rt, "ann")
    bob = connect(rt, "bob")
    store(rt, Record, ann)
    store(rt, Record, ann, external_id="2", deleted_at=NOW)
    store(rt, Record, bob)
    store(rt, Quarantined, ann)
    store(rt, Stream, ann, cursor=NOW, backlog_since=NOW - timedelta(days=9), backlog_until=NOW)
    store(rt, SyncRun, ann, requests=3)
    store(rt, SyncRun, bob)
    store(rt, SyncRun, ann, outcome="deferred", message=REASON)

    user = status.user(rt, "ann")

    assert user is not None
    [connection] = user["connections"]
    assert (user["user_id"], user["created_at"]) == ("ann", NOW)
    assert (connection["records"], connection["quarantined"]) == (1, 1)
    assert connection["sentence"] == "Up to date; due again at 12:13 UTC."
    assert connection["streams"] == [
        {
            "name": "activities",
            "read_at": NOW,
            "off_reason": None,
            "history_left_since": NOW - timedelta(days=9),
            "history_left_until": NOW,
            "history_goes_to": NOW - timedelta(days=9),
            "history_share": 0.0,
            "records": 1,
        }
    ]
    assert [(run["outcome"], run["message"], run["requests"]) for run in user["runs"]] == [
        ("deferred", REASON, 0),
        ("ok", None, 3),
    ]
    assert status.user(rt, "nobody") is None


def test_users_come_page_by_page_and_by_the_beginning_of_their_id(rt: Runtime) -> None:
    for user_id in ("ann", "anna", "bob", "a_b", "axb"):
        add_user(rt, user_id)
    connect(rt, "ann")

    def ids(**more: Any) -> list[str]:
        return [each["user_id"] for each in status.users(rt, **more)]

    assert sorted(ids()) == ["a_b", "ann", "anna", "axb", "bob"]
    first = ids(limit=2)
    assert first + ids(after=first[-1]) == ids()
    assert ids(search="ann") == ["ann", "anna"]
    assert ids(search="a_") == ["a_b"], "no wildcard"
    assert ids(search="%") == []
    [ann] = status.users(rt, search="ann", limit=1)
    assert [connection["provider"] for connection in ann["connections"]] == ["strava"]


def test_the_journal_is_read_from_its_end(rt: Runtime) -> None:
    ann = connect(rt, "ann")
    for number in range(4):
        store(rt, SyncRun, ann, requests=number)

    newest = status.runs(rt, limit=2)

    assert [run["requests"] for run in newest] == [3, 2]
    assert [run["requests"] for run in status.runs(rt, before=newest[-1]["id"])] == [1, 0]
    assert {(run["user_id"], run["provider"]) for run in newest} == {("ann", "strava")}
    assert status.runs(rt, user_id="bob") == []


# Plain values, no secrets -----------------------------------------------------------------------------------


def test_all_of_it_can_be_written_as_json_and_none_of_it_is_secret(rt: Runtime) -> None:
    ann = connect(rt, "ann", wait_reason=REASON)
    for table in (Record, Quarantined, Stream, SyncRun):
        store(rt, table, ann)
    with rt.store.read() as db:
        sealed = [
            bytes(each)
            for each in db.execute(select(Connection.access_token, Connection.refresh_token)).one()
        ]

    told = [status.overview(rt), status.users(rt), status.user(rt, "ann"), status.runs(rt)]

    text = json.dumps(status.as_json(told))
    for hidden in ["hush", 'token"', "access_token", "refresh_token", *(each.decode() for each in sealed)]:
        assert hidden not in text


def test_times_are_iso_texts_with_an_offset() -> None:
    at = NOW.astimezone(UTC)

    assert status.as_json({"at": at, "on": at.date(), "all": [at, None, 1, (at,)]}) == {
        "at": "2026-11-24T12:00:00+00:00",
        "on": "2026-11-24",
        "all": ["2026-11-24T12:00:00+00:00", None, 1, ["2026-11-24T12:00:00+00:00"]],
    }
