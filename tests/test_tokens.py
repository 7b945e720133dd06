"""Promise 5: no refresh token is lost, none is used twice; and promise 10 for the tokens on their way."""

from __future__ import annotations

import dataclasses
import json
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Barrier
from typing import Any

import pytest
from cryptography.fernet import Fernet
from redis.exceptions import ConnectionError as RedisGone
from sqlalchemy import event, text

from lifelogger import sync
from lifelogger.crypto import Vault, key_file
from lifelogger.errors import LifeloggerError, SignInAgain, Unavailable, Wait
from lifelogger.runtime import Runtime
from lifelogger.store.models import Base
from lifelogger.tokens import LEASE, Tokens, rotate_keys
from tests.live import (
    LIST,
    NOON,
    TOKEN,
    change,
    connect,
    connection,
    in_background,
    stored,
    truth,
)
from tests.sandbox.control import Control

HOUR = 3600
LIFE = 6 * HOUR
"""How long an access token lives, in seconds."""
PAST = timedelta(seconds=LIFE)


def refreshes(sandbox: Control, **filters: Any) -> list[dict[str, Any]]:
    return sandbox.ledger(route=TOKEN, **filters)


def held(live: Runtime, user_id: str = "alice") -> tuple[str, str]:
    """The access and the refresh token in the row."""
    row = connection(live, user_id)
    return live.vault.decrypt(row.access_token), live.vault.decrypt(row.refresh_token)


@contextmanager
def refusing(live: Runtime, *, when: str) -> Iterator[None]:
    """The database refuses to change tokens: `always`, or only when they become other ones (`new`)."""
    change_of = "NEW.refresh_token <> OLD.refresh_token" if when == "new" else "1 = 1"
    if live.store.is_sqlite:
        begin = [
            f"CREATE TRIGGER refuse BEFORE UPDATE OF access_token ON connections WHEN {change_of} "
            "BEGIN SELECT RAISE(ABORT, 'disk full'); END"
        ]
        end = "DROP TRIGGER refuse"
    else:
        begin = [
            "CREATE FUNCTION refuse() RETURNS trigger AS $$ BEGIN RAISE 'disk full'; END $$ LANGUAGE plpgsql",
            "CREATE TRIGGER refuse BEFORE UPDATE OF access_token ON connections FOR EACH ROW "
            f"WHEN ({change_of}) EXECUTE FUNCTION refuse()",
        ]
        end = "DROP FUNCTION refuse CASCADE"
    with live.store.write() as db:
        for statement in begin:
            db.execute(text(statement))
    try:
        yield
    finally:
        with live.store.write() as db:
            db.execute(text(end))


# What is refreshed -----------------------------------------------------------------------------------


def test_what_is_about_to_expire_is_refreshed_and_nothing_else(live: Runtime, sandbox: Control) -> None:
    """Promise 5: the periodic refresh takes the connections within the margin, once."""
    connect(live, sandbox, "alice")
    sandbox.step(LIFE - 1200)
    connect(live, sandbox, "bruno")
    before = held(live)

    first = Tokens(live).refresh_expiring()
    second = Tokens(live).refresh_expiring()

    assert (first["refreshed"], sum(first.values()), sum(second.values())) == (1, 1, 0)
    assert [entry["person"] for entry in refreshes(sandbox)] == ["alice"]
    assert set(held(live)).isdisjoint(before)
    assert connection(live, "alice").token_expires_at == NOON + timedelta(seconds=LIFE - 1200) + PAST
    assert connection(live, "alice").refreshing_until is None


