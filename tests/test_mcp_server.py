"""What an assistant can ask, with the SDK's own client: about one user, and nothing but reading."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from sqlalchemy import insert, select, update
from starlette.testclient import TestClient

from lifelogger import api_keys, mcp_server, notices
from lifelogger.connections import import_lines
from lifelogger.runtime import Runtime
from lifelogger.store.models import Connection, Stream
from lifelogger.tokens import needs_reauth
from lifelogger.web.app import create_app
from lifelogger.web.login import login_token
from tests.processes import ROOT
from tests.test_changes import NOW, item, lose, write

ONE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def rt(runtime: Runtime) -> Runtime:
    """With Ann and Bob, who have records."""
    rt = replace(runtime, clock=lambda: NOW)
    lines = [
        {"user_id": person, "provider": "strava", "access_token": "a", "expires_at": 1900000000}
        for person in ("ann", "bob")
    ]
    import_lines(rt, map(json.dumps, lines))
    write(rt, "ann", item(1), item(2, "Evening"))
    write(rt, "bob", item(3, "his secret"))
    with rt.store.write() as db:
        for number in db.scalars(select(Connection.id)).all():
            db.execute(insert(Stream).values(connection_id=number, name="activities", cursor=NOW))
    return rt


Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(rt: Runtime) -> Ask:
    """Ask a tool as an assistant with a key for Ann."""
    key = api_keys.add(rt, "assistant", ["read:records"], "ann")
    made = mcp_server.server(rt, lambda _: api_keys.find(rt, key))

    def call(tool: str, **arguments: Any) -> dict[str, Any]:
        return asyncio.run(asked(made, tool, arguments))

    return call


async def asked(server: Any, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The structured answer, or `{"error": sentence}`."""
    async with Client(server) as client:
        result = await client.call_tool(tool, arguments)
    if result.is_error:
        return {"error": result.content[0].text}
    assert json.loads(result.content[0].text) == result.structured_content
    return dict(result.structured_content)


def ids(answer: dict[str, Any], what: str = "records") -> list[str]:
    return [each["external_id"] for each in answer[what]]


# What it tells ----------------------------------------------------------------------------------------------


def test_every_tool_only_reads_and_says_what_it_is_for(rt: Runtime) -> None:
    async def listed() -> list[Any]:
        async with Client(mcp_server.server(rt, lambda _: None)) as client:
            assert "do not guess" in client.instructions
            return list((await client.list_tools()).tools)

    tools = asyncio.run(listed())

    assert [tool.name for tool in tools] == ["whats_new", "how_fresh", "records", "latest"]
    assert all(tool.annotations.read_only_hint and tool.description for tool in tools)
    assert not [tool.name for tool in tools if "user" in json.dumps(tool.input_schema).lower()]


def test_what_is_new_is_told_once(rt: Runtime, ask: Ask) -> None:
    first = ask("whats_new")
    assert ids(first, "changes") == ["1", "2"]

    again = ask("whats_new", cursor=first["next"])
    assert (again["changes"], again["next"]) == ([], first["next"])
    with rt.store.write() as db:
        db.execute(update(Connection).values(needs_reauth("ended", NOW)))
    notices.publish(rt)
    assert ask("whats_new", cursor=first["next"])["changes"] == [], "how_fresh tells it"

    lose(rt, "ann", "1")
    write(rt, "bob", item(4))
    [change] = ask("whats_new", cursor=first["next"])["changes"]
    assert (change["action"], change["external_id"], change["record"]) == ("delete", "2", None)


def test_what_is_new_since_a_time(ask: Ask) -> None:
    assert ids(ask("whats_new", since=NOW.isoformat()), "changes") == ["1", "2"]
    assert ask("whats_new", since=(NOW + timedelta(seconds=1)).isoformat())["changes"] == []


def test_the_records_of_a_time_page_by_page(ask: Ask) -> None:
    day = (NOW - timedelta(days=2)).isoformat()

    first = ask("records", since=day, until=NOW.isoformat(), kind="activity", limit=1)
    second = ask("records", since=day, until=NOW.isoformat(), kind="activity", limit=1, cursor=first["next"])

    assert ids(first) + ids(second) == ["1", "2"]
    assert second["next"] is None
    assert ask("records", kind="sleep")["records"] == []
    assert ask("records", until=day)["records"] == []


def test_a_record_is_short(ask: Ask) -> None:
    """Without the payload, and without what is not known."""
    [record] = ask("latest")["records"]

    assert record["title"] == "Morning"
    assert "raw" not in record
    assert None not in record.values()


