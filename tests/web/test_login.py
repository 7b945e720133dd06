"""The login: one token, signed sessions, few attempts."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html import escape
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from lifelogger.errors import SettingsError
from lifelogger.runtime import Runtime
from lifelogger.settings import Settings
from lifelogger.web.app import create_app
from lifelogger.web.login import (
    ATTEMPT_SPAN,
    COOKIE,
    MOST_ATTEMPTS,
    MOST_ATTEMPTS_OF_ALL,
    SESSION,
    Door,
    TooManyAttempts,
    local,
    login_token,
)
from tests.web.people import HERE

MakeSettings = Callable[..., Settings]
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    """One database is enough here."""
    return f"sqlite:///{tmp_path / 'test.db'}"


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def door(clock: Clock) -> Door:
    return Door("right", clock)


# The token -----------------------------------------------------------------------------------------


def test_the_token_is_made_on_first_use_and_told_once(settings_env: MakeSettings) -> None:
    settings = settings_env()
    token, made = login_token(settings)
    assert made
    assert len(token) >= 40
    assert login_token(settings) == (token, False)


def test_its_file_is_for_its_owner_only(settings_env: MakeSettings) -> None:
    settings = settings_env()
    login_token(settings)
    assert stat.S_IMODE((settings.var / "login.token").stat().st_mode) == 0o600


def test_the_token_of_the_settings_wins_and_nothing_is_written(settings_env: MakeSettings) -> None:
    settings = settings_env(security={"login_token": "mine"})
    assert login_token(settings) == ("mine", False)
    assert not (settings.var / "login.token").exists()


def test_an_empty_file_is_no_open_door(settings_env: MakeSettings) -> None:
    settings = settings_env()
    (settings.var / "login.token").touch()
    with pytest.raises(SettingsError, match="is empty"):
        login_token(settings)


# Sessions ------------------------------------------------------------------------------------------


def test_the_right_token_opens_everything(anonymous: TestClient, token: str) -> None:
    reply = anonymous.post("/login", data={"token": f" {token}\n"})
    assert (reply.status_code, reply.headers["location"]) == (303, "/")
    assert anonymous.get("/").status_code == 200
    assert anonymous.get("/api/status").status_code == 200


@pytest.mark.parametrize(
    "wrong", ["", "wrong", "ünïcode", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")]
)
def test_a_wrong_token_opens_nothing(anonymous: TestClient, wrong: str) -> None:
    reply = anonymous.post("/login", data={"token": wrong})
    assert reply.status_code == 403
    assert "not the login token" in reply.text
    assert COOKIE not in reply.headers.get("set-cookie", "")
    assert anonymous.get("/").status_code == 303


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(anonymous: TestClient, token: str) -> None:
    cookie = anonymous.post("/login", data={"token": token}).headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert f"Max-Age={12 * 3600}" in cookie
    assert "Secure" not in cookie
    assert token not in cookie


def test_over_https_the_cookie_stays_there(
    app: FastAPI, visit: Callable[..., TestClient], token: str
) -> None:
    browser = visit(app, login=False, base_url="https://localhost")
    assert "Secure" in browser.post("/login", data={"token": token}).headers["set-cookie"]


def test_a_session_ends_by_itself(door: Door, clock: Clock) -> None:
    cookie = door.open()
    clock.now += SESSION - timedelta(seconds=1)
    assert door.knows(cookie)
    clock.now += timedelta(seconds=1)
    assert not door.knows(cookie)


@pytest.mark.parametrize("forged", ["", "x", "eyJpZCI6ICJ4In0.x", "e30.e30"])
def test_a_forged_session_is_none(door: Door, forged: str) -> None:
    assert not door.knows(forged)


def test_a_changed_cookie_is_no_session(door: Door) -> None:
    cookie = door.open()
    assert not door.knows("A" + cookie[1:])


def test_another_token_ends_all_sessions(door: Door, clock: Clock) -> None:
    assert not Door("another", clock).knows(door.open())


def test_logging_out_ends_the_session_and_not_only_the_cookie(client: TestClient) -> None:
    cookie = client.cookies[COOKIE]
    reply = client.post("/logout")
    assert (reply.status_code, reply.headers["location"]) == (303, "/login")
    assert COOKIE not in client.cookies
    assert client.get("/", headers={"cookie": f"{COOKIE}={cookie}"}).status_code == 303


def test_logging_out_leaves_other_sessions(door: Door) -> None:
    mine, other = door.open(), door.open()
    door.end(mine)
    assert not door.knows(mine)
    assert door.knows(other)


# Attempts ------------------------------------------------------------------------------------------


def test_after_too_many_wrong_tokens_the_right_one_is_refused_too(anonymous: TestClient, token: str) -> None:
    for _ in range(MOST_ATTEMPTS):
        assert anonymous.post("/login", data={"token": "wrong"}).status_code == 403
    reply = anonymous.post("/login", data={"token": token})
    assert reply.status_code == 429
    assert "wait five minutes" in reply.text
    assert reply.headers["retry-after"] == "300"


def test_wrong_bearer_tokens_count_as_well(anonymous: TestClient, token: str) -> None:
    for _ in range(MOST_ATTEMPTS):
        anonymous.get("/api/status", headers={"authorization": "Bearer wrong"})
    reply = anonymous.get("/api/status", headers={"authorization": f"Bearer {token}"})
    assert reply.status_code == 429
    assert anonymous.post("/login", data={"token": token}).status_code == 429


def test_other_addresses_may_go_on_trying(door: Door) -> None:
    for _ in range(MOST_ATTEMPTS):
        door.admits("wrong", "203.0.113.1")
    assert door.admits("right", "203.0.113.2")


def test_but_not_however_many_there_are(door: Door) -> None:
    for number in range(MOST_ATTEMPTS_OF_ALL):
        door.admits("wrong", f"2001:db8::{number:x}")
    with pytest.raises(TooManyAttempts):
        door.admits("right", "2001:db8:1::1")


def test_attempts_are_forgotten_after_a_while(door: Door, clock: Clock) -> None:
    for _ in range(MOST_ATTEMPTS):
        door.admits("wrong", "203.0.113.1")
    clock.now += ATTEMPT_SPAN
    assert door.admits("right", "203.0.113.1")


def test_right_tokens_do_not_count(door: Door) -> None:
    assert all(door.admits("right", "203.0.113.1") for _ in range(2 * MOST_ATTEMPTS))


def test_who_is_logged_in_already_does_not_notice(client: TestClient) -> None:
    for _ in range(MOST_ATTEMPTS + 1):
        client.post("/login", data={"token": "wrong"})
    assert client.get("/").status_code == 200


# Where to, afterwards ------------------------------------------------------------------------------


def test_one_comes_back_to_where_one_wanted_to_go(anonymous: TestClient, token: str) -> None:
    asked = anonymous.get("/users/a%2Fb?asked=1")
    assert asked.headers["location"] == "/login?next=%2Fusers%2Fa%252Fb%3Fasked%3D1"
    form = anonymous.get(asked.headers["location"])
    assert 'name="next" value="/users/a%2Fb?asked=1"' in form.text
    reply = anonymous.post("/login", data={"token": token, "next": "/users/a%2Fb?asked=1"})
    assert reply.headers["location"] == "/users/a%2Fb?asked=1"


def test_who_goes_on_to_a_provider_is_not_redirected_by_the_form(anonymous: TestClient, token: str) -> None:
    """Chromium lets no redirect that follows a form leave for where `form-action` does not allow forms."""
    there = "/connect/strava?user=a%2Fb&next=%2Fusers%2Fa%252Fb"
    reply = anonymous.post("/login", data={"token": token, "next": there})
    assert reply.status_code == 200
    assert COOKIE in reply.cookies
    assert "form-action 'self'" in reply.headers["content-security-policy"]
    assert f'content="0; url={escape(there)}"' in reply.text
    assert f'<a href="{escape(there)}">' in reply.text


@pytest.mark.parametrize(
    "elsewhere",
    [
        "https://evil.example/",
        "//evil.example/",
        "/\\evil.example/",
        "\\\\evil.example",
        "/\t/evil.example/",
        "/\r\nSet-Cookie: a=b",
        " //evil.example",
        "javascript:alert(1)",
        "evil",
        "",
    ],
)
def test_nobody_is_led_elsewhere(anonymous: TestClient, token: str, elsewhere: str) -> None:
    assert local(elsewhere) == "/"
    reply = anonymous.post("/login", data={"token": token, "next": elsewhere})
    assert reply.headers["location"] == "/"


def test_the_session_follows_the_clock_of_the_runtime(
    runtime: Runtime, broker: object, visit: Callable[..., TestClient], clock: Clock
) -> None:
    browser = visit(create_app(replace(runtime, clock=clock), broker))  # type: ignore[arg-type]
    clock.now += SESSION
    assert browser.get("/api/users").status_code == 401
    assert browser.get("/users", headers={"host": HERE.removeprefix("http://")}).status_code == 303
