"""Oura API v2. Each fact and its source: docs/providers/oura.md."""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any
from urllib.parse import quote

from lifelogger.errors import BadRecord, Forged, NotThere
from lifelogger.providers.base import (
    Ask,
    Call,
    Endpoints,
    Event,
    Heard,
    Http,
    Json,
    Known,
    Page,
    Pool,
    Provider,
    Record,
    RevokeRequest,
    Stream,
    Subscription,
    Window,
    begun,
    count,
    instant,
    joules,
    lasted,
    lived,
    midnight,
    number,
    parsed,
    plain_id,
    same,
    shown,
    text,
    told_id,
    webhook_secret,
    whole_list,
    word,
)

SPAN = timedelta(days=90)
"""How much of the past one page holds: all replies of a span, so that what is read of it is whole."""
SUBSCRIPTIONS = "/v2/webhook/subscription"
HAPPENED = ("create", "update", "delete")
TAKEN_FOR = timedelta(minutes=90)
"""So far from now may the time of an event's signature be: it is tried again for about an hour."""
SERIES_SPAN = timedelta(days=30)
"""The same of a series of samples, of which there are hundreds a day."""
MARGIN = timedelta(days=2)
"""How many days the days asked for reach beyond a window, which is UTC, on either side. A person's date is up
to one off that of UTC; a nap after 18:00 belongs to the next day, and a day of the ring lasts until 4:00."""

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
    revokes_access = True

    def pages(self, http: Http, stream: Stream, window: Window) -> Iterator[Page]:
        """Walk back over spans, each read to the end of its `next_token`s.

        A sleep that the person deleted still comes, as a document that says so: it is left out,
        like what is deleted elsewhere.
        """
        last, series = window.newest, stream.kind == "body"
        while True:
            since = max(window.since, last - (SERIES_SPAN if series else SPAN))
            query = instants(since, last) if series else civil_days(since, last)
            items = documents(http, stream.name, query)
            yield Page([item for item in items if not deleted(item)], since)
            if since <= window.since:
                return
            last = since

    def item(self, http: Http, stream: Stream, external_id: str, owner: str | None) -> Json:
        """A document by its id, in the list's own form; a token sees those of its person only."""
        try:
            found = http.get(f"/v2/usercollection/{stream.name}/{quote(external_id, safe='')}")
        except NotThere:
            return None
        return None if deleted(found) else found

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
        if stream.kind == "body" and isinstance(item, dict):
            try:
                value = f"{begun(item, 'timestamp').isoformat()}/{item.get('source')}"
            except BadRecord:
                return None
        return plain_id(value)

    def pools(self, settings: Endpoints, connection_id: int, *, token: bool = False) -> tuple[Pool, ...]:
        """Each request spends from the token's limit and from the application's; replies tell neither.

        Token calls spend from the latter too, which errs on the safe side.
        """
        requests = self.pool(settings, "requests", settings.budget, reports=False)
        user = self.pool(settings, "user", settings.user_budget, reports=False, connection_id=connection_id)
        return (requests,) if token else (user, requests)

    def spent_pools(self, headers: Mapping[str, str]) -> tuple[str, ...]:
        """A tier named like the layer of tokens is that one. No word is documented: at another, all wait."""
        tier = headers.get("X-RateLimit-Tier", "").lower()
        return ("user",) if "token" in tier and "app" not in tier else ()

    def revocation(self, access: str, refresh: str | None) -> RevokeRequest:
        """The access token is the whole request."""
        return RevokeRequest(query={"access_token": access}, authenticated=False)

    def is_revoked(self, status: int, reply: Json) -> bool:
        """A token that is dead already is not authorised to end anything."""
        return status == 401 or super().is_revoked(status, reply)

    def account(self, http: Http) -> str | None:
        """Any token may read it."""
        return told_id(http, "/v2/usercollection/personal_info", "id")

    def refusal(self, status: int, reply: Json) -> str | None:
        """403: a scope is missing, and then we do not ask, or else as Oura says "usually" this.

        It may be of one collection alone, so the others are asked all the same.
        """
        ended = "refused (403) although it was granted: usually the person's Oura subscription has ended"
        return ended if status == 403 else None

    # Webhooks: a subscription for each collection and each of three things that happen to its documents.

    def webhook_topics(self, settings: Endpoints) -> tuple[str, ...]:
        """Not of heart rates: there are none."""
        wanted = [each.name for each in self.streams if each.wanted(settings) and each.kind != "body"]
        return tuple(f"{name} {happened}" for name in wanted for happened in HAPPENED)

    def webhook(self, settings: Endpoints, call: Call, known: Known) -> Heard:
        """The handshake, or an event, signed together with its time by the client's secret.

        Whether one that is sent again, for an hour, is signed anew is not told: so it is taken for as long.
        """
        if call.method == "GET":
            if not same(call.query.get("verification_token", ""), webhook_secret(settings)):
                raise Forged("verification_token is not ours")
            return Heard(reply={"challenge": call.query.get("challenge", "")[:200]})
        at, key = call.headers.get("x-oura-timestamp", ""), settings.client_secret.get_secret_value()
        signature = call.headers.get("x-oura-signature", "")
        expected = hmac.new(key.encode(), at.encode("latin-1", "replace") + call.body, "sha256").hexdigest()
        if not key or not same(signature, expected.upper()):
            raise Forged("its signature is not right")
        if not abs(known.now - signed_at(at)) <= TAKEN_FOR:
            raise Forged("it is too old")
        event = parsed(call.body)
        owner = plain_id(event.get("user_id")) if isinstance(event, dict) else None
        if owner is None:
            raise Forged("it is nobody's")
        streams = [each.name for each in self.streams if each.name == event.get("data_type")]
        about = Event(owner, tuple(streams), plain_id(event.get("object_id")))
        return Heard((about,) if streams else (), signature=signature)

    def subscriptions(self, ask: Ask, settings: Endpoints) -> list[Subscription]:
        found = ask("GET", settings.api_url + SUBSCRIPTIONS, headers=application(settings))
        return [
            Subscription(
                str(each["id"]),
                f"{each['data_type']} {each['event_type']}",
                str(each["callback_url"]),
                instant(each["expiration_time"]),
            )
            for each in (found if isinstance(found, list) else [])
            if isinstance(each, dict)
            and {"id", "data_type", "event_type", "callback_url", "expiration_time"} <= each.keys()
        ]

    def subscribe(self, ask: Ask, settings: Endpoints, topic: str, callback: str) -> None:
        name, happened = topic.split()
        wanted = {"callback_url": callback, "verification_token": webhook_secret(settings)}
        wanted |= {"data_type": name, "event_type": happened}
        ask("POST", settings.api_url + SUBSCRIPTIONS, headers=application(settings), json=wanted)

    def renew(self, ask: Ask, settings: Endpoints, subscription: Subscription) -> None:
        address = f"{settings.api_url}{SUBSCRIPTIONS}/renew/{subscription.id}"
        ask("PUT", address, headers=application(settings))

    def unsubscribe(self, ask: Ask, settings: Endpoints, subscription: Subscription) -> None:
        address = f"{settings.api_url}{SUBSCRIPTIONS}/{subscription.id}"
        ask("DELETE", address, headers=application(settings))

    def retry_at(self, headers: Mapping[str, str], now: datetime) -> datetime | None:
        """`Retry-After`, or else the second at which the window is reset."""
        reset = headers.get("X-RateLimit-Reset", "")
        found = super().retry_at(headers, now)
        if found is None and reset.isdecimal() and len(reset) < 12:
            found = max(now, datetime.fromtimestamp(int(reset), UTC))
        return found


