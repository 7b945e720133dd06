"""The engine against a simulated Oura, end to end on both databases."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from queue import Queue
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import requests

from lifelogger import sync
from lifelogger.connecting import connect as connect_account
from lifelogger.providers.oura import Oura
from lifelogger.runtime import Runtime
from lifelogger.sandbox.server import Sandbox
from lifelogger.store.models import Record, Stream
from tests.conftest import CLOCK
from tests.live import NOON, connect, connection, in_background, journal, quarantined, rows, tuned
from tests.sandbox.control import Control
from tests.sandbox.openapi import SPEC

QUARTER, HOUR, DAY = 900, 3600, 86_400
NAMES = [stream.name for stream in Oura.streams if not stream.optional]
ONCE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For what no database has a part in."""


@pytest.fixture(scope="module")
def sandbox_server() -> Iterator[Sandbox]:
    """As many people as it takes to have one at each end of the world."""
    with Sandbox(people=21, seed=7, history_days=90, clock=CLOCK) as server:
        yield server


@pytest.fixture
def live(live: Runtime) -> Runtime:
    """With a history that ends a little before people's: two spans."""
    return tuned(live, sync={"history_days": 120})


@pytest.fixture
def pages_of_seven(sandbox: Control) -> Iterator[None]:
    """Oura's pages have seven documents: a span is many of them."""
    sandbox.settings(provider="oura", page_size=7)
    yield
    sandbox.settings(provider="oura", page_size=50)


def joined(live: Runtime, sandbox: Control, *people: str, **grant: Any) -> list[dict[str, Any]]:
    return connect(live, sandbox, *people, provider="oura", **grant)


def truth(sandbox: Control, person: str, *names: str) -> dict[tuple[str, str], Any]:
    """Every document of a person that is not deleted, asked of the cloud by somebody else."""
    token = sandbox.connect(person, provider="oura", client_id="referee")[0]["access_token"]
    found: dict[tuple[str, str], Any] = {}
    for name in names or NAMES:
        query = {"start_date": "2026-01-01", "end_date": "2026-12-31"}
        while True:
            reply = requests.get(
                f"{sandbox.url}/oura/v2/usercollection/{name}",
                query,
                headers={"Authorization": f"Bearer {token}"},
                timeout=20,
            ).json()
            found |= {(name, item["id"]): item for item in reply["data"] if item.get("type") != "deleted"}
            if not reply["next_token"]:
                break
            query["next_token"] = reply["next_token"]
    return found


def kept(live: Runtime, person: str) -> list[Any]:
    return [row for row in rows(live, Record.__table__, person) if row.deleted_at is None]


def stored(live: Runtime, person: str) -> dict[tuple[str, str], Any]:
    return {(row.stream, row.external_id): row.raw for row in kept(live, person)}


def streams(live: Runtime, person: str) -> dict[str, Any]:
    return {row.name: row for row in rows(live, Stream.__table__, person)}


def asked(sandbox: Control, **filters: Any) -> list[dict[str, Any]]:
    """What our application asked for, oldest first."""
    return sandbox.ledger(provider="oura", client="sandbox", **filters)


def imported(live: Runtime, sandbox: Control, person: str) -> None:
    """Sync until there is no history left to read."""
    for _ in range(5):
        (run,) = sync.run(person, runtime=live)
        assert run.outcome == "ok"
        if all(stream.backlog_until is None for stream in streams(live, person).values()):
            return
        sandbox.step(QUARTER)
    raise AssertionError("the import does not end")


@pytest.mark.usefixtures("pages_of_seven")
def test_a_first_import_stores_exactly_what_is_there(live: Runtime, sandbox: Control) -> None:
    """Promise 6: every document of every collection once, its payload equal in meaning."""
    joined(live, sandbox, "alice", "bruno")

    runs = sync.run("alice", runtime=live) + sync.run("bruno", runtime=live)

    assert [(run.outcome, run.message) for run in runs] == [("ok", None), ("ok", None)]
    for person in ("alice", "bruno"):
        assert stored(live, person) == truth(sandbox, person)
        assert {name for name, _ in stored(live, person)} == set(NAMES)
        assert quarantined(live, person) == []


def test_a_poll_without_news_changes_nothing_and_costs_seven_requests(
    live: Runtime, sandbox: Control
) -> None:
    """docs/providers/oura.md: one for each collection, since no request shows two of them."""
    joined(live, sandbox, "alice")
    imported(live, sandbox, "alice")
    before = rows(live, Record.__table__, "alice")
    sandbox.step(QUARTER)

    (run,) = sync.run("alice", runtime=live)

    assert rows(live, Record.__table__, "alice") == before
    assert (run.requests, run.counts.inserted, run.counts.updated, run.counts.deleted) == (7, 0, 0, 0)
    assert run.requests == Oura.poll_cost


