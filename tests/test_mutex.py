"""Promises 1 and 2: one at a time, however a message ends; a skip is counted and takes nothing away."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import dramatiq
import pytest
import redis
from dramatiq.broker import MessageProxy
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import MiddlewareError, SkipMessage, TimeLimitExceeded, raise_thread_exception

from lifelogger.errors import LockLost, Unavailable
from lifelogger.mutex import CannotLock, Locked, Mutex, MutexMiddleware
from lifelogger.settings import Settings
from tests.processes import worker
from tests.servers import RedisServer, wait_until

TTL = 60.0
NEVER = 1e6  # seconds between renewals, where a test renews by itself


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def mutex(client: redis.Redis, clock: Clock) -> Mutex:
    return Mutex(client, ttl=TTL, clock=clock, renew_every=NEVER)


@pytest.fixture
def other(client: redis.Redis) -> Mutex:
    """Another process, as far as Redis can tell."""
    return Mutex(client, ttl=TTL, renew_every=NEVER)


def owner(client: redis.Redis, key: str) -> Any:
    return client.get(f"lifelogger:lock:{key}")


# The lock -------------------------------------------------------------------------------------------


def test_only_one_has_it(mutex: Mutex, other: Mutex) -> None:
    lock = mutex.acquire("a")
    assert lock is not None
    assert other.acquire("a") is None
    assert mutex.acquire("a") is None
    assert other.acquire("b") is not None

    lock.release()

    assert other.acquire("a") is not None


def test_it_expires_in_redis_with_its_ttl(mutex: Mutex, client: redis.Redis) -> None:
    lock = mutex.acquire("a")
    assert lock is not None
    assert owner(client, "a") == lock.token.encode()
    assert 0 < client.pttl("lifelogger:lock:a") <= TTL * 1000


def test_only_the_owner_releases(mutex: Mutex, other: Mutex, client: redis.Redis) -> None:
    mine = mutex.acquire("a")
    assert mine is not None
    client.delete("lifelogger:lock:a")  # it expired
    theirs = other.acquire("a")
    assert theirs is not None

    mine.release()
    mine.release()

    assert owner(client, "a") == theirs.token.encode()


def test_an_attempt_that_was_sent_twice_is_not_somebody_else(mutex: Mutex, client: redis.Redis) -> None:
    assert mutex._take(keys=["k"], args=["me", 1000]) == 1
    assert mutex._take(keys=["k"], args=["me", 1000]) == 1
    assert mutex._take(keys=["k"], args=["you", 1000]) == 0


def test_hold_takes_and_releases(mutex: Mutex, other: Mutex) -> None:
    with mutex.hold("a") as lock:
        lock.check()
        with pytest.raises(Locked) as refused, other.hold("a"):
            pass
        assert refused.value.key == "a"
    with pytest.raises(LockLost):
        lock.check()
    with pytest.raises(ZeroDivisionError), other.hold("a"):
        1 / 0  # noqa: B018
    assert mutex.acquire("a") is not None


def test_hold_yields_what_the_thread_has_already(mutex: Mutex, client: redis.Redis) -> None:
    lock = mutex.acquire("a")
    with mutex.hold("a") as held:
        assert held is lock
    assert owner(client, "a") is not None, "released by whoever took it, not before"

    refused = []

    def elsewhere() -> None:
        with pytest.raises(Locked), mutex.hold("a"):
            pass
        refused.append(True)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert refused


def test_check_raises_when_the_time_is_over_and_asks_nobody(
    mutex: Mutex, clock: Clock, redis_server: RedisServer
) -> None:
    lock = mutex.acquire("a")
    assert lock is not None
    redis_server.stop()
    clock.now += TTL - 1
    lock.check()
    clock.now += 1
    assert lock.lost
    with pytest.raises(LockLost):
        lock.check()


def test_a_renewal_gives_the_full_time_again(mutex: Mutex, clock: Clock, client: redis.Redis) -> None:
    first, second = mutex.acquire("a"), mutex.acquire("b")
    assert first is not None
    assert second is not None
    client.pexpire("lifelogger:lock:a", 5000)
    clock.now += 40

    mutex.renew_once()

    clock.now += 40
    first.check()
    second.check()
    assert client.pttl("lifelogger:lock:a") > 5000


@pytest.mark.parametrize("taken_over", [True, False], ids=["somebody else has it", "Redis forgot it"])
def test_a_renewal_finds_out_that_it_is_lost(
    mutex: Mutex, other: Mutex, client: redis.Redis, taken_over: bool
) -> None:
    lock, kept = mutex.acquire("a"), mutex.acquire("b")
    assert lock is not None
    assert kept is not None
    client.delete("lifelogger:lock:a")
    theirs = other.acquire("a") if taken_over else None

    mutex.renew_once()

    with pytest.raises(LockLost):
        lock.check()
    with pytest.raises(LockLost), mutex.hold("a"):
        pass
    kept.check()
    assert owner(client, "a") == (theirs.token.encode() if theirs else None)


def test_without_redis_it_lasts_until_its_deadline(
    mutex: Mutex, clock: Clock, redis_server: RedisServer
) -> None:
    lock = mutex.acquire("a")
    assert lock is not None
    redis_server.stop()
    with pytest.raises(Unavailable):
        mutex.renew_once()
    lock.check()
    clock.now += TTL
    with pytest.raises(LockLost):
        lock.check()
    with pytest.raises(Unavailable):
        mutex.acquire("b")
    with pytest.raises(Unavailable):
        mutex.skips()
    lock.release()  # cannot be freed now, and says so in the log only


def test_one_thread_renews_and_ends_when_nothing_is_held(client: redis.Redis) -> None:
    mutex = Mutex(client, ttl=TTL, renew_every=0.01)
    first, second = mutex.acquire("a"), mutex.acquire("b")
    assert first is not None
    assert second is not None
    renewer = mutex._renewer
    assert renewer is not None
    deadlines = first.deadline, second.deadline

    wait_until(lambda: first.deadline > deadlines[0] and second.deadline > deadlines[1], "two renewals")

    assert mutex._renewer is renewer
    first.release()
    second.release()
    wait_until(lambda: not renewer.is_alive(), "the end of the renewing thread")
    with mutex.hold("a") as lock:
        again = lock.deadline
        wait_until(lambda: lock.deadline > again, "a renewal by a new thread")


def test_renewal_goes_on_after_redis_came_back(client: redis.Redis, redis_server: RedisServer) -> None:
    mutex = Mutex(client, ttl=TTL, renew_every=0.01)
    lock = mutex.acquire("a")
    assert lock is not None
    renewer = mutex._renewer
    assert renewer is not None
    redis_server.stop()
    redis_server.start()  # empty: it has forgotten the lock

    wait_until(lambda: lock.lost, "the news that the lock is lost")

    assert renewer.is_alive()
    lock.release()


def test_the_lock_of_a_thread_that_died_is_not_renewed_for_ever(mutex: Mutex, client: redis.Redis) -> None:
    thread = threading.Thread(target=mutex.acquire, args=("a",))
    thread.start()
    thread.join()
    assert owner(client, "a") is not None

    mutex.renew_once()

    assert owner(client, "a") is None


def test_a_forked_child_has_none_of_its_parents_locks(client: redis.Redis) -> None:
    mutex = Mutex(client, ttl=TTL, renew_every=0.01)
    lock = mutex.acquire("a")
    assert lock is not None
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # whatever happens in here, no pytest goes on
        try:
            lock.release()
            own = mutex.acquire("b")
            assert own is not None
            deadline = own.deadline
            wait_until(lambda: own.deadline > deadline, "a renewal in the child")
            os.write(write, b"lost" if lock.lost else b"kept")
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        assert answer.read() == b"lost"
    os.waitpid(child, 0)
    lock.check()
    assert owner(client, "a") == lock.token.encode()
    assert owner(client, "b") is not None, "a process that ends without release leaves it to expiry"
    lock.release()


# The middleware -------------------------------------------------------------------------------------


@pytest.fixture
def broker(mutex: Mutex) -> StubBroker:
    broker = StubBroker()
    broker.add_middleware(MutexMiddleware(lambda: mutex))
    return broker


@contextmanager
def running(broker: StubBroker, threads: int = 2) -> Iterator[dramatiq.Worker]:
    worker = dramatiq.Worker(broker, worker_timeout=10, worker_threads=threads)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


class Gate:
    """An actor's body: tells that it is reached, then waits until it is opened, or for an exception."""

    def __init__(self) -> None:
        self.thread = 0
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self) -> None:
        self.thread = threading.get_ident()
        self.reached.set()
        while not self.opened.wait(0.01):  # in short steps: an exception is raised between two of them
            pass


