"""Webhooks as the clouds send them: to whom, when, how often, and how they prove themselves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import requests

from tests.live import NOON
from tests.sandbox.control import Control
from tests.servers import wait_until

CLIENT = {"client_id": "sandbox", "client_secret": "sandbox"}
BY_HEADER = {"x-client-id": "sandbox", "x-client-secret": "sandbox"}


class Application:
    """Somebody who subscribed: notes what it is sent and answers as it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[dict[str, str], bytes]] = []
        self.statuses: list[int] = []
        """Of the next answers; then 200."""
        application = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = dict(parse_qsl(urlsplit(self.path).query))
                for name in ("hub.challenge", "challenge"):
                    if name in query:
                        self.answer(200, f'{{"{name}":"{query[name]}"}}'.encode())

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if body == b'{"type":"verification"}':
                    self.answer(201 if self.headers["Authorization"] == "Bearer word" else 401)
                    return
                application.heard.append((dict(self.headers), body))
                self.answer(application.statuses.pop(0) if application.statuses else 200)

            def answer(self, status: int, body: bytes = b"") -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hooks"

    def wait_for(self, number: int) -> None:
        wait_until(lambda: len(self.heard) >= number, f"{number} webhooks")


@pytest.fixture
def application() -> Iterator[Application]:
    made = Application()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def at_noon(sandbox: Control) -> Control:
    sandbox.freeze(NOON)
    return sandbox


def at_strava(sandbox: Control, url: str) -> requests.Response:
    form = {**CLIENT, "callback_url": url, "verify_token": "word"}
    return requests.post(f"{sandbox.url}/strava/api/v3/push_subscriptions", data=form, timeout=10)


def at_oura(sandbox: Control, url: str, name: str, what: str) -> requests.Response:
    body = {"callback_url": url, "verification_token": "word", "data_type": name, "event_type": what}
    address = f"{sandbox.url}/oura/v2/webhook/subscription"
    return requests.post(address, json=body, headers=BY_HEADER, timeout=10)


def at_google(sandbox: Control, url: str, *types: str) -> requests.Response:
    body = {
        "endpointUri": url,
        "subscriberConfigs": [{"dataTypes": list(types), "subscriptionCreatePolicy": "AUTOMATIC"}],
        "endpointAuthorization": {"secret": "Bearer word"},
    }
    address = f"{sandbox.url}/fitbit/v4/projects/ours/subscribers"
    return requests.post(address, json=body, headers={"Authorization": "Bearer sandbox"}, timeout=10)


def over(sandbox: Control, number: int, provider: str = "strava") -> list[Any]:
    """All deliveries, once so many are done."""
    found: list[Any] = []

    def done() -> bool:
        found[:] = [each for each in sandbox.webhooks(provider)["deliveries"] if each["done"]]
        return len(found) >= number

    wait_until(done, f"{number} deliveries to be over")
    return found


def test_nobody_is_called_who_did_not_subscribe(at_noon: Control) -> None:
    at_noon.connect("alice")
    at_noon.add("alice")

    assert at_noon.webhooks() == {"subscriptions": [], "deliveries": []}


@pytest.mark.parametrize("url", ["https://example.com/hooks", "http://10.0.0.1/hooks", "nowhere", ""])
def test_nobody_elsewhere_is_called(at_noon: Control, url: str) -> None:
    at_noon.connect("alice")

    assert at_strava(at_noon, url).status_code == 400
    assert at_noon.webhooks()["subscriptions"] == []


def test_each_wants_its_handshake(at_noon: Control, application: Application) -> None:
    for provider in ("strava", "fitbit", "oura"):
        at_noon.connect("alice", provider=provider)

    assert at_strava(at_noon, "http://127.0.0.1:1/").status_code == 400
    assert at_oura(at_noon, "http://127.0.0.1:1/", "sleep", "create").status_code == 400
    assert at_google(at_noon, "http://127.0.0.1:1/", "sleep").status_code == 400
    assert at_strava(at_noon, application.url).status_code == 201
    assert at_oura(at_noon, application.url, "sleep", "create").status_code == 201
    assert at_google(at_noon, application.url, "sleep").json()["response"]["state"] == "ACTIVE"


def test_strava_has_one_for_each_application(at_noon: Control, application: Application) -> None:
    at_noon.connect("alice")
    assert at_strava(at_noon, application.url).status_code == 201

    again = at_strava(at_noon, application.url)

    assert (again.status_code, again.json()["errors"][0]["code"]) == (400, "already exists")


