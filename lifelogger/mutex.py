"""One at a time: a lock in Redis that any actor can ask for, and that anything else can hold too.

    @dramatiq.actor(mutex=lambda user_id: f"sync:{user_id}")
    def sync_user_data(user_id): ...

A message whose lock is taken is skipped and counted. A lock carries its owner's random token and expires
after `ttl` seconds; one thread per process renews what is held, so a lock outlives its owner's process by
`ttl` at most. Renewal and release compare the token first, so nobody touches another owner's lock.

**Fence your writes.** No lock in Redis can promise that its owner still has it: a process may be paused
between the check and the write, and Redis may forget. So whoever writes under a lock does two things. It
takes a number of its own in the database when it begins, which a later owner raises, and writes only while
that number stands: this is what keeps stale writes out. And it calls `Lock.check` before each write: this
costs no round trip and stops the stale owner early.

This module knows nothing of what the locks are for.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import dramatiq
import redis
from dramatiq.broker import MessageProxy
from dramatiq.middleware import MiddlewareError, SkipMessage

from lifelogger.errors import LifeloggerError, LockLost, Unavailable

log = logging.getLogger(__name__)

# The second answer is for our own attempt, sent again by the client after its reply was lost.
TAKE = """
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 1 end
if redis.call('GET', KEYS[1]) == ARGV[1] then return 1 end
return 0
"""
RENEW = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 0
"""
RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""


