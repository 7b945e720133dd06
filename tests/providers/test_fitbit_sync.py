"""The engine against a simulated Fitbit: what is imported, what a poll costs, what is read again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from datetime import date, timedelta
from queue import Queue
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import requests

from lifelogger import sync
from lifelogger.connecting import challenge_of
from lifelogger.connecting import connect as connect_account
from lifelogger.providers.fitbit import METRICS, SOURCES, Fitbit
from lifelogger.runtime import Runtime
from lifelogger.store.models import Record, Stream
from tests.live import NOON, connection, in_background, rows, ticked, tuned
from tests.live import connect as connect_any
from tests.sandbox.control import Control

QUARTER = 900
RECONCILE = "GET /dataTypes/{type}/dataPoints:reconcile"
ROLL_UP = "POST /dataTypes/{type}/dataPoints:dailyRollUp"
ONCE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For what no database has a part in."""

STREAMS = [stream.name for stream in Fitbit.streams if not stream.optional]
SAMPLES = "heart-rate-samples"
ROLLED_UP = ("steps", "distance", "total-calories", "heart-rate")


def connect(live: Runtime, sandbox: Control, *people: str, **grant: Any) -> list[dict[str, Any]]:
    return connect_any(live, sandbox, *people, provider="fitbit", **grant)


def imported(live: Runtime, sandbox: Control, user_id: str) -> None:
    """Sync until the past is there; the sandbox knows some ninety days of it."""
    short = tuned(live, sync={"history_days": 120})
    for _ in range(5):
        (run,) = sync.run(user_id, runtime=short)
        assert run.outcome == "ok", run.message
        sandbox.step(QUARTER)
        if all(row.backlog_until is None for row in rows(live, Stream.__table__, user_id)):
            return
    raise AssertionError("the import does not end")


def told(sandbox: Control, token: str, name: str) -> list[Any]:
    """Every point of a data type, asked for in another way than we do: in the smallest spans there are."""
    url = f"{sandbox.url}/fitbit/v4/users/me/dataTypes/{SOURCES[name].type}/dataPoints"
    headers, found = {"Authorization": f"Bearer {token}"}, []
    if name not in ROLLED_UP:
        query = {}
        while True:
            reply = requests.get(url, query, headers=headers, timeout=20).json()
            found += reply.get("dataPoints", [])
            if "nextPageToken" not in reply:
                return found
            query = {"pageToken": reply["nextPageToken"]}
    day = date(2026, 8, 1)
    while day < date(2026, 11, 27):
        ends = [
            {"date": {"year": each.year, "month": each.month, "day": each.day}}
            for each in (day, day + timedelta(14))
        ]
        body: dict[str, Any] = {"range": {"start": ends[0], "end": ends[1]}, "pageSize": 9}
        while body:
            reply = requests.post(f"{url}:dailyRollUp", json=body, headers=headers, timeout=20).json()
            found += [point for point in reply.get("rollupDataPoints", []) if len(point) > 2]
            body = {**body, "pageToken": reply["nextPageToken"]} if "nextPageToken" in reply else {}
        day += timedelta(14)
    return found


def stored(live: Runtime, user_id: str, stream: str) -> list[Any]:
    """The payloads of a stream, in an order that does not matter."""
    table = Record.__table__
    there = [row for row in rows(live, table, user_id) if row.stream == stream and row.deleted_at is None]
    return in_order(row.raw for row in there)


def in_order(items: Iterator[Any] | list[Any]) -> list[Any]:
    return sorted(items, key=lambda item: json.dumps(item, sort_keys=True))


def records(live: Runtime, user_id: str, stream: str) -> list[Any]:
    found = [row for row in rows(live, Record.__table__, user_id) if row.stream == stream]
    return sorted(found, key=lambda row: row.ordered_at)


