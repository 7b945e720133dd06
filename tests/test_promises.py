"""The promises that are about processes: real `dramatiq` and `periodiq` commands, real Redis, both databases.

The sandbox's ledger is the witness. What needs no process is in the tests of each module.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import dramatiq
import pytest
import requests
from dramatiq import Message
from sqlalchemy import func, select, text

import lifelogger.broker
from lifelogger import client, planner, status, sync
from lifelogger.connections import import_lines
from lifelogger.runtime import Runtime, build
from lifelogger.sandbox.server import Sandbox
from lifelogger.settings import Settings
from lifelogger.store.migrate import upgrade
from lifelogger.store.models import Connection, Record, SyncRun, Tick
from lifelogger.tokens import Tokens
from tests.conftest import pointed_at
from tests.processes import Command, scheduler, worker
from tests.sandbox.control import Control
from tests.servers import RedisServer, wait_until

LOCK_SECONDS = 3
LIST = "GET /athlete/activities"


@dataclass
class Application:
    """lifelogger as it is deployed, in real time: settings in the environment, its parts as processes."""

    rt: Runtime
    sandbox: Control

    def connect(self, *people: str) -> list[str]:
        """Connect people (all of them, without any) and return their ids."""
        lines = self.sandbox.connect(*people)
        import_lines(self.rt, map(json.dumps, lines))
        return [line["user_id"] for line in lines]

    def send(self, actor: str, *arguments: str, queue: str = "default", **options: Any) -> None:
        message: Message[Any] = Message(
            queue_name=queue, actor_name=actor, args=arguments, kwargs={}, options=options
        )
        lifelogger.broker.broker.enqueue(message)

    def learn_the_budget(self) -> None:
        """Let one request tell what is spent: else the first one of a test goes out alone."""
        self.connect("ewa")
        sync.run("ewa", runtime=self.rt)

    def workers(self, processes: int = 1, threads: int = 4) -> Command:
        return worker("actors", "scheduler", processes=processes, threads=threads)

    def skips(self) -> int:
        skips = self.rt.mutex.skips()
        return skips.get("sync_user_data", 0) + skips.get("sync_user_now", 0)

    def runs(self, user_id: str) -> list[dict[str, Any]]:
        return status.runs(self.rt, user_id=user_id, limit=1000)

    def idle(self) -> bool:
        """Whether nothing is claimed, running or queued."""
        queued = sum(int(self.rt.redis.llen(f"lifelogger:{queue}")) for queue in ("default", "now"))  # type: ignore[arg-type]
        with self.rt.store.read() as db:
            claimed = db.scalar(select(func.count()).where(Connection.claimed_at.is_not(None)))
            running = db.scalar(select(func.count()).where(SyncRun.outcome == "running"))
        return not (claimed or running or queued)

    def stored(self, user_id: str) -> dict[str, Any]:
        """What the store holds of a user, by id: the provider's own items."""
        query = (
            select(Record.external_id, Record.raw)
            .join_from(Record, Connection, Record.connection_id == Connection.id)
            .where(Connection.user_id == user_id, Record.deleted_at.is_(None))
        )
        with self.rt.store.read() as db:
            rows = db.execute(query).all()
        assert len(rows) == len({row.external_id for row in rows})
        return {row.external_id: row.raw for row in rows}

    def truth(self, user_id: str) -> dict[str, Any]:
        return {str(item["id"]): item for item in self.sandbox.truth(user_id)}


def application_of(settings: Settings, sandbox: Control) -> Application:
    rt = build(settings)
    upgrade(rt.store)
    return Application(rt, sandbox)


SETTINGS: dict[str, Any] = {"sync": {"lock_seconds": LOCK_SECONDS, "lease_seconds": 1, "interval_seconds": 1}}


@pytest.fixture
def fresh_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process's broker is made anew, for the settings of this test."""
    monkeypatch.delitem(vars(lifelogger.broker), "broker", raising=False)
    monkeypatch.setattr(dramatiq.broker, "global_broker", None)


@pytest.fixture
def application(
    database_url: str,
    redis_url: str,
    settings_env: Callable[..., Settings],
    sandbox: Control,
    fresh_broker: None,
) -> Iterator[Application]:
    made = application_of(
        settings_env(
            database={"url": database_url},
            redis={"url": redis_url},
            providers=pointed_at(sandbox),
            **SETTINGS,
        ),
        sandbox,
    )
    yield made
    made.rt.close()


