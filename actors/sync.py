"""Sync actors. One message, one user; what a sync does is in `lifelogger.sync`."""

import dramatiq

from actors.notify import deliver_changes
from lifelogger import notices, planner, sync
from lifelogger.broker import TIME_LIMIT_MS, broker
from lifelogger.errors import LockLost
from lifelogger.mutex import Locked
from lifelogger.runtime import runtime
from lifelogger.settings import get_settings


@dramatiq.actor(
    broker=broker,
    mutex=lambda user_id, *_, **__: f"sync:{user_id}",
    max_retries=0,
    throws=(LockLost, Locked),
    time_limit=TIME_LIMIT_MS,
)
def sync_user_data(user_id: str, trigger: str = "asked") -> None:
    """Pull what is new for one user.

    A message of a tick takes the connections that it claimed; any other is somebody's wish, and takes
    all that did not fail. Skipped while a sync of that user runs: who knows of news asks through
    `client.request_sync`, which writes that down first. Never retried by the
    broker, which would park the message in worker memory: a failed connection has its
    `next_sync_at`, and a later tick meets it.
    """
    runs = sync.run(user_id, trigger)
    if any(run.learned for run in runs):
        plan_again.send()
    ended = any(run.outcome == "needs_reauth" for run in runs)
    if get_settings().notify.urls and (ended or any(run.counts.changed for run in runs)):
        deliver_changes.send()
    if ended:
        notices.tell(runtime())


@dramatiq.actor(
    broker=broker,
    queue_name="now",
    mutex=lambda user_id, *_, **__: f"sync:{user_id}",
    max_retries=0,
    throws=(LockLost, Locked),
    time_limit=TIME_LIMIT_MS,
)
def sync_user_now(user_id: str, trigger: str = "asked") -> None:
    """The same, in a queue of its own: whoever waits for it shall not stand behind a tick's long line.

    A webhook's message is `news`: it takes what is hinted at and no more.
    """
    sync_user_data.fn(user_id, trigger)


@dramatiq.actor(broker=broker, queue_name="schedule", mutex=lambda: "plan", max_retries=0)
def plan_again() -> None:
    """Plan what waited for a budget count that is known now."""
    planner.tick(planner.AGAIN, None, send_tick)


def send_tick(user_id: str) -> None:
    """Enqueue one planned user."""
    sync_user_data.send(user_id, "tick")