class Locked(LifeloggerError):
    """Somebody else holds the lock `key` now."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key} is locked by somebody else")
        self.key = key


class CannotLock(LifeloggerError, MiddlewareError):
    """Whether the lock is free could not be found out, so the actor was not run.

    A `MiddlewareError`, because after any other error in a hook Dramatiq runs the actor all the same; no
    `SkipMessage`, because the message is not superfluous: the actor's own retry policy decides.
    """


class Taken(SkipMessage):
    """The message was skipped: another one with the same lock is running."""


class Lock:
    """One key, owned by the thread that acquired it until it is released or lost. Made by `Mutex`."""

    def __init__(self, mutex: Mutex, key: str, token: str, deadline: float) -> None:
        self.key = key
        self.token = token
        self.deadline = deadline
        """When it expires unless renewed before, by the clock of its mutex: never later than in Redis."""
        self.owner = threading.current_thread()
        self.released = False
        self.taken_away = False
        self._mutex = mutex

    @property
    def lost(self) -> bool:
        """Redis said that it is no longer ours, or nobody could renew it in time."""
        return self.taken_away or self._mutex.clock() >= self.deadline

    def check(self) -> None:
        """Raise `LockLost` unless this lock is still owned, as far as this process knows. Asks nobody."""
        if self.released or self.lost:
            raise LockLost(f"the lock {self.key} is no longer ours")

    def release(self) -> None:
        """Free the key if it is still ours. Never raises: what cannot be freed now expires."""
        self._mutex.release(self)


class Mutex:
    """The locks of one process.

    `ttl` is in seconds: how long a lock outlives an owner that died. It must be several times longer than
    `client` waits for Redis. What is held is renewed every `renew_every` seconds (a third of `ttl` if not
    given), and more often while that fails. The keys in Redis are `{prefix}:lock:{key}` and, for counts,
    `{prefix}:skips`.
    """

    def __init__(
        self,
        client: redis.Redis,
        *,
        ttl: float = 60,
        prefix: str = "lifelogger",
        clock: Callable[[], float] = time.monotonic,
        renew_every: float | None = None,
    ) -> None:
        self.ttl = ttl
        self.clock = clock
        self._client = client
        self._prefix = prefix
        self._renew_every = ttl / 3 if renew_every is None else renew_every
        self._take = client.register_script(TAKE)
        self._renew = client.register_script(RENEW)
        self._release = client.register_script(RELEASE)
        self._guard = threading.Lock()  # of the two below
        self._held: dict[str, Lock] = {}  # by token: a lost lock and its successor may have one key
        self._renewer: threading.Thread | None = None
        _mutexes.add(self)

    def acquire(self, key: str) -> Lock | None:
        """Take the lock, or return None at once if somebody, this thread included, has it already.

        Raises `Unavailable` when Redis does not answer; if it did take the lock, the lock expires.
        """
        token = secrets.token_hex(16)
        started = self.clock()  # before Redis begins to count, so that our time runs out first
        try:
            won = self._take(keys=[self._name(key)], args=[token, self._milliseconds])
        except redis.RedisError as error:
            raise _unavailable(error) from None
        if not won:
            return None
        lock = Lock(self, key, token, started + self.ttl)
        with self._guard:
            self._held[token] = lock
            if self._renewer is None or not self._renewer.is_alive():
                self._renewer = threading.Thread(target=self._keep_renewing, name="mutex", daemon=True)
                self._renewer.start()
        return lock

    @contextmanager
    def hold(self, key: str) -> Iterator[Lock]:
        """Yield the lock that this thread holds already, or a fresh one that is released at the end.

        Raises `Locked` when somebody else has it, `LockLost` when this thread had it and lost it, and
        `Unavailable` when Redis does not answer.
        """
        held = next((lock for lock in self._locks_here() if lock.key == key), None)
        if held is not None:
            held.check()
            yield held
            return
        fresh = self.acquire(key)
        if fresh is None:
            raise Locked(key)
        try:
            yield fresh
        finally:
            fresh.release()

    def release(self, lock: Lock) -> None:
        """What `Lock.release` does."""
        if lock.token not in self._held:
            return  # released before, or the parent's: a forked child has a copy of the object, not the lock
        lock.released = True  # first: whatever interrupts us here, nobody renews it any more
        try:
            freed = self._release(keys=[self._name(lock.key)], args=[lock.token])
        except redis.RedisError as error:
            log.warning("The lock %s was not freed and expires in %g s: %s", lock.key, self.ttl, error)
        else:
            if not freed:
                log.warning("The lock %s was lost before it was released.", lock.key)
        with self._guard:
            self._held.pop(lock.token, None)

    def release_here(self) -> None:
        """Release whatever this thread holds."""
        for lock in self._locks_here():
            lock.release()

    def renew_once(self) -> None:
        """Give every lock held its full time again, in one round trip; what is no longer ours is lost.

        Raises `Unavailable` when Redis does not answer: then every deadline stays as it was. The renewing
        thread calls this; a test may.
        """
        with self._guard:
            held = [lock for lock in self._held.values() if not lock.released]
        for orphan in [lock for lock in held if not lock.owner.is_alive()]:
            # Its thread died between its work and our hook; renewed, it would be held as long as we live.
            log.warning("The lock %s is released: its thread has ended.", orphan.key)
            orphan.release()
            held.remove(orphan)
        if not held:
            return
        started = self.clock()
        pipeline = self._client.pipeline(transaction=False)
        for lock in held:
            self._renew(keys=[self._name(lock.key)], args=[lock.token, self._milliseconds], client=pipeline)
        try:
            answers = pipeline.execute()
        except redis.RedisError as error:
            raise _unavailable(error) from None
        for lock, ours in zip(held, answers, strict=True):
            if ours:
                lock.deadline = started + self.ttl
            elif not lock.released:
                lock.taken_away = True
                log.warning("The lock %s is lost: it expired, or Redis forgot it.", lock.key)

    def count_skip(self, name: str) -> None:
        """Count a message of the actor `name` that found its lock taken. Never raises."""
        try:
            self._client.hincrby(self._skips, name, 1)
        except redis.RedisError as error:
            log.warning("A skip of %s was not counted: %s", name, error)

    def skips(self) -> dict[str, int]:
        """How many messages of each actor were skipped since Redis is there, on all machines together.

        Raises `Unavailable` when Redis does not answer.
        """
        try:
            counts: Any = self._client.hgetall(self._skips)
        except redis.RedisError as error:
            raise _unavailable(error) from None
        return {
            name.decode() if isinstance(name, bytes) else name: int(count) for name, count in counts.items()
        }

    def _keep_renewing(self) -> None:
        """Renew until nothing is held; the next lock starts another thread."""
        pause = self._renew_every
        while True:
            time.sleep(pause)
            try:
                self.renew_once()
                pause = self._renew_every
            except Unavailable as trouble:
                pause = self._renew_every / 4  # there may be just enough time left
                log.warning("Locks were not renewed, trying again: %s", trouble)
            with self._guard:
                if not self._held:
                    self._renewer = None
                    return

    def _locks_here(self) -> list[Lock]:
        here = threading.current_thread()
        with self._guard:
            return [lock for lock in self._held.values() if lock.owner is here]

    def _forget(self) -> None:
        """In a forked child: the locks are the parent's, and its thread is not here."""
        for lock in self._held.values():
            lock.taken_away = True
        self._guard = threading.Lock()
        self._held = {}
        self._renewer = None

    def _name(self, key: str) -> str:
        return f"{self._prefix}:lock:{key}"

    @property
    def _skips(self) -> str:
        return f"{self._prefix}:skips"

    @property
    def _milliseconds(self) -> int:
        return round(self.ttl * 1000)


