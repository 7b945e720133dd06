"""Fitbit: speaks the Google Health API v4. Each fact and its source: docs/providers/fitbit.md."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
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

SCOPE = "https://www.googleapis.com/auth/googlehealth."
ACTIVITY = (f"{SCOPE}activity_and_fitness.readonly",)
METRICS = (f"{SCOPE}health_metrics_and_measurements.readonly",)
SLEEP = (f"{SCOPE}sleep.readonly",)

DAY, SECOND, RESOLUTION = timedelta(days=1), timedelta(seconds=1), timedelta.resolution
WEST, EAST = timedelta(hours=12), timedelta(hours=14)
"""How far civil time is behind UTC and ahead of it, at most."""
LONGEST_SLEEP = timedelta(days=2)
"""Sleep is filtered by its end and lies in its stream by its start: this is how far the two may be apart."""
MOST_PAGES = 1000
"""Pages of one span before we conclude that the list has no end."""
JOULES = 4184
"""In a kilocalorie."""

TYPES = {
    "AEROBIC_WORKOUT": "workout",
    "BADMINTON": "badminton",
    "BIKING": "cycling",
    "CANOEING": "canoeing",
    "CARDIO_WORKOUT": "workout",
    "CIRCUIT_TRAINING": "workout",
    "CLIMBING": "climbing",
    "CROSSFIT": "crossfit",
    "CROSS_COUNTRY_SKI": "cross_country_skiing",
    "ELECTRIC_BIKE": "e_biking",
    "ELLIPTICAL": "elliptical",
    "FREE_WEIGHTS": "strength_training",
    "FUNCTIONAL_STRENGTH_TRAINING": "strength_training",
    "GOLF": "golf",
    "HAND_CYCLING": "handcycling",
    "HIIT": "interval_training",
    "HIKING": "hiking",
    "ICE_SKATING": "ice_skating",
    "INCLINE_RUN": "running",
    "INCLINE_WALK": "walking",
    "INDOOR_CLIMBING": "climbing",
    "INTERVAL_WORKOUT": "interval_training",
    "KAYAKING": "kayaking",
    "KITESURFING": "kitesurfing",
    "MOUNTAIN_BIKE": "mountain_biking",
    "NORDIC_WALKING": "walking",
    "OUTDOOR_BIKE": "cycling",
    "OUTDOOR_WORKOUT": "workout",
    "PADDLEBOARDING": "stand_up_paddling",
    "PICKELBALL": "pickleball",
    "PILATES": "pilates",
    "POWERLIFTING": "strength_training",
    "POWER_WALKING": "walking",
    "RACQUETBALL": "racquetball",
    "ROCK_CLIMBING": "climbing",
    "ROLLERBLADING": "inline_skating",
    "ROWING": "rowing",
    "ROWING_MACHINE": "rowing",
    "RUNNING": "running",
    "SAILING": "sailing",
    "SKATEBOARDING": "skateboarding",
    "SNOWBOARDING": "snowboarding",
    "SNOWSHOEING": "snowshoeing",
    "SOCCER": "football",
    "SPINNING": "cycling",
    "SQUASH": "squash",
    "STAIRCLIMBER": "stair_climbing",
    "STATIONARY_BIKE": "cycling",
    "STRENGTH_TRAINING": "strength_training",
    "STROLLER_WALK": "walking",
    "SURFING": "surfing",
    "SWIMMING": "swimming",
    "SWIMMING_OPEN_WATER": "swimming",
    "SWIMMING_POOL": "swimming",
    "TABLE_TENNIS": "table_tennis",
    "TENNIS": "tennis",
    "TRAIL_RUN": "trail_running",
    "TREADMILL": "running",
    "TREADMILL_WALK": "walking",
    "WALKING": "walking",
    "WALK_WITH_WEIGHTS": "walking",
    "WEIGHTLIFTING": "strength_training",
    "WEIGHTS": "strength_training",
    "WEIGHT_MACHINES": "strength_training",
    "WHEELCHAIR": "wheelchair",
    "WINDSURFING": "windsurfing",
    "WORKOUT": "workout",
    "YOGA": "yoga",
    "YOGA_BIKRAM": "yoga",
    "YOGA_HATHA": "yoga",
    "YOGA_POWER": "yoga",
    "YOGA_VINYASA": "yoga",
}
"""Google's `ExerciseType` to our vocabulary. A word that is not here is `other`, and kept beside it."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a stream comes from: a data type (the stream's name), and how it is asked for."""

    shape: str
    """What its points are: one of `READERS`. All but the `rollup` are reconciled."""
    span: int
    """Days that are asked for at once: of a roll-up the most that is allowed."""
    size: int
    """The largest page."""


SOURCES = {
    "exercise": Source("session", 90, 25),
    "sleep": Source("sleep", 90, 25),
    "steps": Source("rollup", 90, 90),
    "distance": Source("rollup", 90, 90),
    "total-calories": Source("rollup", 14, 14),
    "heart-rate": Source("rollup", 14, 14),
    "daily-resting-heart-rate": Source("daily", 3650, 10_000),
    "daily-heart-rate-variability": Source("daily", 3650, 10_000),
    "daily-oxygen-saturation": Source("daily", 3650, 10_000),
    "weight": Source("sample", 3650, 10_000),
}


class Fitbit(Provider):
    """A stream for each data type. A list has no promised order, so a span is always read to its end."""

    name = "fitbit"
    title = "Fitbit"
    scopes = (*ACTIVITY, *METRICS, *SLEEP)
    streams = (
        Stream("exercise", "activity", scopes=ACTIVITY),
        Stream("sleep", "sleep", scopes=SLEEP),
        Stream("steps", "day", scopes=ACTIVITY),
        Stream("distance", "day", scopes=ACTIVITY),
        Stream("total-calories", "day", scopes=ACTIVITY),
        Stream("heart-rate", "day", scopes=METRICS),
        Stream("daily-resting-heart-rate", "day", scopes=METRICS),
        Stream("daily-heart-rate-variability", "day", scopes=METRICS),
        Stream("daily-oxygen-saturation", "day", scopes=METRICS),
        Stream("weight", "body", scopes=METRICS),
    )
    poll_cost = len(streams)
    pkce = True

    def pages(self, http: Http, stream: Stream, window: Window) -> Iterator[Page]:
        """Walk back in spans, each read to its last page and yielded as one: nothing tells their order.

        The look-back of a poll fits into one span. The newest one has no end, or where one must
        be told, that of the civil day which has begun somewhere on Earth.
        """
        source, upper = SOURCES[stream.name], window.until
        read = rolled_up if source.shape == "rollup" else reconciled
        newest = window.until or window.now
        while True:
            if newest is None:
                raise Unavailable("a walk without an end needs to know the time")
            lowest = newest - timedelta(days=source.span)
            if source.shape == "rollup":
                lowest = midnight(edge(upper, newest) - timedelta(days=source.span))
            reached = max(window.since, lowest)
            yield Page(read(http, stream, source, reached, upper, newest), reached)
            if reached <= window.since:
                return
            upper = newest = reached

    def record(self, stream: Stream, item: Json) -> Record:
        """Normalise a `ReconciledDataPoint` or a `DailyRollupDataPoint` (specs: google-health.v4)."""
        if not isinstance(item, dict):
            raise BadRecord(f"not a data point: {shown(item)}")
        value = part(item, field(stream))
        return READERS[SOURCES[stream.name].shape](stream, item, value)

    def external_id(self, stream: Stream, item: Json) -> str | None:
        """The point's own id, or a civil day, or for points without an id their interval and source."""
        try:
            return key(stream, item) if isinstance(item, dict) else None
        except BadRecord:
            return None

    def pools(self, settings: Endpoints, connection_id: int, *, token: bool = False) -> tuple[Pool, ...]:
        """Each request spends from the person's limit and from the project's; replies report neither."""
        owner = f"{self.name}:{settings.client_id}"
        project = Pool("project", f"{owner}:project", settings.budget, reports=False)
        user = Pool("user", f"{owner}:user:{connection_id}", settings.user_budget, reports=False)
        return (project,) if token else (user, project)

    def authorize_extras(self) -> dict[str, str]:
        """Without `prompt=consent` a second sign-in gets no refresh token."""
        return {"access_type": "offline", "prompt": "consent", "include_granted_scopes": "true"}

    def revocation(self, access: str, refresh: str | None) -> RevokeRequest:
        """Google takes either token, and asks nobody who they are."""
        return RevokeRequest({"token": refresh or access}, authenticated=False)

    def account(self, http: Http) -> str | None:
        """Webhooks name the person by it, too. Nobody is kept out because it cannot be told."""
        try:
            reply = http.get("/v4/users/me/identity")
        except Refused:
            return None
        found = reply.get("healthUserId") if isinstance(reply, dict) else None
        return found if isinstance(found, str) and re.fullmatch(r"[A-Za-z0-9-]{1,63}", found) else None

    def refusal(self, status: int, reply: Json) -> str | None:
        """`ACCOUNT_NOT_LINKED` is nothing to try again soon, and the person can mend it."""
        error = reply.get("error") if isinstance(reply, dict) else None
        details = error.get("details") if isinstance(error, dict) else None
        reasons = [each.get("reason") for each in listed(details) if isinstance(each, dict)]
        if "ACCOUNT_NOT_LINKED" in reasons:
            return "this Google account has no Fitbit profile: set one up in the Fitbit app"
        return None


