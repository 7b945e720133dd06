"""What one writes without lifelogger, too: a request, an activity's columns, a digest."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import requests

API, DATABASE, REDIS = (os.environ.get(f"BENCH_{name}", "") for name in ("API", "DATABASE", "REDIS"))
LOOK_BACK = timedelta(days=7)
WHOLE, RECENT = 200, 13
"""How many activities are asked for at once: of a whole past, and of the look-back. As lifelogger asks."""

_of_thread = threading.local()


def pages(token: str, cursor: datetime | None) -> Iterator[list[Any]]:
    """What is new since `cursor`, or everything: newest first, until the list ends or lies behind it."""
    session = getattr(_of_thread, "session", None)
    if session is None:
        session = _of_thread.session = requests.Session()
    size, page = (WHOLE if cursor is None else RECENT), 1
    while True:
        reply = session.get(
            f"{API}/athlete/activities",
            params={"per_page": size, "page": page},
            headers={"Authorization": f"Bearer {token}"},
            timeout=20,
        )
        reply.raise_for_status()
        found = reply.json()
        if found:
            yield found
        if not found or (cursor and begins(found[-1]) < cursor - LOOK_BACK):
            return
        page += 1


def begins(activity: Any) -> datetime:
    return datetime.fromisoformat(activity["start_date"])


def columns(activity: Any) -> dict[str, Any]:
    """The row of an activity: as lifelogger's, so that all write the same."""
    start = begins(activity)
    text = json.dumps(activity, separators=(",", ":"))
    return {
        "external_id": str(activity["id"]),
        "kind": "activity",
        "ordered_at": start,
        "start_at": start,
        "end_at": start + timedelta(seconds=activity["elapsed_time"]),
        "utc_offset_s": activity["utc_offset"],
        "local_date": (start + timedelta(seconds=activity["utc_offset"])).date(),
        "type": "running" if activity["sport_type"] == "Run" else "other",
        "provider_type": activity["sport_type"],
        "title": activity["name"],
        "duration_s": activity["elapsed_time"],
        "moving_s": activity["moving_time"],
        "distance_m": activity["distance"],
        "elevation_gain_m": activity["total_elevation_gain"],
        "heart_rate_avg_bpm": activity["average_heartrate"],
        "heart_rate_max_bpm": activity["max_heartrate"],
        "raw": text,
        "digest": digest(activity),
    }


def digest(activity: Any) -> str:
    """As lifelogger's, whose rows are there already when there is no news."""
    return hashlib.sha256(json.dumps(activity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def now() -> datetime:
    return datetime.now(UTC)
