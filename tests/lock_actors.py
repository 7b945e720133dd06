"""An actor under a lock, for real workers: Redis lists tell it what to do, and us what it did."""

from __future__ import annotations

import os

import dramatiq
import redis

from lifelogger.broker import broker, get_mutex
from lifelogger.errors import LockLost
from lifelogger.settings import get_settings


@dramatiq.actor(broker=broker, mutex=lambda key: key, max_retries=0)
def guarded(key: str) -> None:
    """Say that it has begun, wait for its gate, and write unless the lock was lost meanwhile."""
    me = os.getpid()
    client = redis.Redis.from_url(get_settings().redis.url, socket_timeout=60)
    with get_mutex().hold(key) as lock:
        client.rpush("begun", me)
        client.blpop([f"gate:{me}"], timeout=30)
        try:
            lock.check()
        except LockLost:
            client.rpush("stopped", me)
            raise
        client.rpush("written", me)
