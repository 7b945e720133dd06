"""Everything as a ratio: lifelogger, Celery with Beat and plain Dramatiq over a floor of bare threads.

    make bench          or: benchmarks/.venv/bin/python -m benchmarks.compare [--quick] [--only NAME,…]

One run, interleaved: in each round every contestant does each workload once, on a fresh copy of the same
database, and the next round begins with another one. README.md says what is measured, and what it came to.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import requests

from lifelogger.connections import import_lines
from lifelogger.runtime import build
from lifelogger.settings import load_settings
from lifelogger.store.migrate import upgrade
from tests.servers import PostgresServer, RedisServer, wait_until

HERE = Path(__file__).resolve().parent
USERS, WARM_UP = 500, 32
PROCESSES, THREADS = 2, 8
IN_FLIGHT = PROCESSES * THREADS
IDLE_SECONDS = 3.0
LATENCIES = 12
NEVER = "0 0 1 1 *"
"""Ticks are sent by hand: none shall come in the middle of a measurement."""
WORKLOADS = {"no news at 50 ms": ("full", 0.05), "first import at 0 ms": ("empty", 0.0)}


# What processes use -------------------------------------------------------------------------------------


def tree(root: int) -> list[int]:
    """A process and all beneath it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def cpu(roots: list[int]) -> float:
    """Seconds that these processes and all beneath them have used, those that ended among them."""
    ticks = 0
    for pid in {pid for root in roots for pid in tree(root)}:
        try:
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def memory(roots: list[int]) -> tuple[float, float]:
    """PSS and RSS of these processes and all beneath them, in MB."""
    sums = {"Pss": 0, "Rss": 0}
    for pid in {pid for root in roots for pid in tree(root)}:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in sums:
                sums[name] += int(rest.split()[0])
    return sums["Pss"] / 1024, sums["Rss"] / 1024


# The contestants ----------------------------------------------------------------------------------------


@dataclass
class Ground:
    """What all stand on: the same servers, and where they are."""

    postgres: PostgresServer
    redis: RedisServer
    cloud: subprocess.Popen[str]
    api: str
    folder: Path
    database: str = ""

    def environ(self) -> dict[str, str]:
        provider = "LIFELOGGER_PROVIDERS__STRAVA__"
        socket = str(self.redis.socket)
        plain = self.postgres.url_of(self.database)
        return {
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "",  # as once installed: nobody compiles his own modules at each start
            "BENCH_API": self.api,
            "BENCH_DATABASE": plain,
            "LIFELOGGER_SETTINGS": str(self.folder / "settings.toml"),
            "LIFELOGGER_DATABASE__URL": plain,
            "LIFELOGGER_REDIS__URL": self.redis.url,
            "LIFELOGGER_WORKER__PROCESSES": str(PROCESSES),
            "LIFELOGGER_WORKER__THREADS": str(THREADS),
            "LIFELOGGER_SCHEDULE__SYNC": NEVER,
            "LIFELOGGER_SANDBOX__PORT": "1",
            f"{provider}CLIENT_ID": "bench",
            f"{provider}CLIENT_SECRET": "bench",
            f"{provider}API_URL": self.api,
            f"{provider}BUDGET": '["10000000/15 minutes", "100000000/day"]',
            f"{provider}OVERALL_BUDGET": '["10000000/15 minutes", "100000000/day"]',
            "BENCH_REDIS": f"unix://{socket}?db=0",
        }

    def sql(self, statement: str, *values: Any) -> Any:
        with self.connect() as db:
            at = db.execute(statement, values)  # type: ignore[call-overload]
            return at.fetchone() if at.description else None

    def connect(self) -> psycopg.Connection:
        return psycopg.connect(
            host=str(self.postgres.folder), user="postgres", dbname=self.database, autocommit=True
        )

    def ask(self, path: str) -> Any:
        return requests.get(self.api + path, timeout=10).json()