def test_days_that_are_revised_are_read_again(live: Runtime, sandbox: Control) -> None:
    """Steps grow with the day, and a night is analysed again hours after it."""
    sandbox.freeze(datetime(2026, 11, 24, 8, tzinfo=UTC))  # a few hours after Alice woke up
    joined(live, sandbox, "alice")
    imported(live, sandbox, "alice")
    before = {row.external_id: row for row in kept(live, "alice")}
    sandbox.step(10 * HOUR)

    (run,) = sync.run("alice", runtime=live)

    after = {row.external_id: row for row in kept(live, "alice")}
    today = {
        row.stream: (before[key], row) for key, row in after.items() if row.raw != before.get(key, row).raw
    }
    assert stored(live, "alice") == truth(sandbox, "alice")
    assert {"daily_activity", "daily_readiness", "daily_sleep", "sleep"} <= today.keys()
    assert today["daily_activity"][1].steps > today["daily_activity"][0].steps
    assert today["sleep"][1].hrv_rmssd_ms == today["sleep"][0].hrv_rmssd_ms + 1
    assert run.counts.updated == len(today)


@pytest.mark.slow
def test_a_sleep_that_its_owner_deletes_is_gone_and_one_deleted_before_never_comes(
    live: Runtime, sandbox: Control
) -> None:
    """It still is in the list, and says `type: "deleted"`."""
    people = ("alice", "bruno", "chiyo", "devi")
    joined(live, sandbox, *people)
    for person in people:
        imported(live, sandbox, person)
    seen: set[str] = set()
    for _ in range(8):
        sandbox.step(DAY / 2)
        for person in people:
            sync.run(person, runtime=live)
            assert {key for key in stored(live, person) if key[0] == "sleep"} == set(
                truth(sandbox, person, "sleep")
            )
            seen |= {
                row.external_id
                for row in rows(live, Record.__table__, person)
                if row.stream == "sleep" and row.deleted_at and row.raw is None and row.asleep_s is None
            }

    assert seen


def test_a_workout_that_is_deleted_or_edited(live: Runtime, sandbox: Control) -> None:
    joined(live, sandbox, "alice")
    imported(live, sandbox, "alice")
    first, second = (
        sandbox.add("alice", start=NOON - timedelta(days=age), provider="oura") for age in (3, 4)
    )
    sync.run("alice", runtime=live)
    sandbox.edit(first, fields={"label": "With Bruno"}, provider="oura")
    sandbox.delete_path(f"activities/{second}?provider=oura")

    (run,) = sync.run("alice", runtime=live)

    assert (run.counts.updated, run.counts.deleted) == (1, 1)
    assert stored(live, "alice") == truth(sandbox, "alice")
    assert "With Bruno" in {row.title for row in kept(live, "alice")}


# Zones -----------------------------------------------------------------------------------------------


@ONCE
@pytest.mark.parametrize(
    "moment",
    [
        datetime(2026, 11, 24, 9, 50, tzinfo=UTC),  # UTC+14: before midnight
        datetime(2026, 11, 24, 10, 30, tzinfo=UTC),  # UTC+14: the 25th has begun; UTC-11: still the 23rd
        datetime(2026, 11, 24, 11, 30, tzinfo=UTC),  # UTC-11: the 24th has begun
        datetime(2026, 11, 24, 23, 30, tzinfo=UTC),
        datetime(2026, 11, 25, 0, 30, tzinfo=UTC),
    ],
)
def test_today_is_read_wherever_somebody_is(live: Runtime, sandbox: Control, moment: datetime) -> None:
    """From UTC-11 to UTC+14, on both sides of their midnight and of that of UTC."""
    sandbox.freeze(moment)
    zones = {person: zone_of(sandbox, person) for person in ("tala", "uma", "alice")}
    joined(live, sandbox, *zones)
    for person, zone in zones.items():
        imported(live, sandbox, person)
        today = sandbox_date(sandbox, zone)

        newest = max(row.local_date for row in kept(live, person) if row.stream == "daily_activity")

        assert newest == today
        assert stored(live, person) == truth(sandbox, person)


def test_the_homes_of_these_tests_are_the_ends_of_the_world(sandbox: Control) -> None:
    offsets = [NOON.astimezone(zone_of(sandbox, person)).utcoffset() for person in ("tala", "uma")]

    assert offsets == [timedelta(hours=-11), timedelta(hours=14)]


