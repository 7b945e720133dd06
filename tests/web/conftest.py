"""The web application on a real Redis and both databases, asked without a socket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import dramatiq
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from dramatiq.brokers.redis import RedisBroker
from fastapi import FastAPI
from mcp.server.mcpserver.tools import Tool
from starlette.testclient import TestClient

import lifelogger.broker
from lifelogger.broker import make_broker
from lifelogger.runtime import Runtime
from lifelogger.web.app import create_app
from lifelogger.web.login import login_token
from tests.web.people import HERE

Visit = Callable[..., TestClient]


@pytest.fixture(scope="session", autouse=True)
def _tools_are_read_once() -> Iterator[None]:
    """Each application has an MCP server of its own; what its tools take and tell is read from their code."""
    read: dict[CodeType, Tool] = {}

    def from_function(fn: Callable[..., Any], **options: Any) -> Tool:
        if fn.__code__ not in read:
            read[fn.__code__] = original(fn, **options)
        return read[fn.__code__].model_copy(update={"fn": fn})

    with pytest.MonkeyPatch.context() as patch:
        original = Tool.from_function
        patch.setattr(Tool, "from_function", from_function)
        yield


@pytest.fixture(scope="session")
def portal() -> Iterator[BlockingPortal]:
    """Where requests are answered: without one, each is given a thread and an event loop of its own."""
    with start_blocking_portal() as portal:
        yield portal


@pytest.fixture
def broker(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> RedisBroker:
    """The broker of this process, on the Redis of the test."""
    made = make_broker(runtime.settings, mutex=lambda: runtime.mutex)
    assert isinstance(made, RedisBroker)
    monkeypatch.setitem(vars(lifelogger.broker), "broker", made)
    monkeypatch.setattr(dramatiq.broker, "global_broker", made)
    return made


@pytest.fixture
def app(runtime: Runtime, broker: RedisBroker) -> FastAPI:
    return create_app(runtime, broker)


@pytest.fixture
def token(runtime: Runtime) -> str:
    return login_token(runtime.settings)[0]


@pytest.fixture
def visit(token: str, portal: BlockingPortal) -> Visit:
    """A browser on an application, which sends `Origin` as browsers do; logged in unless told otherwise."""

    def browser(app: FastAPI, *, login: bool = True, base_url: str = HERE) -> TestClient:
        client = TestClient(
            app,
            base_url=base_url,
            headers={"origin": base_url},
            follow_redirects=False,
            raise_server_exceptions=False,
        )
        client.portal = portal
        if login:
            assert client.post("/login", data={"token": token}).status_code == 303
        return client

    return browser


@pytest.fixture
def anonymous(app: FastAPI, visit: Visit) -> TestClient:
    return visit(app, login=False)


@pytest.fixture
def client(app: FastAPI, visit: Visit) -> TestClient:
    return visit(app)
