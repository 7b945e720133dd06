"""An application of one actor and one tick, for the real commands."""

from __future__ import annotations

import dramatiq
import redis
from periodiq import cron

from lifelogger.broker import broker
from lifelogger.settings import get_settings


@dramatiq.actor(broker=broker, periodic=cron("* * * * *"))
def tick() -> None:
    """Tell that it ran."""
    redis.Redis.from_url(get_settings().redis.url).rpush("ticks", "ran")
