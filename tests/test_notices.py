"""Promise 5: whatever ends an authorisation stops the polling, is told once, and is mended by signing in."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest

from actors import sync as actors
from lifelogger import client, doctor, leaving, notices, planner, sync
from lifelogger.connections import import_lines
from lifelogger.notices import SignInNeeded
from lifelogger.runtime import Runtime
from lifelogger.tokens import Tokens, needs_reauth
from tests.live import TOKEN, change, connect, connection, stored, truth, tuned
from tests.sandbox.control import Control

ONCE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
HOOK = "host_of_this_test:tell"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[SignInNeeded]:
    """What a host application was told."""
    heard: list[SignInNeeded] = []
    module = ModuleType("host_of_this_test")
    module.tell = heard.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "host_of_this_test", module)
    return heard


@pytest.fixture
def hooked(live: Runtime, told: list[SignInNeeded]) -> Runtime:
    return tuned(live, hooks={"sign_in_again": HOOK})


def end(live: Runtime, sandbox: Control, cause: str) -> str:
    """Let alice's authorisation end in one way, at the provider returned; the next sync meets it."""
    provider = {"test token of seven days": "fitbit", "single-use token lost": "oura"}.get(cause, "strava")
    scopes = ["read"] if cause == "scope refused" else None
    (line,) = sandbox.connect("alice", provider=provider, scopes=scopes)
    if cause == "no refresh token":
        del line["refresh_token"]
    import_lines(live, [json.dumps(line)])
    if cause == "test token of seven days":
        sandbox.step(7 * 86400)
    if cause in ("revoked", "expired", "test token of seven days", "single-use token lost"):
        sandbox.revoke("alice", provider=provider)
    if cause == "expired":  # while nobody asked: the token endpoint is the first to say so
        change(live, "alice", token_expires_at=live.clock())
    elif cause == "password changed":
        sandbox.expire("alice")
        change(live, "alice", token_expires_at=live.clock())
        sandbox.fault(TOKEN, status=400, json={"error": "invalid_grant"})
    elif cause == "no refresh token":
        change(live, "alice", token_expires_at=live.clock())
    return provider


CAUSES = [
    "revoked", "expired", "test token of seven days", "single-use token lost", "password changed",
    "no refresh token", "scope refused",
]  # fmt: skip


@pytest.mark.parametrize("cause", CAUSES)
def test_every_cause_stops_the_polling_and_is_told_once(
    hooked: Runtime, sandbox: Control, told: list[SignInNeeded], cause: str
) -> None:
    provider = end(hooked, sandbox, cause)

    (run,) = sync.run("alice", runtime=hooked)

    row = connection(hooked, "alice")
    assert (run.outcome, row.status, row.next_sync_at) == ("needs_reauth", "needs_reauth", None)
    assert [notices.tell(hooked) for _ in range(3)] == [1, 0, 0]
    assert told == [SignInNeeded("alice", provider, row.status_reason)]
    [notice] = statuses(hooked)
    assert (notice["action"], notice["user_id"], notice["provider"]) == ("sign_in_again", "alice", provider)
    assert (notice["reason"], notice["at"]) == (row.status_reason, hooked.clock())
    asked = sandbox.summary()["requests"]
    sandbox.step(86400)
    planned: list[str] = []
    planner.tick("sync", hooked.clock(), planned.append, runtime=hooked)
    assert (planned, sync.run("alice", runtime=hooked)) == ([], [])
    assert Tokens(hooked).refresh_expiring()["refreshed"] == 0
    assert sandbox.summary()["requests"] == asked
    assert notices.tell(hooked) == 0
    assert statuses(hooked) == [notice]


def statuses(rt: Runtime, after: str = "") -> list[client.Change]:
    """What the change feed says of connections."""
    page = client.changes(after, limit=1000, connections=True, runtime=rt)
    return [each for each in page.changes if each["action"] in ("sign_in_again", "signed_in")]


