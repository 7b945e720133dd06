"""Promise 11: whoever leaves is gone, here and at the provider, and a receipt stays."""

from __future__ import annotations

import json
import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisGone
from sqlalchemy import inspect, select, text

from lifelogger import leaving, sync
from lifelogger.connections import add_user, import_lines
from lifelogger.errors import LifeloggerError
from lifelogger.runtime import Runtime
from lifelogger.store.journal import forget
from lifelogger.store.models import Connection, Receipt, Record, Revocation
from lifelogger.tokens import rotate_keys
from tests.live import LIST, change, connect, connection, in_background, stored, truth, tuned
from tests.sandbox.control import Control, Hold

PROVIDERS = {
    "strava": (LIST, "POST /oauth/revoke"),
    "fitbit": ("GET *:reconcile", "POST /revoke"),
    "oura": ("GET /daily_activity", "POST /oauth/revoke"),
}
"""What each is read by, and what it is told to end a grant."""
EACH = pytest.mark.parametrize("provider", PROVIDERS)
ONCE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def live(live: Runtime) -> Runtime:
    """People with a short past: whoever leaves with five years of it leaves in the same way."""
    return tuned(live, sync={"history_days": 14})


def let_in(live: Runtime, sandbox: Control, provider: str, *people: str) -> list[dict[str, Any]]:
    lines = sandbox.connect(*people, provider=provider)
    import_lines(live, map(json.dumps, lines))
    return lines


def everything(live: Runtime) -> dict[str, list[Any]]:
    """All rows of all tables, whatever is added to them one day."""
    with live.store.read() as db:
        names = [name for name in inspect(db).get_table_names() if name != "alembic_version"]
        return {name: db.execute(text(f"SELECT * FROM {name}")).all() for name in names}


def waiting(live: Runtime) -> list[Any]:
    with live.store.read() as db:
        return list(db.execute(select(Revocation.__table__)))


def revoked(sandbox: Control, line: dict[str, Any], provider: str) -> bool:
    """Whether the provider has ended the grant: a token that worked does no more."""
    import requests

    paths = {
        "strava": "/strava/api/v3/athlete",
        "fitbit": "/fitbit/v4/users/me/identity",
        "oura": "/oura/v2/usercollection/personal_info",
    }
    reply = requests.get(
        sandbox.url + paths[provider],
        headers={"Authorization": f"Bearer {line['access_token']}"},
        timeout=20,
    )
    assert reply.status_code in (200, 401), reply.text
    return reply.status_code == 401


# Disconnecting ---------------------------------------------------------------------------------------


@EACH
def test_disconnecting_deletes_all_of_it_and_revokes_the_grant(
    live: Runtime, sandbox: Control, provider: str
) -> None:
    (line, _) = let_in(live, sandbox, provider, "alice", "bruno")
    (mine,) = sync.run("alice", runtime=live)
    sync.run("bruno", runtime=live)
    assert not revoked(sandbox, line, provider)

    said = leaving.disconnect(live, "alice", provider)

    (left,) = said["connections"]
    assert (said["kind"], left["provider"], left["revocation"]) == ("disconnected", provider, "done")
    assert left["deleted"]["records"] == mine.counts.inserted > 0
    assert left["deleted"]["sync_runs"] == 1
    assert revoked(sandbox, line, provider)
    assert waiting(live) == []
    assert leaving.receipt(live, said["receipt"]) == said
    assert stored(live, "alice") == {}
    assert stored(live, "bruno") != {}
    assert not add_user(live, "alice")  # who is still known


def test_disconnecting_one_provider_keeps_the_others(live: Runtime, sandbox: Control) -> None:
    let_in(live, sandbox, "strava", "alice")
    let_in(live, sandbox, "oura", "alice")
    sync.run("alice", runtime=live)

    leaving.disconnect(live, "alice", "oura")

    assert stored(live, "alice") == truth(sandbox, "alice")


def test_who_is_not_connected_cannot_leave(live: Runtime, sandbox: Control) -> None:
    connect(live, sandbox, "alice")

    with pytest.raises(LifeloggerError, match="alice is not connected to 'oura'"):
        leaving.disconnect(live, "alice", "oura")
    with pytest.raises(LifeloggerError, match="There is no user 'zoe'"):
        leaving.erase(live, "zoe")

    assert everything(live)["receipts"] == []