def test_instants_offsets_and_dates_over_the_end_of_summer_time(live: Runtime, sandbox: Control) -> None:
    """Each record has the offset of its own moment, and the civil date that Oura gave it."""
    for person in ("alice", "bruno"):
        zone = zone_of(sandbox, person)
        joined(live, sandbox, person)
        imported(live, sandbox, person)
        found = kept(live, person)
        for row in found:
            assert row.local_date == date.fromisoformat(row.raw["day"])
            if row.kind == "day":
                assert (row.start_at, row.utc_offset_s) == (None, None)
                assert row.ordered_at == datetime.combine(row.local_date, datetime.min.time(), UTC)
                continue
            offset = row.start_at.astimezone(zone).utcoffset()
            assert row.utc_offset_s == offset.total_seconds()
            assert row.end_at - row.start_at == timedelta(seconds=row.duration_s)
            if row.kind == "activity":
                assert row.local_date == row.start_at.astimezone(zone).date()
        nights = [row for row in found if row.is_main_sleep]
        over = [row for row in nights if row.end_at.astimezone(zone).utcoffset() != offset_of(row)]
        assert len({row.utc_offset_s for row in nights}) == 2
        assert all(row.asleep_s + row.awake_s == row.duration_s for row in nights)
        assert len(over) <= 1


# What is not granted, and what is refused ------------------------------------------------------------


def test_a_stream_whose_scope_is_missing_is_off_and_the_others_go_on(live: Runtime, sandbox: Control) -> None:
    joined(live, sandbox, "alice", scopes=["daily", "workout"])

    (run,) = sync.run("alice", runtime=live)

    assert run.outcome == "ok"
    assert (
        run.message == "Not read: daily_spo2: not granted: spo2Daily or spo2; session: not granted: session"
    )
    assert {name for name, _ in stored(live, "alice")} == set(NAMES) - {"daily_spo2", "session"}
    assert streams(live, "alice")["session"].off_reason == "not granted: session"
    assert {entry["status"] for entry in asked(sandbox)} == {200}
    assert not {"/daily_spo2", "/session"} & {entry["path"][19:] for entry in asked(sandbox)}


def test_a_scope_that_is_granted_later_brings_its_stream(live: Runtime, sandbox: Control) -> None:
    joined(live, sandbox, "alice", scopes=["daily"])
    sync.run("alice", runtime=live)
    joined(live, sandbox, "alice")
    sandbox.step(QUARTER)

    imported(live, sandbox, "alice")

    assert stored(live, "alice") == truth(sandbox, "alice")
    assert [row.off_reason for row in streams(live, "alice").values()] == [None] * 7


def test_an_ended_subscription_is_a_state_and_no_fault_to_retry(live: Runtime, sandbox: Control) -> None:
    """403: asked once for each stream, then not for a day, and told in words."""
    sandbox.settings(provider="oura", lapsed=["alice"])
    joined(live, sandbox, "alice", "bruno")

    (run,) = sync.run("alice", runtime=live)
    sandbox.step(QUARTER)
    (again,) = sync.run("alice", runtime=live)

    assert (run.outcome, run.requests, again.outcome, again.requests) == ("deferred", 7, "deferred", 0)
    assert connection(live, "alice").status == "active"
    assert connection(live, "alice").failures == 0
    assert "subscription" in (again.message or "")
    assert sync.run("bruno", runtime=live)[0].counts.inserted > 0
    sandbox.settings(provider="oura", lapsed=[])
    sandbox.step(DAY)
    imported(live, sandbox, "alice")
    assert stored(live, "alice") == truth(sandbox, "alice")


def test_the_limit_is_waited_for_as_its_headers_say(live: Runtime, sandbox: Control) -> None:
    """429: nothing more is asked until the window ends; what was read stays."""
    joined(live, sandbox, "alice")
    sandbox.limits(provider="oura", requests=[3])

    (run,) = sync.run("alice", runtime=live)
    due = connection(live, "alice").next_sync_at
    answers = [entry["status"] for entry in asked(sandbox)]

    assert (run.outcome, answers) == ("deferred", [200, 200, 200, 429])
    assert NOON.replace(minute=5) <= due <= NOON.replace(minute=5, second=1)
    (again,) = sync.run("alice", runtime=live)
    assert (again.outcome, again.requests) == ("deferred", 0)
    sandbox.limits(provider="oura", requests=[5000])
    sandbox.step(QUARTER)
    imported(live, sandbox, "alice")
    assert stored(live, "alice") == truth(sandbox, "alice")


@ONCE
def test_a_reset_time_alone_is_enough(live: Runtime, sandbox: Control) -> None:
    joined(live, sandbox, "alice")
    reset = NOON + timedelta(minutes=2)
    headers = {"Retry-After": None, "X-RateLimit-Reset": str(int(reset.timestamp()))}
    sandbox.fault("GET /daily_activity", status=429, headers=headers, times=1, provider="oura")

    sync.run("alice", runtime=live)

    assert reset <= connection(live, "alice").next_sync_at <= reset + timedelta(seconds=1)


# Heart rate, which is an option ----------------------------------------------------------------------


