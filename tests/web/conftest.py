"""The web application on a real Redis and both databases, asked without a socket."""

from __future__ import annotations

from collections.abc import Callable

import dramatiq
import pytest
from dramatiq.brokers.redis import RedisBroker
from fastapi import FastAPI
from starlette.testclient import TestClient

import lifelogger.broker
from lifelogger.broker import make_broker
from lifelogger.runtime import Runtime
from lifelogger.web.app import create_app
from lifelogger.web.login import login_token
from tests.web.people import HERE

Visit = Callable[..., TestClient]


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
def visit(token: str) -> Visit:
    """A browser on an application, which sends `Origin` as browsers do; logged in unless told otherwise."""

    def browser(app: FastAPI, *, login: bool = True, base_url: str = HERE) -> TestClient:
        client = TestClient(
            app,
            base_url=base_url,
            headers={"origin": base_url},
            follow_redirects=False,
            raise_server_exceptions=False,
        )
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
