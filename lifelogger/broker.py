"""The Dramatiq broker and its middleware, in one place.

    from lifelogger.broker import broker

makes it on first use from the settings, and starts the embedded Redis when none is named. With
`LIFELOGGER_BROKER=stub` in the environment it is a `StubBroker` with the same middleware: messages stay in
this process, and only locks need Redis. Without another one set before, it also becomes Dramatiq's global
broker, so that `dramatiq actors` and `periodiq scheduler` find it; a host's own broker is left alone.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import dramatiq
import redis
from dramatiq.broker import MessageProxy
from dramatiq.brokers.redis import RedisBroker, _RedisConsumer
from dramatiq.brokers.stub import StubBroker
from dramatiq.errors import ConnectionClosed
from dramatiq.middleware import CurrentMessage, SkipMessage, default_middleware
from periodiq import PeriodiqMiddleware

from lifelogger import embedded, redis_url
from lifelogger.checks import checked
from lifelogger.errors import SettingsError
from lifelogger.mutex import Mutex, MutexMiddleware, Taken
from lifelogger.settings import Settings, get_settings

KIND = "LIFELOGGER_BROKER"

SKIP_DELAY_SECONDS = 840
"""A tick picked up later than this is dropped. Periodiq's own 30 s drop ticks whenever workers are busy for
half a minute, or restart; just below the usual 15 minutes, a late tick still fires and hardly meets the next
one. Where ticks come more often, some fire together after an outage: the later ones find nothing due."""

HEARTBEAT_TIMEOUT_MS = 60_000
"""After this silence a worker counts as dead, and its messages go to others. Less would run more messages of
workers that were only paused twice."""

MAINTENANCE_CHANCE = 10_000
"""Of a million fetches, how many look for messages of dead workers. An idle process fetches from each queue
once a second: at Dramatiq's own 1,000 two of them would find such a message after eight minutes, not one.
"""

LONGEST_WAIT_SECONDS = 5.0
"""How long Redis is asked to wait for a message at most: less than we wait for an answer of Redis."""

TIME_LIMIT_MS = 3_600_000
"""For actors that refresh tokens. Dramatiq's ten minutes strike wherever the code is: between a provider's
answer and our commit they would lose a pair that comes only once. Requests have time-outs of their own."""

WORKER_NAME = "lifelogger-worker"
"""How the connections of a worker to Redis begin: `CLIENT LIST` shows them."""

broker: dramatiq.Broker
"""The broker of this process."""

_making = threading.Lock()


def __getattr__(name: str) -> Any:
    if name != "broker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _making:
        if name not in globals():
            globals()[name] = _claim(make_broker(checked(get_settings()), stub=_stub_wanted()))
    return globals()[name]


def make_broker(
    settings: Settings, *, stub: bool = False, mutex: Callable[[], Mutex] | None = None
) -> dramatiq.Broker:
    """A broker on the Redis of `settings`, or one in this process's memory (`stub`).

    `mutex` is asked for when the first lock is needed; by default it is that of this process.
    """
    logging.getLogger("dramatiq.worker.WorkerThread").addFilter(_quiet_skips)
    middleware: list[dramatiq.Middleware] = [each() for each in default_middleware]
    middleware += [
        NamedConnections(),
        Ticks(skip_delay=SKIP_DELAY_SECONDS),
        CurrentMessage(),
        MutexMiddleware(mutex or get_mutex),
    ]
    if stub:
        return StubBroker(middleware=middleware)
    url = embedded.redis_url(settings)
    return Broker(  # type: ignore[no-untyped-call]
        client=redis_url.client(url, timeout=10, connect_timeout=5),
        namespace=settings.redis.prefix,
        heartbeat_timeout=HEARTBEAT_TIMEOUT_MS,
        maintenance_chance=MAINTENANCE_CHANCE,
        middleware=middleware,
    )


class Broker(RedisBroker):
    """Dramatiq's, with a consumer of our own. The prefetch stays at its two messages a thread: one costs a
    third of the throughput.
    """

    @property
    def consumer_class(self) -> type[Consumer]:
        return Consumer


class Consumer(_RedisConsumer):
    """Waits in Redis until there is a message; Dramatiq's looks again and again, and sleeps in between.

    So a message starts at once, and whoever has nothing to do does next to nothing. All who wait are woken;
    one who comes too late sleeps for some milliseconds, as Dramatiq's does after the first of its vain looks.
    """

    def __next__(self) -> MessageProxy | None:
        if self.misses and self.outstanding_message_count < self.prefetch:
            queue = f"{self.broker.namespace}:{self.queue_name}"
            seconds = min(self.timeout / 1000, LONGEST_WAIT_SECONDS)
            try:
                # Takes the first of the list and puts it back where it was: so nothing moves.
                self.broker.client.blmove(queue, queue, seconds, "LEFT", "LEFT")
            except redis.ConnectionError as error:
                raise ConnectionClosed(error) from None  # type: ignore[no-untyped-call]
            self.misses = 0
        return super().__next__()  # type: ignore[no-any-return, no-untyped-call]


def get_mutex() -> Mutex:
    """The locks of this process, as its runtime has them: what an actor's message locked, its code holds."""
    from lifelogger.runtime import runtime  # with the database: who only sends messages does without

    return runtime().mutex


class LateTick(SkipMessage):
    """The message was skipped: it is a tick that came too late."""


class Ticks(PeriodiqMiddleware):  # type: ignore[misc]  # Periodiq has no types
    """Periodiq's middleware, whose skips can be told from those of others."""

    def before_process_message(self, broker: dramatiq.Broker, message: MessageProxy) -> None:
        try:
            super().before_process_message(broker, message)
        except SkipMessage as skip:
            raise LateTick(*skip.args) from None


class NamedConnections(dramatiq.Middleware):
    """Names a worker's connections to Redis, so that one can see which workers there are.

    Dramatiq's heartbeats do not tell: whoever sends a message has one, too.
    """

    def before_worker_boot(self, broker: dramatiq.Broker, worker: dramatiq.Worker) -> None:
        if isinstance(broker, RedisBroker):
            host = re.sub(r"[^\w.-]", "-", socket.gethostname())
            pool = broker.client.connection_pool
            pool.connection_kwargs["client_name"] = f"{WORKER_NAME}:{host}:{os.getpid()}"
            pool.disconnect(inuse_connections=False)  # those without a name


class QuietSkips(logging.Filter):
    """Keeps Dramatiq's warning about each skipped message to the skips that are not everyday business.

    The warning does not say why the message was skipped; it is written while that exception is handled.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return not isinstance(sys.exception(), (Taken, LateTick))


_quiet_skips = QuietSkips()


def _stub_wanted() -> bool:
    kind = os.environ.get(KIND, "")
    if kind not in ("", "redis", "stub"):
        raise SettingsError(f"{KIND} = {kind!r}: must be redis (or empty), or stub")
    return kind == "stub"


def _claim(made: dramatiq.Broker) -> dramatiq.Broker:
    if dramatiq.broker.global_broker is None:
        dramatiq.set_broker(made)
    return made