@EACH
@pytest.mark.parametrize("leave", ["disconnect", "erase"])
def test_a_running_sync_stops_before_its_next_write(
    live: Runtime, sandbox: Control, provider: str, leave: str
) -> None:
    """Promise 11: nothing of a page that was on its way is stored."""
    let_in(live, sandbox, provider, "alice")
    with sandbox.hold(PROVIDERS[provider][0], times=1) as gate:
        working = in_background(sync.run, "alice", runtime=live)
        gate.wait_until_reached()
        if leave == "erase":
            leaving.erase(live, "alice")
        else:
            leaving.disconnect(live, "alice", provider)
    (run,) = working.result(20)

    assert run.outcome == "interrupted"
    left = {name for name, found in everything(live).items() if found} - {"revocations"}
    assert left == {"receipts", "erasures", "feed", *(["users"] if leave == "disconnect" else [])}


def test_the_sync_of_another_provider_goes_on(live: Runtime, sandbox: Control) -> None:
    let_in(live, sandbox, "oura", "alice")
    let_in(live, sandbox, "strava", "alice")
    with sandbox.hold("GET /daily_activity", times=1) as gate:
        working = in_background(sync.run, "alice", runtime=live)
        gate.wait_until_reached()
        leaving.disconnect(live, "alice", "oura")
    runs = working.result(20)

    assert sorted(run.outcome for run in runs) == ["interrupted", "ok"]
    assert stored(live, "alice") == truth(sandbox, "alice")
    assert connection(live, "alice").claimed_at is None


def test_a_late_sync_does_not_write_into_the_next_connection(live: Runtime, sandbox: Control) -> None:
    """Promise 1: SQLite gives the number of the row that went to the next one."""
    connect(live, sandbox, "alice")
    with sandbox.hold(LIST, times=1) as gate:
        working = in_background(sync.run, "alice", runtime=live)
        gate.wait_until_reached()
        leaving.erase(live, "alice")
        connect(live, sandbox, "bruno")
        sync.begin(live, "bruno", "asked")
    late = in_background(working.exception, 20).result(20)

    assert stored(live, "bruno") == {}
    assert late is None or type(late).__name__ == "LockLost"


def test_connecting_again_after_leaving_begins_anew(live: Runtime, sandbox: Control) -> None:
    connect(live, sandbox, "alice")
    sync.run("alice", runtime=live)
    leaving.disconnect(live, "alice", "strava")

    connect(live, sandbox, "alice")
    sync.run("alice", runtime=live)

    assert stored(live, "alice") == truth(sandbox, "alice")


# Revoking --------------------------------------------------------------------------------------------


