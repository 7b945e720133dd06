"""The broker: which one, with what middleware, and how the real commands find it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import dramatiq
import pytest
import redis
from dramatiq.broker import MessageProxy
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.cli import import_broker
from dramatiq.middleware import CurrentMessage, SkipMessage

import lifelogger.broker
from lifelogger.broker import LONGEST_WAIT_SECONDS, WORKER_NAME, make_broker
from lifelogger.errors import SettingsError
from lifelogger.mutex import Mutex, MutexMiddleware
from lifelogger.settings import Settings
from tests.processes import scheduler, worker
from tests.servers import wait_until

MakeSettings = Callable[..., Settings]


@pytest.fixture
def settings(settings_env: MakeSettings, redis_url: str) -> Settings:
    return settings_env(redis={"url": redis_url, "prefix": "mine"})


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def mutex(client: redis.Redis) -> Mutex:
    return Mutex(client, prefix="mine")


@pytest.fixture
def stub(settings: Settings, mutex: Mutex) -> StubBroker:
    broker = make_broker(settings, stub=True, mutex=lambda: mutex)
    assert isinstance(broker, StubBroker)
    return broker


@pytest.fixture
def no_broker_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: no broker was made or set, and none of this test's stays."""
    monkeypatch.delitem(vars(lifelogger.broker), "broker", raising=False)
    monkeypatch.setattr(dramatiq.broker, "global_broker", None)


@contextmanager
def running(broker: dramatiq.Broker) -> Iterator[dramatiq.Worker]:
    worker = dramatiq.Worker(broker, worker_threads=2, worker_timeout=50)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


def test_it_is_on_the_redis_of_the_settings_under_their_prefix(
    settings: Settings, client: redis.Redis, mutex: Mutex
) -> None:
    broker = make_broker(settings, mutex=lambda: mutex)
    assert isinstance(broker, RedisBroker)
    seen = []

    @dramatiq.actor(broker=broker, mutex=lambda user: user)
    def work(user: str) -> None:
        seen.append((user, client.exists("mine:lock:ann")))

    work.send("ann")
    assert client.llen("mine:default") == 1
    with running(broker):
        broker.join("default", timeout=10_000)

    assert seen == [("ann", 1)]
    assert all(key.startswith(b"mine:") for key in client.scan_iter())


def test_both_kinds_have_the_same_middleware_and_the_lock_comes_last(
    settings: Settings, stub: StubBroker
) -> None:
    kinds = [type(each) for each in make_broker(settings).middleware]
    assert kinds == [type(each) for each in stub.middleware]
    assert kinds[-1] is MutexMiddleware
    assert CurrentMessage in kinds
    assert "Prometheus" not in [kind.__name__ for kind in kinds]
    assert {"mutex", "periodic", "max_retries", "time_limit"} <= stub.actor_options


