"""Where providers call: handshakes, what is believed, what it costs, and that nothing is lost."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import hmac
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from dramatiq.brokers.redis import RedisBroker
from fastapi import FastAPI
from sqlalchemy import func, select
from starlette.testclient import TestClient

from lifelogger import client as library
from lifelogger import planner, webhooks
from lifelogger.connections import import_lines
from lifelogger.providers.base import Subscription, webhook_secret
from lifelogger.runtime import Runtime
from lifelogger.settings import Settings
from lifelogger.store.models import Connection, WebhookCall
from lifelogger.web.app import create_app
from tests.servers import RedisServer
from tests.web.people import HERE

SECRET = "the application's secret"
OWNERS = {"strava": "4711", "fitbit": "health-4711", "oura": "ring-4711"}


@pytest.fixture
def runtime(runtime: Runtime, settings_env: Callable[..., Settings]) -> Runtime:
    """All three with an application of ours, and a clock that stands."""
    own = {"client_id": "ours", "client_secret": SECRET}
    settings = settings_env(providers={name: {**own, "project": "ours"} for name in OWNERS})
    now = runtime.clock().replace(microsecond=0)
    return dataclasses.replace(runtime, settings=settings, clock=lambda: now)


@pytest.fixture
def calls(app: FastAPI) -> TestClient:
    """A provider: it has no session, no origin, and calls again when it is not answered."""
    return TestClient(app, base_url=HERE, raise_server_exceptions=False)


def connect(rt: Runtime, provider: str, user_id: str = "alice", *, synced: bool = True, **more: Any) -> None:
    line = {
        "user_id": user_id,
        "provider": provider,
        "access_token": "access",
        "expires_at": (rt.clock() + timedelta(hours=6)).isoformat(),
        "provider_user_id": OWNERS[provider],
        **more,
    }
    import_lines(rt, [json.dumps(line)])
    if synced:
        change(rt, next_sync_at=rt.clock() + timedelta(minutes=10), news_at=None)


def change(rt: Runtime, **values: Any) -> None:
    with rt.store.write() as db:
        db.execute(Connection.__table__.update().values(values))


def connection(rt: Runtime) -> Any:
    with rt.store.read() as db:
        return db.execute(select(Connection.__table__)).one()


def messages(app: FastAPI, broker: RedisBroker) -> list[list[str]]:
    """The arguments of all that was sent to workers."""
    app.state.messenger.flush()
    sent = broker.client.hvals("lifelogger:now.msgs")
    return [json.loads(each)["args"] for each in sent]


def known_to_be(rt: Runtime, provider: str, id_: str = "77", keys: Any = None) -> None:
    """Our subscription, as the last check found it."""
    webhooks.save(rt, provider, [Subscription(id_, "all", "https://ours.example")], keys)


# Events as each provider sends them


def strava_event(**changes: Any) -> bytes:
    event = {
        "object_type": "activity",
        "object_id": 1,
        "aspect_type": "create",
        "updates": {},
        "owner_id": int(OWNERS["strava"]),
        "subscription_id": 77,
        "event_time": 1516126040,
    }
    return json.dumps({**event, **changes}).encode()


def oura_call(rt: Runtime, *, key: str = SECRET, age: int = 0, **changes: Any) -> dict[str, Any]:
    event = {
        "event_type": "create",
        "data_type": "sleep",
        "object_id": "abc",
        "event_time": "2026-11-24T07:00:00+00:00",
        "user_id": OWNERS["oura"],
    }
    body = json.dumps({**event, **changes}).encode()
    at = str(int(rt.clock().timestamp()) - age)
    signature = hmac.new(key.encode(), at.encode() + body, hashlib.sha256).hexdigest().upper()
    return {"content": body, "headers": {"x-oura-timestamp": at, "x-oura-signature": signature}}


class Google:
    """Who signs: a key, and its place in the keyset."""

    def __init__(self, key_id: int = 4_000_000_001) -> None:
        self.key_id, self.private = key_id, ec.generate_private_key(ec.SECP256R1())

    @property
    def keyset(self) -> dict[str, Any]:
        point = self.private.public_key().public_bytes(
            serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
        )
        x, y = point[1:33], point[33:]
        # Tink's EcdsaPublicKey: version 0, parameters, then x and y, with a leading zero as Java writes them.
        message = b"\x12\x06\x08\x03\x10\x02\x18\x02" + b"\x1a\x21\x00" + x + b"\x22\x21\x00" + y
        data = {
            "typeUrl": "type.googleapis.com/google.crypto.tink.EcdsaPublicKey",
            "value": base64.b64encode(message).decode(),
            "keyMaterialType": "ASYMMETRIC_PUBLIC",
        }
        return {
            "primaryKeyId": self.key_id,
            "key": [{"keyData": data, "status": "ENABLED", "keyId": self.key_id, "outputPrefixType": "TINK"}],
        }

    def call(self, rt: Runtime, body: bytes | None = None, **changes: Any) -> dict[str, Any]:
        body = body or google_event()
        der = self.private.sign(body, ec.ECDSA(hashes.SHA256()))
        signature = base64.b64encode(b"\x01" + self.key_id.to_bytes(4, "big") + der).decode()
        authorization = f"Bearer {webhook_secret(rt.settings.providers['fitbit'])}"
        headers = {"authorization": authorization, "google-health-api-signature": signature, **changes}
        return {"content": body, "headers": {name: value for name, value in headers.items() if value}}


def google_event(data_type: str = "sleep", owner: str = OWNERS["fitbit"]) -> bytes:
    span = {"startTime": "2026-11-24T00:00:00Z", "endTime": "2026-11-24T07:00:00Z"}
    data = {
        "healthUserId": owner,
        "operation": "UPSERT",
        "dataType": data_type,
        "intervals": [{"physicalTimeInterval": span}],
    }
    return json.dumps([{"data": data}]).encode()


# Handshakes ----------------------------------------------------------------------------------------


def test_each_handshake_is_answered_for_whoever_knows_the_secret(runtime: Runtime, calls: TestClient) -> None:
    secret = webhook_secret(runtime.settings.providers["strava"])
    strava = {"hub.mode": "subscribe", "hub.challenge": "c1", "hub.verify_token": secret}
    oura = {"verification_token": secret, "challenge": "c2"}

    assert calls.get("/webhooks/strava", params=strava).json() == {"hub.challenge": "c1"}
    assert calls.get("/webhooks/oura", params=oura).json() == {"challenge": "c2"}
    assert calls.get("/webhooks/strava", params={**strava, "hub.verify_token": "x"}).status_code == 401
    assert calls.get("/webhooks/oura", params={"challenge": "c2"}).status_code == 401
    body = {"type": "verification"}
    bearer = {"authorization": f"Bearer {secret}"}
    assert calls.post("/webhooks/fitbit", json=body, headers=bearer).status_code == 201
    assert calls.post("/webhooks/fitbit", json=body).status_code == 401


def test_who_has_no_webhooks_is_not_there(runtime: Runtime, calls: TestClient) -> None:
    assert calls.get("/webhooks/nobody").status_code == 404
    assert calls.post("/webhooks/nobody", content=b"{}").status_code == 404


# What is believed ----------------------------------------------------------------------------------


def test_an_event_is_written_down_and_sends_one_message(
    runtime: Runtime, app: FastAPI, broker: RedisBroker, calls: TestClient
) -> None:
    connect(runtime, "strava")
    known_to_be(runtime, "strava")

    for _ in range(20):  # a burst becomes one sync
        assert calls.post("/webhooks/strava", content=strava_event()).status_code == 200

    row = connection(runtime)
    assert (row.news_at, row.next_sync_at, row.news_streams) == (
        runtime.clock(),
        runtime.clock(),
        ["activities"],
    )
    assert messages(app, broker) == [["alice", "news"]]


def test_signed_events_name_their_streams(
    runtime: Runtime, app: FastAPI, broker: RedisBroker, calls: TestClient
) -> None:
    google = Google()
    connect(runtime, "fitbit")
    known_to_be(runtime, "fitbit", keys=google.keyset)

    assert calls.post("/webhooks/fitbit", **google.call(runtime)).status_code == 204
    assert calls.post("/webhooks/fitbit", **google.call(runtime, google_event("steps"))).status_code == 204
    assert calls.post("/webhooks/fitbit", **google.call(runtime, google_event("floors"))).status_code == 204

    assert connection(runtime).news_streams == ["sleep", "steps"]
    assert messages(app, broker) == [["alice", "news"]]


def refused(rt: Runtime, google: Google) -> dict[str, tuple[str, dict[str, Any]]]:
    """Calls that nobody may believe."""
    right = google.call(rt)
    return {
        "strava: no subscription of ours": ("strava", {"content": strava_event(subscription_id=78)}),
        "strava: no JSON": ("strava", {"content": b"\xff"}),
        "strava: deeply nested": ("strava", {"content": b"[" * 60_000}),
        "strava: nobody": ("strava", {"content": strava_event(owner_id="x")}),
        "oura: another key": ("oura", oura_call(rt, key="guessed")),
        "oura: an altered body": ("oura", {**oura_call(rt), "content": b"{}"}),
        "oura: an old time": ("oura", oura_call(rt, age=5401)),
        "oura: a time to come": ("oura", oura_call(rt, age=-5401)),
        "oura: no time": (
            "oura",
            {
                "content": b"{}",
                "headers": {"x-oura-signature": oura_call(rt)["headers"]["x-oura-signature"]},
            },
        ),
        "oura: not signed": ("oura", {"content": b"{}"}),
        "fitbit: another key": ("fitbit", Google().call(rt)),
        "fitbit: a key that is not known": ("fitbit", Google(5).call(rt)),
        "fitbit: an altered body": ("fitbit", {**right, "content": google_event("steps")}),
        "fitbit: without Authorization": ("fitbit", google.call(rt, authorization=None)),
        "fitbit: another Authorization": ("fitbit", google.call(rt, authorization="Bearer x")),
        "fitbit: not signed": ("fitbit", google.call(rt, **{"google-health-api-signature": None})),
        "fitbit: not base64": ("fitbit", google.call(rt, **{"google-health-api-signature": "!"})),
    }


def test_what_cannot_be_believed_changes_nothing(
    runtime: Runtime, app: FastAPI, broker: RedisBroker, calls: TestClient
) -> None:
    google = Google()
    for provider in OWNERS:
        connect(runtime, provider)
    change(runtime, next_sync_at=runtime.clock() + timedelta(minutes=10), news_at=None)
    known_to_be(runtime, "strava")
    known_to_be(runtime, "fitbit", keys=google.keyset)
    before = all_of(runtime)

    answers = {
        name: calls.post(f"/webhooks/{provider}", **content).status_code
        for name, (provider, content) in refused(runtime, google).items()
    }

    assert {name for name, status in answers.items() if status != 401} == set()
    assert calls.post("/webhooks/strava", content=b" " * 70_000).status_code == 413
    assert all_of(runtime) == before
    assert messages(app, broker) == []


def all_of(rt: Runtime) -> list[Any]:
    with rt.store.read() as db:
        taken = db.scalar(select(func.count()).select_from(WebhookCall))
        return [taken, *db.execute(select(Connection.__table__).order_by(Connection.id))]


def test_a_signed_event_has_its_effect_once(
    runtime: Runtime, app: FastAPI, broker: RedisBroker, calls: TestClient
) -> None:
    """Sent twice by the provider, or caught and sent again by somebody: answered, and nothing done."""
    google = Google()
    connect(runtime, "fitbit")
    connect(runtime, "oura")
    known_to_be(runtime, "fitbit", keys=google.keyset)
    for provider, call in (("fitbit", google.call(runtime)), ("oura", oura_call(runtime))):
        assert calls.post(f"/webhooks/{provider}", **call).status_code < 300
        change(runtime, next_sync_at=runtime.clock() + timedelta(minutes=10), news_at=None)
        before = all_of(runtime)

        assert calls.post(f"/webhooks/{provider}", **call).status_code < 300

        assert all_of(runtime) == before


def test_a_webhook_that_says_someone_left_is_no_proof(
    runtime: Runtime, app: FastAPI, broker: RedisBroker, calls: TestClient
) -> None:
    """It is not signed: the provider is asked, and until then the connection goes on."""
    connect(runtime, "strava")
    known_to_be(runtime, "strava")

    gone = strava_event(object_type="athlete", aspect_type="update", updates={"authorized": "false"})
    assert calls.post("/webhooks/strava", content=gone).status_code == 200

    row = connection(runtime)
    assert (row.status, row.deauthorised_at) == ("active", runtime.clock())
    assert messages(app, broker) == [["alice", "news"]]


# What it costs -------------------------------------------------------------------------------------


def test_hints_make_us_look_once_a_minute(
    runtime: Runtime, app: FastAPI, broker: RedisBroker, calls: TestClient
) -> None:
    """What comes within the minute is written down, and met when it is over."""
    connect(runtime, "strava")
    known_to_be(runtime, "strava")
    turn = runtime.clock() + timedelta(seconds=50)
    change(runtime, hint_after=turn)

    calls.post("/webhooks/strava", content=strava_event())

    row = connection(runtime)
    assert (row.news_at, row.next_sync_at) == (runtime.clock(), turn)
    assert messages(app, broker) == []
    sent: list[str] = []
    assert planner.serve_news(sent.append, runtime=runtime) == 0
    later = dataclasses.replace(runtime, clock=lambda: turn)
    assert planner.serve_news(sent.append, runtime=later) == 1
    assert sent == ["alice"]


def test_a_failed_connection_keeps_its_time(runtime: Runtime, app: FastAPI, calls: TestClient) -> None:
    connect(runtime, "strava")
    known_to_be(runtime, "strava")
    change(runtime, failures=3)
    due = connection(runtime).next_sync_at

    calls.post("/webhooks/strava", content=strava_event())

    assert connection(runtime).next_sync_at == due
    assert connection(runtime).news_at == runtime.clock()


def test_a_person_s_wish_stays_one(runtime: Runtime, app: FastAPI, calls: TestClient) -> None:
    """They want to see all that is new, wherever a webhook hints at."""
    connect(runtime, "strava")
    known_to_be(runtime, "strava")
    library.request_sync("alice", runtime=runtime)

    calls.post("/webhooks/strava", content=strava_event())

    assert connection(runtime).news_streams is None


# Redis away ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_without_redis_it_is_written_down_and_the_next_tick_serves_it(
    runtime: Runtime, broker: RedisBroker, redis_server: RedisServer
) -> None:
    """The reply does not wait for the message: here nobody sends it at all until Redis is back."""
    app = create_app(runtime, broker)
    connect(runtime, "strava")
    known_to_be(runtime, "strava")
    redis_server.stop()

    reply = TestClient(app, base_url=HERE).post("/webhooks/strava", content=strava_event())

    assert reply.status_code == 200
    assert connection(runtime).news_at == runtime.clock()
    redis_server.start()
    sent: list[str] = []
    assert planner.serve_news(sent.append, runtime=runtime) == 1
    assert sent == ["alice"]
