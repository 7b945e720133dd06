"""The command line in this process: what it prints, where, and the exit status. Errors are sentences."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.fernet import Fernet
from dramatiq.brokers.stub import StubBroker
from rich.console import Console
from sqlalchemy import delete

import lifelogger.broker
from lifelogger import api_keys, cli, connections, sync
from lifelogger.providers import strava
from lifelogger.runtime import Runtime
from lifelogger.runtime import runtime as processwide
from lifelogger.settings import Settings
from lifelogger.store.models import Stream, SyncRun
from tests.live import (
    change,
    connect,
    connection,
    stored,
    tuned,
)
from tests.processes import ROOT
from tests.sandbox.control import Control
from tests.servers import PostgresServer

COMMANDS = [
    ["run"],
    ["worker"],
    ["periodiq"],
    ["web"],
    ["sandbox"],
    ["migrate"],
    ["doctor"],
    ["user", "add"],
    ["user", "list"],
    ["user", "remove"],
    ["disconnect"],
    ["receipt"],
    ["connect"],
    ["connections", "import"],
    ["export"],
    ["sync"],
    ["status"],
    ["runs"],
    ["budget"],
    ["plan"],
    ["webhooks", "list"],
    ["webhooks", "subscribe"],
    ["webhooks", "remove"],
    ["keys", "new"],
    ["keys", "rotate"],
    ["api-key", "add"],
    ["api-key", "list"],
    ["api-key", "remove"],
    ["notify", "secret"],
    ["notify", "list"],
    ["mcp"],
]
ONCE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
NOWHERE = "redis://127.0.0.1:1"
"""Nobody listens there."""


class Said(SimpleNamespace):
    """What a command left behind: `status`, `out`, `err`."""

    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def run(*arguments: str) -> Said:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main(list(arguments))
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err + printed.out
        return Said(status=end.value.code, out=printed.out, err=printed.err)

    return run


@pytest.fixture
def lifelogger_(call: Callable[..., Said], runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command line on an empty database of each kind."""
    monkeypatch.setattr(cli, "processwide", lambda: runtime)
    monkeypatch.setattr(lifelogger.broker, "broker", nobody_listens(), raising=False)
    return call


@pytest.fixture
def with_people(
    call: Callable[..., Said], live: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Said]:
    """The command line with Alice, who is connected to the sandbox and was synced, and a worker."""
    monkeypatch.setattr(cli, "processwide", lambda: live)
    monkeypatch.setattr(lifelogger.broker, "broker", Worker(live), raising=False)
    connect(live, sandbox, "alice")
    sync.run("alice", runtime=live)
    return call


def nobody_listens() -> StubBroker:
    """A broker without a worker."""
    broker = StubBroker()
    broker.declare_queue("now")
    return broker


class Worker:
    """A broker whose messages a thread takes at once."""

    def __init__(self, live: Runtime) -> None:
        self.live = live

    def enqueue(self, message: Any) -> None:
        assert message.actor_name == "sync_user_now"
        threading.Thread(target=sync.run, args=message.args, kwargs={"runtime": self.live}).start()


# Help and arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(call: Callable[..., Said], command: list[str]) -> None:
    said = call(*command, "--help")

    assert said.status == 0
    assert f"lifelogger {' '.join(command)}" in said.out


def test_the_list_of_commands_is_complete_and_not_cut(call: Callable[..., Said]) -> None:
    listed = [
        line.split() for line in call("--help").out.partition("Commands:")[2].splitlines() if line.strip()
    ]

    assert {words[0] for words in listed} == {command[0] for command in COMMANDS}
    assert not [words for words in listed if words[-1].endswith("...")]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["status", "--nonsense"], "No such option: --nonsense"),
        (["user", "add"], "Missing argument 'USER'"),
        (["user", "add", "a\nb"], "cannot be a user's id"),
        (["user", "add", ""], "cannot be a user's id"),
        (["user", "add", "x" * 201], "cannot be a user's id"),
        (["connect", "a\x1bb", "strava"], "cannot be a user's id"),
        (["run", "--for", "0s"], "'--for': '0s' is not a time: write 60s, 5m or 1h"),
        (["run", "--for", "soon"], "'soon' is not a time"),
        (["sync", "alice", "--timeout", "-1s"], "is not a time"),
        (["connect", "alice", "strava", "--timeout", "x"], "is not a time"),
        (["connections", "import", "/nowhere.jsonl"], "does not exist"),
        (["runs", "--limit", "0"], "greater than or equal to 1"),
    ],
)
def test_wrong_arguments(call: Callable[..., Said], arguments: list[str], sentence: str) -> None:
    said = call(*arguments)

    assert said.status == 2
    assert said.out == ""
    assert sentence in " ".join(said.err.split())


