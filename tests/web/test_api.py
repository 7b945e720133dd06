"""The API: what `lifelogger.status` says, as JSON."""

from __future__ import annotations

import asyncio
import io
import json
import time
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import ANY

import pytest
from dramatiq.brokers.redis import RedisBroker
from fastapi import FastAPI
from sqlalchemy import select
from starlette.testclient import TestClient

from lifelogger import client as library
from lifelogger import export, status
from lifelogger.runtime import Runtime
from lifelogger.store.models import Connection
from lifelogger.web import waiting
from lifelogger.web.waiting import Watch
from tests.live import in_background
from tests.servers import RedisServer, wait_until
from tests.web.people import connect, ran, read_stream, recorded


def sent(runtime: Runtime) -> int:
    return int(runtime.redis.llen(f"{runtime.settings.redis.prefix}:now"))


def test_the_status_is_that_of_the_command_line(client: TestClient, runtime: Runtime) -> None:
    recorded(runtime, connect(runtime, "ann"))
    told: dict[str, Any] = client.get("/api/status").json()
    expected = status.as_json(status.overview(runtime))
    for key in ("now", "counted_at"):
        assert datetime.fromisoformat(told[key]).tzinfo is not None
        assert told.pop(key) <= expected.pop(key)
    assert told == expected
    assert told["records"] == 1
    assert told["providers"]["strava"]["budget"]


def test_users_and_a_user_are_those_of_status(client: TestClient, runtime: Runtime) -> None:
    for user_id in ("ann", "bob"):
        later = runtime.clock() + timedelta(days=1)
        connection = connect(runtime, user_id, wait_reason="spent", next_sync_at=later)
        ran(runtime, connection)
        read_stream(runtime, connection)
    assert client.get("/api/users").json() == status.as_json(status.users(runtime))
    assert client.get("/api/users?after=ann").json() == status.as_json(status.users(runtime, after="ann"))
    assert client.get("/api/users?search=b").json() == status.as_json(status.users(runtime, search="b"))
    assert client.get("/api/users/ann").json() == status.as_json(status.user(runtime, "ann"))


def test_the_journal_is_read_in_pages(client: TestClient, runtime: Runtime) -> None:
    ann, bob = connect(runtime, "ann"), connect(runtime, "bob")
    for connection in (ann, bob, ann):
        ran(runtime, connection)
    everything = client.get("/api/runs").json()
    assert everything == status.as_json(status.runs(runtime))
    assert client.get("/api/runs?limit=1").json() == everything[:1]
    assert client.get(f"/api/runs?before={everything[0]['id']}").json() == everything[1:]
    assert [run["user_id"] for run in client.get("/api/runs?user=bob").json()] == ["bob"]


def test_records_can_be_chosen(client: TestClient, runtime: Runtime) -> None:
    now, connection = runtime.clock(), connect(runtime, "ann")
    for days in (1, 2, 3):
        recorded(runtime, connection, str(days), ordered_at=now - timedelta(days=days))
    recorded(runtime, connection, "sleep", kind="sleep")

    def chosen(**params: Any) -> list[str]:
        found = client.get("/api/users/ann/records", params=params).json()
        return [each["external_id"] for each in found]

    assert chosen(kind="activity") == ["1", "2", "3"]
    assert chosen(kind="activity", limit=1) == ["1"]
    since = (now - timedelta(days=2)).isoformat()
    assert chosen(kind="activity", since=since) == ["1", "2"]
    assert chosen(kind="activity", until=since) == ["3"]
    (record,) = client.get("/api/users/ann/records?kind=sleep").json()
    assert record["raw"] == {"id": "sleep"}
    assert datetime.fromisoformat(record["start_at"]).utcoffset() == timedelta(0)


def test_an_import_is_told_until_it_is_done(client: TestClient, runtime: Runtime) -> None:
    now, connection = runtime.clock(), connect(runtime, "ann")
    reached, goes_to = now - timedelta(days=25), now - timedelta(days=100)
    read_stream(runtime, connection, cursor=now, backlog_since=goes_to, backlog_until=reached)
    recorded(runtime, connection)
    ran(runtime, connection, requests=7)

    [told] = client.get("/api/users/ann/imports").json()

    assert told == {
        "provider": "strava",
        "reached": reached.isoformat(),
        "goes_to": goes_to.isoformat(),
        "share": 0.25,
        "records": 1,
        "requests": 7,
        "left_s": None,
    }
    [of_user] = client.get("/api/users/ann").json()["connections"]
    assert {name: of_user["import"][name] for name in told} == told
    model = client.get("/api/openapi.json").json()["components"]["schemas"]["Import"]
    assert set(model["properties"]) == set(told)
    assert client.get("/api/status").json()["importing"] == 1
    assert client.get("/api/users/nobody/imports").status_code == 404


def test_a_text_that_is_no_unicode_is_no_error(client: TestClient, runtime: Runtime) -> None:
    recorded(runtime, connect(runtime, "ann"), raw={"name": "\ud800\0"})
    (record,) = client.get("/api/users/ann/records").json()
    assert record["raw"] == {"name": "\ud800\0"}