def test_an_end_that_is_met_twice_is_one_change(
    live: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token's refresh finds it, another worker tells the feed, and then the sync writes it down too."""
    connect(live, sandbox, "alice")
    sandbox.revoke("alice")
    finish, seen = sync.ConnectionSync._finish, []

    def later(self: sync.ConnectionSync, until: Any) -> None:
        notices.publish(live)
        seen.extend(statuses(live))
        finish(self, until)

    monkeypatch.setattr(sync.ConnectionSync, "_finish", later)
    sync.run("alice", runtime=live)

    assert notices.publish(live) == 0
    assert statuses(live) == seen
    assert len(seen) == 1


@pytest.mark.parametrize("times", [1, 2])
def test_signing_in_is_told_to_who_was_told_of_the_end(live: Runtime, sandbox: Control, times: int) -> None:
    """Each time anew, however often it is connected without need in between."""
    connect(live, sandbox, "alice")
    cursor = ""
    for _ in range(times):
        sandbox.revoke("alice")
        sandbox.step(900)
        sync.run("alice", runtime=live)
        notices.tell(live)
        [ended] = statuses(live, cursor)
        cursor = client.newest_cursor(runtime=live)

        for _ in range(2):
            connect(live, sandbox, "alice")
            notices.tell(live)

        [works] = statuses(live, cursor)
        assert (ended["action"], works["action"], works["reason"]) == ("sign_in_again", "signed_in", None)
        assert statuses(live) == [works], "the end is over"
        cursor = client.newest_cursor(runtime=live)


def test_who_connects_for_the_first_time_is_no_notice(live: Runtime, sandbox: Control) -> None:
    connect(live, sandbox, "alice")
    connect(live, sandbox, "alice")
    notices.tell(live)

    assert statuses(live) == []


def test_who_does_not_ask_for_connections_hears_of_records_only(live: Runtime, sandbox: Control) -> None:
    connect(live, sandbox, "alice")
    sandbox.revoke("alice")
    sync.run("alice", runtime=live)
    notices.tell(live)

    page = client.changes(runtime=live)

    assert page == ([], client.newest_cursor(runtime=live))
    assert client.changes("", user_id="alice", runtime=live).changes == []
    assert len(client.changes("", user_id="alice", connections=True, runtime=live).changes) == 1
    assert client.changes("", user_id="bob", connections=True, runtime=live).changes == []


def test_what_ended_is_forgotten_with_its_connection(live: Runtime, sandbox: Control) -> None:
    connect(live, sandbox, "alice")
    sandbox.revoke("alice")
    sync.run("alice", runtime=live)
    notices.tell(live)

    leaving.erase(live, "alice")

    assert statuses(live) == []


def test_workers_that_publish_at_once_give_each_a_number_of_its_own(live: Runtime, sandbox: Control) -> None:
    people = [each["user_id"] for each in sandbox.people()]
    connect(live, sandbox, *people)
    for person in people:
        change(live, person, **needs_reauth("ended", live.clock()))

    with ThreadPoolExecutor(4) as workers:
        counts = list(workers.map(lambda _: notices.publish(live), range(4)))

    assert sum(counts) == len(people)
    assert sorted(each["user_id"] for each in statuses(live)) == sorted(people)


def test_after_signing_in_polling_goes_on_where_it_had_stopped_and_the_next_end_is_told_again(
    hooked: Runtime, sandbox: Control, told: list[SignInNeeded]
) -> None:
    connect(hooked, sandbox, "alice")
    sync.run("alice", runtime=hooked)
    for times in (1, 2):
        sandbox.revoke("alice")
        sandbox.step(900)
        sync.run("alice", runtime=hooked)
        notices.tell(hooked)
        assert len(told) == times

        sandbox.add("alice")
        connect(hooked, sandbox, "alice")
        (run,) = sync.run("alice", runtime=hooked)
        assert (run.outcome, run.requests) == ("ok", 1)
        assert stored(hooked, "alice") == truth(sandbox, "alice")
        assert notices.tell(hooked) == 0


def test_workers_that_tell_at_once_tell_of_everybody_once(
    hooked: Runtime, sandbox: Control, told: list[SignInNeeded]
) -> None:
    people = [each["user_id"] for each in sandbox.people()]
    connect(hooked, sandbox, *people)
    for person in people:
        change(hooked, person, status="needs_reauth", status_reason="ended", next_sync_at=None)

    with ThreadPoolExecutor(4) as workers:
        counts = list(workers.map(lambda _: notices.tell(hooked), range(4)))

    assert sorted(each.user_id for each in told) == sorted(people)
    assert sum(counts) == len(people)


def test_a_hook_that_fails_is_called_again(
    hooked: Runtime, sandbox: Control, told: list[SignInNeeded], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    connect(hooked, sandbox, "alice")
    change(hooked, "alice", **needs_reauth("ended", hooked.clock()))

    def broken(notice: SignInNeeded) -> None:
        raise ConnectionError("no mail server")

    with monkeypatch.context() as away:
        away.setattr(sys.modules["host_of_this_test"], "tell", broken)
        assert notices.tell(hooked) == 0

    assert "no mail server" in caplog.text
    before = statuses(hooked)
    assert notices.tell(hooked) == 1
    assert statuses(hooked) == before
    assert len(before) == 1


@ONCE
def test_a_worker_tells_as_soon_as_its_sync_has_met_it(
    hooked: Runtime, sandbox: Control, told: list[SignInNeeded], monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(hooked, sandbox, "alice")
    sandbox.revoke("alice")
    run = sync.run
    monkeypatch.setattr(actors, "runtime", lambda: hooked)
    monkeypatch.setattr(sync, "run", lambda *arguments: run(*arguments, runtime=hooked))

    actors.sync_user_data.fn("alice")

    assert [each.user_id for each in told] == ["alice"]


@ONCE
@pytest.mark.parametrize(
    ("name", "sentence"),
    [("no_such_module:tell", "cannot be imported"), ("json:no_such", "cannot be imported"),
     ("sys:version", "is not callable")],
)  # fmt: skip
def test_a_hook_that_is_not_there_is_found_by_the_doctor_and_stops_nothing(
    live: Runtime, sandbox: Control, caplog: pytest.LogCaptureFixture, name: str, sentence: str
) -> None:
    connect(live, sandbox, "alice")
    change(live, "alice", status="needs_reauth", status_reason="ended", next_sync_at=None)
    wrong = tuned(live, hooks={"sign_in_again": name})

    assert notices.tell(wrong) == 0

    assert sentence in caplog.text
    found: list[Any] = [each for each in doctor.work(wrong) if each.ok is False]
    assert len(found) == 1
    assert sentence in found[0].sentence


@ONCE
def test_without_a_hook_only_the_feed_has_it(live: Runtime, sandbox: Control) -> None:
    connect(live, sandbox, "alice")
    change(live, "alice", **needs_reauth("ended", live.clock()))

    assert notices.tell(live) == 0
    assert connection(live, "alice").told_at is None
    assert [each["action"] for each in statuses(live)] == ["sign_in_again"]
