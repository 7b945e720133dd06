"""The simulated Fitbit against Google's own discovery document, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest
import requests

from lifelogger.sandbox import fitbit
from lifelogger.sandbox.fitbit import LISTED, SUMMED
from tests.sandbox.conftest import NOW
from tests.sandbox.control import Control, Refused
from tests.sandbox.google_health import spec

Ask = Callable[..., requests.Response]
POINTS = "/v4/users/me/dataTypes/{}/dataPoints"
SINCE = {
    "interval.civil_start_time": "2026-06-01",
    "interval.end_time": "2026-06-01T00:00:00Z",
    "date": "2026-06-01",
    "sample_time.physical_time": "2026-06-01T00:00:00+02:00",
}


@pytest.fixture
def token(control: Control) -> str:
    return str(control.connect("alice", provider="fitbit")[0]["access_token"])


@pytest.fixture
def ask(control: Control, http: requests.Session, token: str) -> Ask:
    """Ask as Alice: `ask(path, **of requests)`; a body makes it a POST."""

    def send(path: str, **content: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {content.pop('token', token)}"}
        method = content.pop("method", "POST" if {"json", "data"} & content.keys() else "GET")
        return http.request(
            method,
            f"{control.url}/fitbit{path}",
            headers=headers,
            timeout=10,
            allow_redirects=False,
            **content,
        )

    return send


def member(name: str) -> str:
    return next(each for each in LISTED[name].members if each in SINCE)


def since(name: str) -> str:
    return f'{name.replace("-", "_")}.{member(name)} >= "{SINCE[member(name)]}"'


def days(first: tuple[int, int, int], end: tuple[int, int, int], **more: Any) -> dict[str, Any]:
    ends = [{"date": dict(zip(("year", "month", "day"), each, strict=True))} for each in (first, end)]
    return {"range": {"start": ends[0], "end": ends[1]}, **more}


# As specified -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["", ":reconcile"])
@pytest.mark.parametrize("name", LISTED)
def test_lists_are_as_specified(ask: Ask, name: str, method: str) -> None:
    """Of the reply's schema, unknown fields and missing required ones are faults as well."""
    reply = ask(POINTS.format(name) + method, params={"filter": since(name)}).json()

    about = spec.method("GET", POINTS.format(name) + method)
    assert about is not None
    assert spec.faults("ReconcileDataPointsResponse", reply) == []
    assert reply["dataPoints"]


@pytest.mark.parametrize("name", SUMMED)
def test_roll_ups_are_as_specified(ask: Ask, name: str) -> None:
    body = days((2026, 6, 1), (2026, 6, 14), windowSizeDays=1, pageSize=14)
    assert spec.faults("DailyRollUpDataPointsRequest", body) == []

    reply = ask(f"{POINTS.format(name)}:dailyRollUp", json=body).json()

    assert spec.faults("DailyRollUpDataPointsResponse", reply) == []
    assert len(reply["rollupDataPoints"]) == 13


def test_the_identity_is_as_specified(ask: Ask, control: Control) -> None:
    reply = ask("/v4/users/me/identity").json()

    assert spec.faults("Identity", reply) == []
    assert reply["healthUserId"] == control.people()[0]["fitbit"]["healthUserId"]


def test_the_referee_finds_what_it_is_for() -> None:
    good = {"dataPoints": [{"steps": {"count": "5"}}]}
    bad = {"dataPoints": [{"steps": {"count": 5}}]}
    strange: dict[str, Any] = {"dataPoints": [{"step": {}}]}

    assert "interval" in spec.faults("ReconcileDataPointsResponse", good)[0]
    assert len(spec.faults("ReconcileDataPointsResponse", bad)) == 2
    assert len(spec.faults("ReconcileDataPointsResponse", strange)) == 1


