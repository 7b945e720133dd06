"""The application's actors: as plain functions, sent, and on the timetable. The rest is in the library."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from dramatiq import Message
from dramatiq.brokers.stub import StubBroker
from periodiq import cron

import lifelogger.broker
import lifelogger.runtime
from lifelogger import leaving, notices, notify, planner, sync, tokens
from lifelogger.connections import import_lines
from lifelogger.errors import LockLost
from lifelogger.runtime import Runtime, build
from lifelogger.settings import Settings
from lifelogger.store import counts, journal
from lifelogger.store.pages import Counts
from lifelogger.sync import Run
from tests.conftest import make_tables
from tests.servers import RedisServer

MODULES = ("actors", "actors.notify", "actors.sync", "scheduler")
NAMES = (
    "sync_user_data",
    "sync_user_now",
    "plan_again",
    "sync_active_users",
    "refresh_integration_tokens",
    "revoke_what_is_left",
    "forget_old_runs",
    "count_what_there_is",
    "serve_news",
    "keep_webhooks",
    "deliver_changes",
    "deliver_waiting_changes",
)


@dataclass
class Application:
    """The actors as a new process has them, with messages that stay in this one."""

    rt: Runtime
    broker: StubBroker
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    """What the actors asked of the library, where a test listens."""

    def __getattr__(self, name: str) -> Any:
        return self.broker.get_actor(name)

    def queued(self, queue: str) -> list[tuple[str, tuple[Any, ...]]]:
        """The messages that wait there, in order."""
        waiting = [Message.decode(data) for data in self.broker.queues[queue].queue]
        return [(message.actor_name, message.args) for message in waiting]

    @contextmanager
    def working(self, queue: str) -> Iterator[None]:
        """With a worker for it; returns when it is empty and everything has been run."""
        worker = dramatiq.Worker(self.broker, queues={queue}, worker_threads=2, worker_timeout=50)
        worker.start()
        try:
            yield
            self.broker.join(queue, timeout=10_000, fail_fast=False)
            worker.join()
        finally:
            worker.stop()


@pytest.fixture
def app(
    settings_env: Callable[..., Settings],
    redis_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Application]:
    """On SQLite: which database it is, is nothing to an actor."""
    schedule = {
        "sync": "*/20 6-22 * * *",
        "refresh_tokens": "3 * * * 7",
        "revoke": "*/7 * * * *",
        "tidy": "5 4 * * *",
        "notify": "7 * * * *",
    }
    rt = build(
        settings_env(
            database={"url": f"sqlite:///{tmp_path / 'test.db'}"}, redis={"url": redis_url}, schedule=schedule
        )
    )
    make_tables(rt.store)
    monkeypatch.setenv("LIFELOGGER_BROKER", "stub")
    monkeypatch.setattr(lifelogger.runtime, "runtime", lambda: rt)
    monkeypatch.delitem(vars(lifelogger.broker), "broker", raising=False)
    monkeypatch.setattr(dramatiq.broker, "global_broker", None)
    before = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    for name in ("actors", "scheduler"):  # as the worker does
        importlib.import_module(name)
    broker = lifelogger.broker.broker
    assert isinstance(broker, StubBroker)

    yield Application(rt, broker)

    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(before)
    vars(lifelogger.broker).pop("broker", None)
    broker.close()
    rt.close()


def listen(
    app: Application, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, answer: Any = None
) -> None:
    """Note the calls of a function of the library instead of running it; an exception is raised."""

    def heard(*arguments: Any) -> Any:
        app.calls.append(arguments)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(module, name, heard)


# What all have in common ------------------------------------------------------------------------------------


def test_there_are_these(app: Application) -> None:
    assert set(app.broker.actors) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_no_actor_is_retried_by_the_broker(app: Application, name: str) -> None:
    """A retry is a delayed message, and those stand in worker memory in the order of their arrival."""
    assert app.broker.get_actor(name).options["max_retries"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_each_says_what_it_does(app: Application, name: str) -> None:
    assert app.broker.get_actor(name).fn.__doc__


@pytest.mark.parametrize(
    ("name", "arguments", "key"),
    [
        ("sync_user_data", ("ann",), "sync:ann"),
        ("sync_user_data", ("ann", "tick"), "sync:ann"),
        ("sync_user_now", ("ann", "news"), "sync:ann"),
        ("plan_again", (), "plan"),
        ("refresh_integration_tokens", (), "refresh_integration_tokens"),
        ("deliver_changes", (), "notify"),
        ("deliver_waiting_changes", (), "notify"),
        ("revoke_what_is_left", (), "revoke_what_is_left"),
        ("forget_old_runs", (), "tidy"),
        ("count_what_there_is", (), "count"),
    ],
)
def test_the_lock_that_each_takes(app: Application, name: str, arguments: tuple[str, ...], key: str) -> None:
    assert app.broker.get_actor(name).options["mutex"](*arguments) == key


def test_the_timetable_is_that_of_the_settings(app: Application) -> None:
    timetable = {
        name: actor.options["periodic"]
        for name, actor in app.broker.actors.items()
        if "periodic" in actor.options
    }

    assert timetable == {
        "sync_active_users": cron("*/20 6-22 * * *"),
        "refresh_integration_tokens": cron("3 * * * 7"),
        "revoke_what_is_left": cron("*/7 * * * *"),
        "forget_old_runs": cron("5 4 * * *"),
        "count_what_there_is": cron("*/5 * * * *"),
        "deliver_waiting_changes": cron("7 * * * *"),
        "serve_news": cron("* * * * *"),
        "keep_webhooks": cron("41 * * * *"),
    }
    assert cron("3 * * * 7") != cron("4 * * * 7")


def test_a_failure_is_not_tried_again(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    listen(app, monkeypatch, sync, "run", ValueError("any"))

    with app.working("default"):
        app.sync_user_data.send("ann")

    assert len(app.calls) == 1
    assert app.broker.get_declared_delay_queues() == {"default.DQ", "now.DQ", "schedule.DQ", "notify.DQ"}
    assert all(app.broker.queues[queue].empty() for queue in app.broker.queues)
    assert [message.actor_name for message in app.broker.dead_letters] == ["sync_user_data"]


# sync_user_data ---------------------------------------------------------------------------------------------


def test_what_is_urgent_is_the_same_in_a_queue_of_its_own(
    app: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen(app, monkeypatch, sync, "run", [])

    with app.working("now"):
        app.broker.get_actor("sync_user_now").send("ann", "news")

    assert app.calls == [("ann", "news")]


def test_a_sync_is_a_wish_unless_the_planner_sends_it(
    app: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen(app, monkeypatch, sync, "run", [])

    app.sync_user_data("ann")
    app.sync_user_data("ann", "tick")

    assert app.calls == [("ann", "asked"), ("ann", "tick")]


def test_as_a_plain_function_it_syncs(app: Application) -> None:
    """Nobody is connected, so there is nothing to pull; what a sync does is tested elsewhere."""
    app.sync_user_data("nobody")

    assert app.queued("schedule") == []


def test_a_message_syncs_under_the_users_lock(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    def run(user_id: str, trigger: str) -> list[Run]:
        held.append((user_id, trigger, app.rt.redis.exists(f"lifelogger:lock:sync:{user_id}")))
        return []

    monkeypatch.setattr(sync, "run", run)

    with app.working("default"):
        app.sync_user_data.send("ann")

    assert held == [("ann", "asked", 1)]
    assert not app.rt.redis.exists("lifelogger:lock:sync:ann")


def test_a_message_whose_user_is_being_synced_is_skipped_and_no_other(
    app: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen(app, monkeypatch, sync, "run", [])

    with app.rt.mutex.hold("sync:ann"), app.working("default"):
        app.sync_user_data.send("ann")
        app.sync_user_data.send("bob")

    assert app.calls == [("bob", "asked")]
    assert app.rt.mutex.skips() == {"sync_user_data": 1}


def test_a_lost_lock_is_no_fault(
    app: Application, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody else has taken over: a line in the log, no traceback."""
    listen(app, monkeypatch, sync, "run", LockLost("a newer sync has taken over"))

    with app.working("default"):
        app.sync_user_data.send("ann")

    assert len(app.calls) == 1
    assert [record for record in caplog.records if record.exc_info] == []


