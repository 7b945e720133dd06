"""API keys at the door: what their scopes and their user allow, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from dramatiq.brokers.redis import RedisBroker
from fastapi import FastAPI
from starlette.testclient import TestClient

from lifelogger import api_keys, notices
from lifelogger.runtime import Runtime
from lifelogger.store import Store
from lifelogger.tokens import needs_reauth
from lifelogger.web.app import create_app
from lifelogger.web.login import MOST_ATTEMPTS
from tests.live import change
from tests.web.people import connect, ran, recorded
from tests.web.test_guard import addresses

Show = Callable[..., TestClient]

SCOPED = {
    "read:records": [
        "GET /api/users/ann/records",
        "GET /api/users/ann/latest",
        "GET /api/users/ann/freshness",
        "GET /api/users/ann/imports",
        "GET /api/changes",
    ],
    "read:status": ["GET /api/status", "GET /api/users", "GET /api/users/ann", "GET /api/runs"],
    "export": ["GET /api/users/ann/export"],
    "sync": ["POST /api/users/ann/sync"],
    "erase": [
        "GET /api/receipts/{number}",
        "DELETE /api/users/ann/connections/{provider}",
        "DELETE /api/users/ann",
    ],
}
EVERYBODY = {"GET /api/status", "GET /api/users"}


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    """One database is enough here: tests/test_api_keys.py has both."""
    return f"sqlite:///{tmp_path / 'test.db'}"


@pytest.fixture
def people(runtime: Runtime) -> None:
    for user_id in ("ann", "bob"):
        connection = connect(runtime, user_id)
        recorded(runtime, connection)
        ran(runtime, connection)


@pytest.fixture
def show(app: FastAPI, visit: Callable[..., TestClient], runtime: Runtime) -> Show:
    """A program with a new key of these scopes."""

    def program(*scopes: str, user_id: str | None = None, key: str | None = None) -> TestClient:
        name = f"{scopes} {user_id}"
        client = visit(app, login=False)
        shown = key or api_keys.add(runtime, name, scopes, user_id)
        client.headers = {"authorization": f"Bearer {shown}"}
        return client

    return program


def ask(client: TestClient, what: str) -> int:
    return client.request(*what.split()).status_code


def test_every_address_of_the_api_asks_for_a_scope(
    app: FastAPI,
    visit: Callable[..., TestClient],
    runtime: Runtime,
    people: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever adds one says with `needs` which: without it every key could do it."""
    client = visit(app, login=False)
    monkeypatch.setitem(api_keys.SCOPES, "nothing", "")
    client.headers = {"authorization": f"Bearer {api_keys.add(runtime, 'none', ['nothing'])}"}
    of_the_api = {
        f"{method} {path}"
        for method, path in addresses(app)
        if path.startswith("/api/")
        and path != "/api/openapi.json"
        and method in ("GET", "POST", "DELETE", "PUT")
    }

    assert of_the_api == {what for each in SCOPED.values() for what in each}
    for what in of_the_api:
        reply = client.request(*what.split())
        assert reply.status_code == 403, what
        assert "has not the scope" in reply.json()["detail"]


@pytest.mark.parametrize("scope", SCOPED)
def test_a_scope_opens_what_it_says_and_nothing_else(show: Show, people: None, scope: str) -> None:
    program = show(scope)

    for each, asked in SCOPED.items():
        for what in asked:
            assert (ask(program, what) != 403) == (each == scope), what


def test_a_key_for_one_user_opens_nobody_elses(show: Show, people: None) -> None:
    """Whether there is somebody of that name or not: 403 for both, so it cannot be found out."""
    program = show(*SCOPED, user_id="ann")

    for path in ("/api/runs", "/api/changes"):
        assert program.get(path, params={"user": "bob"}).status_code == 403
    for what in [what for each in SCOPED.values() for what in each]:
        if "ann" in what:
            assert ask(program, what.replace("ann", "bob")) == 403
            assert ask(program, what.replace("ann", "nobody")) == 403
        assert (ask(program, what) == 403) == (what in EVERYBODY), what


def test_what_tells_about_several_tells_a_key_for_one_about_theirs(show: Show, people: None) -> None:
    program = show(*SCOPED, user_id="ann")

    for suffix in ("", "?user=ann"):
        assert {run["user_id"] for run in program.get(f"/api/runs{suffix}").json()} == {"ann"}
        changes = program.get(f"/api/changes{suffix}").json()["changes"]
        assert [change["user_id"] for change in changes] == ["ann"]