WRONG = [
    "limit=0",
    "limit=1001",
    "limit=x",
    "since=yesterday",
    "since=2026-03-01T00:00:00",
    "since=0001-01-01T00:00:00%2B12:00",
    "until=9999-12-31T23:59:59-12:00",
    "kind=%00",
]


def test_a_wrong_parameter_is_named_but_not_repeated(client: TestClient, runtime: Runtime) -> None:
    connect(runtime, "ann")
    for query in WRONG:
        reply = client.get(f"/api/users/ann/records?{query}")
        assert reply.status_code == 422
        (fault,) = reply.json()["detail"]
        assert set(fault) == {"loc", "msg", "type"}
        assert fault["loc"] == ["query", query.partition("=")[0]]


def test_an_unknown_user_is_none(client: TestClient, runtime: Runtime) -> None:
    connect(runtime, "ann")
    for path in ("nobody", "nobody/records", "%00", "a/b", "ann%2Frecords", "ann%2Frecords/records"):
        reply = client.get(f"/api/users/{path}")
        assert reply.status_code == 404
        assert reply.json()["detail"]


def test_a_user_whose_id_looks_like_another_address_is_not_another(
    client: TestClient, runtime: Runtime
) -> None:
    recorded(runtime, connect(runtime, "ann"))
    connect(runtime, "ann/records")
    assert client.get("/api/users/ann%2Frecords").json()["user_id"] == "ann/records"
    assert client.get("/api/users/ann%2Frecords/records").json() == []
    assert len(client.get("/api/users/ann/records").json()) == 1


def test_a_sync_is_asked_for(client: TestClient, runtime: Runtime, broker: RedisBroker) -> None:
    connect(runtime, "a/b", news_at=None)
    reply = client.post("/api/users/a%2Fb/sync")
    assert (reply.status_code, reply.json()) == (202, {"connections": 1, "at": ANY, "runs": []})
    assert sent(runtime) == 1


def test_nothing_is_sent_for_an_unknown_user(client: TestClient, runtime: Runtime) -> None:
    assert client.post("/api/users/nobody/sync").status_code == 404
    assert sent(runtime) == 0


def test_nothing_is_sent_for_who_has_to_sign_in_again(client: TestClient, runtime: Runtime) -> None:
    connect(runtime, "ann", status="needs_reauth", status_reason="gone", next_sync_at=None)
    assert client.post("/api/users/ann/sync").json()["connections"] == 0
    assert sent(runtime) == 0


def test_a_wish_is_kept_while_redis_is_away(
    client: TestClient, runtime: Runtime, redis_server: RedisServer
) -> None:
    connect(runtime, "ann", news_at=None)
    redis_server.stop()
    reply = client.post("/api/users/ann/sync")
    assert reply.status_code == 503
    assert "written down" in reply.json()["detail"]
    with runtime.store.read() as db:
        noted = db.scalar(select(Connection.news_at))
    assert noted is not None
    assert datetime.now(UTC) - noted < timedelta(minutes=1)


def test_records_are_read_in_pages_that_the_answer_links(client: TestClient, runtime: Runtime) -> None:
    now, connection = runtime.clock(), connect(runtime, "a/b")
    for hours in range(5):
        recorded(runtime, connection, str(hours), ordered_at=now - timedelta(hours=hours))

    found, address = [], "/api/users/a%2Fb/records?limit=2&kind=activity"
    while address:
        reply = client.get(address)
        assert len(reply.json()) <= 2
        found += [each["external_id"] for each in reply.json()]
        address = reply.links["next"]["url"] if "next" in reply.links else ""
        assert not address or address.startswith("/api/users/a%2Fb/records?")

    assert found == ["0", "1", "2", "3", "4"]
    assert client.get("/api/users/a%2Fb/records?after=nonsense").status_code == 410


def test_the_latest_and_how_fresh_it_is_are_those_of_the_client(client: TestClient, runtime: Runtime) -> None:
    connection = connect(runtime, "ann")
    recorded(runtime, connection)
    read_stream(runtime, connection)

    assert client.get("/api/users/ann/latest").json() == client.get("/api/users/ann/records").json() != []
    assert client.get("/api/users/ann/latest?kind=sleep").json() == []
    told = client.get("/api/users/ann/freshness").json()
    assert told == status.as_json(library.freshness("ann", runtime=runtime)) != []


# Changes --------------------------------------------------------------------------------------------------


def test_changes_are_read_with_the_cursor_of_the_last_page(client: TestClient, runtime: Runtime) -> None:
    ann, bob = connect(runtime, "ann"), connect(runtime, "bob")
    for connection, key in ((ann, "1"), (bob, "2"), (ann, "3")):
        recorded(runtime, connection, key)

    page = client.get("/api/changes?limit=2").json()
    assert [change["external_id"] for change in page["changes"]] == ["1", "2"]
    assert page["changes"][0]["record"] == client.get("/api/users/ann/records").json()[1]
    rest = client.get(f"/api/changes?after={page['next']}").json()
    assert [change["external_id"] for change in rest["changes"]] == ["3"]
    assert client.get(f"/api/changes?after={rest['next']}").json() == {"changes": [], "next": rest["next"]}
    hers = client.get("/api/changes?user=ann").json()
    assert [change["external_id"] for change in hers["changes"]] == ["1", "3"]