def test_a_user_never_has_two_syncs_at_once(application: Application, sandbox: Control) -> None:
    """Promise 1: ten messages, two worker processes, one person."""
    application.connect("alice")

    with sandbox.hold(LIST) as gate, application.workers(processes=2) as command:
        for _ in range(10):
            application.send("sync_user_data", "alice")
        gate.wait_until_reached()  # the first sync stays open until released
        command.wait_until(lambda: application.skips() == 9, "nine skips")
        gate.release()
        command.wait_until(application.idle, "the sync to end")

    assert sandbox.summary()["overlaps"] == 0
    assert [run["outcome"] for run in application.runs("alice")] == ["ok"]
    assert application.stored("alice") == application.truth("alice")


def test_a_skip_loses_nothing(application: Application, sandbox: Control) -> None:
    """Promise 2: the wish of a skipped message is served by the sync that was running."""
    application.connect("alice")

    with sandbox.hold(LIST) as gate, application.workers(processes=2) as command:
        client.request_sync("alice", runtime=application.rt)
        gate.wait_until_reached()
        client.request_sync("alice", runtime=application.rt)
        command.wait_until(lambda: application.skips() == 1, "the skip")
        news = sandbox.add("alice", fields={"name": "This morning's run"})
        gate.release()
        command.wait_until(lambda: str(news) in application.stored("alice"), "the news to be stored")
        command.wait_until(application.idle, "the sync to end")

    assert sandbox.summary()["overlaps"] == 0
    assert application.stored("alice") == application.truth("alice")


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_wish_within_the_minute_loses_nothing(application: Application, sandbox: Control) -> None:
    """Promise 2: no message is sent for it, and the run that it joined brings the news."""
    application.connect("alice")

    with sandbox.hold(LIST) as gate, application.workers(processes=2) as command:
        client.sync_now("alice", runtime=application.rt)
        gate.wait_until_reached()
        news = sandbox.add("alice", fields={"name": "This morning's run"})
        wish = client.sync_now("alice", runtime=application.rt)
        gate.release()
        command.wait_until(lambda: str(news) in application.stored("alice"), "the news to be stored")
        command.wait_until(application.idle, "the sync to end")

    assert len(wish.runs) == 1
    assert application.skips() == 0
    assert application.stored("alice") == application.truth("alice")


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_killed_worker_is_made_good(application: Application, sandbox: Control) -> None:
    """Promises 1, 6: its lock expires, a later tick plans the user again, nothing is lost or doubled."""
    application.learn_the_budget()
    application.connect("alice")
    gate = sandbox.hold(LIST)
    with application.workers() as command:
        application.send("sync_user_data", "alice")
        gate.wait_until_reached()
        command.kill()
    gate.release()

    with application.workers() as command:

        def synced() -> bool:
            planner.tick("test", None, lambda user: application.send("sync_user_data", user, "tick"),
                         runtime=application.rt)  # fmt: skip
            return any(run["outcome"] == "ok" for run in application.runs("alice"))

        command.wait_until(synced, "a sync after the lock expired")
        command.wait_until(application.idle, "the syncs to end")

    assert [run["outcome"] for run in application.runs("alice")][-1] == "interrupted"
    assert application.stored("alice") == application.truth("alice")
    assert sandbox.summary()["overlaps"] == 0


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_paused_worker_stops_before_its_next_write(application: Application, sandbox: Control) -> None:
    """Promise 1: SIGSTOP past the TTL; another worker takes over, and the first one writes nothing."""
    application.learn_the_budget()
    application.connect("alice")
    gate = sandbox.hold(LIST, times=1)
    with application.workers() as paused, application.workers() as other:
        application.send("sync_user_data", "alice")
        gate.wait_until_reached()
        stopped = [command for command in (paused, other) if holds_lock(application, command, gate)]
        first = stopped[0]
        second = other if first is paused else paused
        signal_group(first, signal.SIGSTOP)
        second.wait_until(lambda: application.rt.mutex.acquire("sync:alice"), "the lock to expire")
        application.rt.mutex.release_here()
        sandbox.add("alice", fields={"name": "After the pause"})
        application.send("sync_user_data", "alice")
        second.wait_until(
            lambda: any(run["outcome"] == "ok" for run in application.runs("alice")), "the second sync"
        )
        stored = application.stored("alice")
        gate.release()

        signal_group(first, signal.SIGCONT)
        first.wait_until(lambda: "LockLost" in first.log(), "the first worker to notice")
        first.wait_until(application.idle, "all to end")

    assert stored == application.stored("alice") == application.truth("alice")
    assert sorted(run["outcome"] for run in application.runs("alice")) == ["interrupted", "ok"]


