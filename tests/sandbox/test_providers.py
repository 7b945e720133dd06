"""Providers are found, not listed; and a small one of one's own is some lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import pytest
import requests

from lifelogger.sandbox import world
from lifelogger.sandbox.calls import Call, Reply, Route, json_reply, route
from lifelogger.sandbox.clock import Clock
from lifelogger.sandbox.fitbit import Fitbit
from lifelogger.sandbox.ledger import PAGE, READ, TOKEN
from lifelogger.sandbox.oura import Oura
from lifelogger.sandbox.people import Activity
from lifelogger.sandbox.provider import FIRST, LAST, Provider, utc
from lifelogger.sandbox.server import Sandbox
from lifelogger.sandbox.strava import Strava
from tests.sandbox.conftest import NOW
from tests.sandbox.control import Control, Refused


class Pulsar(Provider):
    """One list of trainings."""

    name = "pulsar"
    title = "Pulsar"
    base = "/v1"
    scopes = ("trainings", "profile")
    pools: ClassVar[Mapping[str, tuple[int, ...]]] = {"requests": (900, 86_400)}
    first_limits: ClassVar[Mapping[str, tuple[int, ...]]] = {"requests": (5, 100)}

    def make_routes(self) -> Sequence[Route]:
        return (
            route(READ, "GET /trainings", self._list, self.base),
            route(TOKEN, "POST /oauth/token", self.token),
            route(TOKEN, "POST /oauth/revoke", self.revoke),
            route(PAGE, "GET /oauth/authorize", self.authorize),
        )

    def item(self, activity: Activity) -> Any:
        return {"id": activity.key, "begin": utc(activity.start), "seconds": activity.elapsed}

    def start_in(self, fields: Mapping[str, Any]) -> int | None:
        return int(datetime.fromisoformat(fields["begin"]).timestamp()) if "begin" in fields else None

    def _list(self, call: Call) -> Reply:
        listed = self.listed(self.asker(call, "trainings"), "activities", FIRST, LAST, call.now)
        return json_reply(200, [item.value for item in listed])


@pytest.fixture(scope="module")
def small() -> Iterator[Control]:
    clock = Clock()
    clock.freeze(NOW)
    with Sandbox(people=2, seed=7, history_days=60, clock=clock, providers=[Pulsar]) as sandbox:
        yield Control(sandbox.url)


@pytest.fixture
def control(small: Control) -> Control:
    small.reset()
    return small


def get(control: Control, token: str, path: str = "/v1/trainings") -> requests.Response:
    headers = {"Authorization": f"Bearer {token}"}
    return requests.get(f"{control.url}/pulsar{path}", headers=headers, timeout=10)


def post(control: Control, path: str, **form: str) -> requests.Response:
    form = {"client_id": "app", "client_secret": "secret", **form}
    return requests.post(f"{control.url}/pulsar/oauth/{path}", data=form, timeout=10)


def test_it_lists_what_is_true(control: Control) -> None:
    line = control.connect("alice", provider="pulsar")[0]

    items = get(control, line["access_token"]).json()

    assert items[::-1] == control.truth("alice", "pulsar")
    assert len(items) > 5
    assert (line["provider_user_id"], line["scopes"]) == ("alice", ["trainings", "profile"])
    assert control.people()[0]["pulsar"] == {"id": "alice"}


def test_its_items_can_be_changed(control: Control) -> None:
    token = control.connect("alice", provider="pulsar")[0]["access_token"]
    first, second, third = [each["key"] for each in control.items("alice", "activities", "pulsar")[:3]]

    control.change_item("alice", "activities", first, "pulsar", deleted=True)
    control.change_item("alice", "activities", second, "pulsar", fields={"seconds": -1})
    control.change_item("alice", "activities", third, "pulsar", fields={"begin": "2026-06-15T12:00:00Z"})

    *_, changed, moved = get(control, token).json()
    assert (changed["id"], changed["seconds"]) == (int(second), -1)
    assert (moved["id"], moved["begin"]) == (int(third), "2026-06-15T12:00:00Z")


def test_its_limits_hold(control: Control) -> None:
    token = control.connect("alice", provider="pulsar")[0]["access_token"]

    assert [get(control, token).status_code for _ in range(6)] == [200] * 5 + [429]

    assert control.ledger()[-1]["usage"] == "requests 6,6"
    control.step(900)
    assert get(control, token).status_code == 200
    assert control.spend(7, "requests", provider="pulsar") == {"requests": [8, 14]}


def test_its_tokens_are_made_renewed_and_revoked(control: Control) -> None:
    query = {
        "client_id": "app",
        "redirect_uri": "http://here/",
        "response_type": "code",
        "scope": "profile trainings",
        "person": "bruno",
    }
    url = f"{control.url}/pulsar/oauth/authorize"
    back = requests.get(url, params=query, allow_redirects=False, timeout=10).headers["Location"]
    code = back.split("code=")[1].split("&")[0]

    first = post(control, "token", grant_type="authorization_code", code=code).json()
    second = post(control, "token", grant_type="refresh_token", refresh_token=first["refresh_token"]).json()
    again = post(control, "token", grant_type="refresh_token", refresh_token=first["refresh_token"])

    assert first.keys() == {"token_type", "access_token", "expires_in", "refresh_token", "scope"}
    assert (again.status_code, again.json()) == (400, {"error": "invalid_grant"})
    assert control.summary()["refresh_tokens_used_twice"] == 1
    assert get(control, second["access_token"]).ok
    control.step(3600)
    assert get(control, second["access_token"]).status_code == 401
    third = post(control, "token", grant_type="refresh_token", refresh_token=second["refresh_token"]).json()
    assert get(control, third["access_token"]).ok
    assert post(control, "revoke", token=third["refresh_token"]).ok
    assert get(control, third["access_token"]).status_code == 401


def test_it_refuses_what_the_others_refuse(control: Control) -> None:
    poor = control.connect("alice", provider="pulsar", scopes=["profile"])[0]["access_token"]

    replies = [get(control, poor), get(control, "made-up"), get(control, poor, "/v1/elsewhere")]

    assert [reply.status_code for reply in replies] == [403, 401, 404]
    assert [entry["note"] for entry in control.ledger()] == [
        "scope trainings is missing",
        "unknown access token",
        "no such route",
    ]
    with pytest.raises(Refused, match="no scope 'all': one of trainings, profile"):
        control.connect("alice", provider="pulsar", scopes=["all"])
    with pytest.raises(Refused, match="access_token_seconds: 'x' is not a whole number"):
        control.settings("pulsar", access_token_seconds="x")
    with pytest.raises(Refused, match="no setting 'order': one of access_token_seconds"):
        control.settings("pulsar", order="random")


def test_a_world_has_the_providers_it_is_given(control: Control) -> None:
    assert control.people()[0].keys() == {"user_id", "name", "timezone", "pulsar"}
    with pytest.raises(Refused, match="no provider 'strava': one of pulsar"):
        control.truth("alice")


def test_a_provider_may_show_no_activities() -> None:
    class Scales(Pulsar):
        streams = ()
        activity_stream = ""
        item = Provider.item

    with Sandbox(people=1, providers=[Scales]) as sandbox:
        control = Control(sandbox.url)
        with pytest.raises(Refused, match="Pulsar shows no activities"):
            control.add("alice", provider="pulsar")
        assert control.connect("alice", provider="pulsar")
        control.close()


# Finding them -------------------------------------------------------------------------------------------


@pytest.fixture
def fresh() -> Iterator[None]:
    world.found.cache_clear()
    yield
    world.found.cache_clear()


def test_the_folders_are_found_by_name() -> None:
    assert world.found() == [Fitbit, Oura, Strava]


def test_those_of_other_packages_are_found_too(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def entry_points(group: str) -> list[EntryPoint]:
        assert group == "lifelogger.sandbox"
        return [EntryPoint("pulsar", f"{__name__}:Pulsar", group)]

    monkeypatch.setattr(world, "entry_points", entry_points)

    assert world.found() == [Fitbit, Oura, Pulsar, Strava]


def test_what_is_abstract_or_imported_is_no_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world.providers_of("lifelogger.sandbox.provider") == []
    assert world.providers_of("lifelogger.sandbox.world") == []
    assert world.providers_of(__name__) == [Pulsar]


def test_strava_is_meant_when_no_provider_is_named(running: Sandbox) -> None:
    control = Control(running.url)
    control.reset()
    line = control.post("connect", people=["alice"])[0]
    added = control.post("people/alice/activities")

    assert line["provider"] == "strava"
    assert added["item"] == control.get("people/alice/activities")[0]
    assert added["item"] == control.get("people/alice/items")[0]["item"]
    assert added["item"]["sport_type"] == "Run"
    assert control.get("limits").keys() == {"reads", "overall"}
    control.close()