@pytest.mark.parametrize(
    ("verb", "path"),
    [
        ("GET", POINTS.format("sleep")),
        ("GET", POINTS.format("sleep") + ":reconcile"),
        ("POST", POINTS.format("steps") + ":dailyRollUp"),
        ("GET", "/v4/users/me/identity"),
    ],
)
def test_it_knows_the_parameters_that_the_specification_has(verb: str, path: str) -> None:
    about = spec.method(verb, path)
    assert about is not None

    asked = {name for name, each in about["parameters"].items() if each["location"] == "query"}

    assert asked == (set(fitbit.LIST_PARAMETERS) if "filter" in asked else set())
    assert set(spec.document["schemas"]["DailyRollUpDataPointsRequest"]["properties"]) == set(
        fitbit.ROLLUP_FIELDS
    )


# What it refuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "content"),
    [
        (POINTS.format("sleep"), {"params": {"filter": since("sleep"), "page_size": 5}}),
        (
            POINTS.format("sleep"),
            {"params": {"filter": 'sleep.interval.start_time >= "2026-06-01T00:00:00Z"'}},
        ),
        (POINTS.format("sleep"), {"params": {"filter": 'sleep.interval.end_time > "2026-06-01T00:00:00Z"'}}),
        (POINTS.format("sleep"), {"params": {"filter": 'sleep.interval.end_time >= "2026-06-01"'}}),
        (POINTS.format("sleep"), {"params": {"filter": since("weight")}}),
        (POINTS.format("exercise"), {"params": {"filter": 'exercise.interval.start_time >= "2026-06-01"'}}),
        (POINTS.format("sleep"), {"params": {"filter": since("sleep"), "pageSize": "many"}}),
        (POINTS.format("sleep"), {"params": {"filter": since("sleep"), "pageToken": "made-up"}}),
        (POINTS.format("dreams"), {"params": {}}),
        (POINTS.format("heart-rate-samples"), {"params": {}}),
        (f"{POINTS.format('steps')}:dailyRollUp", {"json": days((2026, 1, 1), (2026, 4, 2))}),
        (f"{POINTS.format('heart-rate')}:dailyRollUp", {"json": days((2026, 6, 1), (2026, 6, 16))}),
        (f"{POINTS.format('steps')}:dailyRollUp", {"json": days((2026, 6, 1), (2026, 6, 1))}),
        (f"{POINTS.format('steps')}:dailyRollUp", {"json": {}}),
        (f"{POINTS.format('steps')}:dailyRollUp", {"json": days((2026, 6, 1), (2026, 6, 2), window=1)}),
        (f"{POINTS.format('steps')}:dailyRollUp", {"json": days((2026, 2, 30), (2026, 6, 2))}),
        (f"{POINTS.format('steps')}:dailyRollUp", {"data": "{"}),
    ],
)
def test_what_the_specification_does_not_have_is_refused_and_noted(
    ask: Ask, control: Control, path: str, content: dict[str, Any]
) -> None:
    reply = ask(path, **content)

    assert (reply.status_code, reply.json()["error"]["status"]) == (400, "INVALID_ARGUMENT")
    assert control.ledger(provider="fitbit")[-1]["note"].startswith("not in the specification")


@pytest.mark.parametrize(
    "path", ["/v4/users/me/dataPoints", "/v4/users/me/dataTypes/sleep", "/1/user/-/sleep"]
)
def test_a_path_that_there_is_not_is_not_found(ask: Ask, control: Control, path: str) -> None:
    assert spec.refuses("GET", path) is not None
    assert ask(path).status_code == 404
    assert control.ledger(provider="fitbit")[-1]["note"] == "no such route"


def test_a_list_without_a_filter_is_noted(ask: Ask, control: Control) -> None:
    assert ask(POINTS.format("weight")).status_code == 200
    assert control.ledger(provider="fitbit")[-1]["note"].startswith("no filter")


# Pages and filters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["descending", "ascending"])
def test_pages_have_25_sessions_at_most_and_their_tokens_end(ask: Ask, control: Control, order: str) -> None:
    control.settings("fitbit", order=order)
    wanted = 'sleep.interval.end_time >= "2026-04-01T00:00:00Z"'
    query, sizes, starts = {"filter": wanted, "pageSize": "1000"}, [], []
    while True:
        reply = ask(POINTS.format("sleep") + ":reconcile", params=query).json()
        sizes.append(len(reply["dataPoints"]))
        starts += [point["sleep"]["interval"]["startTime"] for point in reply["dataPoints"]]
        if not reply.get("nextPageToken"):
            break
        query["pageToken"] = reply["nextPageToken"]

    assert len(sizes) > 2
    assert set(sizes[:-1]) == {25}
    assert starts == sorted(starts, reverse=order == "descending")
    assert len(set(starts)) == len(starts)


