"""`lifelogger connect` from the address it shows to the stored connection, against the sandbox's own page."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import Future
from queue import Queue
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from dramatiq.brokers.stub import StubBroker

import lifelogger.broker
from lifelogger import cli, client, sync
from lifelogger.connecting import HOST, Callback, Connected, connect
from lifelogger.connections import AccountTaken, add_user
from lifelogger.errors import LifeloggerError, Refused
from lifelogger.providers import strava
from lifelogger.runtime import Runtime
from tests.live import (
    change,
    connection,
    in_background,
    stored,
    ticked,
    truth,
    tuned,
)
from tests.live import connect as let_in
from tests.sandbox.control import Control

SECONDS = 20
ONCE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


class Attempt:
    """`connect` in a thread, and the person's browser."""

    def __init__(self, live: Runtime, user_id: str = "zoe", provider: str = "strava") -> None:
        shown: Queue[str] = Queue()
        self.result: Future[Connected] = in_background(
            connect, live, user_id, provider, shown.put, seconds=SECONDS
        )
        self.address = shown.get(timeout=SECONDS)

    def browse(self, decision: str) -> requests.Response:
        """Open the address, decide, and follow the redirect to the callback."""
        return requests.get(f"{self.address}&{decision}", timeout=SECONDS)

    def callback(self, **query: str) -> requests.Response:
        """What somebody other than the provider sends to the callback."""
        redirect = parse_qs(urlsplit(self.address).query)["redirect_uri"][0]
        return requests.get(redirect, params=query, timeout=SECONDS)


def test_a_person_agrees(live: Runtime, sandbox: Control) -> None:
    attempt = Attempt(live)

    page = attempt.browse("person=alice")

    assert attempt.result.result(SECONDS) == Connected(True, [])
    assert "You can close this page" in page.text
    row = connection(live, "zoe")
    assert row.provider_user_id == sandbox.connect("alice")[0]["provider_user_id"]
    assert (row.status, row.scopes) == ("active", ["read", "activity:read_all"])
    assert [run.outcome for run in sync.run("zoe", runtime=live)] == ["ok"]
    assert stored(live, "zoe") == truth(sandbox, "alice")


def test_connecting_again_keeps_the_data(live: Runtime, sandbox: Control) -> None:
    let_in(live, sandbox, "alice")
    sync.run("alice", runtime=live)
    before = stored(live, "alice")
    change(live, "alice", status="needs_reauth", status_reason="ended", next_sync_at=None)

    attempt = Attempt(live, "alice")
    attempt.browse("person=alice")

    assert attempt.result.result(SECONDS) == Connected(False, [])
    assert connection(live, "alice").status == "active"
    assert stored(live, "alice") == before


@ONCE
def test_a_person_refuses(live: Runtime) -> None:
    attempt = Attempt(live)

    attempt.browse("deny=1")

    with pytest.raises(Refused, match="Strava was not connected: the person did not agree"):
        attempt.result.result(SECONDS)
    assert nobody(live)


@ONCE
def test_a_person_grants_a_part(live: Runtime) -> None:
    attempt = Attempt(live)

    attempt.browse("person=alice&grant=read")

    assert attempt.result.result(SECONDS) == Connected(True, ["activity:read_all"])
    assert connection(live, "zoe").scopes == ["read"]


@ONCE
def test_an_answer_with_a_wrong_state_is_not_the_answer(live: Runtime) -> None:
    """Somebody else's page in the person's browser must not connect another account (RFC 6749, 10.12)."""
    attempt = Attempt(live)

    for forged in ({"state": "guessed", "code": "theirs"}, {"code": "theirs"}, {}, {"state": "ü"}):
        assert attempt.callback(**forged).status_code == 400
    assert not attempt.result.done()
    attempt.browse("person=alice")

    assert attempt.result.result(SECONDS).new


@ONCE
def test_a_code_that_the_provider_does_not_know(live: Runtime) -> None:
    attempt = Attempt(live)
    state = parse_qs(urlsplit(attempt.address).query)["state"][0]

    attempt.callback(state=state, code="made-up")

    with pytest.raises(Refused, match=r"Strava refused the code .*client_secret right"):
        attempt.result.result(SECONDS)
    assert nobody(live)


def test_the_account_of_another_user(live: Runtime, sandbox: Control) -> None:
    let_in(live, sandbox, "alice")
    before = connection(live, "alice")

    attempt = Attempt(live, "zoe")
    attempt.browse("person=alice")

    with pytest.raises(AccountTaken, match="is connected to another user"):
        attempt.result.result(SECONDS)
    assert connection(live, "alice") == before
    assert nobody(live)


