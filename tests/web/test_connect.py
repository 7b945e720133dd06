"""Connecting an account in the browser: on our own pages, and in a host that mounts the router."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from html import unescape
from typing import Annotated, Any
from urllib.parse import parse_qs, urlsplit

import dramatiq
import pytest
import requests
from dramatiq.brokers.redis import RedisBroker
from fastapi import FastAPI, Header, HTTPException
from pydantic import SecretStr
from sqlalchemy import select
from starlette.testclient import TestClient

import lifelogger.broker
from lifelogger import connecting, leaving, sync
from lifelogger.broker import make_broker
from lifelogger.connections import add_user
from lifelogger.providers.base import Grant
from lifelogger.runtime import Runtime
from lifelogger.settings import Application
from lifelogger.store.models import Connection
from lifelogger.web import connect
from lifelogger.web.app import create_app
from lifelogger.web.login import login_token
from lifelogger.web.render import segment
from tests.live import change, connection, stored, truth, tuned
from tests.live import connect as let_in
from tests.sandbox.control import Control
from tests.web.people import HERE
from tests.web.test_pages import text

ONCE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
EACH = pytest.mark.parametrize("provider", ["fitbit", "oura", "strava"])
PUBLIC = "https://life.example.com"


@pytest.fixture
def broker(live: Runtime, monkeypatch: pytest.MonkeyPatch) -> RedisBroker:
    made = make_broker(live.settings, mutex=lambda: live.mutex)
    assert isinstance(made, RedisBroker)
    monkeypatch.setitem(vars(lifelogger.broker), "broker", made)
    monkeypatch.setattr(dramatiq.broker, "global_broker", made)
    return made


@pytest.fixture
def pages(live: Runtime, broker: RedisBroker, visit: Callable[..., TestClient]) -> TestClient:
    """Our own pages, logged in."""
    return visit(create_app(live, broker))


@pytest.fixture
def token(live: Runtime) -> str:
    return login_token(live.settings)[0]


def signed_in(x_user: Annotated[str | None, Header()] = None) -> str:
    """A host's own login; this one believes a header."""
    if x_user is None:
        raise HTTPException(401, "Sign in first.")
    return x_user


@pytest.fixture
def host(live: Runtime, broker: RedisBroker) -> FastAPI:
    app = FastAPI()
    app.include_router(connect.router(user=signed_in, runtime=live, base_url=PUBLIC), prefix="/accounts")
    return app


@pytest.fixture
def browser(host: FastAPI) -> Iterator[TestClient]:
    """Zoe's browser on the host's application."""
    with TestClient(host, base_url=PUBLIC, headers={"x-user": "zoe"}, follow_redirects=False) as made:
        yield made


def agree(address: str, decision: str = "person=alice") -> str:
    """What the person does on the provider's page; returns where it sends them."""
    reply = requests.get(f"{address}&{decision}", allow_redirects=False, timeout=20)
    assert reply.status_code == 302, reply.text
    return str(reply.headers["location"])


def set_out(browser: TestClient, provider: str = "strava", **query: str) -> str:
    reply = browser.get(f"/accounts/{provider}", params=query)
    assert reply.status_code == 303, reply.text
    return str(reply.headers["location"])


def connections(live: Runtime) -> list[Any]:
    with live.store.read() as db:
        return list(db.execute(select(Connection.user_id, Connection.provider)))


# In a host application -------------------------------------------------------------------------------


