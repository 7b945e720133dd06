"""One sandbox for all tests of it, made anew for each, its clock stopped at a moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import requests

from lifelogger.sandbox.clock import Clock
from lifelogger.sandbox.server import Sandbox
from tests.sandbox.control import Control

NOW = int(datetime(2026, 6, 15, 12, 7, 30, tzinfo=UTC).timestamp())
Ask = Callable[..., requests.Response]


@pytest.fixture(scope="session")
def running() -> Iterator[Sandbox]:
    clock = Clock()
    clock.freeze(NOW)
    with Sandbox(people=5, seed=7, history_days=400, clock=clock) as sandbox:
        yield sandbox


@pytest.fixture
def control(running: Sandbox) -> Iterator[Control]:
    control = Control(running.url)
    control.reset()
    yield control
    control.close()


@pytest.fixture
def http() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


@pytest.fixture
def ask(control: Control, http: requests.Session) -> Ask:
    """Ask Strava: `ask(path, token, method="GET", **of requests)`."""

    def send(path: str, token: str | None = None, method: str = "GET", **content: Any) -> requests.Response:
        headers = dict(content.pop("headers", {}))
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        content.setdefault("timeout", 10)
        return http.request(
            method,
            f"{control.url}/strava{path}",
            headers=headers,
            allow_redirects=False,
            **content,
        )

    return send


@pytest.fixture
def token(control: Control) -> str:
    """An access token of Alice, with the usual scopes."""
    return str(control.connect("alice")[0]["access_token"])
