"""The control API itself: clock, health, refusals, starting anew."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
import requests

from tests.sandbox.conftest import NOW, Ask
from tests.sandbox.control import Control, Refused


def test_health_and_people(control: Control) -> None:
    assert control.get("health") == {"ok": True, "now": NOW, "people": 5}
    alice = control.people()[0]
    assert alice == {
        "user_id": "alice",
        "name": "Alice Abel",
        "timezone": "Europe/Berlin",
        "strava": {"athlete_id": 41_000_000},
        "fitbit": {"healthUserId": "1000000000000", "legacyUserId": "B00000"},
        "oura": alice["oura"],
    }
    assert "sandbox" in requests.get(control.url, timeout=5).text
    assert requests.get(f"{control.url}/elsewhere", timeout=5).status_code == 404


def test_connecting_gives_lines_to_import(control: Control) -> None:
    lines = control.connect()
    assert [line["user_id"] for line in lines] == [person["user_id"] for person in control.people()]
    assert set(lines[0]) == {
        *("user_id", "provider", "access_token", "refresh_token", "expires_at", "scopes", "provider_user_id")
    }
    assert lines[0]["provider_user_id"] == "41000000"
    assert lines[0]["expires_at"] == NOW + 6 * 3600
    assert lines[0]["scopes"] == ["read", "activity:read_all"]


def test_the_clock_is_set_stepped_and_stopped(control: Control) -> None:
    control.set_clock("2026-01-01T00:00:00Z")
    assert control.now() == datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    control.step(90.5)
    assert control.now() == datetime(2026, 1, 1, tzinfo=UTC).timestamp() + 90.5
    control.step(-90.5)
    control.freeze(datetime(2025, 1, 1, tzinfo=UTC))
    assert control.now() == datetime(2025, 1, 1, tzinfo=UTC).timestamp()


def test_the_clock_runs_fast_or_as_it_really_is(control: Control) -> None:
    control.speed(3_600_000)
    first = control.now()
    while control.now() == first:
        pass
    assert NOW < first < control.now() < NOW + 3_600_000 * 60
    control.follow_real_time()
    assert abs(control.now() - datetime.now(UTC).timestamp()) < 5


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("clock", {"set": "tomorrow"}, "neither epoch seconds nor"),
        ("clock", {"set": "2026-01-01T00:00:00"}, "tells no offset"),
        ("clock", {"set": 1e12}, "between 1970 and 3000"),
        ("clock", {"speed": -1}, "less than 0"),
        ("clock", {"stepp": 1}, "no parameter 'stepp'"),
        ("connect", {"people": ["nobody"]}, "no person 'nobody'"),
        ("connect", {"scopes": ["all"]}, "no scope 'all'"),
        ("connect", {"provider": "polar"}, "no provider 'polar'"),
        ("limits", {"reads": [1]}, "reads"),
        ("limits", {"writes": [1, 1]}, "no pool 'writes'"),
        ("spend", {"number": -1}, "number"),
        ("settings", {"rotate": "sometimes"}, "rotate"),
        ("settings", {"colour": 1}, "no setting 'colour'"),
        ("people/alice/activities", {"fields": []}, "fields"),
        ("people/alice/activities", {"sport": "Chess"}, "sport: 'Chess'"),
        ("people/nobody/activities", {}, "no person"),
        ("holds", {}, "match"),
    ],
)
def test_nonsense_is_refused_with_a_sentence(
    control: Control, path: str, body: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(Refused, match=sentence) as refused:
        control.post(path, **body)
    assert ": 400 " in str(refused.value)


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff"])
def test_what_is_no_json_object_is_refused(control: Control, body: bytes) -> None:
    reply = requests.post(f"{control.url}/control/clock", data=body, timeout=5)
    assert reply.status_code == 400
    assert reply.json()["error"]


def test_unknown_things_are_refused(control: Control) -> None:
    for path in ("holds/99", "faults/99", "faults/x", "activities/1"):
        with pytest.raises(Refused, match=": 400 "):
            control.delete_path(path)
    with pytest.raises(Refused, match="no parameter"):
        control.ledger(persn="alice")


def test_a_reset_forgets_everything(ask: Ask, control: Control, token: str) -> None:
    before = control.truth("alice")
    control.add("alice")
    control.delete(before[0]["id"])
    control.fault("*", status=500)
    control.limits(reads=[1, 1])
    control.settings(short_pages=True)
    ask("/api/v3/athlete", token)
    control.step(5000)

    control.reset()

    assert control.now() == NOW
    assert control.truth("alice") == before
    assert control.faults() == []
    assert control.limits() == {"reads": [100, 1000], "overall": [200, 2000]}
    assert control.settings()["short_pages"] is False
    assert (control.summary()["requests"], control.summary()["windows"]) == (0, [])
    assert ask("/api/v3/athlete", token).status_code == 401