@EACH
def test_a_person_connects_and_the_first_import_begins(
    live: Runtime, sandbox: Control, browser: TestClient, broker: RedisBroker, provider: str
) -> None:
    address = set_out(browser, provider, next="/settings?tab=accounts")
    asked = parse_qs(urlsplit(address).query)
    assert asked["redirect_uri"] == [f"{PUBLIC}/accounts/callback"]
    assert asked.get("code_challenge_method") == (["S256"] if live.providers[provider].pkce else None)

    reply = browser.get(agree(address))

    assert (reply.status_code, reply.headers["location"]) == (303, "/settings?tab=accounts")
    assert [tuple(each) for each in connections(live)] == [("zoe", provider)]
    (message,) = broker.client.hvals("lifelogger:now.msgs")
    assert json.loads(message)["args"] == ["zoe", "asked"]
    assert connection(live, "zoe").news_at is not None
    (run,) = sync.run("zoe", runtime=live)
    assert (run.outcome, len(stored(live, "zoe")) > 0) == ("ok", True)


@ONCE
def test_a_host_may_name_the_application(live: Runtime, sandbox: Control, browser: TestClient) -> None:
    second = Application(client_id="two", client_secret=SecretStr("its own"))
    live.settings.providers["strava"].applications["second"] = second

    reply = browser.get(agree(set_out(browser, application="second")))
    refused = browser.get("/accounts/strava", params={"application": "third"})

    assert reply.status_code == 303
    assert connection(live, "zoe").application == "second"
    assert [entry["client"] for entry in sandbox.ledger(route="POST /oauth/token")] == ["two"]
    assert refused.status_code == 404
    assert "is none of main, second" in unescape(refused.text)


def test_another_site_cannot_send_somebody_out(live: Runtime, pages: TestClient) -> None:
    """Or the account of whoever is logged in here becomes somebody else's, without a question."""
    add_user(live, "alice")

    reply = pages.get("/connect/strava?user=alice", headers={"sec-fetch-site": "cross-site"})

    assert reply.status_code == 403
    assert "begin on our own page" in reply.text