# Webhooks


def application(settings: Endpoints) -> dict[str, str]:
    """Who we are, where no person's token says so."""
    return {"x-client-id": settings.client_id, "x-client-secret": settings.client_secret.get_secret_value()}


def signed_at(value: str) -> datetime:
    """The time of a signature: epoch seconds, or ISO 8601, since no document says which."""
    try:
        return instant(int(value) if value.isdecimal() else value)
    except BadRecord:
        raise Forged("its time is none") from None


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
    path = f"/v2/usercollection/{name}"
    return whole_list(
        name, lambda more: http.get(path, **span, **more), "data", "next_token", asked_as="next_token"
    )


def deleted(item: Json) -> bool:
    return isinstance(item, dict) and item.get("type") == "deleted"


# Documents


def daily(stream: Stream, item: dict[str, Json]) -> dict[str, Any]:
    """A civil day. Its `timestamp` is when the day begins for the ring, not an event of the person's."""
    day = civil_day(item)
    saturation = item.get("spo2_percentage")
    if saturation is not None and not isinstance(saturation, dict):
        raise BadRecord(f"spo2_percentage: not an object: {shown(saturation)}")
    return {
        "ordered_at": midnight(day),
        "local_date": day,
        "steps": count(number(item, "steps"), "steps"),
        "energy_j": joules(number(item, "total_calories")),
        "active_energy_j": joules(number(item, "active_calories")),
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
        "type": word(words, kind),
        "provider_type": kind,
        "title": text(item, "label"),
        "duration_s": lasted(found["start_at"], found["end_at"], "end_datetime"),
        "distance_m": number(item, "distance"),
        "energy_j": joules(number(item, "calories")),
    }


def sample(stream: Stream, item: dict[str, Json]) -> dict[str, Any]:
    """One heart rate. Its time is in UTC, so neither offset nor date is known."""
    at = begun(item, "timestamp")
    return {
        "ordered_at": at,
        "start_at": at,
        "provider_type": text(item, "source"),
        "heart_rate_avg_bpm": number(item, "bpm"),
    }


def between(item: dict[str, Json], start_name: str, end_name: str) -> dict[str, Any]:
    """When something began and ended, and the day that Oura counts it to."""
    start, end = begun(item, start_name), begun(item, end_name)
    lasted(start, end, end_name)
    return {
        "ordered_at": start,
        "start_at": start,
        "end_at": end,
        "utc_offset_s": offset(item.get(start_name)),
        "local_date": civil_day(item),
    }


def offset(value: Json) -> int | None:
    """The offset from UTC that a readable time carries; `Z` is UTC and tells none of the person's."""
    if not isinstance(value, str) or value.endswith(("Z", "z")):
        return None
    found = datetime.fromisoformat(value).utcoffset()
    return None if found is None else int(found.total_seconds())


def civil_day(item: dict[str, Json]) -> date:
    """The `day` of a document: a date where the person is, of no zone."""
    value = item.get("day")
    if isinstance(value, str) and re.fullmatch(r"[12][0-9]{3}-[0-9]{2}-[0-9]{2}", value):
        try:
            return lived(date.fromisoformat(value), "day")
        except ValueError:
            pass
    raise BadRecord(f"day: not a date: {shown(value)}")
