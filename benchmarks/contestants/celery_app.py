"""Celery and Beat, as the documentation of Celery has them: one task per user, and one that sends them all.

celery --app celery_app worker --concurrency 16      # prefork, the default
celery --app celery_app beat
"""

from __future__ import annotations

import orm
import plain
from celery import Celery
from celery.schedules import crontab
from celery.signals import worker_ready

app = Celery("tasks", broker=plain.REDIS)
app.conf.task_ignore_result = True
app.conf.beat_schedule = {
    # Every 15 minutes in life; never while it is measured, where one tick is sent by hand.
    "sync-active-users": {
        "task": "celery_app.sync_active_users",
        "schedule": crontab("0", "0", day_of_month="1"),
    }
}


@app.task
def sync_active_users() -> None:
    for user_id in orm.user_ids():
        sync_user_data.delay(user_id)


@app.task(rate_limit="100000/m")  # of the provider, for each worker; here it never binds
def sync_user_data(user_id: str) -> None:
    orm.sync(user_id)


@worker_ready.connect
def say_so(**_: object) -> None:
    print("ready", flush=True)