def test_what_became_of_connections_needs_the_scope_for_the_status(
    show: Show, people: None, runtime: Runtime
) -> None:
    change(runtime, "ann", **needs_reauth("ended", runtime.clock()))
    change(runtime, "bob", **needs_reauth("ended", runtime.clock()))
    notices.publish(runtime)

    def told(client: TestClient, query: str = "?connections=true") -> list[tuple[str, str]] | int:
        reply = client.get(f"/api/changes{query}")
        if reply.status_code != 200:
            return reply.status_code
        return [(each["action"], each["user_id"]) for each in reply.json()["changes"]]

    records = [("upsert", "ann"), ("upsert", "bob")]
    ends = [("sign_in_again", "ann"), ("sign_in_again", "bob")]
    of_records, of_status = show("read:records"), show("read:status")
    of_both = show("read:records", "read:status")
    assert told(of_records, "") == told(of_both, "") == records
    assert told(of_records) == told(of_status) == 403
    assert told(of_both) == records + ends
    assert told(show("read:records", "read:status", user_id="ann")) == [records[0], ends[0]]


def test_a_key_for_a_user_whose_id_has_a_slash(show: Show, runtime: Runtime) -> None:
    recorded(runtime, connect(runtime, "a/b"))
    program = show("read:records", user_id="a/b")

    assert len(program.get("/api/users/a%2Fb/records").json()) == 1


def test_a_key_opens_only_the_api(show: Show, people: None) -> None:
    program = show(*SCOPED)

    for path in ("/", "/users", "/users/ann", "/runs", "/dashboard/"):
        assert program.get(path).status_code == 303


def test_a_key_needs_no_origin(show: Show, people: None) -> None:
    reply = show("sync").post("/api/users/ann/sync", headers={"origin": "https://elsewhere.example"})
    assert reply.status_code == 202


def test_an_unknown_or_removed_key_is_refused_whatever_the_cookie(
    show: Show, client: TestClient, runtime: Runtime, people: None
) -> None:
    program = show("read:status")
    assert ask(program, "GET /api/runs") == 200
    api_keys.remove(runtime, api_keys.listed(runtime)[0].name)

    reply = program.get("/api/runs")
    assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert "API key" in reply.json()["detail"]
    client.headers["authorization"] = program.headers["authorization"]
    assert ask(client, "GET /api/runs") == 401


def test_who_tries_many_keys_is_told_to_wait_and_locks_nobody_out(
    show: Show, runtime: Runtime, people: None, token: str
) -> None:
    stranger, program = show(key="llk_unknown"), show("read:status")

    assert [ask(stranger, "GET /api/runs") for _ in range(MOST_ATTEMPTS)] == [401] * MOST_ATTEMPTS
    reply = stranger.get("/api/runs")

    assert (reply.status_code, reply.headers["retry-after"]) == (429, "300")
    assert ask(program, "GET /api/runs") == 200
    assert ask(show(key=token), "GET /api/runs") == 200


def test_after_five_minutes_they_may_try_again(
    runtime: Runtime, broker: RedisBroker, visit: Callable[..., TestClient]
) -> None:
    now = [runtime.clock()]
    stranger = visit(create_app(replace(runtime, clock=lambda: now[0]), broker), login=False)
    stranger.headers = {"authorization": "Bearer llk_unknown"}
    while ask(stranger, "GET /api/runs") != 429:
        pass

    now[0] += timedelta(minutes=5)

    assert ask(stranger, "GET /api/runs") == 401


def test_without_a_database_a_key_is_neither_right_nor_wrong(
    runtime: Runtime, broker: RedisBroker, visit: Callable[..., TestClient]
) -> None:
    nobody = Store("postgresql+psycopg://nobody:recognisable-password@127.0.0.1:1/none")
    program = visit(create_app(replace(runtime, store=nobody), broker), login=False)
    program.headers = {"authorization": "Bearer llk_unknown"}

    reply = program.get("/api/runs")

    assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
    assert "database" in reply.json()["detail"]
    assert reply.headers["cache-control"] == "no-store"


def test_the_schema_says_how_one_comes_in_and_what_each_address_asks(show: Show, people: None) -> None:
    schema = show("sync").get("/api/openapi.json").json()

    assert schema["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for scope, each in SCOPED.items():
        for what in each:
            method, path = what.replace("ann", "{user_id}").split()
            assert schema["paths"][path][method.lower()]["security"] == [{"key": [scope]}], what