def test_the_module_makes_one_on_first_use(
    no_broker_yet: None, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    from lifelogger.broker import broker

    assert isinstance(broker, RedisBroker)
    assert lifelogger.broker.broker is broker
    assert dramatiq.get_broker() is broker, "`dramatiq actors` looks there"
    assert import_broker("lifelogger.broker:broker")[1] is broker
    with pytest.raises(AttributeError, match="brokr"):
        _ = lifelogger.broker.brokr


def test_a_hosts_own_broker_is_left_alone(no_broker_yet: None, settings: Settings) -> None:
    host = StubBroker()
    dramatiq.set_broker(host)

    assert isinstance(lifelogger.broker.broker, RedisBroker)
    assert dramatiq.get_broker() is host


def test_the_environment_asks_for_a_stub(
    no_broker_yet: None, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    monkeypatch.setenv("LIFELOGGER_BROKER", "stubb")
    with pytest.raises(SettingsError, match="LIFELOGGER_BROKER = 'stubb': must be redis"):
        _ = lifelogger.broker.broker
    monkeypatch.setenv("LIFELOGGER_BROKER", "stub")
    assert isinstance(lifelogger.broker.broker, StubBroker)


def waiting(client: redis.Redis) -> int:
    """How many connections wait in Redis for a message."""
    return sum(each["cmd"] == "blmove" for each in client.client_list())


def test_idle_consumers_wait_in_redis_and_each_message_goes_to_one_in_its_order(
    settings: Settings, client: redis.Redis
) -> None:
    broker = make_broker(settings)
    found: list[tuple[int, int]] = []
    wanted = 6

    @dramatiq.actor(broker=broker)
    def work(number: int) -> None:
        raise AssertionError("no worker runs")

    def consume(who: int) -> None:
        consumer = broker.consume("default", prefetch=wanted, timeout=1000)
        while len(found) < wanted:
            if (message := next(consumer)) is not None:
                found.append((message.args[0], who))
                consumer.ack(message)

    threads = [threading.Thread(target=consume, args=[who]) for who in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: waiting(client) == 3, "all of them to wait")
    for number in range(wanted):
        work.send(number)
    for thread in threads:
        thread.join()

    assert sorted(number for number, _ in found) == list(range(wanted))
    for who in range(3):
        mine = [number for number, whose in found if whose == who]
        assert mine == sorted(mine)
    assert not client.exists("mine:default")


def test_waiting_leaves_a_queue_as_it_is(settings: Settings, client: redis.Redis) -> None:
    broker = make_broker(settings)
    consumer = broker.consume("default", prefetch=1, timeout=1000)
    assert next(consumer) is None
    client.rpush("mine:default", "a", "b")
    client.hset("mine:default.msgs", "a", dramatiq.Message("default", "work", (), {}, {}).encode())

    assert next(consumer) is not None
    assert client.lrange("mine:default", 0, -1) == [b"b"]


def test_a_redis_that_goes_away_meanwhile_ends_the_wait_as_dramatiq_expects_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = make_broker(settings)
    assert isinstance(broker, RedisBroker)
    consumer = broker.consume("default", timeout=1000)
    assert next(consumer) is None

    def away(*_: object) -> None:
        raise redis.ConnectionError("gone")

    monkeypatch.setattr(broker.client, "blmove", away)
    with pytest.raises(dramatiq.BrokerConnectionError, match="gone"):
        next(consumer)


def test_a_wait_ends_before_redis_would_be_taken_for_dead(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = make_broker(settings)
    assert isinstance(broker, RedisBroker)
    asked: list[float] = []
    monkeypatch.setattr(broker.client, "blmove", lambda source, target, seconds, *_: asked.append(seconds))

    for timeout in (1000, 60_000):  # of the environment variable dramatiq_worker_timeout
        consumer = broker.consume("default", timeout=timeout)
        assert next(consumer) is next(consumer) is None

    assert asked == [1.0, LONGEST_WAIT_SECONDS]
    assert broker.client.connection_pool.connection_kwargs["socket_timeout"] > LONGEST_WAIT_SECONDS
    assert dramatiq.Worker(broker).queue_prefetch == 2 * 8


@pytest.mark.parametrize(("minutes_late", "fires"), [(13, 1), (15, 0)])
def test_a_tick_may_be_late_but_not_as_late_as_the_next(
    stub: StubBroker, caplog: pytest.LogCaptureFixture, minutes_late: int, fires: int
) -> None:
    runs = []

    @dramatiq.actor(broker=stub, periodic="a cron, for Periodiq's scheduler only")
    def tick() -> None:
        runs.append(1)

    with running(stub):
        scheduled_at = datetime.now(UTC) - timedelta(minutes=minutes_late)
        tick.send_with_options(scheduled_at=scheduled_at.isoformat())
        stub.join("default", timeout=10_000)

    assert len(runs) == fires
    assert "was skipped" not in caplog.text


class Reluctant(dramatiq.Middleware):
    def before_process_message(self, broker: dramatiq.Broker, message: MessageProxy) -> None:
        raise SkipMessage("not today")


def test_only_everyday_skips_are_quiet(
    stub: StubBroker, mutex: Mutex, caplog: pytest.LogCaptureFixture
) -> None:
    @dramatiq.actor(broker=stub, mutex=lambda: "a")
    def work() -> None:
        raise AssertionError("it is locked")

    caplog.set_level(logging.INFO)
    with mutex.hold("a"), running(stub):
        work.send()
        stub.join("default", timeout=10_000)
    assert mutex.skips() == {"work": 1}
    assert "was skipped" not in caplog.text

    stub.add_middleware(Reluctant())
    with running(stub):
        work.send()
        stub.join("default", timeout=10_000)
    assert "Message work() was skipped." in caplog.text


@pytest.mark.slow
def test_the_real_commands_find_it(settings: Settings, client: redis.Redis) -> None:
    """`periodiq` by the broker's name sends a tick, `dramatiq` by the module of its actors runs it."""
    clock = scheduler("lifelogger.broker:broker", "tests.broker_actors")
    with clock, worker("tests.broker_actors") as command:
        command.wait_until(lambda: client.llen("ticks"), "the tick to run")
        assert command.stop() == 0


def test_a_workers_connections_have_a_name(settings: Settings, client: redis.Redis) -> None:
    """By it one sees which workers there are: `lifelogger doctor` counts them."""
    broker = make_broker(settings)
    broker.declare_queue("default")
    with running(broker):
        wait_until(lambda: any(is_worker(each) for each in client.client_list()), "a connection with a name")


def is_worker(connection: dict[str, str]) -> bool:
    return connection["name"].startswith(f"{WORKER_NAME}:")