def test_a_grant_of_nothing_is_no_connection(
    live: Runtime, browser: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    grant = Grant("token", "refresh", live.clock() + timedelta(hours=1), scopes=(), provider_user_id="7")
    monkeypatch.setattr(connecting, "_redeem", lambda *_: grant)

    reply = browser.get(agree(set_out(browser)))

    assert "nothing was granted" in reply.text
    assert connections(live) == []


def test_connecting_again_keeps_the_data_and_the_cursors(
    live: Runtime, sandbox: Control, browser: TestClient
) -> None:
    browser.get(agree(set_out(browser)))
    sync.run("zoe", runtime=live)
    before = stored(live, "zoe")
    change(live, "zoe", status="needs_reauth", status_reason="ended", next_sync_at=None)

    assert browser.get(agree(set_out(browser))).status_code == 303

    assert (connection(live, "zoe").status, stored(live, "zoe")) == ("active", before)


def test_the_account_of_another_user_is_refused_with_a_reason(
    live: Runtime, sandbox: Control, browser: TestClient
) -> None:
    let_in(live, sandbox, "alice")

    reply = browser.get(agree(set_out(browser)))

    assert reply.status_code == 409
    assert "is connected to another user." in reply.text
    assert [each.user_id for each in connections(live)] == ["alice"]


@ONCE
def test_a_refusal_is_told_in_words(live: Runtime, browser: TestClient) -> None:
    reply = browser.get(agree(set_out(browser, next="/settings"), "deny=1"))

    assert reply.status_code == 400
    assert "Strava was not connected: the person did not agree." in reply.text
    assert '<a href="/settings">' in reply.text
    assert connections(live) == []


@ONCE
def test_a_partial_grant_is_told_in_words(live: Runtime, browser: TestClient) -> None:
    reply = browser.get(agree(set_out(browser), "person=alice&grant=read"))

    assert reply.status_code == 200
    assert "Strava is connected, but this was not granted: activity:read_all." in reply.text
    assert connection(live, "zoe").scopes == ["read"]


@ONCE
def test_a_provider_that_is_down_is_told_in_words(
    live: Runtime, sandbox: Control, browser: TestClient
) -> None:
    sandbox.fault("POST /oauth/token", status=503)

    reply = browser.get(agree(set_out(browser)))

    assert (reply.status_code, "Try again later" in reply.text) == (503, True)
    assert connections(live) == []


@ONCE
def test_an_attempt_is_good_once(live: Runtime, browser: TestClient) -> None:
    callback = agree(set_out(browser))
    assert browser.get(callback).status_code == 303

    again = browser.get(callback)

    assert (again.status_code, "was used already" in again.text) == (400, True)


@ONCE
def test_an_attempt_belongs_to_the_browser_that_began(
    live: Runtime, host: FastAPI, browser: TestClient
) -> None:
    """Somebody who gets a person to open their callback must not connect their account (RFC 6749, 10.12)."""
    callback = agree(set_out(browser), "person=bruno")
    other = TestClient(host, base_url=PUBLIC, headers={"x-user": "zoe"}, follow_redirects=False)
    for _ in range(2):
        assert other.get(callback).status_code == 400
        set_out(other)  # and now with a cookie of its own
    assert connections(live) == []


@ONCE
@pytest.mark.parametrize("query", ["", "state=guessed&code=theirs", "code=theirs", "state=%C3%BC&code=x"])
def test_a_guessed_answer_connects_nothing(live: Runtime, browser: TestClient, query: str) -> None:
    set_out(browser)

    assert browser.get(f"/accounts/callback?{query}").status_code == 400
    assert connections(live) == []


@ONCE
def test_an_attempt_belongs_to_the_user_who_began(live: Runtime, browser: TestClient) -> None:
    callback = agree(set_out(browser))

    reply = browser.get(callback, headers={"x-user": "mallory"})

    assert (reply.status_code, "Somebody else has signed in" in reply.text) == (403, True)
    assert connections(live) == []


@ONCE
def test_who_is_not_signed_in_goes_nowhere(live: Runtime, host: FastAPI) -> None:
    stranger = TestClient(host, base_url=PUBLIC, follow_redirects=False)

    assert stranger.get("/accounts/strava").status_code == 401
    assert stranger.get("/accounts/callback?state=x").status_code == 401


@ONCE
@pytest.mark.parametrize("target", ["https://evil.example/", "//evil.example", "/\\evil.example", "evil"])
def test_the_way_on_stays_in_the_application(live: Runtime, browser: TestClient, target: str) -> None:
    assert browser.get(agree(set_out(browser, next=target))).headers["location"] == "/"


@ONCE
def test_an_attempt_is_kept_encrypted_and_not_for_long(live: Runtime, browser: TestClient) -> None:
    reply = browser.get("/accounts/fitbit")
    state = parse_qs(urlsplit(reply.headers["location"]).query)["state"][0]
    (key,) = live.redis.keys("lifelogger:connect:*")  # type: ignore[misc]

    kept: Any = live.redis.get(key)

    assert 0 < live.redis.ttl(key) <= connect.SECONDS  # type: ignore[operator]
    assert state.encode() not in key + kept
    assert b"zoe" not in key + kept
    cookie = reply.headers["set-cookie"]
    assert {"HttpOnly", "Secure", "SameSite=lax"} <= set(cookie.split("; "))


@ONCE
def test_the_redirect_address_is_not_the_one_a_stranger_names(live: Runtime, broker: RedisBroker) -> None:
    app = FastAPI()
    app.include_router(connect.router(user=signed_in, runtime=live))
    client = TestClient(app, base_url="https://evil.example", headers={"x-user": "zoe"})
    named = FastAPI()
    there = tuned(live, web={"public_url": f"{PUBLIC}/app"})
    named.include_router(connect.router(user=signed_in, runtime=there), prefix="/me")
    behind = TestClient(named, base_url="http://10.0.0.7", headers={"x-user": "zoe"}, follow_redirects=False)

    assert "web.public_url is not set" in client.get("/strava").text
    address = behind.get("/me/strava").headers["location"]
    assert parse_qs(urlsplit(address).query)["redirect_uri"] == [f"{PUBLIC}/app/me/callback"]


@ONCE
def test_a_provider_that_is_not_there(live: Runtime, browser: TestClient) -> None:
    reply = browser.get("/accounts/garmin")

    assert (reply.status_code, "No provider &#34;garmin&#34; is enabled" in reply.text) == (404, True)


def test_an_old_grant_that_waits_for_its_end_does_not_take_the_new_one_with_it(
    live: Runtime, sandbox: Control, browser: TestClient
) -> None:
    """A provider ends all that a person granted: what waits for that comes before they agree again."""
    let_in(live, sandbox, "alice")
    fault = sandbox.fault("POST /oauth/revoke", status=503)
    leaving.erase(live, "alice")
    sandbox.clear_faults(fault)

    browser.get(agree(set_out(browser)))
    sandbox.step(86400)
    assert leaving.revoke_waiting(live) == 0

    (run,) = sync.run("zoe", runtime=live)
    assert (run.outcome, stored(live, "zoe")) == ("ok", truth(sandbox, "alice"))


# On our own pages ------------------------------------------------------------------------------------


def link(page: str, words: str) -> str:
    """Where a link with these words leads."""
    found = re.findall(rf'href="([^"]+)">{words}</a>', page)
    assert len(found) == 1, words
    return unescape(found[0])


@pytest.mark.parametrize("user_id", ["ann", "a/b ü"])
def test_the_page_of_a_user_connects_each_provider(live: Runtime, pages: TestClient, user_id: str) -> None:
    add_user(live, user_id)
    here = f"/users/{segment(user_id)}"

    for title in ("Fitbit", "Oura", "Strava"):
        address = pages.get(link(pages.get(here).text, title)).headers["location"]
        callback = agree(address)
        assert callback.startswith(f"{HERE}/connect/callback?")
        reply = pages.get(callback)
        assert (reply.status_code, reply.headers["location"]) == (303, here)

    assert [each.user_id for each in connections(live)] == [user_id] * 3
    assert "<h2>Connect</h2>" not in pages.get(here).text


def test_the_page_mends_a_connection_that_ended_and_syncing_goes_on(
    live: Runtime, sandbox: Control, pages: TestClient
) -> None:
    let_in(live, sandbox, "alice")
    sync.run("alice", runtime=live)
    sandbox.revoke("alice")
    sandbox.step(900)
    sync.run("alice", runtime=live)
    page = pages.get("/users/alice").text
    assert "Has to sign in again: Strava has ended the authorisation." in text(page)

    reply = pages.get(agree(pages.get(link(page, "Sign in again")).headers["location"]))

    assert reply.headers["location"] == "/users/alice"
    assert "Sign in again" not in pages.get("/users/alice").text
    sandbox.add("alice")
    (run,) = sync.run("alice", runtime=live)
    assert (run.outcome, run.requests) == ("ok", 1)  # no import anew
    assert stored(live, "alice") == truth(sandbox, "alice")


@ONCE
def test_a_refusal_is_told_on_our_page(live: Runtime, pages: TestClient) -> None:
    add_user(live, "ann")
    address = pages.get("/connect/strava?user=ann&next=/users/ann").headers["location"]

    reply = pages.get(agree(address, "deny=1"))

    assert "Strava was not connected: the person did not agree." in reply.text
    assert '<a href="/users/ann">Go on</a>' in reply.text
    assert pages.get("/connect/strava?user=zoe").status_code == 404


@ONCE
def test_strangers_connect_nothing(live: Runtime, broker: RedisBroker, visit: Any) -> None:
    add_user(live, "ann")
    stranger = visit(create_app(live, broker), login=False)

    assert stranger.get("/connect/strava?user=ann").headers["location"].startswith("/login?")
    assert stranger.get("/connect/callback?state=x&code=y").headers["location"].startswith("/login?")
