"""Strava's list of activities, its details and its streams."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from tests.sandbox.conftest import NOW, Ask
from tests.sandbox.control import Control, Refused

LIST = "/api/v3/athlete/activities"
SWAGGER = Path(__file__).parents[3] / "shared" / "specs" / "strava.swagger.json"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# The fields of the two example items in Strava's Swagger document, with the types found there and, for
# those that are null in it, the types its model gives. A question mark: may be missing.
NUMBER = (int, float)
FIELDS: dict[str, Any] = {
    "resource_state": int,
    "athlete": dict,
    "name": str,
    "distance": NUMBER,
    "moving_time": int,
    "elapsed_time": int,
    "total_elevation_gain": NUMBER,
    "type": str,
    "sport_type": str,
    "workout_type": (int, type(None)),
    "id": int,
    "external_id": (str, type(None)),
    "upload_id": (int, type(None)),
    "start_date": str,
    "start_date_local": str,
    "timezone": str,
    "utc_offset": NUMBER,
    "start_latlng": (list, type(None)),
    "end_latlng": (list, type(None)),
    "location_city": type(None),
    "location_state": type(None),
    "location_country": str,
    "achievement_count": int,
    "kudos_count": int,
    "comment_count": int,
    "athlete_count": int,
    "photo_count": int,
    "map": dict,
    "device_name": (str, type(None)),
    "trainer": bool,
    "commute": bool,
    "manual": bool,
    "private": bool,
    "flagged": bool,
    "gear_id": (str, type(None)),
    "from_accepted_tag": bool,
    "average_speed": NUMBER,
    "max_speed": NUMBER,
    "average_cadence?": NUMBER,
    "average_watts?": NUMBER,
    "weighted_average_watts?": int,
    "kilojoules?": NUMBER,
    "device_watts?": bool,
    "has_heartrate": bool,
    "average_heartrate?": NUMBER,
    "max_heartrate?": NUMBER,
    "max_watts?": int,
    "pr_count": int,
    "total_photo_count": int,
    "has_kudoed": bool,
    "suffer_score": (*NUMBER, type(None)),
}


def walk(ask: Ask, token: str, **params: Any) -> list[list[Any]]:
    """All pages of the list, without the empty one at the end."""
    pages: list[list[Any]] = []
    while True:
        reply = ask(LIST, token, params={**params, "page": len(pages) + 1})
        assert reply.status_code == 200
        if not reply.json():
            return pages
        pages.append(reply.json())


def all_of(pages: list[list[Any]]) -> list[Any]:
    return [item for page in pages for item in page]


def started(item: dict[str, Any]) -> float:
    return datetime.fromisoformat(item["start_date"]).timestamp()


def test_items_have_the_fields_and_types_of_the_swagger_document(control: Control) -> None:
    if SWAGGER.exists():
        operation = json.loads(SWAGGER.read_text())["paths"]["/athlete/activities"]["get"]
        for example in operation["responses"]["200"]["examples"]["application/json"]:
            assert list(example) == [name.rstrip("?") for name in FIELDS]
    wanted = {name for name in FIELDS if not name.endswith("?")}
    types = {name.rstrip("?"): of for name, of in FIELDS.items()}

    items = [item for person in control.people() for item in control.truth(person["user_id"])]

    assert len(items) > 300
    for item in items:
        assert wanted <= item.keys() <= types.keys()
        assert {n: v for n, v in item.items() if not isinstance(v, types[n])} == {}
        assert item["id"] > 2**31
        assert ("kilojoules" in item) <= item["sport_type"].endswith("Ride")
        assert ("average_heartrate" in item) == ("max_heartrate" in item) == item["has_heartrate"]
    assert {item["has_heartrate"] for item in items} == {True, False}
    assert any(item["manual"] for item in items)
    assert len({item["id"] for item in items}) == len(items)


def test_local_times_are_wall_times_that_claim_to_be_utc(control: Control) -> None:
    for person in control.people():
        zone = ZoneInfo(person["timezone"])
        for item in control.truth(person["user_id"]):
            start = datetime.fromisoformat(item["start_date"])
            assert item["start_date"].endswith("Z")
            assert item["start_date_local"] == f"{start.astimezone(zone):%Y-%m-%dT%H:%M:%S}Z"
            offset = start.astimezone(zone).utcoffset()
            assert offset is not None
            assert item["utc_offset"] == offset.total_seconds()
    alice = control.truth("alice")
    assert {item["timezone"] for item in alice} == {"(GMT+01:00) Europe/Berlin"}
    assert {item["utc_offset"] for item in alice} == {3600, 7200}


def test_newest_first_and_with_after_oldest_first(ask: Ask, control: Control, token: str) -> None:
    truth = control.truth("alice")
    middle = int(started(truth[40]))

    assert all_of(walk(ask, token, per_page=50)) == truth
    assert ask(LIST, token).json() == truth[:30]
    assert all_of(walk(ask, token, per_page=200, after=middle)) == truth[:40][::-1]
    assert all_of(walk(ask, token, per_page=200, before=middle)) == truth[41:]
    assert all_of(walk(ask, token, per_page=200, before=middle + 1, after=middle - 1)) == [truth[40]]
    assert ask(LIST, token, params={"page": 10_000}).json() == []


@pytest.mark.parametrize(
    "params",
    [
        {"per_page": 201},
        {"per_page": 0},
        {"per_page": "x"},
        {"page": 0},
        {"after": "yesterday"},
        {"before": -1},
    ],
)
def test_parameters_that_cannot_be_are_refused(ask: Ask, token: str, params: dict[str, Any]) -> None:
    reply = ask(LIST, token, params=params)

    (name,) = params
    assert reply.status_code == 400
    assert reply.json() == {
        "message": "Bad Request",
        "errors": [{"resource": "Application", "field": name, "code": "invalid"}],
    }


def test_private_activities_leave_short_pages_and_no_gap(ask: Ask, control: Control) -> None:
    control.limits(reads=[1000, 1000], overall=[1000, 1000])
    for hours in range(30):
        control.add("bruno", start=NOW - 7200 - hours * 3600, elapsed=600, private=hours % 10 < 7)
    private = {item["id"] for item in control.truth("bruno") if item["private"]}
    narrow = control.connect("bruno", scopes=["read", "activity:read"])[0]["access_token"]
    wide = control.connect("bruno")[0]["access_token"]

    pages = walk(ask, narrow, per_page=10)

    assert all_of(pages) == [item for item in control.truth("bruno") if not item["private"]]
    assert 0 < len(pages[0]) < 10
    assert all_of(walk(ask, wide, per_page=10)) == control.truth("bruno")
    assert all_of(walk(ask, narrow, per_page=3)) == all_of(pages)  # some pages would be all private
    assert ask(f"/api/v3/activities/{min(private)}", narrow).status_code == 404
    assert ask(f"/api/v3/activities/{min(private)}", wide).status_code == 200


def test_pages_can_be_short_although_more_follow(ask: Ask, control: Control, token: str) -> None:
    control.settings(short_pages=True)

    pages = walk(ask, token, per_page=30)

    assert {len(page) for page in pages[:-1]} == {20}
    assert all_of(pages) == control.truth("alice")


def test_activities_appear_when_they_are_uploaded(ask: Ask, control: Control, token: str) -> None:
    before = control.truth("alice")
    key = control.add("alice", start=NOW + 3600, elapsed=1800)
    late = control.add("alice", start=NOW - 86_400, uploaded=NOW + 86_400)
    assert control.truth("alice") == before

    control.step(5399)
    assert key not in {item["id"] for item in ask(LIST, token).json()}
    control.step(1)
    assert ask(LIST, token).json()[0]["id"] == key
    control.set_clock(NOW + 86_400)
    token = control.connect("alice")[0]["access_token"]
    assert late in {item["id"] for item in ask(LIST, token, params={"before": NOW}).json()}
    control.set_clock(NOW)
    assert control.truth("alice") == before


def test_life_goes_on_with_the_clock(control: Control) -> None:
    before = control.truth("alice")
    control.step(60 * 86_400)

    after = control.truth("alice")

    assert len(after) > len(before) + 5
    assert [item for item in after if item in before] == before
    late = [item for item in after if item not in before and started(item) < NOW - 900]
    assert all(started(item) > NOW - 6 * 86_400 for item in late)


def test_what_is_edited_shows_in_list_and_detail(ask: Ask, control: Control, token: str) -> None:
    key = control.truth("alice")[3]["id"]

    control.edit(key, fields={"name": "Renamed"}, remove=["distance"])
    item = control.edit(key, fields={"start_date": "2026-06-15T11:00:00Z"})

    assert item["name"] == "Renamed"
    assert item["start_date_local"] == "2026-06-15T13:00:00Z"
    listed = ask(LIST, token, params={"per_page": 1}).json()[0]
    assert listed == item == control.truth("alice")[0]
    assert "distance" not in listed
    detail = ask(f"/api/v3/activities/{key}", token).json()
    assert (detail["name"], detail["start_date"]) == ("Renamed", "2026-06-15T11:00:00Z")


def test_what_is_deleted_is_gone_from_everywhere(ask: Ask, control: Control, token: str) -> None:
    first, second, *rest = control.truth("alice")
    added = control.add("alice")

    control.delete(first["id"])
    control.delete(added)

    assert ask(LIST, token, params={"per_page": 200}).json() == [second, *rest][:200]
    assert ask(f"/api/v3/activities/{first['id']}", token).status_code == 404
    with pytest.raises(Refused, match="no activity 17"):
        control.delete(17)


@pytest.mark.parametrize(
    "raw", [None, "words", {"id": "twelve"}, {"id": 1, "name": "\ud800", "distance": float("nan")}]
)
def test_an_item_can_be_anything(ask: Ask, control: Control, token: str, raw: Any) -> None:
    control.add("alice", raw=raw)

    items = ask(LIST, token, params={"per_page": 2}).json()

    assert json.dumps(items[0]) == json.dumps(raw)
    assert items[1] == control.truth("alice")[1]


@pytest.mark.parametrize("date", ["9999-12-31T23:59:59Z", "2090-01-01T00:00:00Z"])
def test_an_activity_may_be_dated_in_the_far_future(
    ask: Ask, control: Control, token: str, date: str
) -> None:
    control.add("alice", fields={"start_date": date})
    assert ask(LIST, token, params={"per_page": 1}).json()[0]["start_date"] == date
    assert ask(LIST, token, params={"after": NOW, "per_page": 1}).json()[0]["start_date"] == date


@pytest.mark.parametrize(
    "fields", [{"start_date": "0001-01-01T00:00:00Z"}, {"start_date": 5}, {"sport_type": {}}]
)
def test_an_item_may_have_fields_that_cannot_be(
    ask: Ask, control: Control, token: str, fields: dict[str, Any]
) -> None:
    key = control.add("alice", fields={**fields, "elapsed_time": -1})
    (item,) = [item for item in control.truth("alice") if item["id"] == key]
    assert fields.items() <= item.items()
    pages = all_of(walk(ask, token, per_page=200))
    assert pages == control.truth("alice")


def test_a_detail_has_what_the_list_has_not(ask: Ask, control: Control, token: str) -> None:
    item = control.truth("alice")[0]

    detail = ask(f"/api/v3/activities/{item['id']}", token).json()

    assert item.keys() <= detail.keys()
    assert detail["calories"] > 0
    assert {name for name in item if item[name] != detail[name]} == {"resource_state"}
    others = control.truth("bruno")[0]["id"]
    reply = ask(f"/api/v3/activities/{others}", token)
    assert reply.status_code == 404
    assert set(reply.json()) == {"message", "errors"}


def test_streams_are_there_unless_it_was_typed_in(ask: Ask, control: Control, token: str) -> None:
    truth = control.truth("alice")
    recorded = next(item for item in truth if item["has_heartrate"])
    manual = next((item for item in truth if item["manual"]), None)
    path = f"/api/v3/activities/{recorded['id']}/streams"

    found = ask(path, token, params={"keys": "time,heartrate", "key_by_type": "true"}).json()

    assert set(found) == {"time", "heartrate"}
    assert set(found["time"]) == {"data", "series_type", "original_size", "resolution"}
    assert len(found["time"]["data"]) == len(found["heartrate"]["data"]) == found["time"]["original_size"]
    assert ask(path, token, params={"keys": "dreams", "key_by_type": "true"}).status_code == 400
    assert ask(path, token, params={"keys": "time"}).status_code == 400
    assert manual is not None
    path = f"/api/v3/activities/{manual['id']}/streams"
    assert ask(path, token, params={"keys": "time", "key_by_type": "true"}).status_code == 404


def test_an_athlete_is_told_more_with_the_scope_for_it(ask: Ask, control: Control, token: str) -> None:
    wide = control.connect("alice", scopes=["read", "profile:read_all"])[0]["access_token"]

    short, long = ask("/api/v3/athlete", token).json(), ask("/api/v3/athlete", wide).json()

    account = next(person for person in control.people() if person["user_id"] == "alice")
    assert short["id"] == long["id"] == account["strava"]["athlete_id"]
    assert (short["resource_state"], long["resource_state"]) == (2, 3)
    assert "weight" in long.keys() - short.keys()