def test_the_expiring_are_found_by_an_index(live: Runtime) -> None:
    """Promise 9's kin: what a refresh costs follows what expires, not how many people there are."""
    seen: list[tuple[str, Any]] = []

    def note(db: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        seen.append((statement, parameters))

    event.listen(live.store.engine, "before_cursor_execute", note)
    Tokens(live).expiring(NOON)
    event.remove(live.store.engine, "before_cursor_execute", note)

    (statement, parameters) = next(each for each in seen if "token_expires_at" in each[0])
    explain = "EXPLAIN QUERY PLAN " if live.store.is_sqlite else "EXPLAIN "
    with live.store.write() as db:  # a transaction, for whose length it is set
        if not live.store.is_sqlite:  # an empty table is read as it is, whatever there is beside it
            db.execute(text("SET LOCAL enable_seqscan = off"))
        plan = " ".join(str(row) for row in db.exec_driver_sql(explain + statement, parameters))
    assert "ix_connections_expires" in plan
    assert "TEMP B-TREE" not in plan
    assert "Sort" not in plan


def test_a_user_whose_sync_runs_is_left_alone_by_the_periodic_refresh(
    live: Runtime, sandbox: Control
) -> None:
    """Promise 5: the sync refreshes when it needs to."""
    connect(live, sandbox, "alice")
    sandbox.step(LIFE - 1200)
    with sandbox.hold(LIST) as gate:
        working = in_background(sync.run, "alice", runtime=live)
        gate.wait_until_reached()
        outcomes = Tokens(live).refresh_expiring()
    working.result(20)

    assert (outcomes["busy"], outcomes["refreshed"]) == (1, 0)
    assert refreshes(sandbox) == []


def test_a_401_in_the_middle_of_a_sync_refreshes_once_and_goes_on(live: Runtime, sandbox: Control) -> None:
    """Promise 5: the provider ended the token before its time."""
    connect(live, sandbox, "alice")
    sandbox.expire("alice")

    (run,) = sync.run("alice", runtime=live)

    assert run.outcome == "ok"
    assert [entry["status"] for entry in sandbox.ledger()] == [401, 200, 200, 200]
    assert len(refreshes(sandbox)) == 1
    assert stored(live, "alice") == truth(sandbox, "alice")


def test_an_expired_token_is_refreshed_before_it_is_sent(live: Runtime, sandbox: Control) -> None:
    """Promise 5: and the new pair is committed before its first use."""
    connect(live, sandbox, "alice")
    sandbox.step(LIFE - 30)
    with sandbox.hold(LIST) as gate:
        working = in_background(sync.run, "alice", runtime=live)
        gate.wait_until_reached()
        committed = connection(live, "alice").token_expires_at
    working.result(20)

    assert committed == NOON + timedelta(seconds=LIFE - 30) + PAST
    assert {entry["status"] for entry in sandbox.ledger()} == {200}


def test_the_scopes_in_the_reply_are_stored(live: Runtime, sandbox: Control) -> None:
    """Promise 12: a person may have taken one back; without any in the reply the known ones stay."""
    connect(live, sandbox, "alice")
    reply = {"access_token": "a1", "refresh_token": "r1", "expires_in": 60}
    sandbox.fault(TOKEN, json={**reply, "scope": "read"}, times=1)
    sandbox.fault(TOKEN, json=reply, times=1)

    Tokens(live).refresh(connection(live, "alice").id, margin=PAST)
    told = connection(live, "alice").scopes
    Tokens(live).refresh(connection(live, "alice").id, margin=PAST)

    assert told == ["read"]
    assert connection(live, "alice").scopes == ["read"]


# One at a time ---------------------------------------------------------------------------------------


def test_two_workers_that_refresh_at_once_spend_one_refresh_token(live: Runtime, sandbox: Control) -> None:
    """Promise 5 and field notes, 1: the other one waits for a later try, and then has the new token."""
    connect(live, sandbox, "alice")
    number, (access, _) = connection(live, "alice").id, held(live)
    sandbox.step(LIFE)
    both = Barrier(2)

    def refresh() -> str | None:
        both.wait(10)
        try:
            return Tokens(live).refresh(number, refused=access)
        except Unavailable:
            return None

    with sandbox.hold(TOKEN) as gate:
        working = [in_background(refresh) for _ in range(2)]
        gate.wait_until_reached()
        early = next(each for each in working if not wait_for(each, working))
    results = [each.result(20) for each in working]

    assert early is not None
    assert sorted(result is None for result in results) == [False, True]
    assert Tokens(live).refresh(number, refused=access) == held(live)[0] in results
    assert len(refreshes(sandbox)) == 1
    assert sandbox.summary()["refresh_tokens_used_twice"] == 0


def wait_for(one: Any, among: list[Any]) -> bool:
    """Whether `one` is the one that is done first: the loser, while the winner's request is held."""
    other = next(each for each in among if each is not one)
    while not (one.done() or other.done()):
        pass
    return bool(one.done())


def test_a_refresh_whose_worker_died_is_taken_over_after_its_lease(live: Runtime, sandbox: Control) -> None:
    """Promise 5: a killed worker blocks its connection for two minutes, not for ever."""
    connect(live, sandbox, "alice")
    number = connection(live, "alice").id
    Tokens(live)._take(number)

    with pytest.raises(Unavailable):
        Tokens(live).refresh(number, margin=PAST)
    sandbox.step(LEASE.total_seconds() + 1)
    Tokens(live).refresh(number, margin=PAST)

    assert [entry["status"] for entry in refreshes(sandbox)] == [200]


def test_a_sign_in_during_a_refresh_is_not_overwritten(live: Runtime, sandbox: Control) -> None:
    """Promise 5: the newer authorisation stays, whether the older one's refresh ends well or not."""
    for refused in (False, True):
        connect(live, sandbox, "alice")
        if refused:
            sandbox.revoke("alice")
        with sandbox.hold(TOKEN) as gate:
            working = in_background(Tokens(live).refresh, connection(live, "alice").id, margin=PAST)
            gate.wait_until_reached()
            (line,) = connect(live, sandbox, "alice")
        with pytest.raises(SignInAgain if refused else Unavailable):
            working.result(20)

        assert held(live) == (line["access_token"], line["refresh_token"])
        assert connection(live, "alice").status == "active"
    assert [run.outcome for run in sync.run("alice", runtime=live)] == ["ok"]


# What is lost, and what is not -----------------------------------------------------------------------


def test_a_database_that_refuses_writes_leaves_the_old_token_unspent(live: Runtime, sandbox: Control) -> None:
    """Promise 5: the store is proved writable first; mended, the old token is as good as before."""
    connect(live, sandbox, "alice")
    number, before = connection(live, "alice").id, held(live)

    with refusing(live, when="always"), pytest.raises(Unavailable, match="cannot be written"):
        Tokens(live).refresh(number, margin=PAST)
    unasked = refreshes(sandbox) == []
    after = held(live)
    Tokens(live).refresh(number, margin=PAST)

    assert unasked
    assert after == before
    assert [entry["status"] for entry in refreshes(sandbox)] == [200]


def test_a_pair_that_could_not_be_stored_is_found_again(live: Runtime, sandbox: Control) -> None:
    """Promise 5 and field notes, 2: it waits in Redis, encrypted, and no token is used twice."""
    connect(live, sandbox, "alice")
    number, before = connection(live, "alice").id, held(live)
    sandbox.step(LIFE)

    with refusing(live, when="new"), pytest.raises(Unavailable, match="wait in Redis"):
        Tokens(live).refresh(number)
    lost = held(live) == before
    sandbox.step(LEASE.total_seconds() + 1)
    found = Tokens(live).refresh(number)
    asked_once = len(refreshes(sandbox)) == 1
    (run,) = sync.run("alice", runtime=live)
    sandbox.step(LIFE)
    Tokens(live).refresh(number)

    assert lost
    assert asked_once
    assert found != before[0]
    assert run.outcome == "ok"
    assert [entry["status"] for entry in refreshes(sandbox)] == [200, 200]
    assert sandbox.summary()["refresh_tokens_used_twice"] == 0
    assert live.redis.keys("*escrow*") == []


def test_a_replaced_refresh_token_is_found_again_though_the_access_token_stayed(
    live: Runtime, sandbox: Control
) -> None:
    """Promise 5: Strava returns the access token that has an hour left, and may replace the other one."""
    sandbox.settings(rotate="always")
    connect(live, sandbox, "alice")
    number = connection(live, "alice").id

    with refusing(live, when="new"), pytest.raises(Unavailable, match="wait in Redis"):
        Tokens(live).refresh(number, margin=PAST)
    for _ in range(2):
        sandbox.step(LEASE.total_seconds() + 1)
        Tokens(live).refresh(number, margin=PAST)

    assert [entry["status"] for entry in refreshes(sandbox)] == [200, 200]
    assert sandbox.summary()["refresh_tokens_used_twice"] == 0


def test_a_pair_that_was_stored_is_not_taken_for_one_that_waits(
    live: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 5: Redis went away before the pair was removed, and the refresh token stayed the same."""
    sandbox.settings(rotate="never")
    connect(live, sandbox, "alice")
    number = connection(live, "alice").id
    sandbox.step(LIFE)
    with monkeypatch.context() as patch:
        patch.setattr(live.redis, "delete", gone)
        used = Tokens(live).refresh(number)
    sandbox.expire("alice")

    (run,) = sync.run("alice", runtime=live)

    assert run.outcome == "ok"
    assert held(live)[0] != used
    assert connection(live, "alice").status == "active"


def gone(*_: Any, **__: Any) -> None:
    raise RedisGone("away")


def test_a_reply_that_is_lost_after_the_provider_replaced_the_token_needs_the_person(
    live: Runtime, sandbox: Control
) -> None:
    """Promise 5, its honest end: what only the provider knows cannot be kept by us, and it is said so."""
    connect(live, sandbox, "alice")
    number = connection(live, "alice").id
    sandbox.step(LIFE)
    sandbox.fault(TOKEN, cut="after", times=1)

    with pytest.raises(Unavailable):
        Tokens(live).refresh(number)
    between = connection(live, "alice").status
    with pytest.raises(SignInAgain):
        Tokens(live).refresh(number)

    told = connection(live, "alice")
    assert (between, told.status, told.next_sync_at) == ("active", "needs_reauth", None)
    assert "Strava has ended the authorisation" in told.status_reason


def test_a_dead_grant_is_terminal_and_never_asked_for_again(live: Runtime, sandbox: Control) -> None:
    """Promise 5 and field notes, 3: `invalid_grant` is the end of all polling."""
    connect(live, sandbox, "alice")
    sandbox.step(LIFE - 1200)
    sandbox.revoke("alice")

    first = Tokens(live).refresh_expiring()
    again = Tokens(live).refresh_expiring()
    runs = sync.run("alice", runtime=live)
    with pytest.raises(SignInAgain):
        Tokens(live).refresh(connection(live, "alice").id)

    assert (first["needs_reauth"], sum(again.values()), runs) == (1, 0, [])
    assert [entry["status"] for entry in refreshes(sandbox)] == [400]
    assert len(sandbox.ledger()) == 1


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500},
        {"status": 503},
        {"status": 429},
        {"status": 401},
        {"status": 404},
        {"status": 400, "body": "<html>"},
        {"cut": "before"},
        {"body": "<html>"},
        {"json": []},
        {"json": {"access_token": "", "expires_in": 5}},
        {"json": {"access_token": "a", "refresh_token": 7, "expires_in": 5}},
        {"json": {"access_token": "a", "refresh_token": "b", "expires_in": "soon"}},
        {"body": '{"access_token": "a", "refresh_token": "b", "expires_in": 1e999}'},
        {"redirect": "http://127.0.0.1:1/"},
    ],
    ids=lambda fault: "-".join(map(str, fault.items())),
)
def test_trouble_at_the_token_endpoint_is_not_the_end(
    live: Runtime, sandbox: Control, fault: dict[str, Any]
) -> None:
    """Promise 5: temporary, and the old token stays; later it works as if nothing had been."""
    connect(live, sandbox, "alice")
    number, before = connection(live, "alice").id, held(live)
    sandbox.fault(TOKEN, times=1, **fault)

    with pytest.raises(Wait):
        Tokens(live).refresh(number, margin=PAST)
    kept, row = held(live), connection(live, "alice")
    sandbox.step(900)
    Tokens(live).refresh(number, margin=PAST)

    assert kept == before
    assert (row.status, row.refreshing_until) == ("active", None)


def test_one_connection_that_cannot_be_refreshed_does_not_stop_the_others(
    live: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field notes, 9: one was encrypted with a key that is gone, one meets a mistake in the code."""
    connect(live, sandbox, "alice", "bruno", "chiyo")
    change(live, "alice", access_token=b"of another key")
    ask, broken = Tokens.ask, connection(live, "bruno").id

    def faulty(self: Tokens, row: Any, ahead: bool) -> Any:
        if row.id == broken:
            raise ZeroDivisionError
        return ask(self, row, ahead)

    monkeypatch.setattr(Tokens, "ask", faulty)
    sandbox.step(LIFE - 1200)

    outcomes = Tokens(live).refresh_expiring()

    assert (outcomes["refreshed"], outcomes["later"]) == (1, 2)
    assert [entry["person"] for entry in refreshes(sandbox)] == ["chiyo"]
    assert connection(live, "alice").refreshing_until is None


# Promise 10 ------------------------------------------------------------------------------------------


def test_tokens_are_nowhere_to_be_read(
    live: Runtime, sandbox: Control, caplog: pytest.LogCaptureFixture
) -> None:
    """Promise 10: not in logs, tracebacks or reprs, not in Redis while a pair waits, not in the database."""
    caplog.set_level(logging.DEBUG)
    (line,) = connect(live, sandbox, "alice")
    number = connection(live, "alice").id
    secrets = {line["access_token"], line["refresh_token"], "new-access", "new-refresh", "sandbox-secret"}
    reply = {"access_token": "new-access", "refresh_token": "new-refresh", "expires_in": 60}
    told = []
    for fault in ({"status": 500}, {"cut": "before"}, {"body": "<html>"}, {"status": 400}, {"json": reply}):
        sandbox.fault(TOKEN, times=1, **fault)
        with refusing(live, when="new"), pytest.raises(LifeloggerError) as caught:
            Tokens(live).refresh(number, margin=PAST)
        told.append("".join(traceback.format_exception(caught.value)) + repr(caught.value))
        assert caught.value.__cause__ is None
    sandbox.fault(LIST, cut="before", times=1)
    told += [repr(sync.run("alice", runtime=live)), repr(live), repr(Tokens(live))]

    in_redis = [*dump(live), *live.redis.keys("*")]
    in_database = []
    with live.store.read() as db:
        for table in Base.metadata.sorted_tables:
            in_database += [repr(tuple(row)) for row in db.execute(table.select())]

    assert any(b"escrow" in key for key in live.redis.keys("*"))
    everything = "\n".join([caplog.text, *told, *map(str, in_redis), *in_database])
    assert len(everything) > 1000
    assert [secret for secret in secrets if secret in everything] == []


def dump(live: Runtime) -> Iterator[str]:
    """All values in Redis."""
    for key in live.redis.scan_iter("*"):
        kind = live.redis.type(key).decode()
        read: dict[str, Any] = {
            "string": live.redis.get,
            "hash": live.redis.hgetall,
            "set": live.redis.smembers,
            "list": lambda key: live.redis.lrange(key, 0, -1),
            "zset": lambda key: live.redis.zrange(key, 0, -1, withscores=True),
        }
        yield json.dumps(repr(read[kind](key)))


def test_a_pair_that_waited_until_it_expired_is_renewed_at_once(live: Runtime, sandbox: Control) -> None:
    """Promise 5: its access token is no use any more, its refresh token is all there is."""
    sandbox.settings(rotate="always")
    connect(live, sandbox, "alice")
    sandbox.step(LIFE)
    with refusing(live, when="new"), pytest.raises(Unavailable, match="wait in Redis"):
        Tokens(live).refresh(connection(live, "alice").id)
    sandbox.step(2 * LIFE)

    (run,) = sync.run("alice", runtime=live)

    assert run.outcome == "ok"
    assert [entry["status"] for entry in refreshes(sandbox)] == [200, 200]
    assert sandbox.summary()["refresh_tokens_used_twice"] == 0


def test_changed_keys_reach_a_pair_that_waits(live: Runtime, sandbox: Control) -> None:
    """After the rotation the old key may be dropped, and the pair in Redis is still found."""
    sandbox.settings(rotate="always")
    connect(live, sandbox, "alice")
    sandbox.step(LIFE)
    with refusing(live, when="new"), pytest.raises(Unavailable, match="wait in Redis"):
        Tokens(live).refresh(connection(live, "alice").id)
    sandbox.step(LEASE.total_seconds() + 1)
    old, new = key_file(live.settings.var / "encryption.key"), Fernet.generate_key().decode()

    rotate_keys(dataclasses.replace(live, vault=Vault([new, old])))
    Tokens(dataclasses.replace(live, vault=Vault([new]))).refresh(connection(live, "alice").id)

    assert len(refreshes(sandbox)) == 1


def test_refreshing_ahead_of_time_leaves_the_budget_to_syncs(live: Runtime, sandbox: Control) -> None:
    """Promise 4: half of what is to come of every window stays for whoever needs a token or data now."""
    sandbox.limits(overall=(6, 2000))
    people = [person["user_id"] for person in sandbox.people()]
    connect(live, sandbox, *people)
    sync.run(people[0], runtime=live)  # two requests, whose headers tell the limit
    sandbox.step(LIFE - 1790)  # a window has just begun: nearly all of it is still to come

    outcomes = Tokens(live).refresh_expiring()

    assert (outcomes["refreshed"], outcomes["later"]) == (3, len(people) - 3)


def test_a_late_worker_does_not_end_the_lease_of_the_next(live: Runtime, sandbox: Control) -> None:
    """Promise 5: else a third one would begin while the second still asks."""
    connect(live, sandbox, "alice")
    tokens, number = Tokens(live), connection(live, "alice").id
    late = tokens._take(number)
    sandbox.step(LEASE.total_seconds() + 1)
    tokens._take(number)

    tokens._give_back(late)

    assert connection(live, "alice").refreshing_until is not None