@ONCE
def test_it_does_not_matter_in_which_order_google_lists(live: Runtime, sandbox: Control) -> None:
    """The order of `reconcile` is not documented: here the oldest come first, and fill two pages."""
    sandbox.settings("fitbit", order="ascending")
    for hour in range(30):
        sandbox.add("alice", start=NOON - timedelta(hours=hour + 1), elapsed=600)
    (line,) = connect(live, sandbox, "alice")

    imported(live, sandbox, "alice")
    (again,) = sync.run("alice", runtime=live)

    assert stored(live, "alice", "exercise") == in_order(told(sandbox, line["access_token"], "exercise"))
    assert (again.counts.inserted, again.counts.deleted) == (0, 0)


# What a poll costs ----------------------------------------------------------------------------------


# Late, edited, deleted --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sleep", "daily-oxygen-saturation", "weight"])
@ONCE
@pytest.mark.slow
def test_what_google_takes_back_is_deleted_here(live: Runtime, sandbox: Control, name: str) -> None:
    """Of any kind; an absent list is an empty one, and means that there is nothing in the window."""
    (line,) = connect(live, sandbox, "alice")
    imported(live, sandbox, "alice")
    week = [row for row in records(live, "alice", name) if row.ordered_at >= NOON - timedelta(days=6)]
    assert week
    sandbox.fault(f"GET /dataTypes/{name}/dataPoints:reconcile", provider="fitbit", json={}, times=1)

    sync.run("alice", runtime=live)
    there = {row.external_id for row in records(live, "alice", name) if row.deleted_at is None}
    sync.run("alice", runtime=live)

    assert there.isdisjoint(row.external_id for row in week)
    assert stored(live, "alice", name) == in_order(told(sandbox, line["access_token"], name))


@ONCE
def test_more_exercises_than_a_page_holds_are_all_read(live: Runtime, sandbox: Control) -> None:
    """25 a page: the look-back of a busy person costs a request more."""
    for hour in range(30):
        sandbox.add("alice", start=NOON - timedelta(hours=hour + 1), elapsed=600)
    (line,) = connect(live, sandbox, "alice")
    imported(live, sandbox, "alice")

    (run,) = sync.run("alice", runtime=live)

    assert run.requests == 11
    assert stored(live, "alice", "exercise") == in_order(told(sandbox, line["access_token"], "exercise"))


# What is refused --------------------------------------------------------------------------------------


def test_an_account_without_a_profile_is_a_state_that_people_can_read(
    live: Runtime, sandbox: Control
) -> None:
    """`ACCOUNT_NOT_LINKED` is no failure: one request tells it of all streams, and the next a day later."""
    short = tuned(live, sync={"history_days": 7})
    sandbox.settings("fitbit", not_linked=["alice"])
    connect(live, sandbox, "alice")

    (told_so,) = sync.run("alice", runtime=short)
    row = connection(live, "alice")
    sandbox.step(86_400 - 60)
    quiet = ticked(short, "alice")
    sandbox.step(60)
    (again,) = ticked(short, "alice")
    sandbox.settings("fitbit", not_linked=[])
    sandbox.step(86_400)
    (mended,) = ticked(short, "alice")

    assert [(run.outcome, run.requests) for run in (told_so, again)] == [("deferred", 1)] * 2
    assert quiet == []
    assert "this Google account has no Fitbit profile" in (told_so.message or "")
    assert (row.status, row.failures, row.wait_reason) == ("active", 0, told_so.message)
    assert row.next_sync_at == NOON + timedelta(days=1)
    assert (mended.outcome, mended.message) == ("ok", None)
    assert mended.counts.inserted > 0
    assert connection(live, "alice").wait_reason is None


@ONCE
def test_whoever_has_set_up_a_profile_and_asks_is_synced_at_once(live: Runtime, sandbox: Control) -> None:
    short = tuned(live, sync={"history_days": 7})
    sandbox.settings("fitbit", not_linked=["alice"])
    connect(live, sandbox, "alice")
    sync.run("alice", runtime=short)
    sandbox.settings("fitbit", not_linked=[])

    (run,) = sync.run("alice", runtime=short)

    assert (run.outcome, run.message) == ("ok", None)
    assert {row.stream for row in rows(live, Record.__table__, "alice")} == set(STREAMS)