def with_heart_rate(live: Runtime) -> Runtime:
    oura = live.settings.providers["oura"].model_copy(update={"extra_streams": ("heartrate",)})
    providers = {**live.settings.providers, "oura": oura}
    return dataclasses.replace(live, settings=live.settings.model_copy(update={"providers": providers}))


def test_heart_rate_is_read_when_the_settings_say_so(live: Runtime, sandbox: Control) -> None:
    """A sample of each five minutes; a poll costs one request more."""
    sandbox.set_clock(NOON)
    live = with_heart_rate(tuned(live, sync={"history_days": 10}))
    joined(live, sandbox, "alice", scopes=["heartrate"])
    imported(live, sandbox, "alice")
    sandbox.step(QUARTER)

    (run,) = sync.run("alice", runtime=live)

    samples = kept(live, "alice")
    assert (run.requests, run.counts.inserted, run.counts.deleted) == (1, 0, 0)
    assert {row.stream for row in samples} == {"heartrate"}
    assert len(samples) > 10 * 200
    assert NOON - timedelta(minutes=15) < max(row.start_at for row in samples) < NOON


@ONCE
def test_heart_rate_is_neither_asked_for_nor_read_otherwise(live: Runtime, sandbox: Control) -> None:
    oura, address = Oura(), {"redirect_uri": "http://here.example", "state": "s"}
    off, on = (each.settings.providers["oura"] for each in (live, with_heart_rate(live)))
    joined(live, sandbox, "alice", scopes=["daily", "heartrate"])

    (run,) = sync.run("alice", runtime=live)

    assert "heartrate" not in (run.message or "")
    assert "heartrate" not in streams(live, "alice")
    assert "heartrate" not in oura.authorize_address(off, **address)
    assert "heartrate" in oura.authorize_address(on, **address)


# Tokens ----------------------------------------------------------------------------------------------


@ONCE
def test_a_person_connects_and_says_what_may_be_read(live: Runtime, sandbox: Control) -> None:
    """Scope by scope; the token reply does not name them, so one request asks."""
    shown: Queue[str] = Queue()
    connecting = in_background(connect_account, live, "zoe", "oura", shown.put)

    requests.get(f"{shown.get(timeout=20)}&person=alice&grant=daily%20workout", timeout=20)

    assert connecting.result(20) == (True, ["session", "spo2Daily"])
    row = connection(live, "zoe")
    assert row.provider_user_id == sandbox.people()[0]["oura"]["id"]
    assert [entry["route"] for entry in asked(sandbox, kind="read")] == ["GET /personal_info"]
    assert {name for name, _ in stored(live, "zoe")} == set()
    sync.run("zoe", runtime=live)
    assert {name for name, _ in stored(live, "zoe")} == set(NAMES) - {"session", "daily_spo2"}


def test_a_refresh_token_is_used_once(live: Runtime, sandbox: Control) -> None:
    joined(live, sandbox, "alice")
    for _ in range(3):
        sandbox.expire("alice", provider="oura")
        sandbox.step(QUARTER)
        (run,) = sync.run("alice", runtime=live)
        assert run.outcome == "ok"

    assert [entry["status"] for entry in asked(sandbox, kind="token")] == [200] * 3
    assert sandbox.summary()["refresh_tokens_used_twice"] == 0


def test_access_that_is_taken_back_asks_for_a_new_sign_in(live: Runtime, sandbox: Control) -> None:
    joined(live, sandbox, "alice")
    sandbox.revoke("alice", provider="oura")

    (run,) = sync.run("alice", runtime=live)

    assert run.outcome == journal(live, "alice")[-1].outcome == "needs_reauth"


# What was asked --------------------------------------------------------------------------------------


def test_every_request_is_one_that_the_document_has(live: Runtime, sandbox: Control) -> None:
    """The last day asked for is tomorrow, or later, everywhere on Earth."""
    joined(live, sandbox, "alice")
    imported(live, sandbox, "alice")

    entries = asked(sandbox)

    assert {(entry["status"], entry["note"]) for entry in entries} == {(200, "")}
    assert {SPEC.refuses("GET", f"{entry['path']}?{entry['query']}") for entry in entries} == {None}
    newest = {entry["path"] for entry in entries if "end_date=2026-11-26" in entry["query"]}
    assert newest == {f"/v2/usercollection/{name}" for name in NAMES}


def zone_of(sandbox: Control, person: str) -> ZoneInfo:
    return next(ZoneInfo(each["timezone"]) for each in sandbox.people() if each["user_id"] == person)


def sandbox_date(sandbox: Control, zone: ZoneInfo) -> date:
    return datetime.fromtimestamp(sandbox.now(), zone).date()


def offset_of(row: Any) -> timedelta:
    return timedelta(seconds=row.utc_offset_s)