# Asking


def field(stream: Stream) -> str:
    """The data type as the field of a point: `dailyRestingHeartRate`."""
    first, *rest = stream.name.split("-")
    return first + "".join(word.title() for word in rest)


def reconciled(
    http: Http, stream: Stream, source: Source, since: datetime, until: datetime | None, newest: datetime
) -> list[Json]:
    """All points of [since, until), and some around: what people see in the app, over all their devices."""
    until = until and until + SECOND  # filters take whole seconds
    name, member, low, high = stream.name.replace("-", "_"), "", stamp(since), until and stamp(until)
    match source.shape:
        case "session":  # by civil time only: the margin is that of all zones
            member, low = "interval.civil_start_time", civil(since - WEST)
            high = until and civil(until + EAST)
        case "sleep":  # by its end only
            member, high = "interval.end_time", until and stamp(until + LONGEST_SLEEP)
        case "sample":
            member = "sample_time.physical_time"
        case "daily":
            member, low = "date", since.date().isoformat()
            high = until and (until + DAY).date().isoformat()
    query: dict[str, str | int] = {"filter": f'{name}.{member} >= "{low}"', "pageSize": source.size}
    if high:
        query["filter"] = f'{query["filter"]} AND {name}.{member} < "{high}"'
    found: list[Json] = []
    for _ in range(MOST_PAGES):
        reply = http.get(f"/v4/users/me/dataTypes/{stream.name}/dataPoints:reconcile", **query)
        token = collect(reply, "dataPoints", found)
        if token is None:
            return found
        query["pageToken"] = token
    raise Unavailable(f"the list of {stream.name} does not end")