def holds_lock(application: Application, command: Command, gate: Any) -> bool:
    """Whether this command runs the held sync: it has children with an open connection to the sandbox."""
    assert command.process is not None
    port = application.sandbox.url.rsplit(":", 1)[1]
    return any(port in peers(pid) for pid in family(command.process.pid))


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                parent = int(file.read().rsplit(")", 1)[1].split()[1])
        except OSError:  # it ended meanwhile
            continue
        children.setdefault(parent, []).append(int(name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def peers(pid: int) -> set[str]:
    """The ports that a process is connected to."""
    inodes = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in table.readlines()[1:]]
    return {str(int(row[2].split(":")[1], 16)) for row in rows if row[9] in inodes}


def signal_group(command: Command, number: int) -> None:
    assert command.process is not None
    for pid in family(command.process.pid):
        os.kill(pid, number)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_tick_fires_once(
    application: Application, sandbox: Control, settings_env: Callable[..., Settings]
) -> None:
    """Promise 8: two schedulers whose timetables say the same minute, two workers, one plan."""
    # Whoever connects is known to have news, which the tick in between would serve first.
    settings_env(schedule={"sync": "* * * * *", "news": "0 0 1 1 *"}, sync={"interval_seconds": 900})
    application.connect("alice", "bruno")
    before = datetime.now(UTC)

    with ExitStack() as stack:
        commands = [scheduler("scheduler"), scheduler("scheduler"), application.workers(processes=2)]
        for command in commands:
            command.start()
        for command in commands:
            stack.enter_context(command)
        commands[-1].wait_until(lambda: planned(application), "the tick")
        commands[-1].wait_until(
            lambda: all("Scheduling" in command.log() for command in commands[:2]), "both schedulers to send"
        )
        commands[-1].wait_until(application.idle, "the syncs to end")
        commands[-1].wait_until(lambda: not application.rt.redis.llen("lifelogger:schedule"), "all ticks")

    with application.rt.store.read() as db:
        ticks = db.execute(select(Tick.due_at, Tick.planned).where(Tick.name == "sync_active_users")).all()
    minutes = {tick.due_at for tick in ticks}
    assert len(minutes) == len(ticks) <= 1 + (datetime.now(UTC) - before).total_seconds() // 60 + 1
    assert len(application.runs("alice")) == 1


def planned(application: Application) -> bool:
    with application.rt.store.read() as db:
        return bool(db.scalar(select(func.count()).where(Tick.name == "sync_active_users", Tick.planned > 0)))


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_restarted_redis_is_no_new_budget(
    application: Application, sandbox: Control, redis_server: RedisServer
) -> None:
    """Promise 3: it came back empty; one request goes out alone, and its headers tell."""
    people = application.connect("alice", "bruno", "chiyo")
    sandbox.spend(95)

    with application.workers(processes=2) as command:
        redis_server.restart()
        with sandbox.hold(LIST) as gate:
            for person in people:
                application.send("sync_user_data", person)
            gate.wait_until_reached()
            command.wait_until(
                lambda: sum(len(application.runs(person)) for person in people) >= len(people), "all to ask"
            )
            command.wait_until(
                lambda: sum(run["outcome"] == "running" for p in people for run in application.runs(p)) == 1,
                "the others to be told to wait",
            )
            assert gate.reached() == 1
        command.wait_until(application.idle, "the syncs to end")

    summary = sandbox.summary()
    assert summary["most_in_a_window"]["reads"]["900"] <= 100


def test_tokens_and_secrets_are_never_readable(application: Application, sandbox: Control) -> None:
    """Promise 10: not in the database, Redis, or the logs of workers that meet every kind of trouble."""
    application.learn_the_budget()
    lines = sandbox.connect("alice", "bruno", "chiyo")
    import_lines(application.rt, map(json.dumps, lines))
    sandbox.expire("bruno")
    sandbox.fault(LIST, person="alice", status=500, times=1)
    sandbox.fault(LIST, person="chiyo", body="{broken", times=1)
    with application.workers() as command:
        for line in lines:
            application.send("sync_user_data", line["user_id"])
        application.send("sync_user_data", "nobody", "too", "many", "arguments")
        command.wait_until(
            lambda: (
                all(application.runs(line["user_id"]) for line in lines)
                and any(run["outcome"] == "ok" for run in application.runs("bruno"))
                and application.idle()
            ),
            "all runs",
        )
        command.wait_until(lambda: "TypeError" in command.log(), "the message that is wrong to fail")
        log = command.log()
    secrets = [line[name] for line in lines for name in ("access_token", "refresh_token")]
    secrets += tokens_now(application)
    assert len(set(secrets)) > len(lines) * 2, "bruno's tokens were refreshed"

    for secret in secrets:
        assert secret not in log
        assert secret not in everything_in_redis(application)
        assert secret not in everything_in_the_database(application)
    assert secrets[0] in json.dumps(lines), "and this search finds what is there"


def tokens_now(application: Application) -> list[str]:
    with application.rt.store.read() as db:
        rows = db.execute(select(Connection.access_token, Connection.refresh_token)).all()
    return [application.rt.vault.decrypt(sealed) for row in rows for sealed in row if sealed]


def everything_in_redis(application: Application) -> str:
    server = application.rt.redis
    return " ".join(repr(server.dump(key)) for key in server.scan_iter()) + " ".join(
        repr(server.hgetall(key)) for key in server.scan_iter(_type="HASH")
    )


def everything_in_the_database(application: Application) -> str:
    with application.rt.store.read() as db:
        return " ".join(
            repr(row)
            for table in ("connections", "streams", "records", "quarantine", "sync_runs", "ticks", "users")
            for row in db.execute(text(f"SELECT * FROM {table}"))
        )


# Slower ones: `make test-slow` ------------------------------------------------------------------------


@pytest.mark.slow
def test_500_people_and_three_workers_stay_inside_the_window(
    postgres_server: Any, redis_url: str, settings_env: Callable[..., Settings], fresh_broker: None
) -> None:
    """Promise 3 and 9: everybody asks at once; the provider counts at most 100 in any quarter of an hour."""
    database = postgres_server.create("crowd")
    try:
        with Sandbox(people=500, seed=3, history_days=200) as server:
            sandbox = Control(server.url)
            settings = settings_env(
                database={"url": database}, redis={"url": redis_url}, providers=pointed_at(sandbox)
            )
            crowd = application_of(settings, sandbox)
            people = crowd.connect()
            assert len(people) == 500
            with ExitStack() as stack:
                commands = [worker("actors", "scheduler", processes=1, threads=8) for _ in range(3)]
                for command in commands:
                    command.start()
                for command in commands:
                    stack.enter_context(command)
                for person in people:
                    client.request_sync(person, runtime=crowd.rt)
                for _ in range(3):
                    crowd.send("sync_active_users", queue="schedule")
                commands[0].wait_until(lambda: not crowd.rt.redis.llen("lifelogger:default"), "the queue")
                wait_until(crowd.idle, "the syncs to end", seconds=120)

            summary = sandbox.summary()
            assert 90 <= summary["most_in_a_window"]["reads"]["900"] <= 100
            assert summary["by_status"].get("429", 0) == 0
            assert summary["overlaps"] == 0
            waiting = status.overview(crowd.rt)["providers"]["strava"]
            assert waiting["waiting"] >= 350
            assert all("UTC" in wait["reason"] or "learned" in wait["reason"] for wait in waiting["waits"])
            crowd.rt.close()
    finally:
        postgres_server.drop("crowd")


@pytest.mark.slow
def test_kills_at_random_moments_lose_and_double_nothing(
    database_url: str,
    redis_url: str,
    settings_env: Callable[..., Settings],
    sandbox: Control,
    fresh_broker: None,
) -> None:
    """Promises 1, 5, 6: workers are killed again and again, tokens are replaced, people go on living.

    The tokens are replaced by this process, which is not killed: who dies between the provider's answer
    and its arrival has lost a pair that nobody else saw, and no client can prevent that.
    """
    chance = random.Random(1)
    plenty = ["100000/15 minutes", "1000000/day"]
    providers = pointed_at(sandbox)
    providers["strava"] |= {"budget": plenty, "overall_budget": plenty}
    sandbox.limits(reads=(100_000, 1_000_000), overall=(100_000, 1_000_000))
    # Within the margin of the periodic refresh from the start, and good for longer than the test takes.
    sandbox.settings(access_token_seconds=1000, rotate="always")
    application = application_of(
        settings_env(
            database={"url": database_url},
            redis={"url": redis_url},
            providers=providers,
            **SETTINGS,
        ),
        sandbox,
    )
    application.learn_the_budget()
    people = application.connect()

    def tick() -> None:
        planner.tick("test", None, lambda user: application.send("sync_user_data", user, "tick"),
                     runtime=application.rt)  # fmt: skip

    def wrong() -> dict[str, Any]:
        """By person, the ids that differ between the store and the truth."""
        found = {}
        for person in people:
            stored, truth = application.stored(person), application.truth(person)
            found[person] = [key for key in stored.keys() | truth.keys() if stored.get(key) != truth.get(key)]
        return {person: keys for person, keys in found.items() if keys}

    ends = time.monotonic() + 30
    kills = refreshed = 0
    while time.monotonic() < ends:
        with application.workers(processes=2) as command:
            for _ in range(chance.randint(1, 6)):
                person = chance.choice(people)
                live_on(sandbox, person, chance)
                client.request_sync(person, runtime=application.rt)
                tick()
                refreshed += Tokens(application.rt).refresh_expiring()["refreshed"]
                time.sleep(chance.uniform(0, 0.3))  # the moment of the kill is random, nothing waits for it
            command.kill()
            kills += 1
    assert kills >= 5
    assert refreshed >= 5

    with application.workers(processes=2) as command:

        def settled() -> bool:
            tick()
            return not wrong()

        try:  # a failed sync is tried again after a minute
            wait_until(settled, "the store to be the truth", seconds=150)
        except AssertionError as failure:
            users = status.as_json([status.user(application.rt, person, runs_each=5) for person in wrong()])
            pytest.fail(f"{failure}: {wrong()}\n{json.dumps(users, indent=1)}\n{command.log()[-3000:]}")
        assert command.stop() == 0  # what runs comes to its end

    summary = sandbox.summary()
    assert summary["refresh_tokens_used_twice"] == 0
    assert summary["overlaps"] == 0
    assert status.overview(application.rt)["providers"]["strava"]["needs_reauth"] == 0
    application.rt.close()


def live_on(sandbox: Control, person: str, chance: random.Random) -> None:
    """Something happens in a person's last days: an activity more, one changed, one gone."""
    since = (datetime.now(UTC) - timedelta(days=5)).isoformat()
    recent = [item for item in sandbox.truth(person) if item["start_date"] > since]
    happens = chance.choice(["add", "edit", "delete"])
    if happens == "add" or not recent:
        sandbox.add(person)
    elif happens == "edit":
        sandbox.edit(chance.choice(recent)["id"], fields={"name": f"Edited {chance.random()}"})
    else:
        sandbox.delete(chance.choice(recent)["id"])


@pytest.mark.slow
def test_a_poll_without_news_costs_one_request(application: Application, sandbox: Control) -> None:
    """The steady state, with real commands: what the ledger counts for a tick over people without news."""
    people = application.connect()

    def synced(times: int) -> bool:
        return application.idle() and all(
            sum(run["outcome"] == "ok" for run in application.runs(person)) >= times for person in people
        )

    with application.workers() as command:
        for times in (1, 2):  # the day's first poll of somebody new reads to the end once more
            for person in people:
                application.send("sync_user_data", person)
            command.wait_until(lambda times=times: synced(times), f"sync {times} of everybody")
        before = len(sandbox.ledger())
        for person in people:
            application.send("sync_user_data", person)
        command.wait_until(lambda: synced(3), "the poll")

    assert len(sandbox.ledger()) - before == len(people)


def test_the_sandbox_is_asked_on_loopback_only(application: Application) -> None:
    """Tests that reach a real provider would cost real people's budgets."""
    address = application.rt.settings.providers["strava"].api_url
    assert address.startswith("http://127.0.0.1:")
    assert requests.get(f"{application.sandbox.url}/control/health", timeout=10).json()["ok"]
