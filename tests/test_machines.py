"""More than one machine over one Redis and one PostgreSQL, and one of them cut off.

Each has an address of its own, a worker, a scheduler and a web server, all real processes; its lines to Redis,
PostgreSQL and the provider can be cut, so that nothing comes through and nobody is told.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests
from cryptography.fernet import Fernet

from lifelogger import client, status
from lifelogger.connections import import_lines
from lifelogger.settings import Settings
from lifelogger.store.models import Tick
from tests.conftest import pointed_at
from tests.lines import Line
from tests.processes import Command
from tests.sandbox.control import Control, Sandbox
from tests.servers import PostgresServer, RedisServer, wait_until
from tests.test_promises import Application, application_of

pytestmark = pytest.mark.slow


class Machine:
    """A machine of an address: its lines, and what runs on it."""

    def __init__(self, host: str, redis: Path, postgres: Path, sandbox: str, folder: Path) -> None:
        self.host = host
        place, _, port = sandbox.removeprefix("http://").partition(":")
        self.redis, self.database = Line(redis, host), Line(postgres, host)
        self.provider = Line((place, int(port)), host)
        with socket.create_server((host, 0)) as free:
            self.web = f"http://{host}:{free.getsockname()[1]}"
        settings = folder / host / "settings.toml"
        settings.parent.mkdir()
        settings.touch()
        strava = pointed_at_line(self.provider)["strava"]
        self.environ = {
            "LIFELOGGER_SETTINGS": str(settings),
            "LIFELOGGER_REDIS__URL": f"redis://{self.redis.address}/0",
            "LIFELOGGER_DATABASE__URL": f"postgresql://postgres@{self.database.address}/machines",
            "LIFELOGGER_WEB__HOST": host,
            "LIFELOGGER_WEB__PORT": self.web.rpartition(":")[2],
            **{f"LIFELOGGER_PROVIDERS__STRAVA__{key.upper()}": value for key, value in strava.items()},
        }
        ready = {
            "worker": "Worker process is ready for action",
            "periodiq": "Registered periodic actors",
            "web": "Application startup complete",
        }
        self.commands = {
            name: Command("lifelogger", name, ready=word, environ=self.environ)
            for name, word in ready.items()
        }

    @property
    def lines(self) -> list[Line]:
        return [self.redis, self.database, self.provider]

    def start(self) -> None:
        for each in self.commands.values():
            each.start()
        for each in self.commands.values():
            each.wait_until_ready()

    def cut(self) -> None:
        """Redis and PostgreSQL are gone; the provider is still there, so that it could be asked."""
        self.redis.cut()
        self.database.cut()

    def mend(self) -> None:
        self.redis.mend()
        self.database.mend()

    def answers(self) -> bool:
        try:
            return requests.get(f"{self.web}/healthz", timeout=5).ok
        except requests.RequestException:
            return False

    def log(self) -> str:
        return "\n".join(f"--- {self.host} {name}\n{each.log()[-6000:]}" for name, each in self.commands.items())

    def close(self) -> None:
        for each in self.commands.values():
            each.close()
        for line in self.lines:
            line.close()


def pointed_at_line(line: Line) -> Any:
    class Where:
        url = f"http://{line.address}"

    return pointed_at(Where())  # type: ignore[arg-type]


@pytest.fixture
def database(postgres_server: PostgresServer) -> Iterator[str]:
    yield postgres_server.create("machines")
    postgres_server.drop("machines")


@pytest.fixture
def machines(
    database: str,
    postgres_server: PostgresServer,
    redis_server: RedisServer,
    redis_url: str,
    settings_env: Callable[..., Settings],
    fresh_broker: None,
    tmp_path: Path,
) -> Iterator[Callable[..., tuple[Application, list[Machine]]]]:
    with ExitStack() as stack:

        def make(sandbox: Control, **sections: Any) -> tuple[Application, list[Machine]]:
            """The application as this process sees it, and two machines, of which nothing runs yet."""
            settings = settings_env(
                database={"url": database},
                redis={"url": redis_url},
                providers=pointed_at(sandbox),
                worker={"processes": 1, "threads": 4},
                schedule={"sync": "* * * * *"},
                security={"encryption_keys": [Fernet.generate_key().decode()], "login_token": "a" * 40},
                sync={"lock_seconds": 6, "lease_seconds": 10, "interval_seconds": 20},
                **sections,
            )
            application = application_of(settings, sandbox)
            stack.callback(application.rt.close)
            found = []
            for host in ("127.0.0.2", "127.0.0.3"):
                socket_of = postgres_server.folder / ".s.PGSQL.5432"
                found.append(Machine(host, redis_server.socket, socket_of, sandbox.url, tmp_path))
                stack.callback(found[-1].close)
            return application, found

        yield make


def in_time(condition: Callable[[], object], what: str, machines: list[Machine], seconds: float = 180) -> None:
    try:
        wait_until(condition, what, seconds)
    except AssertionError as failure:
        pytest.fail(f"{failure}\n" + "\n".join(machine.log() for machine in machines))


@pytest.mark.timeout(900)
def test_a_machine_that_is_cut_off_within_a_write(
    machines: Callable[..., tuple[Application, list[Machine]]], sandbox: Control
) -> None:
    """The worst moment: it holds the lock of a user and, in the database, of a row that all writers need.

    Promises 1, 2, 3, 6: the other machine takes over, nothing is lost or doubled, what was cut off writes no more
    and works again when the line is whole.
    """
    application, both = machines(sandbox)
    near, far = both
    application.learn_the_budget()
    people = application.connect()

    def all_is_true() -> bool:
        return all(application.stored(person) == application.truth(person) for person in people)

    far.start()
    for person in people:
        client.request_sync(person, runtime=application.rt)
    in_time(all_is_true, "the first import", both)
    in_time(application.idle, "the syncs to end", both)

    # Its transaction takes change numbers, which locks the feed, and never hears that it has.
    far.database.when(b"UPDATE feed", far.cut)
    sandbox.add("alice", fields={"name": "Written by whoever is left"})
    client.request_sync("alice", runtime=application.rt)
    in_time(lambda: application.rt.mutex.acquire("sync:alice") is None, "the sync", both)
    in_time(lambda: not far.database.whole, "the cut", both)
    asked = far.provider.passed

    near.start()
    sandbox.add("bob", fields={"name": "Somebody else's news"})
    client.request_sync("bob", runtime=application.rt)
    in_time(all_is_true, "the other machine to have taken over", both)
    assert near.answers()
    assert far.provider.passed == asked  # without locks and budgets it asks for nothing

    taken_over = status.runs(application.rt, user_id="alice")
    assert [run["outcome"] for run in taken_over][:2] == ["ok", "interrupted"]

    far.mend()
    in_time(far.answers, "the page of the machine that is back", both)
    in_time(application.idle, "what was cut off to end", both)
    assert all_is_true()
    for name in ("worker", "periodiq", "web"):  # now it is alone
        assert near.commands[name].stop() == 0
    sandbox.add("carol" if "carol" in people else people[2])
    client.request_sync("carol" if "carol" in people else people[2], runtime=application.rt)
    in_time(all_is_true, "the machine that is back to work", both)
    in_time(lambda: ticked_by(application, both), "a tick of the machine that is back", both)

    summary = sandbox.summary()
    assert summary["overlaps"] == 0
    assert summary["refresh_tokens_used_twice"] == 0
    assert summary["by_status"].get("429", 0) == 0
    once_a_minute(application)