def test_both_ends_of_a_filter_are_kept(ask: Ask) -> None:
    """From and including, up to and without."""
    all_ = ask(POINTS.format("weight"), params={"filter": since("weight")}).json()["dataPoints"]
    times = sorted(point["weight"]["sampleTime"]["physicalTime"] for point in all_)
    name = "weight.sample_time.physical_time"

    some = ask(
        POINTS.format("weight"), params={"filter": f'{name} >= "{times[1]}" AND {name} < "{times[3]}"'}
    ).json()["dataPoints"]

    assert sorted(point["weight"]["sampleTime"]["physicalTime"] for point in some) == times[1:3]


@pytest.mark.slow
def test_heart_rate_is_a_sample_each_five_minutes_that_it_was_worn(ask: Ask) -> None:
    """To the full hour, newest first; 1440 in a page unless more are wanted, 10,000 at most."""
    path, name = POINTS.format("heart-rate") + ":reconcile", "heart_rate.sample_time.physical_time"
    query = {"filter": f'{name} >= "2026-05-01T00:00:00Z" AND {name} < "2026-06-15T23:00:00+02:00"'}

    usual = ask(path, params=query).json()
    largest = ask(path, params={**query, "pageSize": "20000"}).json()
    rest = ask(path, params={**query, "pageSize": "20000", "pageToken": largest["nextPageToken"]}).json()

    assert (len(usual["dataPoints"]), len(largest["dataPoints"])) == (1440, 10_000)
    samples = [point["heartRate"] for point in largest["dataPoints"] + rest["dataPoints"]]
    assert usual["dataPoints"] == largest["dataPoints"][:1440]
    assert "nextPageToken" not in rest
    times = [sample["sampleTime"]["physicalTime"] for sample in samples]
    assert times == sorted(set(times), reverse=True)
    assert (times[0], times[-1]) == ("2026-06-15T11:55:00Z", "2026-05-01T00:00:00Z")
    gaps = {
        (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()
        for later, earlier in pairwise(times)
    }
    assert gaps == {300, 600}
    assert all(30 < int(sample["beatsPerMinute"]) < 140 for sample in samples)


def test_samples_are_found_by_the_time_on_the_wall_too(ask: Ask) -> None:
    name = "heart_rate.sample_time.civil_time"
    wanted = f'{name} >= "2026-06-10T08:00:00" AND {name} < "2026-06-10T09:00:00"'

    points = ask(POINTS.format("heart-rate"), params={"filter": wanted}).json()["dataPoints"]

    times = [point["heartRate"]["sampleTime"]["physicalTime"] for point in points]
    assert 10 < len(times) <= 12
    assert all(time.startswith("2026-06-10T06:") for time in times)


# One life ---------------------------------------------------------------------------------------------


def test_a_run_on_the_watch_is_everywhere(ask: Ask, control: Control) -> None:
    control.add("alice", start=NOW - 3600, elapsed=1800, sport="Run")

    ours = control.truth("alice", provider="fitbit")[0]["exercise"]
    theirs = control.truth("alice", provider="strava")[0]

    assert ours["interval"]["startTime"] == theirs["start_date"]
    assert ours["metricsSummary"]["distanceMillimeters"] == round(theirs["distance"] * 1000, 1)
    assert (ours["exerciseType"], theirs["sport_type"]) == ("RUNNING", "Run")


def test_the_same_seed_sleeps_the_same_nights(ask: Ask) -> None:
    path, query = POINTS.format("sleep"), {"filter": since("sleep")}

    first, again = (ask(path, params=query).json() for _ in range(2))

    assert first == again
    spans = sorted(
        (point["sleep"]["interval"]["startTime"], point["sleep"]["interval"]["endTime"])
        for point in first["dataPoints"]
    )
    assert all(earlier[1] < later[0] for earlier, later in pairwise(spans))


# Who may --------------------------------------------------------------------------------------------


def error(reply: requests.Response) -> tuple[int, str, str | None]:
    told = reply.json()["error"]
    reasons = [each["reason"] for each in told.get("details", [])]
    assert told["code"] == reply.status_code
    return reply.status_code, told["status"], reasons[0] if reasons else None


def test_errors_have_googles_shape(ask: Ask, control: Control) -> None:
    path = "/v4/users/me/identity"
    poor = control.connect("bruno", provider="fitbit", scopes=[fitbit.SLEEP])[0]["access_token"]
    weight = POINTS.format("weight")

    assert error(ask(path, token="nonsense")) == (401, "UNAUTHENTICATED", None)
    assert error(ask(weight, token=poor)) == (403, "PERMISSION_DENIED", "ACCESS_TOKEN_SCOPE_INSUFFICIENT")
    control.settings("fitbit", not_linked=["alice"])
    assert error(ask(path)) == (400, "FAILED_PRECONDITION", "ACCOUNT_NOT_LINKED")
    control.settings("fitbit", not_linked=[])
    control.limits("fitbit", user=[3])
    assert [ask(path).status_code for _ in range(3)] == [200, 200, 429]
    assert error(ask(path)) == (429, "RESOURCE_EXHAUSTED", "RATE_LIMIT_EXCEEDED")
    assert ask(path, token=control.connect("chiyo", provider="fitbit")[0]["access_token"]).ok


@pytest.fixture
def line(control: Control) -> dict[str, Any]:
    return control.connect("alice", provider="fitbit")[0]


def test_a_refresh_reply_has_no_refresh_token(ask: Ask, line: dict[str, Any], control: Control) -> None:
    """And the old one goes on, until it is revoked."""
    form = {
        "client_id": "sandbox",
        "client_secret": "sandbox",
        "grant_type": "refresh_token",
        "refresh_token": line["refresh_token"],
    }

    for _ in range(2):
        reply = ask("/token", data=form).json()
        assert reply.keys() == {"access_token", "expires_in", "scope", "token_type"}
        assert reply["expires_in"] == 3600
        assert ask("/v4/users/me/identity", token=reply["access_token"]).ok
    assert ask("/revoke", data={"token": line["refresh_token"]}).status_code == 200
    dead = ask("/token", data=form)

    assert (dead.status_code, dead.json()["error"]) == (400, "invalid_grant")
    assert ask("/v4/users/me/identity", token=line["access_token"]).status_code == 401


def test_a_person_lets_an_application_in(ask: Ask, control: Control) -> None:
    query = {
        "client_id": "sandbox",
        "response_type": "code",
        "redirect_uri": "http://localhost/back",
        "scope": " ".join(fitbit.USUAL_SCOPES),
        "state": "s",
        "access_type": "offline",
        "person": "bruno",
    }
    back = ask("/o/oauth2/v2/auth", params=query)
    code = back.headers["Location"].split("code=")[1].split("&")[0]

    reply = ask(
        "/token",
        data={
            "client_id": "sandbox",
            "client_secret": "sandbox",
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": "http://localhost/back",
        },
    ).json()

    assert reply.keys() == {"access_token", "expires_in", "scope", "token_type", "refresh_token"}
    who = ask("/v4/users/me/identity", token=reply["access_token"]).json()
    assert who["healthUserId"] == control.people()[1]["fitbit"]["healthUserId"]


def test_an_access_token_lives_for_an_hour(ask: Ask, control: Control, line: dict[str, Any]) -> None:
    assert line["expires_at"] == NOW + 3600
    control.step(3599)
    assert ask("/v4/users/me/identity", token=line["access_token"]).ok
    control.step(1)
    assert ask("/v4/users/me/identity", token=line["access_token"]).status_code == 401
    assert datetime.fromtimestamp(control.now(), UTC).year == 2026


def test_settings_that_there_are_not_are_refused(control: Control) -> None:
    for wrong in ({"order": "random"}, {"not_linked": "alice"}, {"nonsense": 1}):
        with pytest.raises(Refused):
            control.settings("fitbit", **wrong)
