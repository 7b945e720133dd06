"""Dramatiq's dashboard behind our login, with its habits mended."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import dramatiq
import pytest
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.common import xq_name
from fastapi import FastAPI
from starlette.testclient import TestClient

from lifelogger.broker import make_broker
from lifelogger.runtime import Runtime
from lifelogger.web.app import create_app
from lifelogger.web.login import COOKIE
from tests.servers import RedisServer

Visit = Callable[..., TestClient]


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    """One database is enough here."""
    return f"sqlite:///{tmp_path / 'test.db'}"


def enqueue(broker: RedisBroker, user_id: str = "ann") -> dramatiq.Message[Any]:
    return broker.enqueue(
        dramatiq.Message(
            queue_name="default", actor_name="sync_user_data", args=(user_id,), kwargs={}, options={}
        )
    )


@pytest.fixture
def failed(broker: RedisBroker, runtime: Runtime) -> str:
    """A message among the failed ones; its id in Redis."""
    message = enqueue(broker)
    name, key = message.options["redis_message_id"], f"{runtime.settings.redis.prefix}:{xq_name('default')}"
    runtime.redis.delete(
        f"{runtime.settings.redis.prefix}:default", f"{runtime.settings.redis.prefix}:default.msgs"
    )
    runtime.redis.zadd(key, {name: 1})
    runtime.redis.hset(f"{key}.msgs", name, message.encode())
    return str(name)


def form(client: TestClient, page: str) -> str:
    """The CSRF value of the forms on a page."""
    found = re.search(r'name="__dd_csrf" value="([0-9a-f]{64})"', client.get(page).text)
    assert found
    return found[1]


def test_it_is_closed_to_strangers(anonymous: TestClient) -> None:
    for path in ("/dashboard", "/dashboard/", "/dashboard/queues/default"):
        assert anonymous.get(path).headers["location"].startswith("/login?next=%2Fdashboard")


def test_it_shows_the_queues_of_actors_that_this_process_has_not_loaded(
    client: TestClient, broker: RedisBroker
) -> None:
    enqueue(broker)
    page = client.get("/dashboard/")
    assert page.status_code == 200
    assert "/dashboard/queues/default" in page.text
    assert all(f"/dashboard/queues/{name}" in page.text for name in ("now", "schedule", "notify"))
    assert "sync_user_data(&#39;ann&#39;)" in client.get("/dashboard/queues/default").text


def test_one_finds_back(client: TestClient) -> None:
    assert '<a href="/">lifelogger</a>' in client.get("/dashboard/").text


def test_its_address_without_a_slash_leads_there(client: TestClient) -> None:
    assert client.get("/dashboard", follow_redirects=True).status_code == 200


def test_it_shows_workers_without_reading_every_key(
    client: TestClient, broker: RedisBroker, runtime: Runtime
) -> None:
    prefix = runtime.settings.redis.prefix
    runtime.redis.zadd(f"{prefix}:__heartbeats__", {"worker-1": runtime.clock().timestamp() * 1000})
    runtime.redis.sadd(f"{prefix}:__acks__.worker-1.default", "a", "b")
    runtime.redis.config_resetstat()
    page = client.get("/dashboard/").text
    assert re.search(r"worker-1\s*</td>\s*<td[^>]*>\s*2\s", page)
    assert "cmdstat_keys" not in runtime.redis.info("commandstats")


@pytest.mark.parametrize("path", ["queues/default?cursor=abc", "queues/default/failed?cursor=-"])
def test_a_wrong_parameter_is_a_sentence(client: TestClient, path: str) -> None:
    reply = client.get(f"/dashboard/{path}")
    assert reply.status_code == 400
    assert "cannot read that address" in reply.text


def test_what_is_not_there_is_a_sentence(client: TestClient) -> None:
    for path in ("nowhere", "nowhere%0Aelse"):
        reply = client.get(f"/dashboard/{path}")
        assert reply.status_code == 404
        assert "no such page" in reply.text


def test_a_message_that_is_gone_leads_back_to_its_queue(client: TestClient) -> None:
    reply = client.get("/dashboard/queues/default/standard/gone")
    assert reply.headers["location"] == "/dashboard/queues/default/standard"


def test_an_exception_is_a_sentence(client: TestClient, runtime: Runtime) -> None:
    key = f"{runtime.settings.redis.prefix}:default.msgs"
    runtime.redis.hset(key, "x", b'{"recognisable": 1}')
    reply = client.get("/dashboard/queues/default")
    assert reply.status_code in (400, 500)
    assert "The dashboard" in reply.text
    assert "recognisable" not in reply.text
    assert "Traceback" not in reply.text


def test_a_failed_message_is_enqueued_again(
    client: TestClient, failed: str, broker: RedisBroker, runtime: Runtime
) -> None:
    token = form(client, "/dashboard/queues/default/failed")
    data = {"__dd_csrf": token, "queue": "default.XQ", "id": failed}
    reply = client.post("/dashboard/requeue-message", data=data)
    assert reply.status_code == 302
    assert client.get(reply.headers["location"]).status_code == 200
    prefix = runtime.settings.redis.prefix
    assert runtime.redis.llen(f"{prefix}:default") == 1
    assert runtime.redis.hlen(f"{prefix}:default.XQ.msgs") == 0
    assert client.post("/dashboard/requeue-message", data=data).status_code == 410


def test_a_message_that_cannot_be_enqueued_stays(
    client: TestClient, failed: str, broker: RedisBroker, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise redis.ConnectionError

    token = form(client, "/dashboard/queues/default/failed")
    monkeypatch.setattr(broker, "enqueue", away)
    data = {"__dd_csrf": token, "queue": "default.XQ", "id": failed}
    assert client.post("/dashboard/requeue-message", data=data).status_code >= 500
    assert runtime.redis.hlen(f"{runtime.settings.redis.prefix}:default.XQ.msgs") == 1


def test_a_message_can_be_deleted(client: TestClient, failed: str, runtime: Runtime) -> None:
    token = form(client, "/dashboard/queues/default/failed")
    data = {"__dd_csrf": token, "queue": "default.XQ", "id": failed}
    assert client.post("/dashboard/delete-message", data=data).status_code == 302
    assert runtime.redis.hlen(f"{runtime.settings.redis.prefix}:default.XQ.msgs") == 0


def test_its_own_csrf_check_stays(client: TestClient, failed: str, runtime: Runtime) -> None:
    data = {"__dd_csrf": "0" * 64, "queue": "default.XQ", "id": failed}
    reply = client.post("/dashboard/delete-message", data=data)
    assert reply.status_code == 403
    assert "too old" in reply.text
    assert runtime.redis.hlen(f"{runtime.settings.redis.prefix}:default.XQ.msgs") == 1


def test_a_form_without_its_fields_is_a_sentence(client: TestClient) -> None:
    token = "0" * 64
    client.cookies.set("__dd_csrf", token)
    assert client.post("/dashboard/delete-message", data={"__dd_csrf": token}).status_code == 400


def test_its_cookie_is_kept_from_other_sites_and_paths(client: TestClient) -> None:
    cookie = client.get("/dashboard/queues/default").headers["set-cookie"]
    assert re.fullmatch(r"__dd_csrf=[0-9a-f]{64}; HttpOnly; Path=/dashboard; SameSite=Lax", cookie)


def test_over_https_its_cookie_stays_there(app: FastAPI, visit: Visit) -> None:
    browser = visit(app, base_url="https://localhost")
    assert browser.get("/dashboard/queues/default").headers["set-cookie"].endswith("; Secure")


def test_a_cookie_from_elsewhere_is_not_put_into_the_page(client: TestClient, failed: str) -> None:
    evil = 'x"><b>evil</b>'
    cookie = f"{COOKIE}={client.cookies[COOKIE]}; __dd_csrf={evil}"
    assert "evil" not in client.get("/dashboard/queues/default/failed", headers={"cookie": cookie}).text


def test_its_pages_may_use_their_one_style_sheet_and_nothing_else(client: TestClient) -> None:
    reply = client.get("/dashboard/")
    (style,) = re.findall(r"<style>(.*?)</style>", reply.text, re.DOTALL)
    digest = b64encode(sha256(style.encode()).digest()).decode()
    policy = reply.headers["content-security-policy"]
    assert f"style-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert "<script" not in reply.text


def test_a_user_id_cannot_put_anything_into_its_pages(client: TestClient, broker: RedisBroker) -> None:
    message = enqueue(broker, "<script>alert(1)</script>")
    name = message.options["redis_message_id"]
    for path in ("default", f"default/standard/{name}"):
        page = client.get(f"/dashboard/queues/{path}").text
        assert "&lt;script&gt;" in page
        assert "<script>" not in page


def test_without_redis_it_says_so(client: TestClient, redis_server: RedisServer) -> None:
    redis_server.stop()
    reply = client.get("/dashboard/")
    assert reply.status_code == 503
    assert "Redis does not answer" in reply.text


def test_under_a_stub_broker_there_is_none(runtime: Runtime, visit: Visit) -> None:
    stub = make_broker(runtime.settings, stub=True, mutex=lambda: runtime.mutex)
    reply = visit(create_app(runtime, stub)).get("/dashboard/")
    assert reply.status_code == 200
    assert "no queues to show" in reply.text