@ONCE
def test_nobody_comes_back(live: Runtime) -> None:
    started = time.monotonic()

    with pytest.raises(LifeloggerError, match=r"Nobody came back from the provider's page within 0.1 s"):
        connect(live, "zoe", "strava", lambda address: None, seconds=0.1)

    assert time.monotonic() - started < 10
    assert nobody(live)


@ONCE
def test_a_provider_that_is_not_there(live: Runtime) -> None:
    with pytest.raises(LifeloggerError, match='No provider "garmin" is enabled: fitbit, oura, strava'):
        connect(live, "zoe", "garmin", pytest.fail)


def test_a_port_in_use() -> None:
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(LifeloggerError, match=f"Cannot listen on 127.0.0.1 port {port}: Address already"):
            Callback("state", port)


def test_the_callback_listens_on_this_machine_alone_and_ends() -> None:
    with Callback("state") as callback:
        assert callback.address.startswith("http://127.0.0.1:")
        assert requests.get(callback.address.replace("/callback", "/"), timeout=5).status_code == 400
    with pytest.raises(requests.ConnectionError):
        requests.get(callback.address, timeout=5)


@ONCE
def test_the_command_tells_what_was_not_granted(
    live: Runtime,
    sandbox: Control,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broker = StubBroker()
    broker.declare_queue("now")
    monkeypatch.setattr(lifelogger.broker, "broker", broker, raising=False)
    monkeypatch.setattr(cli, "processwide", lambda: live)
    answers: list[Future[requests.Response]] = []
    say = cli._say

    def browse(line: str) -> None:
        say(line)
        address = line.splitlines()[-1]
        answers.append(in_background(requests.get, f"{address}&person=alice&grant=read", timeout=SECONDS))

    monkeypatch.setattr(cli, "_say", browse)
    with pytest.raises(SystemExit) as end:
        cli.main(["connect", "zoe", "strava", "--no-open"])

    assert end.value.code == 0
    printed = capsys.readouterr()
    assert "Open this address and agree:\nhttp://127.0.0.1:" in printed.out
    assert "Connected zoe.\n" in printed.out
    assert "Not granted: activity:read_all. What needs it is not synced." in printed.out
    assert "The first import goes on in the background: `lifelogger status zoe`" in printed.out
    assert json.loads(broker.queues["now"].get_nowait())["args"] == ["zoe", "asked"]
    assert answers[0].result(SECONDS).ok


class Workers:
    """A broker whose messages a thread takes, with all the ticks that follow."""

    def __init__(self, live: Runtime, sandbox: Control) -> None:
        self.live, self.sandbox = live, sandbox
        self.done: list[Future[None]] = []

    def enqueue(self, message: Any) -> None:
        self.done.append(in_background(self.work, message.args[0]))

    def work(self, user_id: str) -> None:
        sync.run(user_id, runtime=self.live)
        while client.imports(user_id, runtime=self.live):
            self.sandbox.step(900)
            ticked(self.live, user_id)


@ONCE
@pytest.mark.parametrize("worker", [True, False])
def test_the_command_shows_the_import_until_it_is_done(
    live: Runtime,
    sandbox: Control,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    worker: bool,
) -> None:
    monkeypatch.setattr(strava, "LARGEST_PAGE", 5)
    slow = tuned(live, sync={"history_pages": 1, "history_days": 100})
    workers, idle = Workers(slow, sandbox), StubBroker()
    idle.declare_queue("now")
    monkeypatch.setattr(lifelogger.broker, "broker", workers if worker else idle, raising=False)
    monkeypatch.setattr(cli, "processwide", lambda: slow)
    monkeypatch.setattr(cli, "FOLLOW_EVERY_SECONDS", 0.01)
    monkeypatch.setattr(cli, "PATIENCE_SECONDS", 20.0 if worker else 0.1)
    say = cli._say

    def browse(line: str) -> None:
        say(line)
        if line.startswith("Open this address"):
            address = f"{line.splitlines()[-1]}&person=alice"
            in_background(requests.get, address, timeout=SECONDS)

    monkeypatch.setattr(cli, "_say", browse)
    with pytest.raises(SystemExit) as end:
        cli.main(["connect", "zoe", "strava", "--no-open", "--wait"])

    printed = capsys.readouterr()
    if worker:
        workers.done[0].result(SECONDS)
        assert end.value.code == 0
        assert "strava: The past is here back to " in printed.err
        assert printed.err.endswith("strava: Nothing is left to import.\n")
        records = len(stored(live, "zoe"))
        assert printed.out.splitlines()[-1].startswith(f"{records} records. ")
    else:
        assert end.value.code == 1
        assert "No worker took it in 0.1 s: does one run (`make worker`)? It is not forgotten" in printed.err


def nobody(live: Runtime) -> bool:
    """Nothing was stored of an attempt."""
    return add_user(live, "zoe")