def test_what_is_left_is_revoked_by_the_timetable(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    listen(app, monkeypatch, leaving, "revoke_waiting", 0)

    with app.working("schedule"):
        app.revoke_what_is_left.send()

    assert app.calls == [(app.rt,)]


def test_who_has_to_sign_in_again_is_told_of_at_once_and_by_the_timetable(
    app: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "run", lambda *arguments: [Run(1, 1, "any", outcome="needs_reauth")])
    listen(app, monkeypatch, notices, "tell", 0)

    app.sync_user_data("ann")
    app.refresh_integration_tokens()

    assert app.calls == [(app.rt,), (app.rt,)]


@pytest.mark.parametrize(("learned", "planned"), [([False, True], 1), ([False], 0), ([], 0)])
def test_who_learned_a_budget_lets_the_others_be_planned(
    app: Application, monkeypatch: pytest.MonkeyPatch, learned: list[bool], planned: int
) -> None:
    listen(app, monkeypatch, sync, "run", [Run(1, 1, "any", learned=each) for each in learned])

    app.sync_user_data("ann")

    assert app.queued("schedule") == [("plan_again", ())] * planned


@pytest.mark.parametrize(
    ("counts", "urls", "sent"),
    [
        ([Counts(inserted=1)], True, 1),
        ([Counts(), Counts(deleted=2)], True, 1),
        ([Counts(quarantined=1)], True, 0),
        ([], True, 0),
        ([Counts(updated=1)], False, 0),
    ],
)
def test_a_sync_that_changed_something_has_it_told_at_once(
    app: Application,
    monkeypatch: pytest.MonkeyPatch,
    settings_env: Callable[..., Settings],
    counts: list[Counts],
    urls: bool,
    sent: int,
) -> None:
    if urls:
        settings_env(notify={"urls": ["https://app.example/"], "secrets": [notify.new_secret()]})
    listen(app, monkeypatch, sync, "run", [Run(1, 1, "any", counts=each) for each in counts])

    app.sync_user_data("ann")

    assert app.queued("notify") == [("deliver_changes", ())] * sent


def test_who_has_to_sign_in_again_is_told_to_endpoints_at_once(
    app: Application, monkeypatch: pytest.MonkeyPatch, settings_env: Callable[..., Settings]
) -> None:
    settings_env(notify={"urls": ["https://app.example/"], "secrets": [notify.new_secret()]})
    listen(app, monkeypatch, sync, "run", [Run(1, 1, "any", outcome="needs_reauth")])
    listen(app, monkeypatch, notices, "tell", 0)

    app.sync_user_data("ann")

    assert app.queued("notify") == [("deliver_changes", ())]


@pytest.mark.parametrize("name", ["deliver_changes", "deliver_waiting_changes"])
def test_changes_are_delivered(app: Application, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    listen(app, monkeypatch, notify, "deliver")

    with app.working("notify"):
        app.broker.get_actor(name).send()

    assert app.calls == [(app.rt,)]


# Planning ---------------------------------------------------------------------------------------------------

AT = datetime(2026, 11, 24, 12, 15, tzinfo=UTC)


@pytest.fixture
def ticks(app: Application, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The ticks that the planner is asked for, without what they send with."""
    asked: list[tuple[Any, ...]] = []

    def tick(name: str, due_at: datetime | None, send: Callable[[str], object]) -> None:
        asked.append((name, due_at))
        send("ann")

    monkeypatch.setattr(planner, "tick", tick)
    return asked


@pytest.mark.parametrize("name", ["sync_active_users", "plan_again"])
def test_as_a_plain_function_it_plans_at_once(
    app: Application, ticks: list[tuple[Any, ...]], name: str
) -> None:
    app.broker.get_actor(name)()

    assert ticks == [(name, None)]
    assert app.queued("default") == [("sync_user_data", ("ann", "tick"))]


def test_a_tick_is_told_when_it_was_meant_to_fire(app: Application, ticks: list[tuple[Any, ...]]) -> None:
    now = datetime.now(UTC)
    there = now.astimezone().isoformat()  # as Periodiq writes it: with seconds and the local offset

    with app.working("schedule"):
        app.sync_active_users.send_with_options(scheduled_at=there)

    assert ticks == [("sync_active_users", now.replace(second=0, microsecond=0))]


def test_a_tick_that_a_person_sends_goes_ahead(app: Application, ticks: list[tuple[Any, ...]]) -> None:
    with app.working("schedule"):
        app.sync_active_users.send()
        app.plan_again.send()

    assert sorted(ticks) == [("plan_again", None), ("sync_active_users", None)]


def test_a_tick_plans_who_is_due_and_once(app: Application) -> None:
    """Through the planner itself; the budget is not counted yet, so it allows one."""
    for user_id in ("ann", "bob"):
        line = (
            f'{{"user_id": "{user_id}", "provider": "strava", "access_token": "a", "expires_at": 1900000000}}'
        )
        import_lines(app.rt, [line])
    scheduled_at = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()

    with app.working("schedule"):
        for _ in range(2):
            app.sync_active_users.send_with_options(scheduled_at=scheduled_at)

    assert app.queued("default") == [("sync_user_data", ("ann", "tick"))]


def test_nothing_is_sent_with_a_delay(app: Application, ticks: list[tuple[Any, ...]]) -> None:
    app.sync_active_users()

    [data] = app.broker.queues["default"].queue
    assert "eta" not in Message.decode(data).options
    assert app.queued("default.DQ") == []


# Tokens -----------------------------------------------------------------------------------------------------


@pytest.fixture
def refreshed(app: Application, monkeypatch: pytest.MonkeyPatch) -> list[Runtime]:
    """The runtimes whose expiring tokens were refreshed."""
    found: list[Runtime] = []
    monkeypatch.setattr(tokens.Tokens, "refresh_expiring", lambda self: found.append(self.runtime))
    return found


def test_tokens_are_refreshed_with_this_process_parts(app: Application, refreshed: list[Runtime]) -> None:
    app.refresh_integration_tokens()
    assert refreshed == [app.rt]

    with app.working("schedule"):
        app.refresh_integration_tokens.send()
    assert refreshed == [app.rt, app.rt]


def test_one_at_a_time(app: Application, refreshed: list[Runtime]) -> None:
    with app.rt.mutex.hold("refresh_integration_tokens"), app.working("schedule"):
        app.refresh_integration_tokens.send()

    assert refreshed == []


# Tidying up -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [False, True])
def test_the_journal_is_kept_as_long_as_the_settings_say(
    app: Application, monkeypatch: pytest.MonkeyPatch, sent: bool
) -> None:
    listen(app, monkeypatch, journal, "forget")
    earliest = app.rt.clock() - timedelta(days=app.rt.settings.sync.journal_days)

    with app.working("schedule"):
        app.forget_old_runs.send() if sent else app.forget_old_runs()

    [(store, before)] = app.calls
    assert store is app.rt.store
    assert timedelta(0) <= before - earliest < timedelta(minutes=1)


@pytest.mark.parametrize("sent", [False, True])
def test_a_large_store_is_counted(app: Application, monkeypatch: pytest.MonkeyPatch, sent: bool) -> None:
    listen(app, monkeypatch, counts, "recount")

    with app.working("schedule"):
        app.count_what_there_is.send() if sent else app.count_what_there_is()

    assert app.calls == [(app.rt.store, app.rt.clock)]


# Without Redis ----------------------------------------------------------------------------------------------


def test_without_redis_no_sync_runs_unlocked(
    app: Application, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen(app, monkeypatch, sync, "run", [])
    redis_server.stop()

    with app.working("default"):
        app.sync_user_data.send("ann")

    assert app.calls == []


def test_the_scheduler_does_without_the_database_and_the_network() -> None:
    """It only sends messages: half of the memory, and of the time until it is there, would be for nothing."""
    code = (
        "import scheduler, sys\n"
        "print(*sorted({'sqlalchemy', 'requests', 'alembic', 'fastapi'} & sys.modules.keys()))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "LIFELOGGER_BROKER": "stub"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == []
