"""Oura API v2. Each fact and its source: docs/providers/oura.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

from lifelogger.errors import BadRecord, Refused, Unavailable
from lifelogger.providers.base import (
    Endpoints,
    Http,
    Json,
    Page,
    Pool,
    Provider,
    Record,
    RevokeRequest,
    Stream,
    Window,
    instant,
    number,
    shown,
    text,
)

SPAN = timedelta(days=90)
"""How much of the past one page holds: all replies of a span, so that what is read of it is whole."""
SERIES_SPAN = timedelta(days=30)
"""The same of a series of samples, of which there are hundreds a day."""
MARGIN = timedelta(days=2)
"""How many days the days asked for reach beyond a window, which is UTC, on either side. A person's date is up
to one off that of UTC; a nap after 18:00 belongs to the next day, and a day of the ring lasts until 4:00."""
MOST_REPLIES = 200
"""Replies of one span before we conclude that the collection has no end."""
JOULES = 4184
"""In a kilocalorie."""
MOST = 2**31 - 1

TYPES = {
    "americanFootball": "american_football",
    "badminton": "badminton",
    "basketball": "basketball",
    "boxing": "boxing",
    "cross_country_skiing": "cross_country_skiing",
    "cycling": "cycling",
    "dance": "dancing",
    "dancing": "dancing",
    "downhill_skiing": "alpine_skiing",
    "elliptical": "elliptical",
    "golf": "golf",
    "hiking": "hiking",
    "HIIT": "interval_training",
    "hiit": "interval_training",
    "ice_skating": "ice_skating",
    "indoor_cycling": "cycling",
    "mountain_biking": "mountain_biking",
    "nordic_walking": "walking",
    "pilates": "pilates",
    "rowing": "rowing",
    "running": "running",
    "snowboarding": "snowboarding",
    "soccer": "football",
    "stairExercise": "stair_climbing",
    "strength_training": "strength_training",
    "surfing": "surfing",
    "swimming": "swimming",
    "tennis": "tennis",
    "trail_running": "trail_running",
    "walking": "walking",
    "workout": "workout",
    "yoga": "yoga",
}
"""The words for workouts that are known; the API lists none. Others are `other`, kept beside it."""
SESSIONS = {
    "breathing": "breathing",
    "meditation": "meditation",
    "relaxation": "relaxation",
    "rest": "rest",
    "nap": "rest",
}
"""`PublicMomentType` to our vocabulary."""
MAIN_SLEEP = {"long_sleep": True, "sleep": False, "late_nap": False}
"""`PublicSleepType`: a `sleep` is at most three hours. `rest` is no sleep, says the person: neither."""


class Oura(Provider):
    """A stream for each collection of the ring's documents, read by the person's calendar days."""

    name = "oura"
    title = "Oura"
    scopes = ("daily", "workout", "session", "spo2Daily")
    streams = (
        Stream("daily_activity", "day", scopes=("daily",)),
        Stream("daily_readiness", "day", scopes=("daily",)),
        Stream("daily_sleep", "day", scopes=("daily",)),
        Stream("daily_spo2", "day", scopes=("spo2Daily", "spo2")),
        Stream("sleep", "sleep", scopes=("daily",)),
        Stream("workout", "activity", scopes=("workout",)),
        Stream("session", "activity", scopes=("session",)),
        Stream("heartrate", "body", scopes=("heartrate",), optional=True),
    )
    poll_cost = sum(not stream.optional for stream in streams)
    revokes_access = True

    def pages(self, http: Http, stream: Stream, window: Window) -> Iterator[Page]:
        """Walk back over spans, each read to the end of its `next_token`s.

        A sleep that the person deleted still comes, as a document that says so: it is left out,
        like what is deleted elsewhere.
        """
        last = window.until or window.now
        if last is None:
            raise ValueError("a window of Oura needs an end, or a now")
        while True:
            since = max(window.since, last - (SERIES_SPAN if stream.optional else SPAN))
            query = instants(since, last) if stream.optional else civil_days(since, last)
            items = documents(http, stream.name, query)
            yield Page([item for item in items if not deleted(item)], since)
            if since <= window.since:
                return
            last = since

    def record(self, stream: Stream, item: Json) -> Record:
        """Normalise a document (specs: oura.openapi.json, `Public…`)."""
        if not isinstance(item, dict):
            raise BadRecord(f"not a document: {shown(item)}")
        key = self.external_id(stream, item)
        if key is None:
            raise BadRecord(f"id: not a text: {shown(item.get('id'))}")
        read = {"day": daily, "sleep": night, "activity": activity, "body": sample}[stream.kind]
        return Record(external_id=key, kind=stream.kind, **read(stream, item))

    def external_id(self, stream: Stream, item: Json) -> str | None:
        """The document's `id`. A sample has none: its instant, and what it was taken in."""
        value = item.get("id") if isinstance(item, dict) else None
        if stream.optional and isinstance(item, dict):
            try:
                value = f"{moment(item, 'timestamp').isoformat()}/{item.get('source')}"
            except BadRecord:
                return None
        plausible = isinstance(value, str) and re.fullmatch(r"[!-~]{1,200}", value)
        return value if plausible else None

    def pools(self, settings: Endpoints, connection_id: int, *, token: bool = False) -> tuple[Pool, ...]:
        """One pool of the application; token calls spend from it too, which errs on the safe side."""
        key = f"{self.name}:{settings.client_id}:requests"
        return (Pool("requests", key, settings.budget, reports=False),)

    def revocation(self, access: str, refresh: str | None) -> RevokeRequest:
        """The access token is the whole request."""
        return RevokeRequest(query={"access_token": access}, authenticated=False)

    def is_revoked(self, status: int, reply: Json) -> bool:
        """A token that is dead already is not authorised to end anything."""
        return status == 401 or super().is_revoked(status, reply)

    def account(self, http: Http) -> str | None:
        """Any token may read it. Nobody is kept out because it cannot be told."""
        try:
            reply = http.get("/v2/usercollection/personal_info")
        except Refused:
            return None
        found = reply.get("id") if isinstance(reply, dict) else None
        return found if isinstance(found, str) and re.fullmatch(r"[!-~]{1,200}", found) else None

    def refusal(self, status: int, reply: Json) -> str | None:
        """403 means either, and its body has no shape that one could tell them by."""
        either = "the person did not grant this, or their Oura subscription has ended"
        return f"not allowed (403): {either}" if status == 403 else None

    def retry_at(self, headers: Mapping[str, str], now: datetime) -> datetime | None:
        """`Retry-After`, or else the second at which the window is reset."""
        reset = headers.get("X-RateLimit-Reset", "")
        found = super().retry_at(headers, now)
        if found is None and reset.isdecimal() and len(reset) < 12:
            found = max(now, datetime.fromtimestamp(int(reset), UTC))
        return found


# Collections


def civil_days(since: datetime, until: datetime) -> dict[str, str]:
    """The days, both included, that hold whatever lies between two instants, in any zone."""
    first, last = (since - MARGIN).date(), (until + MARGIN).date()
    return {"start_date": first.isoformat(), "end_date": last.isoformat()}


def instants(since: datetime, until: datetime) -> dict[str, str]:
    """A second more on either side: whether the ends are included is not told."""
    first, last = since - timedelta(seconds=1), until + timedelta(seconds=1)
    return {"start_datetime": f"{first:%Y-%m-%dT%H:%M:%SZ}", "end_datetime": f"{last:%Y-%m-%dT%H:%M:%SZ}"}


def documents(http: Http, name: str, span: dict[str, str]) -> list[Json]:
    """All documents of a collection in a span."""
    found: list[Json] = []
    query = span
    for _ in range(MOST_REPLIES):
        reply = http.get(f"/v2/usercollection/{name}", **query)
        items, token = (reply.get("data"), reply.get("next_token")) if isinstance(reply, dict) else (None, "")
        if not isinstance(items, list) or not isinstance(token, str | None):
            raise Unavailable(f"the reply to {name} is not a page of documents")
        found += items
        if not token:
            return found
        query = {**span, "next_token": token}
    raise Unavailable(f"the collection {name} does not end")


def deleted(item: Json) -> bool:
    return isinstance(item, dict) and item.get("type") == "deleted"


# Documents


def daily(stream: Stream, item: dict[str, Json]) -> dict[str, Any]:
    """A civil day. Its `timestamp` is when the day begins for the ring, not an event of the person's."""
    day = civil(item)
    saturation = item.get("spo2_percentage")
    if saturation is not None and not isinstance(saturation, dict):
        raise BadRecord(f"spo2_percentage: not an object: {shown(saturation)}")
    steps = number(item, "steps")
    if steps is not None and not 0 <= steps <= MOST:
        raise BadRecord(f"steps: not a number of steps: {shown(steps)}")
    return {
        "ordered_at": datetime.combine(day, time(), UTC),
        "local_date": day,
        "steps": None if steps is None else int(steps),
        "energy_j": joules(item, "total_calories"),
        "active_energy_j": joules(item, "active_calories"),
        "spo2_avg_pct": number(saturation or {}, "average"),
        "score_pct": number(item, "score"),
    }


def night(stream: Stream, item: dict[str, Json]) -> dict[str, Any]:
    """A time in bed, at night or for a nap."""
    kind = text(item, "type")
    return {
        **between(item, "bedtime_start", "bedtime_end"),
        "provider_type": kind,
        "is_main_sleep": MAIN_SLEEP.get(kind or ""),
        "duration_s": number(item, "time_in_bed"),
        "asleep_s": number(item, "total_sleep_duration"),
        "awake_s": number(item, "awake_time"),
        "light_sleep_s": number(item, "light_sleep_duration"),
        "deep_sleep_s": number(item, "deep_sleep_duration"),
        "rem_sleep_s": number(item, "rem_sleep_duration"),
        "heart_rate_avg_bpm": number(item, "average_heart_rate"),
        "heart_rate_min_bpm": number(item, "lowest_heart_rate"),
        "hrv_rmssd_ms": number(item, "average_hrv"),
        "breaths_per_min": number(item, "average_breath"),
    }


def activity(stream: Stream, item: dict[str, Json]) -> dict[str, Any]:
    """A workout, or a session of breathing and the like."""
    name, words = ("activity", TYPES) if stream.name == "workout" else ("type", SESSIONS)
    kind = text(item, name)
    found = between(item, "start_datetime", "end_datetime")
    return {
        **found,
        "type": None if kind is None else words.get(kind, "other"),
        "provider_type": kind,
        "title": text(item, "label"),
        "duration_s": (found["end_at"] - found["start_at"]).total_seconds(),
        "distance_m": number(item, "distance"),
        "energy_j": joules(item, "calories"),
    }


def sample(stream: Stream, item: dict[str, Json]) -> dict[str, Any]:
    """One heart rate. Its time is in UTC, so neither offset nor date is known."""
    at = moment(item, "timestamp")
    return {
        "ordered_at": at,
        "start_at": at,
        "provider_type": text(item, "source"),
        "heart_rate_avg_bpm": number(item, "bpm"),
    }


def between(item: dict[str, Json], start_name: str, end_name: str) -> dict[str, Any]:
    """When something began and ended, and the day that Oura counts it to."""
    start, end = moment(item, start_name), moment(item, end_name)
    if not timedelta(0) <= end - start < timedelta(days=366):
        raise BadRecord(f"{end_name}: not after {start_name}: {shown(item.get(end_name))}")
    return {
        "ordered_at": start,
        "start_at": start,
        "end_at": end,
        "utc_offset_s": offset(item.get(start_name)),
        "local_date": civil(item),
    }


def moment(item: dict[str, Json], name: str) -> datetime:
    found = instant(item.get(name), name)
    if not 1971 <= found.year < 3000:
        raise BadRecord(f"{name}: not when there are rings: {shown(item.get(name))}")
    return found


def offset(value: Json) -> int | None:
    """The offset from UTC that a readable time carries; `Z` is UTC and tells none of the person's."""
    if not isinstance(value, str) or value.endswith(("Z", "z")):
        return None
    found = datetime.fromisoformat(value).utcoffset()
    return None if found is None else int(found.total_seconds())


def civil(item: dict[str, Json]) -> date:
    """The `day` of a document: a date where the person is, of no zone."""
    value = item.get("day")
    if isinstance(value, str) and re.fullmatch(r"[12][0-9]{3}-[0-9]{2}-[0-9]{2}", value):
        try:
            return date.fromisoformat(value)
        except ValueError:
            pass
    raise BadRecord(f"day: not a date: {shown(value)}")


def joules(item: Mapping[str, Json], name: str) -> float | None:
    """Kilocalories as joules."""
    found = number(item, name)
    return None if found is None else found * JOULES
