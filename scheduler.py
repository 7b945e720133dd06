"""The timetable: every periodic actor, on one page. The times are in settings.toml, `[schedule]`.

Run it with `make periodiq`, the work it enqueues with `make worker`. Any number of both may run:
a tick fires once. What an actor does is imported when it does it: the scheduler itself only sends messages,
and without the database it takes half the memory.
"""

from datetime import timedelta

import dramatiq
from periodiq import cron

from lifelogger.broker import TIME_LIMIT_MS, broker
from lifelogger.settings import get_settings

schedule = get_settings().schedule

# Their own queue: a long line of syncs must not keep a tick waiting.


@dramatiq.actor(broker=broker, queue_name="schedule", periodic=cron(schedule.sync), max_retries=0)
def sync_active_users() -> None:
    """Enqueue a sync for every user that is due and that the budgets can serve now."""
    from actors.sync import send_tick
    from lifelogger import planner, ticks

    planner.tick("sync_active_users", ticks.scheduled_at(), send_tick)


@dramatiq.actor(
    broker=broker,
    queue_name="schedule",
    periodic=cron(schedule.refresh_tokens),
    mutex=lambda: "refresh_integration_tokens",
    max_retries=0,
    time_limit=TIME_LIMIT_MS,
)
def refresh_integration_tokens() -> None:
    """Refresh the access tokens that expire soon, at every provider, and see to whose grant has ended."""
    from lifelogger import leaving, notices
    from lifelogger.runtime import runtime
    from lifelogger.tokens import Tokens

    Tokens(runtime()).refresh_expiring()
    leaving.end_deauthorised(runtime())
    notices.tell(runtime())


@dramatiq.actor(
    broker=broker,
    queue_name="schedule",
    periodic=cron(schedule.revoke),
    mutex=lambda: "revoke_what_is_left",
    max_retries=0,
    time_limit=TIME_LIMIT_MS,
)
def revoke_what_is_left() -> None:
    """End the grants of those who left while their provider did not answer."""
    from lifelogger import leaving
    from lifelogger.runtime import runtime

    leaving.revoke_waiting(runtime())


@dramatiq.actor(
    broker=broker,
    queue_name="schedule",
    periodic=cron(schedule.count),
    mutex=lambda: "count",
    max_retries=0,
    time_limit=TIME_LIMIT_MS,
)
def count_what_there_is() -> None:
    """Count a large store, so that nobody who looks at the status waits for that."""
    from lifelogger.runtime import runtime
    from lifelogger.store import counts

    rt = runtime()
    counts.recount(rt.store, rt.clock)


@dramatiq.actor(
    broker=broker,
    queue_name="schedule",
    periodic=cron(schedule.tidy),
    mutex=lambda: "tidy",
    max_retries=0,
    time_limit=TIME_LIMIT_MS,
)
def forget_old_runs() -> None:
    """Delete the journal of syncs and ticks that nobody will ask for any more."""
    from lifelogger import webhooks
    from lifelogger.runtime import runtime
    from lifelogger.store import journal

    rt = runtime()
    journal.forget(rt.store, rt.clock() - timedelta(days=rt.settings.sync.journal_days))
    webhooks.forget_calls(rt)


@dramatiq.actor(
    broker=broker, queue_name="schedule", periodic=cron(schedule.news), mutex=lambda: "news", max_retries=0
)
def serve_news() -> None:
    """Enqueue a sync for everybody whose news no message told."""
    from actors.sync import send_tick
    from lifelogger import planner

    planner.serve_news(send_tick)


@dramatiq.actor(
    broker=broker,
    queue_name="schedule",
    periodic=cron(schedule.webhooks),
    mutex=lambda: "webhooks",
    max_retries=0,
)
def keep_webhooks() -> None:
    """Make, renew and repair the subscriptions to webhooks."""
    from lifelogger import webhooks
    from lifelogger.runtime import runtime

    webhooks.keep_all(runtime())


@dramatiq.actor(
    broker=broker, queue_name="notify", periodic=cron(schedule.notify), mutex=lambda: "notify", max_retries=0
)
def deliver_waiting_changes() -> None:
    """Send what changed to the webhook endpoints whose time to be tried has come."""
    from lifelogger import notify
    from lifelogger.runtime import runtime

    notify.deliver(runtime())