class Contestant(ABC):
    """One way to sync everybody: commands that run while the `with` block does."""

    commands: tuple[tuple[list[str], str, int], ...]
    """Each with what it says when it is ready, and how often."""
    cwd: Path = HERE / "contestants"

    def __init__(self, name: str, ground: Ground) -> None:
        self.name, self.ground = name, ground
        self.running: list[subprocess.Popen[bytes]] = []
        self.ready_after = 0.0

    def environ(self) -> dict[str, str]:
        return self.ground.environ()

    def __enter__(self) -> Contestant:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def start(self) -> None:
        """Start the commands, and return when all are ready."""
        began = time.monotonic()
        for number, (command, ready, times) in enumerate(self.commands):
            log = self.ground.folder / f"{self.name}-{number}.log"
            with log.open("wb") as out:
                process = subprocess.Popen(
                    command,
                    cwd=self.cwd,
                    env={**os.environ, **self.environ()},
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            self.running.append(process)

            def up(log: Path = log, ready: str = ready, times: int = times) -> bool:
                return log.read_text(errors="replace").count(ready) >= times

            wait_until(up, f"{self.name} ({log})")
            if number == 0:  # the worker: what follows is the timetable
                self.ready_after = time.monotonic() - began

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.running):
            process.terminate()
        for process in self.running:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.running = []

    def pids(self) -> list[int]:
        return [process.pid for process in self.running]

    @abstractmethod
    def tick(self, users: list[str]) -> None:
        """Have all users synced that are due: `users`."""

    def send(self, user_id: str) -> None:
        """Have one synced now."""
        self.tick([user_id])


