"""Strava's authorisation: the page, codes, tokens that rotate and expire, and revocation."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests

from tests.sandbox.conftest import NOW, Ask
from tests.sandbox.control import Control, Refused

AUTHORIZE, TOKEN, REVOKE = "/oauth/authorize", "/api/v3/oauth/token", "/oauth/revoke"
ME = {"client_id": "sandbox", "client_secret": "sandbox"}
ASKED = {
    "client_id": "sandbox",
    "redirect_uri": "http://localhost:9/callback?from=strava",
    "response_type": "code",
    "scope": "read,activity:read_all",
    "state": "a&b",
}
DEAD = {
    "message": "Bad Request",
    "errors": [{"resource": "RefreshToken", "field": "refresh_token", "code": "invalid"}],
}
UNAUTHORISED = {
    "message": "Authorization Error",
    "errors": [{"resource": "Athlete", "field": "access_token", "code": "invalid"}],
}


def refresh(ask: Ask, token: str, **form: str) -> requests.Response:
    data = {**ME, "grant_type": "refresh_token", "refresh_token": token, **form}
    return ask(TOKEN, method="POST", data=data)


def redeem(ask: Ask, code: str, **form: str) -> requests.Response:
    return ask(TOKEN, method="POST", data={**ME, "grant_type": "authorization_code", "code": code, **form})


def callback(ask: Ask, **params: Any) -> dict[str, str]:
    """What the application is told after a decision on the page."""
    reply = ask(AUTHORIZE, params={**ASKED, **params})
    assert reply.status_code == 302
    target = urlsplit(reply.headers["Location"])
    assert target.netloc == "localhost:9"
    return {name: values[0] for name, values in parse_qs(target.query).items()}


def test_a_code_becomes_tokens_once(ask: Ask, control: Control) -> None:
    told = callback(ask, person="bruno")
    assert told.keys() == {"from", "state", "code", "scope"}
    assert (told["state"], told["scope"]) == ("a&b", "read,activity:read_all")

    reply = redeem(ask, told["code"]).json()

    assert set(reply) == {
        *("token_type", "access_token", "refresh_token", "expires_at", "expires_in", "scope", "athlete")
    }
    assert (reply["token_type"], reply["scope"]) == ("Bearer", "read activity:read_all")
    assert (reply["expires_at"], reply["expires_in"]) == (NOW + 6 * 3600, 6 * 3600)
    assert reply["athlete"]["username"] == "bruno"
    assert ask("/api/v3/athlete", reply["access_token"]).json() == reply["athlete"]
    again = redeem(ask, told["code"])
    assert again.status_code == 400
    assert again.json()["errors"][0]["resource"] == "AuthorizationCode"


def test_a_code_is_good_for_a_while_and_for_one_application(ask: Ask, control: Control) -> None:
    other = callback(ask, person="bruno")["code"]
    assert redeem(ask, other, client_id="other", client_secret="x").status_code == 400
    old = callback(ask, person="bruno")["code"]
    control.step(601)
    assert redeem(ask, old).status_code == 400


def test_people_grant_less_than_was_asked_or_nothing(ask: Ask) -> None:
    assert callback(ask, person="bruno", grant="read")["scope"] == "read"
    assert callback(ask, person="bruno", grant=["", "activity:read_all"])["scope"] == "activity:read_all"
    assert callback(ask, person="bruno", grant="")["error"] == "access_denied"
    assert callback(ask, deny="1") == {"from": "strava", "state": "a&b", "error": "access_denied"}


def test_the_page_lists_people_and_escapes_what_it_is_given(ask: Ask) -> None:
    reply = ask(AUTHORIZE, params={**ASKED, "client_id": "<script>"})

    assert reply.status_code == 200
    assert reply.headers["Content-Type"].startswith("text/html")
    assert "<script>" not in reply.text
    assert 'name="person" value="alice"' in reply.text
    assert "deny=1" in reply.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("client_id", ""),
        ("redirect_uri", "javascript:alert(1)"),
        ("response_type", "token"),
        ("scope", "everything"),
        ("scope", ""),
        ("person", "nobody"),
    ],
)
def test_a_bad_request_for_consent_is_not_redirected(ask: Ask, name: str, value: str) -> None:
    reply = ask(AUTHORIZE, params={**ASKED, name: value})

    assert reply.status_code == 400
    assert reply.json()["errors"][0]["field"] == name


def test_a_refresh_with_an_hour_left_changes_nothing(ask: Ask, control: Control) -> None:
    line = control.connect("alice")[0]
    control.step(6 * 3600 - 3601)

    reply = refresh(ask, line["refresh_token"]).json()

    assert reply["access_token"] == line["access_token"]
    assert reply["refresh_token"] == line["refresh_token"]
    assert reply["expires_at"] == line["expires_at"]
    assert reply["expires_in"] == 3601
    assert "athlete" not in reply


def test_a_refresh_rotates_and_the_old_refresh_token_is_dead(ask: Ask, control: Control) -> None:
    line = control.connect("alice")[0]
    control.step(6 * 3600 - 3600)
    reply = refresh(ask, line["refresh_token"]).json()
    assert reply["access_token"] != line["access_token"]
    assert reply["refresh_token"] != line["refresh_token"]
    assert reply["expires_at"] == NOW + 5 * 3600 + 6 * 3600
    for token in (reply["access_token"], line["access_token"]):  # the older one until it expires
        assert ask("/api/v3/athlete", token).status_code == 200

    stale = refresh(ask, line["refresh_token"])

    assert (stale.status_code, stale.json()) == (400, DEAD)
    assert control.summary()["refresh_tokens_used_twice"] == 1
    assert control.ledger(status=400)[0]["note"] == "refresh token used twice"
    assert refresh(ask, reply["refresh_token"]).status_code == 200


@pytest.mark.parametrize(("rotate", "rotates"), [("always", True), ("never", False)])
def test_rotation_is_a_setting(ask: Ask, control: Control, rotate: str, rotates: bool) -> None:
    control.settings(rotate=rotate, access_token_seconds=60)
    line = control.connect("alice")[0]
    assert line["expires_at"] == NOW + 60

    reply = refresh(ask, line["refresh_token"]).json()

    assert (reply["refresh_token"] != line["refresh_token"]) == rotates
    assert reply["access_token"] != line["access_token"]


def test_tokens_that_never_were_or_are_another_application_s(ask: Ask, control: Control) -> None:
    line = control.connect("alice")[0]
    for reply in (
        refresh(ask, "0" * 40),
        refresh(ask, line["access_token"]),
        refresh(ask, line["refresh_token"], client_id="other", client_secret="x"),
    ):
        assert (reply.status_code, reply.json()) == (400, DEAD)
    assert control.summary()["refresh_tokens_used_twice"] == 0


def test_the_first_secret_of_an_application_is_its_secret(ask: Ask, control: Control) -> None:
    line = control.connect("alice")[0]

    reply = refresh(ask, line["refresh_token"], client_secret="guess")

    assert reply.status_code == 401
    assert reply.json()["message"] == "Authorization Error"
    with pytest.raises(Refused, match="client_secret"):
        control.connect("alice", client_secret="guess")


def test_an_access_token_ends(ask: Ask, control: Control) -> None:
    token = control.connect("alice")[0]["access_token"]
    control.step(6 * 3600 - 1)
    assert ask("/api/v3/athlete", token).status_code == 200
    control.step(1)
    assert ask("/api/v3/athlete", token).json() == UNAUTHORISED

    line = control.connect("bruno")[0]
    control.expire("bruno")
    assert ask("/api/v3/athlete", line["access_token"]).status_code == 401
    assert refresh(ask, line["refresh_token"]).status_code == 200


def test_a_person_takes_it_back(ask: Ask, control: Control) -> None:
    line = control.connect("alice")[0]

    control.revoke("alice")

    assert ask("/api/v3/athlete", line["access_token"]).status_code == 401
    assert refresh(ask, line["refresh_token"]).json() == DEAD
    assert control.summary()["unexpected"] == 0  # the application could not know


@pytest.mark.parametrize("kind", ["access_token", "refresh_token"])
def test_an_application_gives_it_back(ask: Ask, control: Control, kind: str) -> None:
    line = control.connect("alice")[0]
    wrong = ask(REVOKE, method="POST", data={"token": line[kind]}, auth=("sandbox", "guess"))
    assert wrong.status_code == 401
    assert ask(REVOKE, method="POST", data={"token": line[kind]}).status_code == 401
    assert ask("/api/v3/athlete", line["access_token"]).status_code == 200

    reply = ask(REVOKE, method="POST", data={"token": line[kind]}, auth=("sandbox", "sandbox"))

    assert reply.status_code == 200
    assert ask("/api/v3/athlete", line["access_token"]).status_code == 401
    assert refresh(ask, line["refresh_token"]).status_code == 400
    assert control.ledger(route="POST /oauth/revoke", status=200)[0]["person"] == "alice"


def test_scopes_are_asked_for(ask: Ask, control: Control) -> None:
    token = control.connect("alice", scopes=["read"])[0]["access_token"]

    reply = ask("/api/v3/athlete/activities", token)

    assert reply.status_code == 403
    assert reply.json()["errors"] == [
        {"resource": "AccessToken", "field": "activity:read_permission", "code": "missing"}
    ]


@pytest.mark.parametrize("path", ["/api/v3/athletes/1/stats", "/api/v4/athlete", "/", "/api/v3/activities/x"])
def test_everything_else_is_not_found(ask: Ask, token: str, path: str) -> None:
    reply = ask(path, token)
    assert reply.status_code == 404
    assert set(reply.json()["errors"][0]) == {"resource", "field", "code"}
    assert ask("/api/v3/athlete", token, method="POST").status_code == 404


def test_only_a_bearer_token_opens_the_api(ask: Ask, token: str) -> None:
    assert ask("/api/v3/athlete").status_code == 401
    assert ask("/api/v3/athlete", params={"access_token": token}).status_code == 401
    assert ask("/api/v3/athlete", "0" * 40).json() == UNAUTHORISED