def test_how_fresh_it_is(ask: Ask) -> None:
    told = ask("how_fresh")

    [stream] = told["streams"]
    assert (stream["stream"], stream["as_of"], told["now"]) == (
        "activities",
        NOW.isoformat(),
        NOW.isoformat(),
    )
    assert stream["sentence"]


# Whom it tells ----------------------------------------------------------------------------------------------

ALL_TOOLS = ("whats_new", "how_fresh", "records", "latest")


def test_no_tool_tells_of_anybody_else(ask: Ask) -> None:
    for tool in ALL_TOOLS:
        for arguments in ({}, {"user_id": "bob"}, {"user": "bob"}):
            assert "bob" not in json.dumps(ask(tool, **arguments))
            assert "his secret" not in json.dumps(ask(tool, **arguments))


@pytest.mark.parametrize(
    ("scopes", "user_id", "sentence"),
    [
        (["read:records"], None, "for all users"),
        (["read:status", "sync"], "ann", "has not the scope read:records"),
    ],
)
def test_a_key_that_is_for_something_else_gets_nothing(
    rt: Runtime, scopes: list[str], user_id: str | None, sentence: str
) -> None:
    key = api_keys.add(rt, "other", scopes, user_id)
    made = mcp_server.server(rt, lambda _: api_keys.find(rt, key))

    for tool in ALL_TOOLS:
        assert sentence in asyncio.run(asked(made, tool, {}))["error"]


def test_a_removed_key_gets_nothing_from_then_on(rt: Runtime, ask: Ask) -> None:
    assert "error" not in ask("latest")

    api_keys.remove(rt, "assistant")

    assert "removed" in ask("latest")["error"]


def test_what_is_wrong_is_told_to_the_model(ask: Ask) -> None:
    assert "begin without a cursor" in ask("whats_new", cursor="999")["error"]
    assert "Begin without one" in ask("records", cursor="nonsense")["error"]
    assert "timezone" in ask("records", since="2026-11-24T00:00:00")["error"]
    assert "error" in ask("records", limit=100_000)


def test_a_fault_of_ours_tells_nothing_of_the_database(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any, **__: Any) -> None:
        raise RuntimeError("SELECT recognisable")

    monkeypatch.setattr(mcp_server.client, "latest", breaks)

    assert "recognisable" not in ask("latest")["error"]


# How one asks -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@ONE
def test_over_standard_input_and_output(rt: Runtime, tmp_path: Path) -> None:
    """As an assistant on this machine starts it: a command with the key in its environment."""
    key = api_keys.add(rt, "assistant", ["read:records"], "ann")
    command = StdioServerParameters(
        command=sys.executable,
        args=["-m", "lifelogger", "mcp"],
        cwd=ROOT,
        env={
            "LIFELOGGER_SETTINGS": str(tmp_path / "settings.toml"),
            "LIFELOGGER_DATABASE__URL": str(rt.store.url),
            "LIFELOGGER_REDIS__URL": "redis://127.0.0.1:1",
            "LIFELOGGER_API_KEY": key,
        },
    )

    assert ids(asyncio.run(asked(command, "records", {}))) == ["1", "2"]


async def over_http(app: FastAPI, key: str, ask: Callable[[Client], Awaitable[Any]]) -> Any:
    transport = httpx2.ASGITransport(app=app)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, headers=headers, base_url="http://localhost") as http,
        Client(streamable_http_client("http://localhost/mcp", http_client=http)) as client,
    ):
        return await ask(client)


@ONE
def test_over_http_with_the_key_of_the_api(rt: Runtime) -> None:
    key = api_keys.add(rt, "assistant", ["read:records"], "ann")

    async def latest(client: Client) -> Any:
        return (await client.call_tool("latest", {})).structured_content

    assert ids(asyncio.run(over_http(create_app(rt), key, latest))) == ["1"]


@ONE
def test_strangers_are_refused_at_the_door(rt: Runtime) -> None:
    for headers in ({}, {"authorization": "Bearer llk_unknown"}):
        with TestClient(create_app(rt), base_url="http://localhost") as stranger:
            reply = stranger.post("/mcp", json={}, headers={"origin": "http://localhost", **headers})
        assert (reply.status_code, "API key" in reply.json()["detail"]) == (401, True)


@ONE
def test_the_login_token_is_for_nobody_in_particular(rt: Runtime) -> None:
    async def latest(client: Client) -> Any:
        return (await client.call_tool("latest", {})).content[0]

    told = asyncio.run(over_http(create_app(rt), login_token(rt.settings)[0], latest))

    assert "needs an API key" in told.text