def test_a_cursor_that_nobody_knows_is_gone(client: TestClient) -> None:
    reply = client.get("/api/changes?after=17")
    assert (reply.status_code, "without a cursor" in reply.json()["detail"]) == (410, True)


def test_who_waits_for_a_change_is_answered_when_it_comes(
    client: TestClient, app: FastAPI, runtime: Runtime
) -> None:
    """Of others' changes the one who waits for Ann's hears nothing."""
    ann, bob = connect(runtime, "ann"), connect(runtime, "bob")

    future = in_background(client.get, "/api/changes?user=ann&wait=30")
    wait_until(lambda: app.state.watch.waiting == 1, "the request to wait")
    recorded(runtime, bob, "2")
    recorded(runtime, ann, "1")

    page = future.result(20).json()
    assert [change["external_id"] for change in page["changes"]] == ["1"]
    assert app.state.watch.waiting == 0


def test_who_waits_in_vain_gets_an_empty_page(client: TestClient) -> None:
    assert client.get("/api/changes?wait=0.01").json() == {"changes": [], "next": "0"}


def test_however_many_wait_the_database_is_asked_by_one() -> None:
    looks: list[int] = []

    def newest() -> int:
        looks.append(len(looks))
        return looks[-1]

    watch = Watch(newest)

    async def all_of_them() -> list[bool]:
        until = time.monotonic() + 3600
        return await asyncio.gather(*(watch.passed(0, until) for _ in range(50)))

    assert asyncio.run(all_of_them()) == [True] * 50
    assert len(looks) < 10


def test_who_would_be_one_too_many_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "MOST_WAITING", 0)
    watch = Watch(lambda: 1)

    assert asyncio.run(watch.passed(0, time.monotonic() + 3600)) is False


# The schema -----------------------------------------------------------------------------------------------


def test_everything_of_a_user_is_one_archive(client: TestClient, runtime: Runtime) -> None:
    recorded(runtime, connect(runtime, "a/b"))
    recorded(runtime, connect(runtime, "ann"))

    reply = client.get("/api/users/a%2Fb/export")

    assert reply.headers["content-type"] == "application/zip"
    assert reply.headers["content-disposition"] == 'attachment; filename="lifelogger-a_b.zip"'
    assert reply.headers["cache-control"] == "no-store"
    archive = zipfile.ZipFile(io.BytesIO(reply.content))
    assert archive.testzip() is None
    manifest = json.loads(archive.read("manifest.json"))
    assert (manifest["user"], manifest["format"]) == ("a/b", 1)
    told = [json.loads(archive.read(each["name"]).splitlines()[0]) for each in manifest["files"][:2]]
    assert told == [
        {key: value for key, value in each.items() if key != "object"}
        for each in list(export.objects(runtime, "a/b"))[:2]
    ]
    assert client.get("/api/users/nobody/export").status_code == 404


def test_an_archive_is_sent_as_it_is_read_and_holds_no_connection_meanwhile(
    app: FastAPI, runtime: Runtime, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(runtime, connect(runtime, "ann"))
    steps: list[str] = []
    held: list[int] = []
    archive = export.archive

    def watched(*arguments: Any) -> Iterator[bytes]:
        for number, some in enumerate(archive(*arguments)):
            steps.append(f"made {number}")
            yield some

    monkeypatch.setattr(export, "archive", watched)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body" and message.get("more_body"):
            await asyncio.sleep(0)
            held.append(runtime.store.engine.pool.checkedout())  # type: ignore[attr-defined]
            steps.append(f"sent {len(held) - 1}")

    async def receive() -> Any:
        await asyncio.sleep(3600)

    headers = [(b"host", b"127.0.0.1"), (b"authorization", f"Bearer {token}".encode())]
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/api/users/ann/export",
        "raw_path": b"/api/users/ann/export",
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    asyncio.run(app(scope, receive, send))

    assert steps == [f"{what} {number}" for number in range(len(held)) for what in ("made", "sent")]
    assert len(held) > 5
    assert not any(held)


def test_the_schema_is_there_for_who_is_logged_in(client: TestClient) -> None:
    paths = client.get("/api/openapi.json").json()["paths"]
    exported = paths["/api/users/{user_id}/export"]["get"]
    assert set(exported["responses"]["200"]["content"]) == {"application/zip"}
    assert exported["security"] == [{"key": ["export"]}]
    assert set(paths) == {
        "/healthz",
        "/api/status",
        "/api/users",
        "/api/users/{user_id}",
        "/api/users/{user_id}/records",
        "/api/users/{user_id}/latest",
        "/api/users/{user_id}/freshness",
        "/api/users/{user_id}/imports",
        "/api/users/{user_id}/export",
        "/api/users/{user_id}/sync",
        "/api/users/{user_id}/connections/{provider}",
        "/api/receipts/{number}",
        "/api/runs",
        "/api/changes",
    }