@ONCE
def test_a_refused_request_closes_the_budget_for_a_while(live: Runtime, sandbox: Control) -> None:
    """429 without any header: it is over for this minute, and nobody asks again before it ends."""
    connect(live, sandbox, "alice")
    sandbox.fault(RECONCILE, provider="fitbit", status=429, times=1)

    (refused,) = sync.run("alice", runtime=live)
    sandbox.step(60)
    (later,) = sync.run("alice", runtime=tuned(live, sync={"history_days": 7}))

    assert (refused.outcome, refused.requests) == ("deferred", 1)
    assert later.outcome == "ok"


@ONCE
def test_one_persons_budget_is_not_anothers(live: Runtime, sandbox: Control) -> None:
    """300 a minute for each user: whoever has spent theirs keeps nobody else waiting."""
    short = tuned(live, sync={"history_days": 7})
    connect(live, sandbox, "alice", "bruno")
    settings = live.settings.providers["fitbit"]
    for _ in range(295):
        live.budget.settle(live.budget.take(Fitbit().pools(settings, connection(live, "alice").id)))

    (spent,) = sync.run("alice", runtime=short)
    (other,) = sync.run("bruno", runtime=short)

    assert (spent.outcome, spent.requests) == ("deferred", 5)
    assert (other.outcome, other.requests) == ("ok", 10)


@ONCE
def test_a_refresh_keeps_the_old_refresh_token(live: Runtime, sandbox: Control) -> None:
    """Google's reply has none."""
    connect(live, sandbox, "alice")
    short = tuned(live, sync={"history_days": 7})
    sync.run("alice", runtime=short)

    for _ in range(2):
        sandbox.step(3600)
        (run,) = sync.run("alice", runtime=short)
        assert run.outcome == "ok"

    assert len(sandbox.ledger(provider="fitbit", route="POST /token", status=200)) == 2


# Samples, which are an option -------------------------------------------------------------------------


def with_samples(live: Runtime) -> Runtime:
    fitbit = live.settings.providers["fitbit"].model_copy(update={"extra_streams": (SAMPLES,)})
    providers = {**live.settings.providers, "fitbit": fitbit}
    return dataclasses.replace(live, settings=live.settings.model_copy(update={"providers": providers}))


@ONCE
@pytest.mark.slow
def test_samples_are_read_when_the_settings_say_so(live: Runtime, sandbox: Control) -> None:
    """Each once, beside the days that are made of them; a poll costs a request for each day of look-back."""
    sandbox.set_clock(NOON)
    live = with_samples(tuned(live, sync={"history_days": 10}))
    connect(live, sandbox, "alice", scopes=[METRICS[0]])
    for _ in range(2):
        (run,) = sync.run("alice", runtime=live)
        assert run.outcome == "ok", run.message
        sandbox.step(QUARTER)
    asked = len(sandbox.ledger(provider="fitbit", kind="read"))

    (poll,) = sync.run("alice", runtime=live)

    polled = [entry["path"] for entry in sandbox.ledger(provider="fitbit", kind="read")[asked:]]
    assert polled.count("/v4/users/me/dataTypes/heart-rate/dataPoints:reconcile") == 8
    assert poll.requests == len(polled) == 8 + 5
    assert (poll.counts.updated, poll.counts.deleted) == (0, 0)
    (referee,) = sandbox.connect("alice", provider="fitbit", client_id="referee")
    there = requests.get(
        f"{sandbox.url}/fitbit/v4/users/me/dataTypes/heart-rate/dataPoints",
        {"filter": 'heart_rate.sample_time.civil_time >= "2026-11-16"', "pageSize": 10_000},
        headers={"Authorization": f"Bearer {referee['access_token']}"},
        timeout=20,
    ).json()["dataPoints"]
    kept = records(live, "alice", SAMPLES)
    assert in_order(row.raw for row in kept if row.local_date >= date(2026, 11, 16)) == in_order(there)
    assert len(there) > 8 * 200
    assert {(row.kind, row.utc_offset_s, row.deleted_at) for row in kept} == {("body", 3600, None)}
    assert records(live, "alice", "heart-rate")  # the days have a stream of their own


