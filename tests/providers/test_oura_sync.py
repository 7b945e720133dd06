"""The engine against a simulated Oura, end to end on both databases."""

from __future__ import annotations

import dataclasses
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import requests

from lifelogger import sync
from lifelogger.providers.oura import Oura
from lifelogger.runtime import Runtime
from lifelogger.store.models import Record, Stream
from tests.live import NOON, connect, connection, rows, tuned
from tests.sandbox.control import Control

QUARTER, HOUR, DAY = 900, 3600, 86_400
NAMES = [stream.name for stream in Oura.streams if not stream.optional]
ONCE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For what no database has a part in."""


@pytest.fixture
def live(live: Runtime) -> Runtime:
    """With a history that ends a little before people's: two spans."""
    return tuned(live, sync={"history_days": 120})


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


# Zones -----------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize(("tier", "others"), [("access_token", "ok"), ("application", "deferred")])
def test_the_limit_of_one_token_keeps_nobody_else_waiting(
    live: Runtime, sandbox: Control, tier: str, others: str
) -> None:
    """Two layers, and `X-RateLimit-Tier` says which one: at any word that is not the token's, all wait."""
    joined(live, sandbox, "alice", "bruno")
    headers = {"Retry-After": "240", "X-RateLimit-Tier": tier}
    sandbox.fault("GET /daily_activity", status=429, headers=headers, times=1, provider="oura")

    (refused,) = sync.run("alice", runtime=live)
    (other,) = sync.run("bruno", runtime=live)
    (again,) = sync.run("alice", runtime=live)

    assert (refused.outcome, refused.requests, other.outcome) == ("deferred", 1, others)
    assert (again.outcome, again.requests) == ("deferred", 0)
    assert NOON < connection(live, "alice").next_sync_at <= NOON + timedelta(seconds=242)


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


@pytest.mark.slow
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


# What was asked --------------------------------------------------------------------------------------


def zone_of(sandbox: Control, person: str) -> ZoneInfo:
    return next(ZoneInfo(each["timezone"]) for each in sandbox.people() if each["user_id"] == person)


def sandbox_date(sandbox: Control, zone: ZoneInfo) -> date:
    return datetime.fromtimestamp(sandbox.now(), zone).date()


def offset_of(row: Any) -> timedelta:
    return timedelta(seconds=row.utc_offset_s)
