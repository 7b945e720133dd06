"""The guard: closed by default, our own pages only, our own names only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from dramatiq.brokers.redis import RedisBroker
from fastapi import FastAPI
from starlette.routing import Mount
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from lifelogger.runtime import Runtime
from lifelogger.settings import Web
from lifelogger.web.app import create_app, dashboard
from lifelogger.web.health import Health
from lifelogger.web.login import CALLED, HEADERS, MOST_BYTES, OPEN
from tests.web.people import connect

Visit = Callable[..., TestClient]


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    """One database is enough here."""
    return f"sqlite:///{tmp_path / 'test.db'}"


def addresses(app: FastAPI) -> list[tuple[str, str]]:
    """Method and path of everything the application has, with examples for its parameters."""
    found = []
    for route in app.routes:
        if isinstance(route, Mount):
            found += [
                ("GET", f"{route.path}/"),
                ("GET", f"{route.path}/anything"),
                ("POST", f"{route.path}/anything"),
            ]
        for included in getattr(getattr(route, "original_router", None), "routes", [route]):
            for method in getattr(included, "methods", None) or ():
                found.append((method, included.path.replace("{user_id:user}", "ann")))
    return found


def test_every_address_but_the_open_ones_refuses_strangers(
    app: FastAPI, anonymous: TestClient, runtime: Runtime
) -> None:
    connect(runtime, "ann")
    asked = addresses(app)
    assert {"/", "/users", "/users/ann", "/users/ann/sync", "/runs", "/logout"} <= {path for _, path in asked}
    assert {"/api/status", "/api/users/ann/records", "/api/openapi.json"} <= {path for _, path in asked}
    assert ("GET", "/dashboard/anything") in asked
    # Where providers call, each call proves itself: tests/web/test_webhooks.py.
    closed = [(method, path) for method, path in asked if path not in OPEN and not path.startswith(CALLED)]
    assert len(closed) > 15
    for method, path in closed:
        reply = anonymous.request(method, path)
        expected = 401 if path.startswith("/api/") else 303
        assert reply.status_code == expected, f"{method} {path}"
        assert "ann" not in reply.text


@pytest.mark.parametrize(
    "path",
    [
        "/docs", "/redoc", "/openapi.json", "/api/openapi.json", "/nowhere", "/static/../users",
        "/static/nowhere", "/login/", "/%6cogin", "/healthz/", "/LOGIN", "//login",
        "/static/style.css/../../users",
    ],
)  # fmt: skip
def test_what_is_not_listed_is_closed(anonymous: TestClient, path: str) -> None:
    assert anonymous.get(path).status_code in (303, 401)


def test_the_open_ones_are_open(anonymous: TestClient) -> None:
    assert {path: anonymous.get(path).status_code for path in OPEN} == dict.fromkeys(OPEN, 200)


def test_programs_are_told_in_json(anonymous: TestClient) -> None:
    reply = anonymous.get("/api/status")
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert "Bearer" in reply.json()["detail"]


def test_the_token_itself_opens_the_api(anonymous: TestClient, token: str) -> None:
    bearer = {"authorization": f"Bearer {token}"}
    assert anonymous.get("/api/status", headers=bearer).status_code == 200
    assert anonymous.get("/users", headers=bearer).status_code == 303


def test_a_wrong_bearer_token_is_not_helped_by_a_cookie(client: TestClient) -> None:
    assert client.get("/api/status", headers={"authorization": "Bearer wrong"}).status_code == 401


def test_websockets_are_closed(app: FastAPI) -> None:
    with pytest.raises(WebSocketDisconnect) as refused, TestClient(app).websocket_connect("/"):
        pass
    assert refused.value.code == 1008


# Where from ----------------------------------------------------------------------------------------

ELSEWHERE = [
    {"origin": "https://evil.example"},
    {"origin": "http://localhost:8001"},
    {"origin": "http://localhost"},
    {"origin": "null"},
    {"origin": ""},
    {"origin": "http://["},
    {"origin": "http://localhost:8000", "sec-fetch-site": "cross-site"},
    {"origin": "http://localhost:8000", "sec-fetch-site": "same-site"},
    {"origin": "http://localhost:8000", "sec-fetch-site": "none"},
]


POSTS = [
    "/login",
    "/logout",
    "/users/ann/sync",
    "/api/users/ann/sync",
    "/users/ann/erase",
    "/users/ann/connections/strava/disconnect",
    "/dashboard/delete-message",
    "/nowhere",
]


@pytest.mark.parametrize("headers", ELSEWHERE, ids=str)
def test_nothing_is_done_for_other_sites(client: TestClient, headers: dict[str, str]) -> None:
    for path in POSTS:
        reply = client.post(path, headers=headers)
        assert reply.status_code == 403, path
        assert "nothing was done" in reply.text
    assert client.get("/").status_code == 200


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "TRACE"])
def test_no_unsafe_method_is_forgotten(client: TestClient, method: str) -> None:
    assert client.request(method, "/users", headers={"origin": "https://evil.example"}).status_code == 403


def test_a_form_without_any_origin_is_refused(app: FastAPI, client: TestClient) -> None:
    plain = TestClient(app, base_url="http://localhost:8000", cookies=client.cookies, follow_redirects=False)
    assert plain.post("/logout").status_code == 403


def test_the_browser_s_own_judgement_is_enough(client: TestClient) -> None:
    reply = client.post(
        "/logout", headers={"origin": "https://proxy.example", "sec-fetch-site": "same-origin"}
    )
    assert reply.status_code == 303


def test_plain_http_does_not_speak_for_https(app: FastAPI, visit: Visit) -> None:
    browser = visit(app, base_url="https://localhost:8000")
    assert browser.post("/logout", headers={"origin": "http://localhost:8000"}).status_code == 403


def test_programs_with_the_token_need_no_origin(app: FastAPI, token: str, runtime: Runtime) -> None:
    connect(runtime, "ann")
    program = TestClient(app, base_url="http://localhost:8000", headers={"authorization": f"Bearer {token}"})
    assert program.post("/api/users/ann/sync").status_code == 202


# Under which name ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "", "[::2]", "[", "127.0.0.2"]
)
def test_a_name_that_is_not_ours_is_refused(client: TestClient, host: str) -> None:
    for path in ("/", "/healthz", "/login", "/api/status"):
        assert client.get(path, headers={"host": host}).status_code == 400


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000"])
def test_our_names_are_taken(client: TestClient, host: str) -> None:
    assert client.get("/healthz", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    ("configured", "asked", "status"),
    [
        ("life.example", "life.example", 200),
        ("life.example", "evil.example", 400),
        ("0.0.0.0", "anything.example", 200),
        ("::", "anything.example", 200),
        ("::", "[", 400),
    ],
)
def test_the_settings_say_more_names(
    runtime: Runtime, broker: RedisBroker, visit: Visit, configured: str, asked: str, status: int
) -> None:
    settings = runtime.settings.model_copy(update={"web": Web(host=configured)})
    settings._root = runtime.settings.root
    browser = visit(create_app(replace(runtime, settings=settings), broker))
    assert browser.get("/healthz", headers={"host": asked}).status_code == status


def test_a_name_of_a_reverse_proxy_is_let_in(runtime: Runtime, broker: RedisBroker, visit: Visit) -> None:
    settings = runtime.settings.model_copy(update={"web": Web(names=("Life.example",))})
    settings._root = runtime.settings.root
    browser = visit(create_app(replace(runtime, settings=settings), broker))

    assert browser.get("/healthz", headers={"host": "life.example"}).status_code == 200
    assert browser.get("/healthz", headers={"host": "evil.example"}).status_code == 400


def test_without_the_dashboard_there_is_a_page_that_says_so(
    runtime: Runtime, broker: RedisBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`lifelogger[web]` cannot bring it along."""
    monkeypatch.setattr("lifelogger.web.app.find_spec", lambda name: None)

    absent = dashboard(broker, Health(runtime))

    assert b"pip install --no-deps dramatiq-dashboard==0.4.0" in absent.body