def test_an_actor_runs_under_its_lock_and_can_ask_for_it(
    broker: StubBroker, mutex: Mutex, client: redis.Redis
) -> None:
    seen = []

    @dramatiq.actor(broker=broker, mutex=lambda user, *, part="all": f"{user}:{part}")
    def work(user: str, *, part: str = "all") -> None:
        with mutex.hold(f"{user}:{part}") as lock:
            lock.check()
            seen.append((lock.token.encode(), owner(client, f"{user}:{part}")))

    with running(broker):
        work.send("ann")
        work.send("ann", part="days")
        broker.join("default", timeout=10_000)

    assert len(seen) == 2
    assert all(mine == stored for mine, stored in seen)
    assert client.keys("lifelogger:lock:*") == []


def test_a_message_that_finds_it_taken_is_skipped_and_counted(
    broker: StubBroker, mutex: Mutex, other: Mutex, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    runs = []

    @dramatiq.actor(broker=broker, mutex=lambda user: user)
    def work(user: str) -> None:
        runs.append(user)

    theirs = other.acquire("ann")
    assert theirs is not None
    with running(broker), caplog.at_level(logging.DEBUG, "lifelogger"):
        for user in ("ann", "bob", "ann"):
            work.send(user)
        broker.join("default", timeout=10_000)

    assert runs == ["bob"]
    assert mutex.skips() == other.skips() == {"work": 2}
    assert owner(client, "ann") == theirs.token.encode(), "a skipped message frees nothing"
    assert broker.dead_letters == []
    levels = [record.levelno for record in caplog.records if "is skipped" in record.message]
    assert levels == [logging.DEBUG] * 2


def test_a_skip_in_the_same_process_does_not_free_the_running_one(
    broker: StubBroker, mutex: Mutex, client: redis.Redis
) -> None:
    gate = Gate()

    @dramatiq.actor(broker=broker, mutex=lambda: "a")
    def work() -> None:
        gate()

    with running(broker):
        work.send()
        assert gate.reached.wait(10)
        token = owner(client, "a")
        for _ in range(5):
            work.send()
        wait_until(lambda: mutex.skips() == {"work": 5}, "five skips")
        assert owner(client, "a") == token
        gate.opened.set()
        broker.join("default", timeout=10_000)

    assert owner(client, "a") is None


def test_no_option_and_no_key_mean_no_lock(broker: StubBroker, client: redis.Redis, other: Mutex) -> None:
    seen: list[list[Any]] = []

    @dramatiq.actor(broker=broker)
    def free() -> None:
        seen.append(client.keys("lifelogger:lock:*"))

    @dramatiq.actor(broker=broker, mutex=lambda user: user)
    def work(user: str | None) -> None:
        seen.append(client.keys("lifelogger:lock:*"))

    with running(broker):
        free.send()
        work.send(None)
        broker.join("default", timeout=10_000)

    assert seen == [[], []]


class Behind(dramatiq.Middleware):
    """A middleware that comes after ours and spoils the message."""

    def __init__(self, error: Exception, client: redis.Redis) -> None:
        self.error = error
        self.client = client
        self.locked: list[bool] = []

    def before_process_message(self, broker: dramatiq.Broker, message: MessageProxy) -> None:
        self.locked.append(owner(self.client, "a") is not None)
        raise self.error


@pytest.mark.parametrize("error", [SkipMessage("not today"), MiddlewareError("broken")])
def test_it_is_released_when_a_later_middleware_stops_the_message(
    broker: StubBroker, client: redis.Redis, error: Exception
) -> None:
    behind = Behind(error, client)
    broker.add_middleware(behind)
    runs = []

    @dramatiq.actor(broker=broker, mutex=lambda: "a", max_retries=0)
    def work() -> None:
        runs.append(1)

    with running(broker):
        work.send()
        broker.join("default", timeout=10_000, fail_fast=False)

    assert runs == []
    assert behind.locked == [True]
    assert owner(client, "a") is None


def test_it_is_released_when_the_actor_fails_and_taken_again_for_the_retry(
    broker: StubBroker, client: redis.Redis
) -> None:
    tokens = []

    @dramatiq.actor(broker=broker, mutex=lambda: "a", max_retries=1, min_backoff=1, max_backoff=2)
    def work() -> None:
        tokens.append(owner(client, "a"))
        if len(tokens) == 1:
            raise ValueError("once")

    with running(broker):
        work.send()
        broker.join("default", timeout=10_000)

    assert None not in tokens
    assert len(set(tokens)) == 2
    assert owner(client, "a") is None


def test_it_is_released_when_the_time_limit_hits(broker: StubBroker, client: redis.Redis) -> None:
    gate = Gate()

    @dramatiq.actor(broker=broker, mutex=lambda: "a", max_retries=0)
    def work() -> None:
        gate()

    with running(broker):
        work.send()
        assert gate.reached.wait(10)
        assert owner(client, "a") is not None
        raise_thread_exception(gate.thread, TimeLimitExceeded)
        broker.join("default", timeout=10_000, fail_fast=False)

    assert len(broker.dead_letters) == 1
    assert owner(client, "a") is None


def test_it_is_released_when_the_worker_shuts_down(broker: StubBroker, client: redis.Redis) -> None:
    gate = Gate()

    @dramatiq.actor(broker=broker, mutex=lambda key: key, max_retries=0, notify_shutdown=True)
    def work(key: str) -> None:
        gate()

    with running(broker, threads=1):
        work.send("a")
        work.send("b")  # is prefetched, and comes to no hook
        assert gate.reached.wait(10)
        assert client.keys("lifelogger:lock:*") == [b"lifelogger:lock:a"]

    assert not gate.opened.is_set(), "the shutdown ended it"
    assert client.keys("lifelogger:lock:*") == []


def test_a_release_that_was_interrupted_is_done_by_the_next_hook(
    mutex: Mutex, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = mutex.acquire("a")
    assert lock is not None

    def interrupted(**_: object) -> None:
        raise TimeLimitExceeded

    with monkeypatch.context() as patch:
        patch.setattr(mutex, "_release", interrupted)
        with pytest.raises(TimeLimitExceeded):
            mutex.release_here()
    mutex.release_here()
    assert owner(client, "a") is None


def test_without_redis_the_actor_does_not_run(broker: StubBroker, redis_server: RedisServer) -> None:
    """Fail closed: the message fails under the actor's own retry policy, here at once."""
    runs = []

    @dramatiq.actor(broker=broker, mutex=lambda: "a", max_retries=0)
    def work() -> None:
        runs.append(1)

    redis_server.stop()
    with running(broker):
        work.send()
        with pytest.raises(CannotLock, match="work was not run: Unavailable"):
            broker.join("default", timeout=10_000)

    assert runs == []
    assert len(broker.dead_letters) == 1


def broken_key() -> str:
    raise KeyError("user")


def test_the_mutex_is_made_before_there_are_threads_to_make_two(mutex: Mutex) -> None:
    made_in = []

    def make() -> Mutex:
        made_in.append(threading.current_thread())
        return mutex

    broker = StubBroker()
    broker.add_middleware(MutexMiddleware(make))
    with running(broker):
        assert made_in == [threading.current_thread()]


def broken_mutex() -> Mutex:
    raise RuntimeError("no settings")


@pytest.mark.parametrize(
    ("option", "supplier", "reason"),
    [
        (broken_key, None, "KeyError: 'user'"),
        (lambda user: user, None, "missing 1 required positional argument"),
        (lambda: 42, None, "must be a string, not 42"),
        (lambda: "a", broken_mutex, "RuntimeError: no settings"),
    ],
)
def test_whatever_goes_wrong_before_the_lock_the_actor_does_not_run(
    mutex: Mutex, option: Callable[..., Any], supplier: Callable[[], Mutex] | None, reason: str
) -> None:
    broker = StubBroker()
    broker.add_middleware(MutexMiddleware(supplier or (lambda: mutex)))
    runs = []

    @dramatiq.actor(broker=broker, mutex=option, max_retries=0)
    def work() -> None:
        runs.append(1)

    with running(broker):
        work.send()
        with pytest.raises(CannotLock, match=reason):
            broker.join("default", timeout=10_000)
    assert runs == []


def test_an_option_that_is_no_callable_is_refused_at_once(broker: StubBroker) -> None:
    with pytest.raises(CannotLock, match="work: the option mutex must be a callable, not 'sync'"):

        @dramatiq.actor(broker=broker, mutex="sync")
        def work() -> None: ...


# Real workers ---------------------------------------------------------------------------------------


@pytest.fixture
def lock_seconds(settings_env: Callable[..., Settings], redis_url: str) -> int:
    """Settings for real workers, with the shortest lock there is."""
    return settings_env(redis={"url": redis_url}, sync={"lock_seconds": 3}).sync.lock_seconds


def send(client: redis.Redis, key: str = "a", times: int = 1) -> None:
    """Send as a host does, by name: this process has no broker of the application."""
    broker = RedisBroker(client=client, namespace="lifelogger")
    for _ in range(times):
        broker.enqueue(
            dramatiq.Message(queue_name="default", actor_name="guarded", args=(key,), kwargs={}, options={})
        )


def told(client: redis.Redis, what: str) -> list[int]:
    answers: Any = client.lrange(what, 0, -1)
    return [int(pid) for pid in answers]


def skips(client: redis.Redis) -> dict[str, int]:
    return Mutex(client).skips()


@pytest.mark.usefixtures("lock_seconds")
def test_ten_messages_in_two_worker_processes_run_once(client: redis.Redis) -> None:
    """Promises 1 and 2: one runs, nine are skipped and counted, wherever they come up."""
    with worker("tests.lock_actors", processes=2) as command:
        send(client, times=10)
        command.wait_until(lambda: skips(client) == {"guarded": 9}, "nine skips")
        command.wait_until(lambda: told(client, "begun"), "the tenth to run")
        (pid,) = told(client, "begun")
        client.rpush(f"gate:{pid}", "go")
        command.wait_until(lambda: owner(client, "a") is None, "the release")
        log = command.log()

    assert told(client, "begun") == told(client, "written") == [pid]
    assert "was skipped" not in log, "a skip is everyday business"


@pytest.mark.usefixtures("lock_seconds")
@pytest.mark.slow
def test_a_killed_worker_frees_its_lock_by_expiry(client: redis.Redis) -> None:
    with worker("tests.lock_actors") as command:
        send(client)
        command.wait_until(lambda: told(client, "begun"), "the first run")
        assert 0 < client.pttl("lifelogger:lock:a") <= 3000
        command.kill()

    successor = worker("tests.lock_actors")
    successor.start()
    wait_until(lambda: owner(client, "a") is None, "the expiry")
    with successor:
        send(client)
        successor.wait_until(lambda: len(told(client, "begun")) == 2, "the second run")


@pytest.mark.usefixtures("lock_seconds")
@pytest.mark.slow
def test_a_paused_worker_that_lost_its_lock_stops_before_its_next_write(client: redis.Redis) -> None:
    with worker("tests.lock_actors", processes=2) as command:
        send(client)
        command.wait_until(lambda: told(client, "begun"), "the first run")
        (paused,) = told(client, "begun")
        os.kill(paused, signal.SIGSTOP)
        command.wait_until(lambda: owner(client, "a") is None, "the expiry")

        send(client)
        command.wait_until(lambda: len(told(client, "begun")) == 2, "another worker to take over")
        _, successor = told(client, "begun")
        token = owner(client, "a")
        client.rpush(f"gate:{paused}", "go")
        os.kill(paused, signal.SIGCONT)
        command.wait_until(lambda: told(client, "stopped"), "the paused worker to stop")

        assert owner(client, "a") == token, "what it releases is not the other's"
        client.rpush(f"gate:{successor}", "go")
        command.wait_until(lambda: told(client, "written"), "the other one's write")

    assert told(client, "stopped") == [paused]
    assert told(client, "written") == [successor]