def _unavailable(error: redis.RedisError) -> Unavailable:
    return Unavailable(f"Redis, which keeps the locks, does not answer: {error}")


_mutexes: weakref.WeakSet[Mutex] = weakref.WeakSet()


def _forget_locks() -> None:
    for mutex in _mutexes:
        mutex._forget()


os.register_at_fork(after_in_child=_forget_locks)


class MutexMiddleware(dramatiq.Middleware):
    """Runs an actor only under its lock, on every machine together.

    The actor option `mutex` is a callable of the actor's arguments that returns the key, or None for a
    message that needs no lock. Add this middleware last: then what another one skips never takes a lock, and
    the lock is free again before others act on the outcome. `mutex` returns the same one whenever it is
    called, for the first time when a worker boots.

    Which hooks run: `after_process_message` after an actor's return, after whatever it raised (`Shutdown` and
    `TimeLimitExceeded` too) and after an error in a `before` hook; `after_skip_message` after a skip by us or
    by another middleware, wherever it stands. Both release what this thread holds, which is nothing when our
    own hook found the lock taken. Prefetched messages that a shutdown returns to the queue came to no hook.
    """

    def __init__(self, mutex: Callable[[], Mutex]) -> None:
        self._mutex = mutex

    @property
    def mutex(self) -> Mutex:
        return self._mutex()

    @property
    def actor_options(self) -> set[str]:
        return {"mutex"}

    def before_declare_actor(self, broker: dramatiq.Broker, actor: dramatiq.Actor[..., Any]) -> None:
        option = actor.options.get("mutex")
        if option is not None and not callable(option):
            raise CannotLock(f"{actor.actor_name}: the option mutex must be a callable, not {option!r}")

    def before_worker_boot(self, broker: dramatiq.Broker, worker: dramatiq.Worker) -> None:
        self._mutex()  # made before there are threads, which could make two of it

    def before_process_message(self, broker: dramatiq.Broker, message: MessageProxy) -> None:
        option = self._option(broker, message)
        if option is None:
            return
        try:
            key = option(*message.args, **message.kwargs)
            if key is None:
                return
            if not isinstance(key, str):
                raise TypeError(f"the key of its lock must be a string, not {key!r}")
            lock = self.mutex.acquire(key)
        except Exception as error:  # noqa: BLE001 - whatever it is, without this the actor runs unlocked
            reason = f"{type(error).__name__}: {error}"
            raise CannotLock(f"{message.actor_name} was not run: {reason}") from None
        if lock is None:
            log.debug("%s is skipped: somebody else holds %s", message, key)
            self.mutex.count_skip(message.actor_name)
            raise Taken(key)

    def after_process_message(
        self,
        broker: dramatiq.Broker,
        message: MessageProxy,
        *,
        result: Any = None,
        exception: BaseException | None = None,
    ) -> None:
        if self._option(broker, message) is not None:
            self.mutex.release_here()

    def after_skip_message(self, broker: dramatiq.Broker, message: MessageProxy) -> None:
        self.after_process_message(broker, message)

    def _option(self, broker: dramatiq.Broker, message: MessageProxy) -> Callable[..., object] | None:
        option: Callable[..., object] | None = broker.get_actor(message.actor_name).options.get("mutex")
        return option
