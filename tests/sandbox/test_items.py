"""Any item of any stream can be edited, replaced, deleted, brought back: it is so however it is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests

from lifelogger.sandbox.clock import Clock
from lifelogger.sandbox.fitbit import LISTED, SAMPLES, SUMMED, Fitbit
from lifelogger.sandbox.oura import COLLECTIONS, SCOPES, Oura
from lifelogger.sandbox.server import Sandbox
from tests.sandbox.conftest import NOW
from tests.sandbox.control import Control, Refused

STREAMS = [
    ("strava", "activities"),
    *(("fitbit", stream) for stream in Fitbit.streams),
    *(("oura", stream) for stream in Oura.streams),
]
every = pytest.mark.parametrize(("provider", "stream"), STREAMS)
Ask = Callable[..., requests.Response]
ROLL_UP = {
    "range": {
        "start": {"date": {"year": 2026, "month": 6, "day": 3}},
        "end": {"date": {"year": 2026, "month": 6, "day": 17}},
    }
}


@pytest.fixture(scope="module")
def running() -> Iterator[Sandbox]:
    """Short lives: a series of heart rates is looked at as a whole."""
    clock = Clock()
    clock.freeze(NOW)
    with Sandbox(people=2, seed=7, history_days=12, clock=clock) as sandbox:
        yield sandbox


@pytest.fixture
def shown(control: Control, http: requests.Session) -> Callable[[str, str], list[Any]]:
    """All items of a stream as the API lists them to a client that may see all, in its own order."""
    scopes = {"oura": list(SCOPES)}

    def get(provider: str, path: str, **content: Any) -> Any:
        token = control.connect("alice", provider=provider, scopes=scopes.get(provider))[0]["access_token"]
        method = "POST" if "json" in content else "GET"
        reply = http.request(
            method,
            f"{control.url}/{provider}{path}",
            headers={"Authorization": f"Bearer {token}"},
            timeout=10,
            **content,
        )
        assert reply.status_code == 200, reply.text
        return reply.json()

    def pages(provider: str, stream: str) -> Iterator[Any]:
        if provider == "strava":
            yield from get(provider, "/api/v3/athlete/activities", params={"per_page": 200})
            return
        name = "heart-rate" if stream == SAMPLES else stream
        query: dict[str, Any] = {}
        while True:
            if provider == "fitbit" and stream in SUMMED:
                path = f"/v4/users/me/dataTypes/{name}/dataPoints:dailyRollUp"
                page = get(provider, path, json=ROLL_UP)
                yield from page["rollupDataPoints"]
                return
            if provider == "fitbit":
                path = f"/v4/users/me/dataTypes/{name}/dataPoints:reconcile"
                page = get(provider, path, params=query)
                yield from page.get("dataPoints", ())
                query["pageToken"] = page.get("nextPageToken")
                if not query["pageToken"]:
                    return
            else:
                word = "datetime" if stream == "heartrate" else "date"
                begin, end = ("T00:00:00Z", "T23:00:00Z") if stream == "heartrate" else ("", "")
                span = {f"start_{word}": f"2026-06-01{begin}", f"end_{word}": f"2026-06-18{end}"}
                page = get(provider, f"/v2/usercollection/{stream}", params=span | query)
                yield from page["data"]
                query["next_token"] = page["next_token"]
                if not query["next_token"]:
                    return

    return lambda provider, stream: list(pages(provider, stream))


def truth(control: Control, provider: str, stream: str) -> list[Any]:
    return [each["item"] for each in control.items("alice", stream, provider)]


def as_text(item: Any) -> str:
    """To look many up: a series has thousands."""
    return json.dumps(item, sort_keys=True)


@every
def test_the_truth_is_what_the_api_lists(
    control: Control, shown: Callable[[str, str], list[Any]], provider: str, stream: str
) -> None:
    items = truth(control, provider, stream)

    listed = shown(provider, stream)

    assert len(items) > 1
    there, there_too = set(map(as_text, items)), set(map(as_text, listed))
    assert there <= there_too
    strange = [json.loads(text) for text in there_too - there]
    if stream in SUMMED:
        assert all(item.keys() == {"civilStartTime", "civilEndTime"} for item in strange)
    else:
        assert all(item.get("type") == "deleted" for item in strange)
    keys = [each["key"] for each in control.items("alice", stream, provider)]
    assert len(set(keys)) == len(keys)


@every
def test_an_item_is_edited_where_it_stands(
    control: Control, shown: Callable[[str, str], list[Any]], provider: str, stream: str
) -> None:
    before, listed = control.items("alice", stream, provider), shown(provider, stream)
    key, item = before[1].values()
    gone = next(iter(item))

    told = control.change_item("alice", stream, key, provider, fields={"new": {"a": 1, "b": 2}})
    told = control.change_item("alice", stream, key, provider, fields={"new": {"b": 3}}, remove=[gone])

    edited = {name: value for name, value in item.items() if name != gone} | {"new": {"a": 1, "b": 3}}
    assert told == {"key": key, "item": edited}
    after = control.items("alice", stream, provider)
    assert after == [before[0], {"key": key, "item": edited}, *before[2:]]
    assert shown(provider, stream) == [edited if each == item else each for each in listed]


@every
@pytest.mark.parametrize("raw", [None, "words", {"id": "twelve"}])
@pytest.mark.slow
def test_anything_can_take_an_items_place(
    control: Control, shown: Callable[[str, str], list[Any]], provider: str, stream: str, raw: Any
) -> None:
    before, listed = control.items("alice", stream, provider), shown(provider, stream)
    key, item = before[1].values()

    assert control.change_item("alice", stream, key, provider, raw=raw) == {"key": key, "item": raw}

    assert truth(control, provider, stream)[1] == raw
    assert shown(provider, stream) == [raw if each == item else each for each in listed]


@every
def test_an_item_goes_and_comes_back(
    control: Control, shown: Callable[[str, str], list[Any]], provider: str, stream: str
) -> None:
    before, listed = control.items("alice", stream, provider), shown(provider, stream)
    key, item = before[1].values()

    assert control.change_item("alice", stream, key, provider, deleted=True) == {"key": key, "item": None}

    assert control.items("alice", stream, provider) == [before[0], *before[2:]]
    left = shown(provider, stream)
    assert item not in left
    if stream in SUMMED:
        assert len(left) == len(listed)
    elif (provider, stream) == ("oura", "sleep"):
        assert {**item, "type": "deleted"} in left
    else:
        assert left == [each for each in listed if each != item]
    assert control.change_item("alice", stream, key, provider, deleted=False)["item"] == item
    assert shown(provider, stream) == listed
    assert control.items("alice", stream, provider) == before


@every
def test_nobody_else_is_changed(control: Control, provider: str, stream: str) -> None:
    other = control.items("bruno", stream, provider)
    key = control.items("alice", stream, provider)[0]["key"]

    control.change_item("alice", stream, key, provider, raw=None)

    assert control.items("bruno", stream, provider) == other


@pytest.mark.parametrize("stream", COLLECTIONS)
def test_one_document_is_as_it_is_in_the_list(control: Control, http: requests.Session, stream: str) -> None:
    key, item = control.items("alice", stream, "oura")[1].values()
    token = control.connect("alice", provider="oura")[0]["access_token"]

    def get() -> requests.Response:
        url = f"{control.url}/oura/v2/usercollection/{stream}/{item['id']}"
        return http.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=10)

    edited = control.change_item("alice", stream, key, "oura", fields={"id": "x", "score": 1})["item"]
    assert get().json() == edited
    control.change_item("alice", stream, key, "oura", deleted=True)
    assert get().status_code == (200 if stream == "sleep" else 404)


def test_one_activity_is_as_it_is_in_the_list(control: Control, http: requests.Session) -> None:
    key, item = control.items("alice", "activities")[0].values()
    token = control.connect("alice")[0]["access_token"]
    fields = {"map": {"summary_polyline": "x"}, "calories": 1}

    edited = control.change_item("alice", "activities", key, fields=fields)["item"]

    url = f"{control.url}/strava/api/v3/activities/{item['id']}"
    detail = http.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=10).json()
    assert edited["map"] == item["map"] | fields["map"] == detail["map"]
    assert detail["calories"] == 1


def test_nested_fields_are_changed_and_removed(control: Control) -> None:
    key, item = control.items("alice", "sleep", "fitbit")[0].values()

    edited = control.change_item(
        "alice",
        "sleep",
        key,
        "fitbit",
        fields={"sleep": {"type": "NEW", "summary": {}}},
        remove=["sleep.metadata.processed", "sleep.nothing.there", "nothing"],
    )["item"]

    metadata = {name: value for name, value in item["sleep"]["metadata"].items() if name != "processed"}
    assert edited == item | {"sleep": item["sleep"] | {"type": "NEW", "summary": {}, "metadata": metadata}}
    again = control.change_item("alice", "sleep", key, "fitbit", fields={"sleep": {"metadata": 5}})["item"]
    assert again["sleep"]["metadata"] == 5


def test_what_was_changed_in_an_activity_is_one_memory(control: Control) -> None:
    """Whichever of the two verbs changed it."""
    key = control.items("alice", "activities")[2]["key"]

    control.edit(int(key), fields={"name": "first"})
    control.change_item("alice", "activities", key, fields={"description": "second"})
    control.delete(int(key))
    control.change_item("alice", "activities", key, deleted=False)

    [item] = [each["item"] for each in control.items("alice", "activities") if each["key"] == key]
    assert (item["name"], item["description"]) == ("first", "second")
    assert truth(control, "strava", "activities") == control.truth("alice")


@pytest.mark.parametrize(
    ("provider", "stream", "fields"),
    [
        ("strava", "activities", {"start_date": "2026-06-15T12:00:00Z"}),
        ("fitbit", "exercise", {"exercise": {"interval": {"startTime": "2026-06-15T12:00:00Z"}}}),
        ("oura", "workout", {"start_datetime": "2026-06-15T14:00:00.000+02:00"}),
    ],
)
def test_an_activity_moves_with_its_start(
    control: Control,
    shown: Callable[[str, str], list[Any]],
    provider: str,
    stream: str,
    fields: dict[str, Any],
) -> None:
    key = control.items("alice", stream, provider)[-1]["key"]

    control.change_item("alice", stream, key, provider, fields=fields)

    newest = control.items("alice", stream, provider)[0]
    assert newest["key"] == key
    assert newest["item"] in shown(provider, stream)
    if provider == "strava":
        assert newest["item"]["start_date_local"] == "2026-06-15T14:00:00Z"


def test_fields_of_an_exercise_are_replaced_as_a_whole_by_the_activitys_verb(control: Control) -> None:
    key = int(control.items("alice", "exercise", "fitbit")[0]["key"])

    item = control.edit(key, provider="fitbit", fields={"metricsSummary": {"steps": "5"}})

    assert item["exercise"]["metricsSummary"] == {"steps": "5"}
    assert "exerciseType" in item["exercise"]
    assert "metricsSummary" not in item
    again = control.edit(key, provider="fitbit", remove=["metricsSummary"])
    assert "metricsSummary" not in again["exercise"]


def test_a_change_stays_with_a_day_that_goes_on(control: Control) -> None:
    key = control.items("alice", "steps", "fitbit")[0]["key"]
    control.change_item("alice", "steps", key, "fitbit", fields={"new": 1})
    before = truth(control, "fitbit", "steps")[0]

    control.step(4 * 3600)

    after = truth(control, "fitbit", "steps")[0]
    assert after["new"] == before["new"] == 1
    assert int(after["steps"]["countSum"]) > int(before["steps"]["countSum"])


def test_a_sleep_that_is_deleted_anyhow_is_no_item(control: Control) -> None:
    key = control.items("alice", "sleep", "oura")[0]["key"]

    control.change_item("alice", "sleep", key, "oura", fields={"type": "deleted"})

    assert key not in {each["key"] for each in control.items("alice", "sleep", "oura")}


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"stream": "dreams"}, "no stream 'dreams' at Fitbit: one of exercise, sleep"),
        ({"key": "2026-06-40"}, "alice has no '2026-06-40' among their steps at Fitbit"),
        ({"key": "12"}, "alice has no '12'"),
        ({"stream": "exercise", "key": "x"}, "alice has no 'x'"),
        ({"key": 5}, "key"),
        ({"deleted": "yes"}, "deleted"),
        ({"fields": []}, "fields"),
        ({"remove": "all"}, "remove"),
        ({"colour": 1}, "no parameter 'colour'"),
        ({"provider": "polar"}, "no provider"),
    ],
)
def test_nonsense_is_refused_with_a_sentence(control: Control, body: dict[str, Any], sentence: str) -> None:
    good = {"provider": "fitbit", "stream": "steps", "key": "2026-06-14"}

    with pytest.raises(Refused, match=f": 400 .*{sentence}"):
        control.post("people/alice/items", **{**good, **body})


def test_another_persons_activity_is_no_key(control: Control) -> None:
    key = control.items("bruno", "activities")[0]["key"]
    with pytest.raises(Refused, match="alice has no"):
        control.change_item("alice", "activities", key, deleted=True)
    with pytest.raises(Refused, match="no stream"):
        control.items("alice", "steps")


def test_changes_survive_a_restart_and_not_a_reset(tmp_path: Any) -> None:
    options: dict[str, Any] = {"people": 1, "seed": 7, "history_days": 12, "state": tmp_path / "state"}
    clock = Clock()
    clock.freeze(NOW)
    with Sandbox(clock=clock, **options) as sandbox:
        control = Control(sandbox.url)
        before = control.items("alice", "sleep", "fitbit")
        control.change_item(
            "alice", "sleep", before[0]["key"], "fitbit", fields={"a": {"b": 1}}, remove=["sleep"]
        )
        control.change_item("alice", "sleep", before[1]["key"], "fitbit", deleted=True)
        control.change_item("alice", "sleep", before[2]["key"], "fitbit", raw=None)
        changed = control.items("alice", "sleep", "fitbit")
        control.close()

    with Sandbox(clock=clock, **options) as sandbox:
        control = Control(sandbox.url)
        assert control.items("alice", "sleep", "fitbit") == changed != before
        control.reset()
        assert control.items("alice", "sleep", "fitbit") == before
        control.close()


def test_every_list_of_a_specification_is_a_stream() -> None:
    assert {*LISTED, *SUMMED, SAMPLES} == set(Fitbit.streams)
    assert {*COLLECTIONS, "heartrate"} == set(Oura.streams)