def rolled_up(
    http: Http, stream: Stream, source: Source, since: datetime, until: datetime | None, newest: datetime
) -> list[Json]:
    """The civil days of [since, until). A day about which nothing is known is no item."""
    span = {"start": {"date": parts(since.date())}, "end": {"date": parts(edge(until, newest))}}
    body: dict[str, Any] = {"range": span, "windowSizeDays": 1, "pageSize": source.size}
    found: list[Json] = []
    for _ in range(MOST_PAGES):
        reply = http.post(f"/v4/users/me/dataTypes/{stream.name}/dataPoints:dailyRollUp", body)
        token = collect(reply, "rollupDataPoints", found)
        if token is None:
            return [item for item in found if not isinstance(item, dict) or item.get(field(stream))]
        body["pageToken"] = token
    raise Unavailable(f"the days of {stream.name} do not end")


def collect(reply: Json, name: str, found: list[Json]) -> str | None:
    """Take the points of one reply; return the token of the next page. An absent list is an empty one."""
    points = reply.get(name, []) if isinstance(reply, dict) else None
    token = reply.get("nextPageToken") if isinstance(reply, dict) else None
    if not isinstance(points, list) or not isinstance(token, str | None):
        raise Unavailable(f"{name} is not a list of data points")
    found += points
    return token or None


