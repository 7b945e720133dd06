"""Dramatiq without lifelogger: the same function as Celery's, sent by another queue.

dramatiq dramatiq_app --processes 2 --threads 8
"""

from __future__ import annotations

import dramatiq
import orm
import plain
from dramatiq.brokers.redis import RedisBroker

dramatiq.set_broker(RedisBroker(url=plain.REDIS))


@dramatiq.actor
def sync_active_users() -> None:
    for user_id in orm.user_ids():
        sync_user_data.send(user_id)


@dramatiq.actor
def sync_user_data(user_id: str) -> None:
    orm.sync(user_id)
