"""When the timetable meant the running message to fire."""

from __future__ import annotations

from datetime import UTC, datetime

from dramatiq.middleware import CurrentMessage


def scheduled_at() -> datetime | None:
    """The minute that Periodiq wrote into the message; None outside one, or when a person sent it."""
    message = CurrentMessage.get_current_message()
    written = message.options.get("scheduled_at") if message else None
    if written is None:
        return None
    return datetime.fromisoformat(written).astimezone(UTC).replace(second=0, microsecond=0)