def stamp(moment: datetime) -> str:
    """An instant as filters take it (RFC 3339); whole seconds, rounded down."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def civil(moment: datetime) -> str:
    """A civil time as filters take it."""
    return moment.strftime("%Y-%m-%dT%H:%M:%S")


def edge(until: datetime | None, newest: datetime) -> date:
    """The civil day before which a roll-up ends: the newest has all days that begun anywhere on Earth."""
    return (until + DAY - RESOLUTION if until else newest + EAST + DAY).date()


def midnight(when: date) -> datetime:
    return datetime(when.year, when.month, when.day, tzinfo=UTC)


def parts(day: date) -> dict[str, int]:
    return {"year": day.year, "month": day.month, "day": day.day}


# Reading points


def key(stream: Stream, item: Mapping[str, Json]) -> str:
    """What identifies a point in its stream, and stays the same however often it is asked for."""
    shape = SOURCES[stream.name].shape
    value = part(item, field(stream))
    if shape == "rollup":
        return day(part(item, "civilStartTime")).isoformat()
    if shape == "daily":
        return day(value).isoformat()
    named = re.fullmatch(r"users/[^/]+/dataTypes/[^/]+/dataPoints/([\w.~-]{1,150})", name_of(item), re.ASCII)
    if named:
        return named[1]
    if shape == "sample":
        interval = [begun(part(value, "sampleTime"), "physicalTime")]
    else:
        interval = [begun(part(value, "interval"), each) for each in ("startTime", "endTime")]
    words = [moment.isoformat() for moment in interval]
    try:
        source = json.dumps(item.get("dataSource"), sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        raise BadRecord("dataSource: cannot be read") from None
    return "/".join([*words, hashlib.sha256(source.encode()).hexdigest()[:16]])


def session(stream: Stream, item: Mapping[str, Json], value: Mapping[str, Json]) -> Record:
    """An `Exercise`."""
    interval, summary = part(value, "interval"), maybe(value, "metricsSummary")
    start, end = begun(interval, "startTime"), begun(interval, "endTime")
    sport = text(value, "exerciseType")
    calories = quantity(summary, "caloriesKcal")
    return Record(
        external_id=key(stream, item),
        kind=stream.kind,
        ordered_at=start,
        start_at=start,
        end_at=end,
        utc_offset_s=offset(interval, "startUtcOffset"),
        local_date=civil_date(interval, "civilStartTime", start, "startUtcOffset"),
        type=None if sport is None else TYPES.get(sport, "other"),
        provider_type=sport,
        title=text(value, "displayName"),
        duration_s=length(start, end, timedelta(days=366)),
        moving_s=seconds(value, "activeDuration"),
        distance_m=scaled(quantity(summary, "distanceMillimeters"), 0.001),
        elevation_gain_m=scaled(quantity(summary, "elevationGainMillimeters"), 0.001),
        energy_j=scaled(calories, JOULES),
        heart_rate_avg_bpm=quantity(summary, "averageHeartRateBeatsPerMinute"),
        steps=whole(summary, "steps"),
    )


def sleep(stream: Stream, item: Mapping[str, Json], value: Mapping[str, Json]) -> Record:
    """A `Sleep`: a night or a nap. Its civil date is that of waking up."""
    interval, summary, about = part(value, "interval"), maybe(value, "summary"), maybe(value, "metadata")
    start, end = begun(interval, "startTime"), begun(interval, "endTime")
    main, nap = about.get("mainSleep"), about.get("nap")
    return Record(
        external_id=key(stream, item),
        kind=stream.kind,
        ordered_at=start,
        start_at=start,
        end_at=end,
        utc_offset_s=offset(interval, "startUtcOffset"),
        local_date=civil_date(interval, "civilEndTime", end, "endUtcOffset"),
        provider_type=text(value, "type"),
        duration_s=length(start, end, LONGEST_SLEEP),
        is_main_sleep=main if isinstance(main, bool) else False if nap is True else None,
        asleep_s=scaled(quantity(summary, "minutesAsleep"), 60),
        awake_s=scaled(quantity(summary, "minutesAwake"), 60),
        light_sleep_s=stage(summary, "LIGHT"),
        deep_sleep_s=stage(summary, "DEEP"),
        rem_sleep_s=stage(summary, "REM"),
    )


def rollup(stream: Stream, item: Mapping[str, Json], value: Mapping[str, Json]) -> Record:
    """A `DailyRollupDataPoint`: one civil day, summed up. Each type has fields of its own."""
    return of_day(
        stream,
        day(part(item, "civilStartTime")),
        steps=whole(value, "countSum"),
        distance_m=scaled(quantity(value, "millimetersSum"), 0.001),
        energy_j=scaled(quantity(value, "kcalSum"), JOULES),
        heart_rate_avg_bpm=quantity(value, "beatsPerMinuteAvg"),
        heart_rate_max_bpm=quantity(value, "beatsPerMinuteMax"),
        heart_rate_min_bpm=quantity(value, "beatsPerMinuteMin"),
    )


def daily(stream: Stream, item: Mapping[str, Json], value: Mapping[str, Json]) -> Record:
    """What Google derives once a day. Each type has fields of its own."""
    return of_day(
        stream,
        day(value),
        heart_rate_resting_bpm=quantity(value, "beatsPerMinute"),
        hrv_rmssd_ms=quantity(value, "averageHeartRateVariabilityMilliseconds"),
        spo2_avg_pct=quantity(value, "averagePercentage"),
    )


def of_day(stream: Stream, when: date, **values: Any) -> Record:
    return Record(when.isoformat(), stream.kind, midnight(when), local_date=when, **values)


def sample(stream: Stream, item: Mapping[str, Json], value: Mapping[str, Json]) -> Record:
    """A `Weight`."""
    when = part(value, "sampleTime")
    moment = begun(when, "physicalTime")
    return Record(
        external_id=key(stream, item),
        kind=stream.kind,
        ordered_at=moment,
        start_at=moment,
        utc_offset_s=offset(when, "utcOffset"),
        local_date=civil_date(when, "civilTime", moment, "utcOffset"),
        weight_kg=scaled(quantity(value, "weightGrams"), 0.001),
    )


READERS = {"session": session, "sleep": sleep, "rollup": rollup, "daily": daily, "sample": sample}


# What Google writes in a way of its own. Each raises `BadRecord` naming the field.


def part(item: Mapping[str, Json], name: str) -> Mapping[str, Json]:
    """An object that must be there."""
    value = item.get(name)
    if not isinstance(value, dict):
        raise BadRecord(f"{name}: not an object: {shown(value)}")
    return value


def maybe(item: Mapping[str, Json], name: str) -> Mapping[str, Json]:
    """An object that may be missing: then an empty one."""
    return {} if item.get(name) is None else part(item, name)


def listed(value: Json) -> list[Json]:
    return value if isinstance(value, list) else []


def name_of(item: Mapping[str, Json]) -> str:
    name = item.get("dataPointName")
    return name if isinstance(name, str) else ""


def begun(item: Mapping[str, Json], name: str) -> datetime:
    """An instant of somebody's life. A date that none can have would end a walk too early, or time itself."""
    value = item.get(name)
    moment = instant(value, name) if isinstance(value, str) else None
    if moment is None or not 1971 <= moment.year < 3000:
        raise BadRecord(f"{name}: not an instant: {shown(value)}")
    return moment