# What every answer says ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/", "/login", "/users", "/nowhere", "/api/status", "/api/nowhere", "/healthz", "/users/nobody"]
)
def test_every_answer_forbids_what_it_does_not_need(client: TestClient, path: str) -> None:
    reply = client.get(path)
    assert {name: reply.headers[name] for name in HEADERS} == HEADERS
    assert "frame-ancestors 'none'" in HEADERS["content-security-policy"]
    assert "default-src 'none'" in HEADERS["content-security-policy"]
    assert "unsafe" not in HEADERS["content-security-policy"]


def test_refusals_say_it_too(anonymous: TestClient) -> None:
    for reply in (
        anonymous.get("/"),
        anonymous.get("/", headers={"host": "evil.example"}),
        anonymous.put("/login"),
    ):
        assert {name: reply.headers[name] for name in HEADERS} == HEADERS


def test_so_does_a_fault_of_ours(app: FastAPI, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("recognisable detail")

    monkeypatch.setattr("lifelogger.status.runs", broken)
    for path in ("/runs", "/api/runs"):
        reply = client.get(path)
        assert reply.status_code == 500
        assert "This is our fault" in reply.text
        assert "recognisable" not in reply.text
        assert {name: reply.headers[name] for name in HEADERS} == HEADERS


def test_no_page_has_a_script_or_a_style_of_its_own(client: TestClient, runtime: Runtime) -> None:
    connect(runtime, "ann")
    for path in ("/", "/users", "/users/ann", "/runs", "/login", "/nowhere"):
        text = client.get(path).text
        assert "<script" not in text
        assert "<style" not in text
        assert "style=" not in text
        assert "http://" not in text
        assert "https://" not in text


# How much ------------------------------------------------------------------------------------------


def test_a_long_body_is_not_read(anonymous: TestClient) -> None:
    assert anonymous.post("/login", data={"token": "x" * MOST_BYTES}).status_code == 413


@pytest.mark.parametrize("length", ["-1", "x", "9" * 5000])
def test_a_length_that_is_none_is_refused(anonymous: TestClient, length: str) -> None:
    assert anonymous.post("/login", content=b"token=x", headers={"content-length": length}).status_code == 413


def test_a_body_without_a_length_is_not_read(anonymous: TestClient) -> None:
    assert anonymous.post("/login", content=iter([b"token=", b"x"])).status_code == 413