@pytest.mark.parametrize(
    ("text", "seconds"), [("60s", 60), ("90", 90), ("1.5m", 90), ("1h", 3600), (" 2s ", 2), (300.0, 300)]
)
def test_times(text: Any, seconds: float) -> None:
    assert cli._seconds(text) == seconds


# Trouble ---------------------------------------------------------------------------------------------


def test_wrong_settings(
    call: Callable[..., Said], settings_env: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_env()
    monkeypatch.setenv("LIFELOGGER_WEB__PORT", "many")
    processwide.cache_clear()

    said = call("status")

    assert said.status == 2
    assert "web.port = 'many' (LIFELOGGER_WEB__PORT)" in said.err


@pytest.fixture
def settings_for(
    settings_env: Callable[..., Settings], tmp_path: Path, redis_url: str
) -> Iterator[Callable[..., Settings]]:
    """Settings for commands that build their own runtime."""
    processwide.cache_clear()

    def put(**sections: dict[str, Any]) -> Settings:
        return settings_env(**{"redis": {"url": redis_url}, **sections})

    yield put
    if processwide.cache_info().currsize:
        processwide().close()
    processwide.cache_clear()


def test_redis_away(call: Callable[..., Said], settings_for: Callable[..., Settings]) -> None:
    settings_for(redis={"url": NOWHERE})

    refused = call("run", "--for", "1s")
    assert refused.status == 1
    assert refused.err.startswith("Redis does not answer: ")
    assert refused.err.strip().endswith("Is redis.url right?")
    assert ".." not in refused.err
    assert refused.out == ""  # no part was started

    told = call("status")
    assert told.status == 0  # the database knows the rest
    assert "Its budget is unknown: Redis does not answer" in told.out
    assert call("budget", "--json").json() == {"fitbit": None, "oura": None, "strava": None}
    assert call("doctor").status == 1


def test_a_database_without_tables(
    call: Callable[..., Said],
    settings_for: Callable[..., Settings],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    server: PostgresServer = request.getfixturevalue("postgres_server")
    for url in (f"sqlite:///{tmp_path / 'empty.db'}", server.create("empty")):
        settings_for(database={"url": url})
        processwide.cache_clear()

        for command in (["status"], ["runs"], ["user", "list"], ["user", "add", "x"]):
            said = call(*command)
            assert said.status == 1
            assert "does not have the tables of this version" in said.err
            assert "`lifelogger migrate`" in said.err
        assert call("migrate").out.startswith("From no tables to ")
        assert call("migrate").out == "Nothing to do.\n"
        assert call("status").status == 0
        processwide().close()
    server.drop("empty")


def test_a_database_that_is_not_there(
    call: Callable[..., Said], settings_for: Callable[..., Settings]
) -> None:
    settings_for(database={"url": "postgresql://me:hush@127.0.0.1:1/x"})

    said = call("status")

    assert said.status == 1
    assert "Connection refused. Is database.url right?" in said.err
    assert "hush" not in said.err
    assert "migrate" not in said.err


def test_a_folder_that_cannot_be_made(
    call: Callable[..., Said], settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    settings_for(redis={"url": ""})
    (tmp_path / "var").write_text("in the way")

    said = call("status")

    assert said.status == 1
    assert said.err == f"{tmp_path / 'var'}: File exists\n"


@pytest.mark.slow
def test_a_full_disk_behind_standard_output(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").touch()
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [str(ROOT / ".venv/bin/lifelogger"), "keys", "new"],
            env={**os.environ, "LIFELOGGER_SETTINGS": str(tmp_path / "settings.toml")},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )

    assert ended.returncode != 0
    assert "No space left on device" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_ctrl_c(call: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> Runtime:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "processwide", interrupted)

    assert call("status").status == 130


# People ------------------------------------------------------------------------------------------------


def test_adding_a_user(lifelogger_: Callable[..., Said]) -> None:
    said = lifelogger_("user", "add", "Ann [red] Smith")
    assert said.status == 0
    assert said.out == "Added Ann [red] Smith. Next: `lifelogger connect 'Ann [red] Smith' PROVIDER`\n"

    again = lifelogger_("user", "add", "Ann [red] Smith")
    assert again.status == 1
    assert "There is a user 'Ann [red] Smith' already" in again.err
    assert lifelogger_("user", "list", "--json").json() == [{"user_id": "Ann [red] Smith", "connections": []}]
    assert "Ann [red] Smith" in lifelogger_("user", "list").out
    assert "No connection yet" in lifelogger_("status", "Ann [red] Smith").out
    assert "no connection yet" in lifelogger_("sync", "Ann [red] Smith").err


@ONCE
def test_empty_tables_say_what_will_stand_there(lifelogger_: Callable[..., Said]) -> None:
    assert lifelogger_("user", "list").out == "No users yet: `lifelogger connect USER PROVIDER` adds one.\n"
    assert lifelogger_("runs").out.startswith("No syncs yet: ")
    assert lifelogger_("runs", "--json").out == "[]\n"
    assert "No tick yet" in lifelogger_("status").out


@ONCE
def test_a_user_nobody_knows(lifelogger_: Callable[..., Said]) -> None:
    for command in (["status"], ["sync"], ["sync", "--wait"], ["export"], ["runs"]):
        said = lifelogger_(*command, "nobody")

        assert (said.status, said.out) == (1, ""), command
        assert said.err == "There is no user 'nobody': `lifelogger user list` shows all\n"


def lines(*users: str, **changed: Any) -> str:
    return "".join(
        json.dumps(
            {
                "user_id": user,
                "provider": "strava",
                "access_token": f"hush-{user}",
                "refresh_token": f"hush-again-{user}",
                "expires_at": "2030-01-01T00:00:00Z",
                "scopes": ["read", "activity:read_all"],
                "provider_user_id": f"account of {user}",
                **changed,
            }
        )
        + "\n"
        for user in users
    )


def test_importing_connections(lifelogger_: Callable[..., Said], tmp_path: Path) -> None:
    file = tmp_path / "people.jsonl"
    file.write_text(lines("ann", "bob") + "\n")

    said = lifelogger_("connections", "import", str(file))
    assert (said.status, said.out, said.err) == (0, "2 connections added, 0 replaced.\n", "")

    file.write_text(lines("bob", "cid"))
    assert lifelogger_("connections", "import", str(file)).out == "1 connection added, 1 replaced.\n"
    assert [user["user_id"] for user in lifelogger_("user", "list", "--json").json()] == ["ann", "bob", "cid"]
    assert lifelogger_("user", "list", "--json", "--search", "b").json()[0]["user_id"] == "bob"
    assert "hush" not in lifelogger_("status", "bob", "--json").out


def test_an_import_validates_every_line_before_it_writes_any(
    lifelogger_: Callable[..., Said], runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "save", lambda *args: pytest.fail("written before all was read"))
    file = tmp_path / "people.jsonl"
    file.write_text(lines("ann") + "no json\n" + lines("bob", expires_at="soon") + lines("cid", provider="x"))

    said = lifelogger_("connections", "import", str(file))

    assert (said.status, said.out) == (1, "")
    first, *faults = said.err.splitlines()
    assert first == "Nothing was imported:"
    assert [fault.split(":")[0].strip() for fault in faults] == ["line 2", "line 3", "line 4"]
    assert "hush" not in said.err
    assert lifelogger_("user", "list", "--json").json() == []


@ONCE
def test_a_thousand_faults_are_not_all_told(lifelogger_: Callable[..., Said], tmp_path: Path) -> None:
    file = tmp_path / "people.jsonl"
    file.write_text("no json\n" * 1000)

    said = lifelogger_("connections", "import", str(file))

    assert len(said.err.splitlines()) == cli.MOST_FAULTS + 2
    assert said.err.splitlines()[-1].strip() == "and 980 more"


# How it stands ---------------------------------------------------------------------------------------


def test_status_as_json_has_the_documented_keys(with_people: Callable[..., Said], live: Runtime) -> None:
    said = with_people("status", "--json")
    now = said.json()

    assert said.err == ""
    assert {"users", "connections", "records", "quarantined", "last_tick", "providers"} <= set(now)
    assert (now["users"], now["connections"], now["quarantined"], now["last_tick"]) == (1, 1, 0, None)
    strava = now["providers"]["strava"]
    assert {"connections", "records", "budget", "last_sync", "waiting"} <= set(strava)
    assert (strava["connections"], strava["waiting"]) == (1, 0)
    assert strava["records"] == now["records"] > 0
    assert datetime.fromisoformat(strava["last_sync"]).tzinfo is not None
    window = strava["budget"][0]
    assert {"pool", "seconds", "limit", "used", "remaining", "start", "end"} <= set(window)
    assert window["used"] > 0


@ONCE
def test_status_for_people(with_people: Callable[..., Said], live: Runtime) -> None:
    said = with_people("status")

    assert "1 user, 1 connection, " in said.out
    assert "last sync 12:02 UTC." in said.out
    assert "reads to 12:15 UTC: " in said.out
    assert "  What is older than 7 days is read again for edits and deletions; how long" in said.out
    assert (
        "  What is older than 7 days is read again from 2026-12-13 on" in with_people("status", "alice").out
    )
    change(live, "alice", status="needs_reauth", status_reason="Strava has ended it", next_sync_at=None)
    assert "To be signed in again by their people: 1 connection." in with_people("status").out
    assert "Has to sign in again: Strava has ended it." in with_people("status", "alice").out


@ONCE
def test_the_plan_for_people(with_people: Callable[..., Said], live: Runtime) -> None:
    """Promise 12: what the next ticks will do, and for one user the time of the next poll and its reason."""
    said = with_people("plan")

    assert "Strava: No tick has reckoned with its budget yet" in said.out
    assert "Due by 12:17 UTC: 1 connection." in said.out
    assert "alice" in said.out
    assert with_people("plan", "alice").out == (
        "strava: next at 12:15 UTC. There are requests for everybody, every 15 minutes.\n"
        "  What is older than 7 days is read again from 2026-12-13 on, as far as requests are left.\n"
    )
    assert with_people("plan", "nobody").status == 1


def test_all_json_is_alone_on_standard_output(with_people: Callable[..., Said]) -> None:
    for command in (
        ["status"],
        ["status", "alice"],
        ["runs"],
        ["budget"],
        ["user", "list"],
        ["doctor"],
        ["plan"],
        ["plan", "alice"],
    ):
        said = with_people(*command, "--json")
        assert said.json(), command
        assert said.err == ""


@ONCE
def test_tables_are_whole_when_nobody_looks(with_people: Callable[..., Said], live: Runtime) -> None:
    reason = "a very long reason that would never fit on a line of eighty characters " * 3
    change(live, "alice", wait_reason=reason, next_sync_at=datetime.fromisoformat("2026-11-25T00:00Z"))

    said = with_people("user", "list")
    assert reason in said.out
    assert len(said.out.splitlines()) == 2

    journal = with_people("runs", "alice").out
    assert "…" not in journal
    assert len(journal.splitlines()) == 2
    assert " new" in journal


@ONCE
def test_tables_fit_a_narrow_terminal_without_losing_a_letter(
    with_people: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "out", cli.Console(force_terminal=True, width=80, color_system=None))

    journal = with_people("runs").out

    assert "…" not in journal
    assert "11-24 12:02:00" in journal
    assert max(map(len, journal.splitlines())) <= 80


# Syncs -----------------------------------------------------------------------------------------------


def test_asking_for_a_sync(lifelogger_: Callable[..., Said], runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "people.jsonl").write_text(lines("ann"))
    lifelogger_("connections", "import", str(tmp_path / "people.jsonl"))

    said = lifelogger_("sync", "ann")

    assert said.status == 0
    assert said.out == "Asked for a sync of 1 connection. `lifelogger runs ann` tells what came.\n"
    assert connection(runtime, "ann").news_at is not None


def test_waiting_for_a_sync(with_people: Callable[..., Said], sandbox: Control) -> None:
    sandbox.add("alice")
    sandbox.step(60)

    said = with_people("sync", "alice", "--wait", "--timeout", "20s")

    assert said.status == 0
    assert "1 new" in said.out
    assert said.err == ""


@ONCE
def test_waiting_for_a_sync_that_fails(with_people: Callable[..., Said], sandbox: Control) -> None:
    sandbox.revoke("alice")

    said = with_people("sync", "alice", "--wait", "--timeout", "20s")

    assert said.status == 1
    assert "needs_reauth" in said.out
    again = with_people("sync", "alice", "--wait")
    assert again.status == 1
    assert "Nothing to sync: Has to sign in again: " in again.err


@pytest.fixture
def importing(with_people: Callable[..., Said], live: Runtime, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same, where Alice's past is read five items at a time, a page in each sync, and has just begun."""
    monkeypatch.setattr(strava, "LARGEST_PAGE", 5)
    slow = tuned(live, sync={"history_pages": 1, "history_days": 100})
    monkeypatch.setattr(cli, "processwide", lambda: slow)
    monkeypatch.setattr(lifelogger.broker, "broker", Worker(slow), raising=False)
    with live.store.write() as db:
        db.execute(delete(Stream))
        db.execute(delete(SyncRun))
    return with_people


@ONCE
def test_waiting_tells_of_the_import_in_plain_lines(importing: Callable[..., Said]) -> None:
    said = importing("sync", "alice", "--wait", "--timeout", "20s")

    assert said.status == 0
    lines = said.err.splitlines()
    assert all(line.startswith("strava: The past is ") for line in lines)
    assert re.search(r"strava: The past is here back to 20\d\d-\d\d-\d\d, and goes back to ", lines[-1])
    assert "\x1b" not in said.err
    told = importing("status", "alice").out
    assert "How long it still takes cannot be told yet." in told
    assert " % is here)" in told
    assert "Still importing their past: 1 connection.\n" in importing("status").out


@ONCE
def test_on_a_terminal_the_import_is_a_bar(
    importing: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(cli, "err", Console(file=screen, force_terminal=True, width=200))

    assert importing("sync", "alice", "--wait", "--timeout", "20s").status == 0

    shown = screen.getvalue()
    assert "━" in shown
    assert re.search(r"strava.*\d+%.*The past is here back to", shown)


@ONCE
def test_who_stops_waiting_leaves_the_sync_going_on(
    importing: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "time", SimpleNamespace(sleep=interrupted, monotonic=time.monotonic))
    monkeypatch.setattr(lifelogger.broker, "broker", nobody_listens(), raising=False)

    said = importing("sync", "alice", "--wait")

    assert said.status == 130
    assert said.err.endswith("It goes on in the background: `lifelogger status alice`\n")


@ONCE
def test_waiting_while_no_worker_runs(
    with_people: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifelogger.broker, "broker", nobody_listens(), raising=False)

    said = with_people("sync", "alice", "--wait", "--timeout", "0.2s")

    assert said.status == 1
    assert "No worker took it in 0.2 s: does one run (`make worker`)?" in said.err


# Keys --------------------------------------------------------------------------------------------------


def test_a_new_key_is_one(call: Callable[..., Said]) -> None:
    Fernet(call("keys", "new").out.strip())


def test_rotating_keys(with_people: Callable[..., Said], live: Runtime) -> None:
    before = connection(live, "alice").access_token

    said = with_people("keys", "rotate")

    assert said.out == "The tokens of 1 connection are encrypted with the first key now.\n"
    after = connection(live, "alice").access_token
    assert after != before
    assert live.vault.decrypt(after) == live.vault.decrypt(before)


# Ports -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["web", "sandbox"])
def test_an_occupied_port_is_a_sentence(
    call: Callable[..., Said], settings_for: Callable[..., Settings], part: str, sandbox: Control
) -> None:
    port = int(sandbox.url.rpartition(":")[2])
    settings_for(**{part: {"port": port}})

    said = call(part)

    assert said.status == 1
    assert f"{part} cannot listen on 127.0.0.1 port {port}: Address already in use" in said.err
    assert f"LIFELOGGER_{part.upper()}__PORT" in said.err


# API keys ---------------------------------------------------------------------------------------------------


def test_a_key_for_the_api_is_printed_once_listed_and_removed(
    lifelogger_: Callable[..., Said], runtime: Runtime
) -> None:
    lifelogger_("user", "add", "ann")
    printed = lifelogger_("api-key", "add", "assistant", "--scope", "sync", "--user", "ann").out.strip()
    lifelogger_("api-key", "add", "site")

    listed = lifelogger_("api-key", "list").out
    told = json.loads(lifelogger_("api-key", "list", "--json").out)

    assert api_keys.find(runtime, printed)
    assert printed not in listed
    assert "assistant" in listed
    assert [(each["name"], each["scopes"], each["user_id"]) for each in told] == [
        ("assistant", ["sync"], "ann"),
        ("site", ["read:records"], None),
    ]
    assert lifelogger_("api-key", "remove", "assistant").status == 0
    assert api_keys.find(runtime, printed) is None
    again = lifelogger_("api-key", "remove", "assistant")
    assert (again.status, "There is no key 'assistant'" in again.err) == (1, True)


def test_a_key_of_an_unknown_scope_is_not_made(lifelogger_: Callable[..., Said]) -> None:
    said = lifelogger_("api-key", "add", "assistant", "--scope", "everything")

    assert (said.status, said.out) == (1, "")
    assert "read:records, read:status, sync" in said.err
    assert "No keys yet" in lifelogger_("api-key", "list").out


# Webhooks to others -----------------------------------------------------------------------------------------


def test_a_new_secret_is_one_that_the_settings_take(
    call: Callable[..., Said], settings_env: Callable[..., Settings]
) -> None:
    secret = call("notify", "secret").out.strip()

    settings = settings_env(notify={"urls": ["https://app.example/hook"], "secrets": [secret]})

    assert settings.notify.signing_secrets == [secret]


def test_how_the_endpoints_stand(
    lifelogger_: Callable[..., Said], runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "No endpoints" in lifelogger_("notify", "list").out

    told = tuned(runtime, notify={"urls": ("https://user:secret@app.example/hook",)})
    monkeypatch.setattr(cli, "processwide", lambda: told)

    assert "app.example  never      It was not told of anything yet." in lifelogger_("notify", "list").out
    [each] = json.loads(lifelogger_("notify", "list", "--json").out)
    assert (each["host"], "secret" in str(each)) == ("app.example", False)


# An assistant -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["", "llk_unknown", "for all", "for nothing"])
def test_an_assistant_needs_a_key_for_one_user(
    lifelogger_: Callable[..., Said], runtime: Runtime, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    connections.add_user(runtime, "ann")
    made = {
        "for all": api_keys.add(runtime, "for all", ["read:records"]),
        "for nothing": api_keys.add(runtime, "for nothing", ["sync"], "ann"),
    }
    monkeypatch.setenv("LIFELOGGER_API_KEY", made.get(key, key))

    said = lifelogger_("mcp")

    assert (said.status, said.out) == (1, "")
    assert "`lifelogger api-key add assistant --user USER`" in said.err


# Leaving -----------------------------------------------------------------------------------------------


def test_nobody_is_removed_without_yes(with_people: Callable[..., Said], live: Runtime) -> None:
    held = len(stored(live, "alice"))

    said = with_people("user", "remove", "alice")

    assert said.status == 1
    assert f"Nothing was deleted yet of 1 connection and {held} records." in said.err
    assert "`lifelogger user remove alice --yes`" in said.err
    assert len(stored(live, "alice")) == held


def test_a_user_is_removed_and_gets_a_receipt(with_people: Callable[..., Said], live: Runtime) -> None:
    held = len(stored(live, "alice"))

    said = with_people("user", "remove", "alice", "--yes")

    number = said.out.split()[1].rstrip(":")
    assert said.status == 0
    assert f"strava: {held} records deleted. Its authorisation was revoked at the provider." in said.out
    assert "alice" not in said.out
    assert with_people("receipt", number).out == said.out
    assert with_people("receipt", number, "--json").json()["kind"] == "erased"
    assert "There is no user 'alice'" in with_people("user", "remove", "alice", "--yes").err
    assert "There is no receipt 'x'" in with_people("receipt", "x").err


def test_a_connection_is_ended(with_people: Callable[..., Said], live: Runtime) -> None:
    said = with_people("disconnect", "alice", "strava")

    assert said.status == 0
    assert "disconnected" in said.out
    assert stored(live, "alice") == {}
    again = with_people("disconnect", "alice", "strava")
    assert (again.status, "alice is not connected to 'strava'" in again.err) == (1, True)