def test_an_upload_that_the_clock_is_stepped_past_is_told(at_noon: Control, application: Application) -> None:
    at_noon.connect("alice")
    at_strava(at_noon, application.url)
    later = (NOON + timedelta(hours=2)).timestamp()
    news = at_noon.add("alice", start=later - 3600, uploaded=later)
    assert all(each["person"] != "alice" for each in at_noon.webhooks()["deliveries"])

    at_noon.step(2 * 3600)

    told = over(at_noon, 1)
    assert any(f'"object_id":{news},"aspect_type":"create"' in each["body"] for each in told)


def test_who_did_not_let_the_application_in_is_not_told_of(
    at_noon: Control, application: Application
) -> None:
    at_noon.connect("alice")
    at_strava(at_noon, application.url)
    at_noon.add("bruno")
    at_noon.add("alice")

    assert {each["person"] for each in over(at_noon, 1)} == {"alice"}


def test_nights_and_days_are_told_as_they_come(at_noon: Control, application: Application) -> None:
    at_noon.connect("alice", provider="oura")
    at_oura(at_noon, application.url, "sleep", "create")
    at_oura(at_noon, application.url, "daily_activity", "update")

    at_noon.step(24 * 3600)

    told = {(each["stream"], each["what"]) for each in over(at_noon, 2, "oura")}
    assert told == {("sleep", "create"), ("daily_activity", "update")}


def test_strava_tries_three_times(at_noon: Control, application: Application) -> None:
    at_noon.connect("alice")
    at_strava(at_noon, application.url)
    application.statuses = [500] * 5
    at_noon.add("alice")
    for number in (1, 2, 3):
        application.wait_for(number)
        wait_until(lambda n=number: at_noon.webhooks()["deliveries"][0]["tries"] == n, "the try to be noted")
        at_noon.step(400)

    (delivery,) = over(at_noon, 1)
    assert (delivery["tries"], delivery["status"]) == (3, 500)


def test_oura_gives_up_who_is_gone(at_noon: Control, application: Application) -> None:
    at_noon.connect("alice", provider="oura")
    at_oura(at_noon, application.url, "sleep", "update")
    application.statuses = [410]
    key = at_noon.items("alice", "sleep", provider="oura")[0]["key"]

    at_noon.change_item("alice", "sleep", key, provider="oura", fields={"changed": True})

    over(at_noon, 1, "oura")
    assert at_noon.webhooks("oura")["subscriptions"] == []


def test_oura_s_subscriptions_end_unless_they_are_renewed(at_noon: Control, application: Application) -> None:
    at_noon.connect("alice", provider="oura")
    made = [at_oura(at_noon, application.url, "sleep", what).json() for what in ("create", "update")]
    address = f"{at_noon.url}/oura/v2/webhook/subscription"
    at_noon.step(29 * 86_400)
    renewed = requests.put(f"{address}/renew/{made[0]['id']}", headers=BY_HEADER, timeout=10)
    assert renewed.json()["expiration_time"] > made[0]["expiration_time"]

    at_noon.step(2 * 86_400)

    left = requests.get(address, headers=BY_HEADER, timeout=10).json()
    assert [each["id"] for each in left] == [made[0]["id"]]
    assert requests.put(f"{address}/renew/{made[1]['id']}", headers=BY_HEADER, timeout=10).status_code == 403


@pytest.mark.parametrize("what", ["lost", "doubled", "late"])
def test_mischief(at_noon: Control, application: Application, what: str) -> None:
    at_noon.connect("alice")
    at_strava(at_noon, application.url)
    at_noon.disturb_webhooks(**{what: 1})
    at_noon.add("alice")

    if what == "lost":
        assert at_noon.webhooks()["deliveries"] == []
        at_noon.add("alice")
        application.wait_for(1)
    elif what == "doubled":
        application.wait_for(2)
        assert application.heard[0][1] == application.heard[1][1]
    else:
        assert not at_noon.webhooks()["deliveries"][0]["done"]
        at_noon.step(1)
        application.wait_for(1)


def test_reordered_ones_come_in_reverse(at_noon: Control, application: Application) -> None:
    at_noon.connect("alice")
    at_strava(at_noon, application.url)
    at_noon.disturb_webhooks(reordered=2)

    first, second = at_noon.add("alice"), at_noon.add("alice")
    application.wait_for(2)

    ids = [str(second), str(first)]
    assert [id_ in body.decode() for id_, (_, body) in zip(ids, application.heard, strict=True)] == [
        True,
        True,
    ]


def test_a_revocation_is_told_to_strava_s_applications(at_noon: Control, application: Application) -> None:
    at_noon.connect("alice")
    at_strava(at_noon, application.url)

    at_noon.revoke("alice")

    application.wait_for(1)
    assert b'"updates":{"authorized":"false"}' in application.heard[0][1]
