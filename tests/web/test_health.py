"""When a part is away: a sentence, quickly, and no more than that part."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from dramatiq.brokers.redis import RedisBroker
from starlette.testclient import TestClient

from lifelogger.runtime import Runtime
from lifelogger.store import Store
from lifelogger.web.app import create_app
from tests.servers import RedisServer
from tests.web.people import connect

PAGES = ["/", "/users", "/users/ann", "/runs"]
API = ["/api/status", "/api/users", "/api/users/ann", "/api/users/ann/records", "/api/runs"]
QUICKLY = 5.0


@pytest.fixture
def without_database(runtime: Runtime, broker: RedisBroker, visit: Callable[..., TestClient]) -> TestClient:
    """A browser on an application whose database nobody answers for."""
    nobody = Store("postgresql+psycopg://nobody:recognisable-password@127.0.0.1:1/none")
    return visit(create_app(replace(runtime, store=nobody), broker))


def test_it_is_well_when_both_answer(anonymous: TestClient) -> None:
    reply = anonymous.get("/healthz")
    assert (reply.status_code, reply.json()) == (200, {"ok": True})


def test_it_names_redis(anonymous: TestClient, redis_server: RedisServer) -> None:
    redis_server.stop()
    reply = anonymous.get("/healthz")
    assert (reply.status_code, reply.json()) == (503, {"ok": False, "failing": ["redis"]})


def test_it_is_well_again_after_a_restart(anonymous: TestClient, redis_server: RedisServer) -> None:
    assert anonymous.get("/healthz").status_code == 200
    redis_server.restart()
    assert anonymous.get("/healthz").status_code == 200


def test_it_names_the_database(without_database: TestClient) -> None:
    reply = without_database.get("/healthz")
    assert (reply.status_code, reply.json()) == (503, {"ok": False, "failing": ["database"]})


def test_without_redis_the_pages_show_what_is_stored(
    client: TestClient, runtime: Runtime, redis_server: RedisServer
) -> None:
    connect(runtime, "ann")
    redis_server.stop()
    began = time.monotonic()
    for path in PAGES + API:
        assert client.get(path).status_code == 200, path
    assert time.monotonic() - began < QUICKLY
    assert "Redis does not answer" in client.get("/").text
    assert client.get("/api/status").json()["providers"]["strava"]["budget"] is None


def test_without_redis_sync_now_says_that_the_wish_is_kept(
    client: TestClient, runtime: Runtime, redis_server: RedisServer
) -> None:
    connect(runtime, "ann")
    redis_server.stop()
    reply = client.post("/users/ann/sync")
    assert reply.status_code == 503
    assert "The wish is written down" in reply.text


def test_without_the_database_every_page_is_a_sentence(without_database: TestClient) -> None:
    began = time.monotonic()
    for path in PAGES + API:
        reply = without_database.get(path)
        assert reply.status_code == 503, path
        assert "The database does not answer" in reply.text
        assert "recognisable" not in reply.text
        assert reply.headers["retry-after"] == "5"
    assert time.monotonic() - began < QUICKLY


def test_a_database_without_our_tables_is_the_same_sentence(
    runtime: Runtime, broker: RedisBroker, visit: Callable[..., TestClient]
) -> None:
    browser = visit(create_app(replace(runtime, store=Store("sqlite:///:memory:")), broker))
    assert "lifelogger migrate" in browser.get("/users").text
    assert browser.get("/healthz").json()["failing"] == ["database"]


def test_one_can_still_log_in_and_out(without_database: TestClient) -> None:
    assert without_database.get("/login").status_code == 200
    assert without_database.post("/logout").status_code == 303