@EACH
def test_a_provider_that_is_down_is_told_later_and_no_data_is_kept_for_it(
    live: Runtime, sandbox: Control, provider: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    (line,) = let_in(live, sandbox, provider, "alice")
    sync.run("alice", runtime=live)
    fault = sandbox.fault(PROVIDERS[provider][1], status=503)

    said = leaving.erase(live, "alice")

    assert said["connections"][0]["revocation"] == "pending"
    rows = everything(live)
    (_mark,) = rows.pop("erasures")  # tells who reads the changes whom to forget, and nothing else of them
    assert {name for name, found in rows.items() if found} == {"receipts", "revocations", "feed"}
    assert "alice" not in repr(rows)
    assert leaving.revoke_waiting(live) == 0  # not due yet
    waits = []
    for _ in range(3):
        (row,) = waiting(live)
        waits.append(row.next_attempt_at - live.clock())
        sandbox.step(waits[-1].total_seconds())
        assert leaving.revoke_waiting(live) == 0
    ours = [each.getMessage() for each in caplog.records if not each.name.startswith("uvicorn")]
    assert any("not revoked yet" in each for each in ours)
    assert not any(line["access_token"] in each or line["refresh_token"] in each for each in ours)
    assert waits == sorted(waits)
    assert waits[0] < waits[2]
    assert not revoked(sandbox, line, provider)

    sandbox.clear_faults(fault)
    sandbox.step(timedelta(hours=6).total_seconds())
    assert leaving.revoke_waiting(live) == 1

    assert leaving.receipt(live, said["receipt"])["connections"][0]["revocation"] == "done"  # type: ignore[index]
    assert waiting(live) == []
    assert revoked(sandbox, line, provider)


@EACH
def test_a_grant_is_revoked_although_its_access_token_has_expired(
    live: Runtime, sandbox: Control, provider: str
) -> None:
    """Who must show an access token to revoke gets a new one first, however late it is."""
    (line,) = let_in(live, sandbox, provider, "alice")
    sandbox.fault(PROVIDERS[provider][1], status=503, times=1)
    said = leaving.disconnect(live, "alice", provider)
    sandbox.step(timedelta(days=2).total_seconds())

    assert leaving.revoke_waiting(live) == 1

    assert leaving.receipt(live, said["receipt"])["connections"][0]["revocation"] == "done"  # type: ignore[index]
    import_lines(live, [json.dumps(line)])
    sandbox.expire("alice", provider=provider)
    (run,) = sync.run("alice", runtime=live)
    assert run.outcome == "needs_reauth"


@EACH
def test_a_grant_that_has_ended_already_needs_no_revocation(
    live: Runtime, sandbox: Control, provider: str
) -> None:
    let_in(live, sandbox, provider, "alice")
    sandbox.revoke("alice", provider=provider)
    sync.run("alice", runtime=live)
    assert connection(live, "alice").status == "needs_reauth"

    said = leaving.disconnect(live, "alice", provider)

    assert said["connections"][0]["revocation"] == "done"


@ONCE
def test_a_provider_that_never_agrees_is_given_up_and_the_tokens_go(
    live: Runtime, sandbox: Control, caplog: pytest.LogCaptureFixture
) -> None:
    connect(live, sandbox, "alice")
    sandbox.fault(PROVIDERS["strava"][1], status=503)
    said = leaving.disconnect(live, "alice", "strava")
    sandbox.step(leaving.GIVE_UP_AFTER.total_seconds())

    assert leaving.revoke_waiting(live) == 1

    assert leaving.receipt(live, said["receipt"])["connections"][0]["revocation"] == "given_up"  # type: ignore[index]
    assert waiting(live) == []
    assert f"receipt {said['receipt']}: given up after 2 attempts: Strava" in caplog.text


@ONCE
def test_a_provider_without_an_address_for_it_is_told_of_in_the_receipt(
    live: Runtime, sandbox: Control
) -> None:
    connect(live, sandbox, "alice")
    strava = live.settings.providers["strava"].model_copy(update={"revoke_url": ""})
    without = tuned(live)
    without.settings.providers["strava"] = strava

    said = leaving.disconnect(without, "alice", "strava")

    assert said["connections"][0]["revocation"] == "not_offered"
    assert waiting(live) == []


@ONCE
def test_a_fault_of_ours_keeps_nobody_elses_waiting(
    live: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def faulty(*arguments: Any) -> None:
        raise ZeroDivisionError("a mistake")

    connect(live, sandbox, "alice")
    let_in(live, sandbox, "oura", "bruno")
    sandbox.fault("POST /oauth/revoke", status=503, times=1)
    leaving.disconnect(live, "bruno", "oura")
    with monkeypatch.context() as broken:
        broken.setattr(leaving, "call_revoke_endpoint", faulty)
        said = leaving.disconnect(live, "alice", "strava")
    sandbox.step(3600)

    assert leaving.revoke_waiting(live) == 2
    assert "a mistake" in caplog.text
    assert leaving.receipt(live, said["receipt"])["connections"][0]["revocation"] == "done"  # type: ignore[index]


def test_two_workers_tell_the_provider_once(live: Runtime, sandbox: Control) -> None:
    connect(live, sandbox, "alice")
    fault = sandbox.fault("POST /oauth/revoke", status=503)
    leaving.disconnect(live, "alice", "strava")
    sandbox.clear_faults(fault)
    sandbox.step(3600)
    before = len(sandbox.ledger(route="POST /oauth/revoke"))
    with sandbox.hold("POST /oauth/revoke") as gate:
        working = in_background(leaving.revoke_waiting, live)
        gate.wait_until_reached()
        assert leaving.revoke_waiting(live) == 0

    assert working.result(20) == 1
    assert len(sandbox.ledger(route="POST /oauth/revoke")) == before + 1


# Tokens on their way ---------------------------------------------------------------------------------


@EACH
def test_tokens_that_a_refresh_brings_too_late_are_revoked_as_well(
    live: Runtime, sandbox: Control, provider: str
) -> None:
    """The old token is dead when the refresh ends: revoking it would leave the new one alive."""
    let_in(live, sandbox, provider, "alice")
    sandbox.step(timedelta(days=2).total_seconds())
    gate: Hold
    with sandbox.hold("POST /*token") as gate:
        working = in_background(sync.run, "alice", runtime=live)
        gate.wait_until_reached()
        said = leaving.erase(live, "alice")
    working.result(20)
    assert said["connections"][0]["revocation"] == "pending"
    assert len(live.redis.keys("*escrow*")) == 1
    sandbox.step(300)

    assert leaving.revoke_waiting(live) == 1

    assert live.redis.keys("*escrow*") == []
    assert leaving.receipt(live, said["receipt"])["connections"][0]["revocation"] == "done"  # type: ignore[index]
    assert len(sandbox.ledger(status=200, route=PROVIDERS[provider][1])) == 1


def test_tokens_in_redis_wait_for_redis(
    live: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(live, sandbox, "alice")

    def gone(*arguments: Any, **more: Any) -> None:
        raise RedisGone("no Redis")

    with monkeypatch.context() as away:
        for verb in ("get", "set", "delete", "eval", "evalsha"):
            away.setattr(live.redis, verb, gone)
        said = leaving.disconnect(live, "alice", "strava")
    assert said["connections"][0]["revocation"] == "pending"
    assert stored(live, "alice") == {}
    sandbox.step(60)

    assert leaving.revoke_waiting(live) == 1


def test_new_keys_reach_what_is_still_to_be_revoked(live: Runtime, sandbox: Control) -> None:
    (line,) = connect(live, sandbox, "alice")
    sandbox.fault("POST /oauth/revoke", status=503)
    leaving.disconnect(live, "alice", "strava")
    (before,) = waiting(live)

    rotate_keys(live)

    (after,) = waiting(live)
    assert after.access_token != before.access_token
    assert live.vault.decrypt(after.access_token) == line["access_token"]
    assert live.vault.decrypt(after.refresh_token) == line["refresh_token"]


@ONCE
def test_two_workers_do_not_end_one_grant_at_once(live: Runtime, sandbox: Control) -> None:
    """Whoever waits to connect does not wait for its time to come, but for who has it already."""
    let_in(live, sandbox, "strava", "alice")
    fault = sandbox.fault("POST /oauth/revoke", status=503)
    leaving.disconnect(live, "alice", "strava")
    sandbox.clear_faults(fault)
    sandbox.step(3600)
    before = len(sandbox.ledger(route="POST /oauth/revoke"))
    with sandbox.hold("POST /oauth/revoke") as gate:
        working = in_background(leaving.revoke_waiting, live)
        gate.wait_until_reached()
        assert leaving.revoke_waiting(live, "strava") == 0
    assert working.result(20) == 1

    assert len(sandbox.ledger(route="POST /oauth/revoke")) == before + 1
    assert waiting(live) == []


@ONCE
def test_a_token_that_ended_before_its_time_is_no_proof_of_anything(live: Runtime, sandbox: Control) -> None:
    """The grant may live: it has ended when a renewed token says so, or cannot be had."""
    let_in(live, sandbox, "oura", "alice")
    sandbox.fault("POST /oauth/revoke", status=401, times=1)

    said = leaving.disconnect(live, "alice", "oura")
    assert said["connections"][0]["revocation"] == "pending"
    sandbox.step(3600)
    assert leaving.revoke_waiting(live) == 1

    found = leaving.receipt(live, said["receipt"])
    assert found is not None
    assert found["connections"][0]["revocation"] == "done"
    assert {grant["status"] for grant in sandbox.ledger(route="POST /oauth/revoke")} == {401, 200}
    assert waiting(live) == []


# The provider says so --------------------------------------------------------------------------------


@EACH
def test_who_ends_it_at_the_provider_is_deleted_here(live: Runtime, sandbox: Control, provider: str) -> None:
    let_in(live, sandbox, provider, "alice", "bruno")
    sync.run("alice", runtime=live)
    sync.run("bruno", runtime=live)
    change(live, "alice", deauthorised_at=live.clock())
    assert leaving.end_deauthorised(live) == []  # anybody could have said so
    sandbox.step(1)
    change(live, "alice", status="needs_reauth", status_at=live.clock())

    (said,) = leaving.end_deauthorised(live)

    assert (said["kind"], said["connections"][0]["revocation"]) == ("deauthorised", None)
    assert said["connections"][0]["deleted"]["records"] > 0
    assert (stored(live, "alice"), waiting(live)) == ({}, [])
    assert stored(live, "bruno") != {}
    assert sandbox.ledger(route=PROVIDERS[provider][1]) == []  # there is nothing left to revoke
    assert leaving.end_deauthorised(live) == []


# Nothing is left -------------------------------------------------------------------------------------


def test_every_table_that_hangs_on_a_connection_is_emptied() -> None:
    """A new table needs no line in `leaving`: it is found by its foreign key."""
    assert {table.name for table in leaving.dependents()} >= {"records", "quarantine", "streams", "sync_runs"}
    assert all("connection_id" in table.c for table in leaving.dependents())


class Search:
    """Looks for bytes wherever this application keeps any."""

    def __init__(self, live: Runtime, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.live, self.folder, self.caplog = live, folder, caplog

    def logged(self) -> str:
        """What was logged, without the sandbox: it runs in this process, and is not ours."""
        ours = [each for each in self.caplog.records if not each.name.startswith("uvicorn")]
        return "\n".join(f"{each.getMessage()} {each.exc_text}" for each in ours)

    def places(self) -> dict[str, bytes]:
        found = {f"table {name}": repr(rows).encode() for name, rows in everything(self.live).items()}
        for key in self.live.redis.scan_iter():  # type: ignore[union-attr]
            found[f"key {key!r}"] = key + self.value_of(key)
        for path in self.folder.rglob("*"):
            if path.is_file():
                found[f"file {path.name}"] = path.read_bytes()
        found["log"] = self.logged().encode()
        return found

    def value_of(self, key: bytes) -> bytes:
        """What is at a key, of whatever type: a DUMP would be compressed."""
        server: Any = self.live.redis
        read = {
            b"string": server.get,
            b"hash": server.hgetall,
            b"list": lambda key: server.lrange(key, 0, -1),
            b"set": server.smembers,
            b"zset": lambda key: server.zrange(key, 0, -1),
        }
        return repr(read[server.type(key)](key)).encode()

    def having(self, needles: set[bytes]) -> set[tuple[str, bytes]]:
        places = self.places()
        return {(place, each) for place, content in places.items() for each in needles if each in content}


def tokens_of(live: Runtime) -> set[bytes]:
    """Alice's tokens as they are now, sealed and not."""
    mine = [each for each in everything(live)["connections"] if each.user_id == "alice"]
    sealed = {bytes(token) for each in mine for token in (each.access_token, each.refresh_token)}
    return sealed | {live.vault.decrypt(each).encode() for each in sealed}


def keys_of(live: Runtime, user_id: str) -> set[bytes]:
    """The ids that a user's records have at their providers; a day's date is nobody's."""
    with live.store.read() as db:
        mine = select(Connection.id).where(Connection.user_id == user_id)
        found = db.scalars(select(Record.external_id).where(Record.connection_id.in_(mine))).all()
    return {each.encode() for each in found if len(each) > 10}


def test_after_an_erase_no_table_key_file_or_log_holds_a_byte_of_the_person(
    live: Runtime, sandbox: Control, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Promise 11: records, quarantine and tokens of all providers, some of them while a provider is down."""
    caplog.set_level(logging.DEBUG)
    search = Search(live, tmp_path, caplog)
    marks = {"title-only-alice-has", "secret-of-a-bad-record"}
    bad = {"start_date": "2026-11-24T10:00:00Z", "elapsed_time": "no", "name": "secret-of-a-bad-record"}
    sandbox.add("alice", fields={"name": "title-only-alice-has"})
    sandbox.add("alice", raw={"id": 9007199254740993, **bad})
    lines = [line for name in PROVIDERS for line in let_in(live, sandbox, name, "alice", "bruno")]
    tokens = tokens_of(live)
    for _ in range(2):
        for person in ("alice", "bruno"):
            sync.run(person, runtime=live)
        tokens |= tokens_of(live)
        sandbox.step(timedelta(days=2).total_seconds())  # the next sync replaces all tokens
    one = next(each for each in everything(live)["connections"] if each.user_id == "alice")
    older = live.vault.encrypt(json.dumps({"replaces": "an older one"}))
    live.redis.set(f"lifelogger:escrow:{one.id}", older)
    keys = keys_of(live, "alice") - keys_of(live, "bruno")
    accounts = {str(each["provider_user_id"]).encode() for each in lines if each["user_id"] == "alice"}
    needles = {mark.encode() for mark in marks} | tokens | keys | accounts - {b"None"} | {b"alice", older}
    assert len(keys) > 50
    assert {place for place, _ in search.having(needles)} >= {"table records", "table connections"}
    caplog.clear()

    sandbox.fault("POST /revoke", status=503, times=1)  # one of the three is down
    said = leaving.erase(live, "alice")
    assert {each["revocation"] for each in said["connections"]} == {"done", "pending"}
    named = {b"alice"}  # who reads the changes has to be told whom to forget, for a while
    assert search.having(needles - tokens - named) == set()
    sandbox.step(3600)
    assert leaving.revoke_waiting(live) == 1

    assert search.having(needles - named) == set()
    forget(live.store, live.clock() + timedelta(seconds=1))
    live.store.scrub()
    assert search.having(needles) == set()
    assert caplog.text != ""
    assert stored(live, "bruno") != {}


def test_a_receipt_names_nobody() -> None:
    columns = set(Receipt.__table__.columns.keys())

    assert columns == {"id", "number", "kind", "provider", "deleted", "revocation", "created_at"}
    assert not Receipt.__table__.foreign_keys