def quantity(item: Mapping[str, Json], name: str) -> float | None:
    """A number, also one that comes as a string: int64 does (`"9007199254740993"`)."""
    value = item.get(name)
    if isinstance(value, str):
        if not re.fullmatch(r"-?[0-9]{1,15}", value):
            raise BadRecord(f"{name}: not a number: {shown(value)}")
        return float(value)
    return number(item, name)


def whole(item: Mapping[str, Json], name: str) -> int | None:
    """A count that a database can hold."""
    value = quantity(item, name)
    if value is not None and (value != int(value) or not 0 <= value < 2**31):
        raise BadRecord(f"{name}: not a count: {shown(item.get(name))}")
    return None if value is None else int(value)


def scaled(value: float | None, factor: float) -> float | None:
    """In our unit, without what binary fractions add: 1234 mm are 1.234 m."""
    return None if value is None else round(value * factor, 6)


def seconds(item: Mapping[str, Json], name: str) -> float | None:
    """A duration: `"7200s"`, `"-39600s"`, `"1.5s"`."""
    value = item.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not re.fullmatch(r"-?[0-9]{1,9}(\.[0-9]{1,9})?s", value):
        raise BadRecord(f"{name}: not a duration: {shown(value)}")
    return float(value[:-1])


def offset(item: Mapping[str, Json], name: str) -> int | None:
    value = seconds(item, name)
    if value is not None and abs(value) > 86400:
        raise BadRecord(f"{name}: more than a day: {shown(value)}")
    return None if value is None else int(value)


def day(item: Mapping[str, Json]) -> date:
    """A full civil date."""
    value = part(item, "date")
    try:
        found = date(value["year"], value["month"], value["day"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise BadRecord(f"date: not a date: {shown(value)}") from None
    if not 1971 <= found.year < 3000:
        raise BadRecord(f"date: not when there are data: {shown(value)}")
    return found


def civil_date(item: Mapping[str, Json], name: str, moment: datetime, offset_name: str) -> date | None:
    """The civil date as told, or else from the instant and the person's offset then."""
    if item.get(name) is not None:
        return day(part(item, name))
    shift = offset(item, offset_name)
    return None if shift is None else (moment + timedelta(seconds=shift)).date()


def length(start: datetime, end: datetime, most: timedelta) -> float:
    if not timedelta(0) <= end - start < most:
        raise BadRecord(f"endTime: not the end of what began at {stamp(start)}: {stamp(end)}")
    return (end - start).total_seconds()


def stage(summary: Mapping[str, Json], kind: str) -> float | None:
    """How long the stages of a kind were, in seconds."""
    value = summary.get("stagesSummary")
    found = [each for each in listed(value) if isinstance(each, dict) and each.get("type") == kind]
    return scaled(quantity(found[0], "minutes"), 60) if found else None
