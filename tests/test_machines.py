"""More than one machine over one Redis and one PostgreSQL, and one of them cut off.

Each has an address of its own, a worker, a scheduler and a web server, all real processes; its lines to
Redis, PostgreSQL and the provider can be cut, so that nothing comes through and nobody is told.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import requests
from cryptography.fernet import Fernet

from lifelogger import client, status
from lifelogger.sandbox.server import Sandbox
from lifelogger.settings import Settings
from tests.conftest import pointed_at
from tests.lines import Line
from tests.processes import Command
from tests.sandbox.control import Control
from tests.servers import PostgresServer, RedisServer, wait_until
from tests.test_promises import Application, application_of, fresh_broker  # noqa: F401 - a fixture

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
            "periodiq": "syncs at",
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
        return "\n".join(
            f"--- {self.host} {name}\n{each.log()[-6000:]}" for name, each in self.commands.items()
        )

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


Make = Callable[..., tuple[Application, list[Machine]]]


@pytest.fixture
def machines(
    database: str,
    postgres_server: PostgresServer,
    redis_server: RedisServer,
    redis_url: str,
    settings_env: Callable[..., Settings],
    fresh_broker: None,  # noqa: F811
    tmp_path: Path,
) -> Iterator[Make]:
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


def in_time(
    condition: Callable[[], object], what: str, machines: list[Machine], seconds: float = 180
) -> None:
    try:
        wait_until(condition, what, seconds)
    except AssertionError as failure:
        pytest.fail(f"{failure}\n" + "\n".join(machine.log() for machine in machines))


@pytest.mark.timeout(900)
def test_a_machine_that_is_cut_off_within_a_write(machines: Make, sandbox: Control) -> None:
    """The worst moment: it holds a user's lock, and in the database that of a row which all writers need.

    Promises 1, 2, 6: the other machine takes over, nothing is lost or doubled; what was cut off asks for
    nothing and writes nothing, and works again when the line is whole.
    """
    application, (far, near) = machines(sandbox)
    both = [far, near]
    application.learn_the_budget()
    alice, bob, carol, *_ = people = application.connect()

    def all_is_true() -> bool:
        return all(application.stored(person) == application.truth(person) for person in people)

    def ticked_since(moment: datetime) -> bool:
        tick = status.overview(application.rt)["last_tick"]
        return bool(tick and tick["fired_at"] > moment)

    far.start()
    in_time(all_is_true, "the first import, as its ticks plan it", both)

    # Its transaction takes change numbers, which locks the feed, and never hears that it has.
    far.database.when(b"UPDATE feed", far.cut)
    news = sandbox.add(alice, fields={"name": "Whoever is left writes this"})
    client.request_sync(alice, runtime=application.rt)
    in_time(lambda: not far.database.whole, "the cut", both)
    wait_until(lambda: application.rt.redis.exists(f"lifelogger:lock:sync:{alice}"), "its lock", 1)
    asked = far.provider.passed
    assert str(news) not in application.stored(alice)

    near.start()
    sandbox.add(bob, fields={"name": "And this, for which it needs the same row"})
    client.request_sync(bob, runtime=application.rt)
    in_time(all_is_true, "the other machine to have taken over", both)
    assert near.answers()
    assert not far.database.whole
    assert far.provider.passed == asked
    assert "interrupted" in [run["outcome"] for run in application.runs(alice)]

    far.mend()
    in_time(far.answers, "the page of the machine that is back", both)
    for each in near.commands.values():  # now it is alone
        each.stop()
    alone = datetime.now(UTC)
    sandbox.add(carol)
    client.request_sync(carol, runtime=application.rt)
    in_time(all_is_true, "the machine that is back to work", both)
    in_time(lambda: ticked_since(alone), "a tick of the machine that is back", both)

    summary = sandbox.summary()
    assert summary["overlaps"] == 0
    assert summary["refresh_tokens_used_twice"] == 0
    assert summary["by_status"].get("429", 0) == 0


@pytest.mark.timeout(600)
def test_two_machines_spend_one_budget(machines: Make) -> None:
    """Promise 3, as the provider counts: whichever machine asks, and though one is cut off meanwhile."""
    limit = 60
    with Sandbox(people=150, seed=3, history_days=60) as server:
        sandbox = Control(server.url)
        sandbox.limits(reads=(limit, 1000), overall=(2 * limit, 2000))
        application, both = machines(sandbox)
        people = application.connect()
        for machine in both:
            machine.start()
        for person in people:
            client.request_sync(person, runtime=application.rt)
        in_time(lambda: sandbox.summary()["requests"] >= limit // 2, "half of the budget", both)
        both[0].cut()

        def spent() -> bool:
            windows = status.overview(application.rt)["providers"]["strava"]["budget"]
            return any(not each["remaining"] and each["known"] for each in windows)

        in_time(spent, "the rest to be spent", both)
        in_time(lambda: not application.rt.redis.llen("lifelogger:now"), "the queue", both)
        both[0].mend()
        in_time(both[0].answers, "the machine to be back", both)
        in_time(application.idle, "the syncs to end", both)

        summary = sandbox.summary()
        assert limit * 3 // 4 <= summary["most_in_a_window"]["reads"]["900"] <= limit
        assert summary["by_status"].get("429", 0) == 0
        assert summary["overlaps"] == 0
