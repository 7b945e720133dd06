"""The actor that tells other applications of changes; what it does is in `lifelogger.notify`."""

import dramatiq

from lifelogger import notify
from lifelogger.broker import broker
from lifelogger.runtime import runtime

# Their own queue: an endpoint that does not answer must not keep a tick waiting.


@dramatiq.actor(broker=broker, queue_name="notify", mutex=lambda: "notify", max_retries=0)
def deliver_changes() -> None:
    """Send what changed to the webhook endpoints of the settings.

    Skipped while another one does: that one goes on until there is no more, and the next tick of the
    timetable finds what came in between.
    """
    notify.deliver(runtime())
