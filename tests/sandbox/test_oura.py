"""The simulated Oura against Oura's own document: what it answers, and what it refuses to be asked."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, timedelta
from itertools import pairwise
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests

from tests.sandbox.control import Control, Refused
from tests.sandbox.openapi import SPEC

COLLECTIONS = {
    "daily_activity": "daily",
    "daily_readiness": "daily",
    "daily_sleep": "daily",
    "daily_spo2": "spo2Daily",
    "sleep": "daily",
    "workout": "workout",
    "session": "session",
}
BASE = "/v2/usercollection"
DAY = 86_400
Get = Callable[..., requests.Response]
every = pytest.mark.parametrize("name", COLLECTIONS)


@pytest.fixture
def token(control: Control) -> str:
    return str(control.connect("alice", provider="oura")[0]["access_token"])


@pytest.fixture
def get(control: Control, http: requests.Session, token: str) -> Get:
    """Ask Oura: `get("sleep", start_date=…)`, as Alice unless `token` says otherwise."""

    def ask(path: str, token: str = token, **query: str) -> requests.Response:
        headers = {"Authorization": f"Bearer {token}"}
        return http.get(f"{control.url}/oura{BASE}/{path}", params=query, headers=headers, timeout=10)

    return ask


def everything(
    get: Get, name: str, first: str = "2026-04-15", last: str = "2026-06-17", **of: Any
) -> list[Any]:
    """All documents of a span, each page checked against the document."""
    found: list[Any] = []
    query = {"start_date": first, "end_date": last}
    while True:
        reply = get(name, **query, **of)
        assert SPEC.refuses("GET", reply.url.partition("/oura")[2]) is None
        assert SPEC.faults(f"{BASE}/{name}", reply.json()) == []
        found += reply.json()["data"]
        if reply.json()["next_token"] is None:
            return found
        query["next_token"] = reply.json()["next_token"]


# Replies ---------------------------------------------------------------------------------------------


@every
def test_replies_are_what_the_document_says(get: Get, control: Control, name: str) -> None:
    for person in ("alice", "bruno", "ewa"):
        token = control.connect(person, provider="oura")[0]["access_token"]

        items = everything(get, name, token=token)

        assert len(items) > 4
        assert len({item["id"] for item in items}) == len(items)
        assert items == sorted(items, key=lambda item: (item["day"], item["id"]))
        assert items == everything(get, name, token=token)


@every
def test_pages_come_to_the_same_as_one(get: Get, control: Control, name: str) -> None:
    control.settings(provider="oura", page_size=1000)
    at_once = everything(get, name)
    control.settings(provider="oura", page_size=3)

    assert everything(get, name, first="2026-05-01") == [
        item for item in at_once if item["day"] >= "2026-05-01"
    ]


@every
def test_days_are_inclusive_but_for_the_last_of_activity(get: Get, name: str) -> None:
    items = everything(get, name, "2026-05-01", "2026-05-20")
    alone = everything(get, name, items[1]["day"], items[1]["day"])

    assert {item["day"] for item in items} <= {f"2026-05-{day:02}" for day in range(1, 21)}
    if name == "daily_activity":
        assert (alone, items[-1]["day"]) == ([], "2026-05-19")
    else:
        assert alone == [item for item in items if item["day"] == items[1]["day"]]


@every
def test_one_document_by_its_id_and_no_other_persons(get: Get, control: Control, name: str) -> None:
    item = everything(get, name, "2026-05-01")[0]
    bruno = control.connect("bruno", provider="oura")[0]["access_token"]

    assert get(f"{name}/{item['id']}").json() == item
    assert get(f"{name}/{item['id']}", token=bruno).status_code == 404


def test_fields_narrow_a_reply(get: Get) -> None:
    (item,) = get("daily_sleep", start_date="2026-06-10", end_date="2026-06-10", fields="day,score").json()[
        "data"
    ]

    assert item.keys() == {"id", "day", "score"}


def test_a_run_on_the_watch_is_there_too(get: Get, control: Control) -> None:
    """One life: the same activities as everywhere, at the same time and as long."""
    other = {
        (datetime.fromisoformat(item["start_date"]), item["elapsed_time"])
        for item in control.truth("alice")
        if item["start_date"] > "2026-05-02"
    }

    items = everything(get, "workout", "2026-05-01")

    assert len(other) > 5
    assert other <= {(begun(item), (ended(item) - begun(item)).total_seconds()) for item in items}


def begun(item: Any) -> datetime:
    return datetime.fromisoformat(item["start_datetime"])


def ended(item: Any) -> datetime:
    return datetime.fromisoformat(item["end_datetime"])


def test_heart_rate_is_a_series_of_instants(get: Get, control: Control) -> None:
    token = control.connect("alice", provider="oura", scopes=["heartrate"])[0]["access_token"]
    query = {"start_datetime": "2026-06-01T00:00:00Z", "end_datetime": "2026-06-15T10:00:00+02:00"}

    first = get("heartrate", token=token, **query)
    rest = get("heartrate", token=token, **query, next_token=first.json()["next_token"])
    latest = get("heartrate", token=token, latest="true")

    for reply in (first, rest, latest):
        assert SPEC.refuses("GET", reply.url.partition("/oura")[2]) is None
        assert SPEC.faults(f"{BASE}/heartrate", reply.json()) == []
    rows = first.json()["data"] + rest.json()["data"]
    times = [row["timestamp"] for row in rows]
    assert times == sorted(set(times))
    assert (times[0], times[-1]) == ("2026-06-01T00:00:00.000Z", "2026-06-15T07:55:00.000Z")
    assert rest.json()["next_token"] is None
    assert latest.json()["data"][0]["timestamp"] == "2026-06-15T11:55:00.000Z"
    assert get("heartrate").status_code == 403
    assert get("heartrate", token=token, start_date="2026-06-01").status_code == 400
    assert get("heartrate", token=token, start_datetime="June").status_code == 422
    assert get("heartrate", token=token, next_token="x").status_code == 400


@pytest.mark.slow
def test_sleep_belongs_to_the_day_of_waking_and_a_late_nap_to_the_next(get: Get, control: Control) -> None:
    kinds: set[str] = set()
    for person in ("alice", "bruno", "chiyo", "devi", "ewa"):
        token = control.connect(person, provider="oura")[0]["access_token"]
        items = everything(get, "sleep", "2025-12-01", token=token)
        for item in items:
            woken = datetime.fromisoformat(item["bedtime_end"])
            late = item["type"] == "late_nap" or (item["type"] == "deleted" and woken.hour >= 18)
            assert date.fromisoformat(item["day"]) - woken.date() == timedelta(days=late)
            assert late == (woken.hour >= 18)
            kinds.add(item["type"])
            assert item["time_in_bed"] == item["total_sleep_duration"] + item["awake_time"]
        spans = sorted((item["bedtime_start"], item["bedtime_end"]) for item in items)
        assert all(before[0] < after[0] for before, after in pairwise(spans))
    assert {"long_sleep", "sleep", "deleted"} <= kinds


def test_recent_days_are_revised_and_old_ones_are_not(get: Get, control: Control) -> None:
    control.set_clock("2026-06-15T07:30:00Z")
    before = {(name, item["id"]): item for name in COLLECTIONS for item in everything(get, name)}
    control.step(12 * 3600)

    after = {(name, item["id"]): item for name in COLLECTIONS for item in everything(get, name)}

    changed = {key for key, item in before.items() if after[key] != item}
    assert {"daily_activity", "daily_readiness", "daily_sleep", "sleep"} <= {name for name, _ in changed}
    assert min(before[key]["day"] for key in changed) >= "2026-06-13"


# What is refused -------------------------------------------------------------------------------------


@every
def test_a_parameter_that_the_document_lacks_is_an_error(get: Get, control: Control, name: str) -> None:
    reply = get(name, start_date="2026-05-01", end_date="2026-05-02", per_page="200")

    assert reply.status_code == 400
    assert control.ledger(provider="oura")[-1]["note"] == "no parameter per_page"
    assert SPEC.parameters(f"{BASE}/{name}").keys() == {"start_date", "end_date", "next_token", "fields"}


@pytest.mark.parametrize(
    ("query", "status", "note"),
    [
        ({"start_date": "01/05/2026"}, 422, "start_date: not a date"),
        ({"end_date": "2026-02-30"}, 422, "end_date: not a date"),
        ({"start_date": "2026-05-03", "end_date": "2026-05-01"}, 400, "start_date is after end_date"),
        ({"next_token": "2"}, 400, "next_token: not one of ours"),
        ({"start_datetime": "2026-05-01T00:00:00Z"}, 400, "no parameter start_datetime"),
    ],
)
def test_a_value_that_cannot_be_is_an_error(
    get: Get, control: Control, query: dict[str, str], status: int, note: str
) -> None:
    reply = get("sleep", **query)

    assert (reply.status_code, control.ledger(provider="oura")[-1]["note"]) == (status, note)
    if status == 422:
        assert SPEC.faults(f"{BASE}/sleep", reply.json(), 422) == []
        assert SPEC.refuses("GET", f"{BASE}/sleep?{reply.url.partition('?')[2]}") is not None


@pytest.mark.parametrize("path", ["sleeps", "sleep/a/b", "daily_activity/", "../v1/sleep"])
def test_a_path_that_the_document_lacks_is_an_error(get: Get, control: Control, path: str) -> None:
    assert get(path).status_code == 404
    assert control.ledger(provider="oura")[-1]["note"] in ("no such route", "no such document")


@every
def test_each_collection_wants_its_scope(get: Get, control: Control, name: str) -> None:
    others = sorted(set(COLLECTIONS.values()) - {COLLECTIONS[name]})
    token = control.connect("alice", provider="oura", scopes=others)[0]["access_token"]

    assert get(name, token=token).status_code == 403
    assert control.ledger(provider="oura")[-1]["note"] == f"scope {COLLECTIONS[name]} is missing"


def test_the_scopes_are_those_of_the_document(control: Control) -> None:
    flow = SPEC.document["components"]["securitySchemes"]["OAuth2"]["flows"]["authorizationCode"]

    lines = control.connect("alice", provider="oura", scopes=sorted(flow["scopes"]))

    assert lines[0]["scopes"] == sorted(flow["scopes"])
    with pytest.raises(Refused, match="no scope"):
        control.connect("alice", provider="oura", scopes=["activity"])


def test_an_ended_subscription_is_forbidden_and_still_has_a_name(get: Get, control: Control) -> None:
    control.settings(provider="oura", lapsed=["alice"])

    assert get("sleep").status_code == 403
    told = get("personal_info").json()
    assert told["id"] == control.connect("alice", provider="oura")[0]["provider_user_id"]
    assert SPEC.faults(f"{BASE}/personal_info", told) == []
    with pytest.raises(Refused, match="lapsed"):
        control.settings(provider="oura", lapsed=["nobody"])


def test_without_a_working_token(get: Get, control: Control, token: str) -> None:
    assert get("sleep", token="wrong").status_code == 401
    control.step(DAY + 1)
    assert get("sleep").status_code == 401
    control.step(-DAY - 1)
    control.revoke("alice", provider="oura")
    assert get("sleep").status_code == 401


def test_more_than_the_limit_is_429_with_the_headers(get: Get, control: Control) -> None:
    control.limits(provider="oura", requests=[2])

    replies = [get("sleep") for _ in range(3)]

    names = [
        "Retry-After",
        "X-RateLimit-Limit",
        "X-RateLimit-Window",
        "X-RateLimit-Reset",
        "X-RateLimit-Tier",
    ]
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert not set(names) & replies[1].headers.keys()
    told = [replies[2].headers[name] for name in names]
    reset = (int(control.now()) // 300 + 1) * 300
    assert told == [str(reset - int(control.now())), "2", "300", str(reset), "application"]
    control.step(int(told[0]))
    assert get("sleep").status_code == 200


# Authorisation ---------------------------------------------------------------------------------------


def test_sign_in_and_single_use_refresh_tokens(control: Control, http: requests.Session, get: Get) -> None:
    query = {
        "client_id": "app",
        "response_type": "code",
        "redirect_uri": "http://here.example/back",
        "scope": "daily workout session",
        "state": "s",
        "person": "bruno",
        "grant": "daily workout",
    }
    back = http.get(
        f"{control.url}/oura/oauth/authorize", params=query, allow_redirects=False, timeout=10
    ).headers["Location"]
    told = parse_qs(urlsplit(back).query)
    assert (told["state"], told["scope"]) == (["s"], ["daily workout"])

    def exchange(**form: str) -> requests.Response:
        form = {"client_id": "app", "client_secret": "secret", **form}
        return http.post(f"{control.url}/oura/oauth/token", data=form, timeout=10)

    code = {"code": told["code"][0], "redirect_uri": query["redirect_uri"]}
    first = exchange(grant_type="authorization_code", **code).json()
    second = exchange(grant_type="refresh_token", refresh_token=first["refresh_token"])
    again = exchange(grant_type="refresh_token", refresh_token=first["refresh_token"])

    assert (first["expires_in"], first["scope"]) == (DAY, "daily workout")
    assert second.json()["refresh_token"] != first["refresh_token"]
    assert (again.status_code, again.json()) == (400, {"error": "invalid_grant"})
    assert control.summary()["refresh_tokens_used_twice"] == 1
    assert exchange(grant_type="authorization_code", **code).json() == {"error": "invalid_grant"}
    assert exchange(grant_type="refresh_token", client_secret="other").status_code == 401
    assert exchange(grant_type="password").json() == {"error": "unsupported_grant_type"}
    access = second.json()["access_token"]
    assert get("workout", token=access).status_code == 200
    assert get("session", token=access).status_code == 403
    assert http.post(f"{control.url}/oura/oauth/revoke", params={"access_token": access}, timeout=10).ok
    assert get("workout", token=access).status_code == 401


def test_a_sign_in_that_makes_no_sense(control: Control, http: requests.Session) -> None:
    reply = http.get(f"{control.url}/oura/oauth/authorize", params={"client_id": "app"}, timeout=10)

    assert reply.status_code == 400
    assert control.ledger(provider="oura")[-1]["note"].startswith("redirect_uri")