@ONCE
def test_samples_are_neither_asked_for_nor_read_otherwise(live: Runtime, sandbox: Control) -> None:
    connect(live, sandbox, "alice", scopes=[METRICS[0]])

    (run,) = sync.run("alice", runtime=tuned(live, sync={"history_days": 7}))

    assert (run.outcome, run.requests) == ("ok", 5)
    assert SAMPLES not in (run.message or "")
    assert records(live, "alice", SAMPLES) == []


# Connecting -------------------------------------------------------------------------------------------


@ONCE
def test_a_person_connects_with_a_proof_key_and_is_known(live: Runtime, sandbox: Control) -> None:
    """The token reply does not name them: one request asks. A code without its proof is worth nothing."""
    shown: Queue[str] = Queue()
    connecting = in_background(connect_account, live, "zoe", "fitbit", shown.put)
    address = shown.get(timeout=20)
    assert "code_challenge_method=S256" in address

    requests.get(f"{address}&person=alice", timeout=20)

    assert connecting.result(20) == (True, [])
    row = connection(live, "zoe")
    assert row.provider_user_id == sandbox.people()[0]["fitbit"]["healthUserId"]
    assert [entry["route"] for entry in sandbox.ledger(provider="fitbit", kind="read")] == ["GET /identity"]
    (run,) = sync.run("zoe", runtime=tuned(live, sync={"history_days": 7}))
    assert run.outcome == "ok"


@ONCE
def test_a_stolen_code_is_worth_nothing(live: Runtime, sandbox: Control) -> None:
    settings = live.settings.providers["fitbit"]
    address = Fitbit().authorize_address(
        settings, redirect_uri="http://localhost/", state="s", challenge=challenge_of("ours")
    )
    back = requests.get(f"{address}&person=alice", timeout=20, allow_redirects=False).headers["Location"]
    form = {
        "client_id": "sandbox",
        "client_secret": "sandbox",
        "grant_type": "authorization_code",
        "code": dict(parse_qsl(urlsplit(back).query))["code"],
    }

    stolen = requests.post(settings.token_url, {**form, "code_verifier": "theirs"}, timeout=20)
    ours = requests.post(settings.token_url, {**form, "code_verifier": "ours"}, timeout=20)

    assert (stolen.status_code, ours.status_code) == (400, 200)


# Where people live ------------------------------------------------------------------------------------


@ONCE
def test_a_run_and_a_night_over_the_end_of_summer_time(live: Runtime, sandbox: Control) -> None:
    """Berlin, 25 October: from 02:30 to 02:30 is an hour, and the night is as long as it was."""
    key = sandbox.add("alice", start="2026-10-25T00:30:00Z", elapsed=3600)
    connect(live, sandbox, "alice")
    imported(live, sandbox, "alice")

    (run,) = [row for row in records(live, "alice", "exercise") if row.external_id == f"{key:x}"]
    (night,) = [
        row for row in records(live, "alice", "sleep")
        if row.local_date == date(2026, 10, 25) and row.is_main_sleep
    ]  # fmt: skip
    days = [row.local_date for row in records(live, "alice", "steps")]

    assert (run.duration_s, run.utc_offset_s, run.local_date) == (3600, 7200, date(2026, 10, 25))
    assert run.raw["exercise"]["interval"]["endUtcOffset"] == "3600s"
    assert night.duration_s == (night.end_at - night.start_at).total_seconds()
    assert night.duration_s == night.asleep_s + night.awake_s
    assert days == [days[0] + timedelta(number) for number in range(len(days))]
