"""The sandbox as a process and as a thread: starting, ending, going on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from lifelogger.sandbox.__main__ import main
from lifelogger.sandbox.clock import Clock
from lifelogger.sandbox.server import Sandbox
from lifelogger.sandbox.state import State
from tests.sandbox.conftest import NOW
from tests.sandbox.control import Control

OPTIONS = ["--people", "2", "--history-days", "30"]
COMMAND = [sys.executable, "-m", "lifelogger.sandbox", *OPTIONS]
ROOT = Path(__file__).parents[2]


@contextmanager
def process(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The sandbox as a child process, and what it says first."""
    child = subprocess.Popen(
        [*COMMAND, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert child.stdout is not None
        yield child, child.stdout.readline()
    finally:
        child.kill()
        child.communicate()


def stopped() -> Clock:
    clock = Clock()
    clock.freeze(NOW)
    return clock


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_in_a_second_whatever_is_open(number: signal.Signals) -> None:
    with process("--port", "0") as (child, line):
        assert line.startswith("sandbox listening on http://127.0.0.1:")
        control = Control(line.split()[-1])
        token = control.connect("alice")[0]["access_token"]
        gate = control.hold("GET /athlete")
        errors: list[Exception] = []

        def ask() -> None:
            try:
                headers = {"Authorization": f"Bearer {token}"}
                requests.get(f"{control.url}/strava/api/v3/athlete", headers=headers, timeout=20)
            except requests.ConnectionError as error:
                errors.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        gate.wait_until_reached()
        begun = time.monotonic()
        os.kill(child.pid, number)
        _, said = child.communicate(timeout=10)

        assert time.monotonic() - begun < 1
        assert (child.returncode, said) == (0, "")
        asking.join(10)
        assert len(errors) == 1


def test_an_occupied_port_and_a_used_file_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*options: str) -> str:
        """What it says when it does not start."""
        assert main([*OPTIONS, *options]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        return said.err

    file = tmp_path / "state.db"
    with Sandbox(people=2, history_days=30, state=file) as sandbox:
        port = sandbox.url.rpartition(":")[2]
        assert f"cannot listen on 127.0.0.1 port {port}" in refusal("--port", port)
        assert "is another sandbox using it?" in refusal("--port", "0", "--state", str(file))
    assert "made with people 2, seed 1" in refusal("--port", "0", "--state", str(file), "--seed", "2")
    assert "cannot listen" in refusal("--port", "99999")
    assert str(tmp_path) in refusal("--port", "0", "--state", str(tmp_path / "no" / "file"))
    (tmp_path / "text").write_text("no database at all, but some text\n" * 100)
    assert "not a database" in refusal("--port", "0", "--state", str(tmp_path / "text"))


def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    file = tmp_path / "state.db"
    with Sandbox(people=2, state=file, clock=stopped()) as sandbox:
        control = Control(sandbox.url)
        control.freeze(NOW)
        line = control.connect("alice")[0]
        headers = {"Authorization": f"Bearer {line['access_token']}"}
        added = control.add("alice", fields={"name": "Added"})
        control.edit(added, fields={"distance": 12.5})
        control.delete(control.truth("alice")[1]["id"])
        control.limits(reads=[7, 70])
        control.settings(rotate="never")
        assert requests.get(f"{sandbox.url}/strava/api/v3/athlete", headers=headers, timeout=5).ok
        truth = control.truth("alice")

    with Sandbox(people=2, state=file) as sandbox:
        control = Control(sandbox.url)
        assert control.now() == NOW
        assert control.truth("alice") == truth
        reply = requests.get(f"{sandbox.url}/strava/api/v3/athlete", headers=headers, timeout=5)
        assert reply.headers["X-ReadRateLimit-Usage"] == "2,2"
        assert reply.headers["X-ReadRateLimit-Limit"] == "7,70"
        assert control.settings()["rotate"] == "never"
        assert control.summary()["requests"] == 2
        assert control.add("alice") == added + 1


def test_a_file_of_the_version_before_goes_on(tmp_path: Path) -> None:
    """Its people stay connected: their tokens are in it. What was edited by hand is forgotten."""
    path = tmp_path / "sandbox.db"
    state = State(path)
    state.put("kept", 7)
    with state:
        state.db.execute("DROP TABLE changes")
        state.db.execute("CREATE TABLE changes (provider TEXT NOT NULL, key INTEGER NOT NULL)")
        state.db.execute("PRAGMA user_version=1")
    state.close()

    again = State(path)

    assert again.get("kept") == 7
    assert again.db.execute("SELECT count(stream) FROM changes").fetchone() == (0,)
    again.close()


def test_two_sandboxes_of_one_seed_tell_the_same() -> None:
    with Sandbox(people=2, clock=stopped()) as one, Sandbox(people=2, clock=stopped()) as two:
        assert Control(one.url).people() == Control(two.url).people()
        assert Control(one.url).truth("bruno") == Control(two.url).truth("bruno")


def test_the_thread_starts_and_ends_quickly() -> None:
    begun = time.monotonic()
    with Sandbox(people=500, history_days=1825) as sandbox:
        Control(sandbox.url).get("health")
        assert time.monotonic() - begun < 0.5
        begun = time.monotonic()
    assert time.monotonic() - begun < 1


def test_it_imports_nothing_of_lifelogger_outside() -> None:
    code = (
        "import sys, lifelogger.sandbox.__main__\n"
        "print([n for n in sys.modules if n.startswith('lifelogger.') and '.sandbox' not in n])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