def executable(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


class Floor(Contestant):
    commands = tuple(([sys.executable, "floor.py", str(THREADS)], "ready", 1) for _ in range(PROCESSES))

    def environ(self) -> dict[str, str]:
        return {**super().environ(), "BENCH_DATABASE": f"host={self.ground.postgres.folder} user=postgres "
                f"dbname={self.ground.database}"}  # fmt: skip

    def tick(self, users: list[str]) -> None:
        for number, process in enumerate(self.running):
            assert process.stdin is not None
            process.stdin.write(" ".join(users[number::PROCESSES]).encode() + b"\n")
            process.stdin.flush()


class OnDramatiq(Contestant):
    """Messages by name: the same for lifelogger and for Dramatiq alone."""

    tick_queue, namespace = "default", "dramatiq"

    def enqueue(self, queue: str, actor: str, *arguments: str) -> None:
        from dramatiq import Message
        from dramatiq.brokers.redis import RedisBroker

        if not hasattr(self, "broker"):
            self.broker = RedisBroker(url=self.ground.redis.url, namespace=self.namespace, middleware=[])
            for each in {queue, "default"}:
                self.broker.declare_queue(each)
        self.broker.declare_queue(queue)
        self.broker.enqueue(
            Message(queue_name=queue, actor_name=actor, args=arguments, kwargs={}, options={})
        )

    def tick(self, users: list[str]) -> None:
        self.enqueue(self.tick_queue, "sync_active_users")

    def send(self, user_id: str) -> None:
        self.enqueue("default", "sync_user_data", user_id)


class Dramatiq(OnDramatiq):
    commands = (
        (
            [
                executable("dramatiq"),
                "dramatiq_app",
                "--processes",
                str(PROCESSES),
                "--threads",
                str(THREADS),
            ],
            "Worker process is ready for action",
            PROCESSES,
        ),
    )


class Lifelogger(OnDramatiq):
    commands = (
        ([executable("lifelogger"), "worker"], "Worker process is ready for action", PROCESSES),
        ([executable("lifelogger"), "periodiq"], "refreshes tokens at", 1),
    )
    cwd = HERE.parent
    tick_queue, namespace = "schedule", "lifelogger"


class Celery(Contestant):
    commands = (
        (
            [executable("celery"), "--app", "celery_app", "worker", "--concurrency", str(IN_FLIGHT)],
            "MainProcess] ready",
            1,
        ),
        (
            [executable("celery"), "--app", "celery_app", "beat", "--schedule", "/dev/shm/bench-beat"],
            "beat v",
            1,
        ),
    )

    def environ(self) -> dict[str, str]:
        return {**super().environ(), "BENCH_REDIS": f"redis+socket://{self.ground.redis.socket}"}

    def app(self) -> Any:
        if not hasattr(self, "_app"):
            import celery

            self._app = celery.Celery(broker=self.environ()["BENCH_REDIS"])
        return self._app

    def tick(self, users: list[str]) -> None:
        self.app().send_task("celery_app.sync_active_users")

    def send(self, user_id: str) -> None:
        self.app().send_task("celery_app.sync_user_data", args=[user_id])


CONTESTANTS: dict[str, type[Contestant]] = {
    "floor": Floor,
    "lifelogger": Lifelogger,
    "dramatiq": Dramatiq,
    "celery": Celery,
}


# Measuring ----------------------------------------------------------------------------------------------


def connect_everybody(ground: Ground) -> None:
    """The template databases: `empty`, where all have just connected, and `full`, where all was imported."""
    ground.database = "empty"
    ground.postgres.create("empty")
    os.environ.update(ground.environ())
    rt = build(load_settings())
    upgrade(rt.store)
    line = {
        "provider": "strava",
        "access_token": "a1b2c3d4" * 5,
        "refresh_token": "d4c3b2a1" * 5,
        "expires_at": "2099-01-01T00:00:00Z",
        "scopes": ["read", "activity:read_all"],
    }
    everybody = [f"u{number:04}" for number in range(USERS)] + [f"w{number}" for number in range(WARM_UP)]
    import_lines(rt, [json.dumps({**line, "user_id": user, "provider_user_id": user}) for user in everybody])
    rt.close()
    # The others have no feed: what numbers its changes must come by itself.
    ground.sql("CREATE SEQUENCE others")
    ground.sql("ALTER TABLE records ALTER change SET DEFAULT -nextval('others')")
    ground.sql("UPDATE connections SET next_sync_at = '2090-01-01', news_at = NULL, claimed_at = NULL")
    copy(ground, "empty", "full")
    ground.ask("/control?delay=0")
    with Lifelogger("template", ground) as lifelogger:
        go(ground, lifelogger, "w", WARM_UP)
        go(ground, lifelogger, "u", USERS)
    ground.sql("UPDATE connections SET next_sync_at = '2090-01-01', news_at = NULL, claimed_at = NULL")
    ground.sql("DELETE FROM sync_runs")
    ground.sql("VACUUM ANALYZE")
    ground.redis.flush()


def copy(ground: Ground, template: str, name: str) -> None:
    with ground.postgres.connect() as db:
        db.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        db.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY FILE_COPY')
    ground.database = name


@dataclass
class Went:
    """How a tick went: seconds from the first request to the last commit, and what was used for it."""

    seconds: float
    cpu: float
    postgres: float
    redis: float
    cloud: float
    requests: int


def go(ground: Ground, contestant: Contestant, whose: str, number: int, seconds: float = 240) -> Went:
    """Make so many users due, tick, and wait until all have been synced."""
    ground.ask(f"/control?delay={ground.ask('/counted')['delay']}")
    users = [f"{whose}{each:04}" if whose == "u" else f"{whose}{each}" for each in range(number)]
    pids = [contestant.pids(), [ground.postgres.process.pid], [ground.redis.process.pid], [ground.cloud.pid]]
    with ground.connect() as db:
        db.execute(
            "UPDATE connections SET next_sync_at = now() - interval '1 second' WHERE user_id = ANY(%s)",
            [users],
        )
        before, began = [cpu(each) for each in pids], time.time()
        contestant.tick(users)

        def told() -> Any:
            return db.execute(
                "SELECT count(*) FILTER (WHERE outcome = 'ok'), count(*) FILTER (WHERE outcome = 'failed'),"
                " extract(epoch FROM max(ended_at)) FROM sync_runs WHERE started_at >= to_timestamp(%s)"
                " AND ended_at IS NOT NULL",
                [began],
            ).fetchone()

        deadline = time.monotonic() + seconds
        while (found := told())[0] < number:
            if found[1] or time.monotonic() > deadline:
                raise SystemExit(f"{contestant.name}: {found[0]} of {number} syncs, {found[1]} failed")
            time.sleep(0.1)
    time.sleep(0.2)  # what comes after a sync: its message is told to be done
    used = [cpu(each) - spent for each, spent in zip(pids, before, strict=True)]
    counted = ground.ask("/counted")
    return Went(float(found[2]) - counted["first"], *used, counted["requests"])


def latencies(ground: Ground, contestant: Contestant) -> list[float]:
    """Milliseconds from sending one message to an idle worker until its first request arrives."""
    found = []
    ground.ask("/control?delay=0")
    for _ in range(LATENCIES):
        time.sleep(random.uniform(0.3, 0.8))
        ground.ask("/control?delay=0")
        sent = time.time()
        contestant.send(f"w{random.randrange(WARM_UP)}")
        wait_until(lambda: ground.ask("/counted")["first"], "the request of a single message")
        found.append((ground.ask("/counted")["first"] - sent) * 1000)
    return found


@dataclass
class Table:
    """What was measured: {(contestant, what): a value for each round}."""

    values: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def add(self, name: str, what: str, value: float) -> None:
        self.values.setdefault((name, what), []).append(value)

    def ratio(self, name: str, base: str, what: str) -> str:
        mine, other = self.values.get((name, what)), self.values.get((base, what))
        if not mine or not other:
            return ""
        each = sorted(a / b for a, b in zip(mine, other, strict=True) if b)
        if not each:
            return ""
        return f"{statistics.median(each):.2f} ({each[0]:.2f}-{each[-1]:.2f})"

    def show(self, names: list[str], say: Callable[[str], None] = print) -> None:
        whats = list(dict.fromkeys(what for _, what in self.values))
        for what in whats:
            say(f"\n{what}")
            say(f"  {'':<12}{'median':>10} {'range':>19}   {'to the floor':<19} {'to Celery':<19}")
            for name in names:
                if values := self.values.get((name, what)):
                    span = f"{min(values):.4g} - {max(values):.4g}"
                    say(
                        f"  {name:<12}{statistics.median(values):>10.4g} {span:>19}   "
                        f"{self.ratio(name, 'floor', what):<19} {self.ratio(name, 'celery', what):<19}"
                    )


def measure(ground: Ground, name: str, workload: str, table: Table) -> None:
    template, delay = WORKLOADS[workload]
    ground.redis.flush()
    copy(ground, template, "bench")
    ground.ask(f"/control?delay={delay}")
    with CONTESTANTS[name](name, ground) as contestant:
        go(ground, contestant, "w", WARM_UP)
        went = go(ground, contestant, "u", USERS)
        table.add(name, f"{workload}: syncs/s", USERS / went.seconds)
        table.add(name, f"{workload}: ms of CPU a sync", went.cpu / USERS * 1000)
        table.add(name, f"{workload}: ms of PostgreSQL's CPU a sync", went.postgres / USERS * 1000)
        table.add(name, f"{workload}: ms of Redis's CPU a sync", went.redis / USERS * 1000)
        table.add(name, f"{workload}: ms of the provider's CPU a sync", went.cloud / USERS * 1000)
        table.add(name, f"{workload}: requests", went.requests)
        table.add(name, f"{workload}: records there are", ground.sql("SELECT count(*) FROM records")[0])
        pss, rss = memory(contestant.pids())
        table.add(name, f"{workload}: PSS in MB", pss)
        table.add(name, f"{workload}: RSS in MB", rss)
        if name != "floor":
            table.add(name, "seconds until the worker is ready", contestant.ready_after)
        if name != "floor" and template == "full":
            time.sleep(1)
            before, began = cpu(contestant.pids()), time.monotonic()
            time.sleep(IDLE_SECONDS)
            share = (cpu(contestant.pids()) - before) / (time.monotonic() - began)
            table.add(name, "idle: % of a core", share * 100)
            waited = latencies(ground, contestant)
            table.add(name, "idle: ms from a message to its first request", statistics.median(waited))
            table.add(name, "idle: the slowest of them", max(waited))


@contextmanager
def grounds() -> Iterator[Ground]:
    with ExitStack() as ends:
        folder = Path(tempfile.mkdtemp(prefix="bench-"))
        ends.callback(shutil.rmtree, folder, ignore_errors=True)
        (folder / "settings.toml").touch()
        redis, postgres = RedisServer(), PostgresServer()
        for server in (redis, postgres):
            ends.callback(server.close)
            server.start()
        cloud = subprocess.Popen(
            [sys.executable, HERE / "cloud.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        ends.callback(cloud.wait)
        ends.callback(cloud.kill)
        assert cloud.stdout is not None
        yield Ground(postgres, redis, cloud, cloud.stdout.readline().strip(), folder)


def main() -> None:
    global USERS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 users and one round: does it run at all?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--users", type=int, default=USERS)
    parser.add_argument("--only", default=",".join(CONTESTANTS), help="some of the contestants")
    parser.add_argument("--workloads", default="", help="those that begin with this word")
    chosen = parser.parse_args()
    rounds, USERS = (1, 100) if chosen.quick else (chosen.rounds, chosen.users)
    names = chosen.only.split(",")
    workloads = [each for each in WORKLOADS if each.startswith(chosen.workloads)]
    table = Table()
    with grounds() as ground:
        connect_everybody(ground)
        for number in range(rounds):
            for workload in workloads:
                turn = number % len(names)
                for name in names[turn:] + names[:turn]:
                    began = time.monotonic()
                    measure(ground, name, workload, table)
                    rate = table.values[name, f"{workload}: syncs/s"][-1]
                    used = table.values[name, f"{workload}: ms of CPU a sync"][-1]
                    print(
                        f"round {number + 1}: {workload:<21} {name:<12}{rate:7.1f} syncs/s {used:6.2f} ms of "
                        f"CPU a sync ({time.monotonic() - began:.0f} s)",
                        flush=True,
                    )
    version = sys.version.split()[0]
    print(
        f"\npython {version}, {os.cpu_count()} cores, {USERS} users, {IN_FLIGHT} in flight, {rounds} rounds;"
    )
    print("the median, the range, and the median ratio of a round with its range")
    table.show(names)
    for workload in workloads:
        for what in ("requests", "records there are"):
            counted = {value for name in names for value in table.values[name, f"{workload}: {what}"]}
            if len(counted) > 1:
                raise SystemExit(f"{workload}: not everybody did the same: {what}: {sorted(counted)}")


if __name__ == "__main__":
    main()
