"""Fitbit: speaks the Google Health API v4. Each fact and its source: docs/providers/fitbit.md."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from lifelogger.errors import BadRecord, Forged, Refused
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
    date_there,
    joules,
    lasted,
    lived,
    midnight,
    number,
    parsed,
    plain_id,
    same,
    scaled,
    shown,
    text,
    told_id,
    utc_offset,
    webhook_secret,
    whole_list,
    word,
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
    """Where a stream comes from, and how it is asked for."""

    type: str
    """The data type, as a path has it: `daily-resting-heart-rate`."""
    shape: str
    """What its points are: one of `READERS`. All but the `rollup` are reconciled."""
    span: int
    """Days that are asked for at once: of a roll-up the most that is allowed."""
    size: int
    """The largest page."""

    @property
    def field(self) -> str:
        """The data type as the field of a point: `dailyRestingHeartRate`."""
        first, *rest = self.type.split("-")
        return first + "".join(word.title() for word in rest)


SOURCES = {
    "exercise": Source("exercise", "session", 90, 25),
    "sleep": Source("sleep", "sleep", 90, 25),
    "steps": Source("steps", "rollup", 90, 90),
    "distance": Source("distance", "rollup", 90, 90),
    "total-calories": Source("total-calories", "rollup", 14, 14),
    "heart-rate": Source("heart-rate", "rollup", 14, 14),
    "daily-resting-heart-rate": Source("daily-resting-heart-rate", "daily", 3650, 10_000),
    "daily-heart-rate-variability": Source("daily-heart-rate-variability", "daily", 3650, 10_000),
    "daily-oxygen-saturation": Source("daily-oxygen-saturation", "daily", 3650, 10_000),
    "weight": Source("weight", "sample", 3650, 10_000),
    # A span is held and written at once, and nobody tells how many samples a day has.
    "heart-rate-samples": Source("heart-rate", "sample", 1, 10_000),
}


class Fitbit(Provider):
    """A stream for each data type; of heart rate two, its days and its samples.

    A list has no promised order, so a span is always read to its end.
    """

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
        # One request for each day that has a part in a look-back of seven.
        Stream("heart-rate-samples", "body", scopes=METRICS, optional=True, poll_cost=8),
    )
    pkce = True

    def pages(self, http: Http, stream: Stream, window: Window) -> Iterator[Page]:
        """Walk back in spans, each read to its last page and yielded as one: nothing tells their order.

        The look-back of a poll fits into one span, but for samples. The newest one has no end, or
        where one must be told, that of the civil day which has begun somewhere on Earth.
        """
        source, upper = SOURCES[stream.name], window.until
        read = rolled_up if source.shape == "rollup" else reconciled
        newest = window.newest
        while True:
            lowest = newest - timedelta(days=source.span)
            if source.shape == "rollup":
                lowest = midnight(edge(upper, newest) - timedelta(days=source.span))
            reached = max(window.since, lowest)
            yield Page(read(http, source, reached, upper, newest), reached)
            if reached <= window.since:
                return
            upper = newest = reached

    def record(self, stream: Stream, item: Json) -> Record:
        """Normalise a `ReconciledDataPoint` or a `DailyRollupDataPoint` (specs: google-health.v4)."""
        if not isinstance(item, dict):
            raise BadRecord(f"not a data point: {shown(item)}")
        source = SOURCES[stream.name]
        value = part(item, source.field)
        return Record(key(source, item), stream.kind, **READERS[source.shape](item, value))

    def external_id(self, stream: Stream, item: Json) -> str | None:
        """The point's own id, or a civil day, or for points without an id their interval and source."""
        try:
            return key(SOURCES[stream.name], item) if isinstance(item, dict) else None
        except BadRecord:
            return None

    def pools(self, settings: Endpoints, connection_id: int, *, token: bool = False) -> tuple[Pool, ...]:
        """Each request spends from the person's limit and from the project's; replies report neither."""
        project = self.pool(settings, "project", settings.budget, reports=False)
        user = self.pool(settings, "user", settings.user_budget, reports=False, connection_id=connection_id)
        return (project,) if token else (user, project)

    def authorize_extras(self) -> dict[str, str]:
        """Without `prompt=consent` a second sign-in gets no refresh token."""
        return {"access_type": "offline", "prompt": "consent", "include_granted_scopes": "true"}

    def revocation(self, access: str, refresh: str | None) -> RevokeRequest:
        """Google takes either token, and asks nobody who they are."""
        return RevokeRequest({"token": refresh or access}, authenticated=False)

    def account(self, http: Http) -> str | None:
        """Webhooks name the person by it, too."""
        return told_id(http, "/v4/users/me/identity", "healthUserId")

    # Webhooks: one subscriber for the project, which is told of whoever has granted us the data type.

    def webhook_topics(self, settings: Endpoints) -> tuple[str, ...]:
        """A subscriber needs a project; without one there are no webhooks."""
        return (",".join(self._types(settings)),) if settings.project else ()

    def webhook(self, settings: Endpoints, call: Call, known: Known) -> Heard:
        """The two calls of the verification, or notifications: signed, and with the subscriber's secret."""
        if not same(call.headers.get("authorization", ""), f"Bearer {webhook_secret(settings)}"):
            raise Forged("its Authorization is not ours")
        signature = call.headers.get("google-health-api-signature", "")
        if call.method == "POST" and not signature and parsed(call.body) == {"type": "verification"}:
            return Heard(status=201)
        check_signature(signature, call.body, known.keys)
        told = parsed(call.body)
        events = []
        for each in told if isinstance(told, list) else [told]:
            data = each.get("data") if isinstance(each, dict) else None
            data = data if isinstance(data, dict) else {}
            owner, about = plain_id(data.get("healthUserId")), str(data.get("dataType")).replace("_", "-")
            streams = tuple(stream.name for stream in self.streams if SOURCES[stream.name].type == about)
            if owner is not None and streams:
                events.append(Event(owner, streams, span=lived_in(data.get("intervals"))))
        return Heard(tuple(events), status=204, signature=signature)

    def webhook_keys(self, ask: Ask, settings: Endpoints) -> Json:
        return ask("GET", settings.webhook_keys_url)

    def subscriptions(self, ask: Ask, settings: Endpoints) -> list[Subscription]:
        found = ask("GET", subscribers(settings), headers=account_of(ask, settings))
        found = found.get("subscribers") if isinstance(found, dict) else None
        return [
            Subscription(str(each["name"]), ",".join(types_of(each)), str(each["endpointUri"]))
            for each in listed(found)
            if isinstance(each, dict) and {"name", "endpointUri"} <= each.keys()
        ]

    def subscribe(self, ask: Ask, settings: Endpoints, topic: str, callback: str) -> None:
        wanted = {
            "endpointUri": callback,
            "subscriberConfigs": [
                {"dataTypes": topic.split(","), "subscriptionCreatePolicy": "AUTOMATIC"},
            ],
            "endpointAuthorization": {"secret": f"Bearer {webhook_secret(settings)}"},
        }
        ask("POST", subscribers(settings), headers=account_of(ask, settings), json=wanted)

    def unsubscribe(self, ask: Ask, settings: Endpoints, subscription: Subscription) -> None:
        address = f"{settings.api_url}/v4/{subscription.id}"
        ask("DELETE", address, headers=account_of(ask, settings), params={"force": "true"})

    def _types(self, settings: Endpoints) -> list[str]:
        """The data types of all that is read."""
        return sorted({SOURCES[each.name].type for each in self.streams if each.wanted(settings)})

    def refusal(self, status: int, reply: Json) -> str | None:
        """What the person can mend."""
        if self.refuses_account(status, reply):
            return "this Google account has no Fitbit profile: set one up in the Fitbit app"
        return None

    def refuses_account(self, status: int, reply: Json) -> bool:
        """`ACCOUNT_NOT_LINKED`: an account without a profile has no data of any type."""
        error = reply.get("error") if isinstance(reply, dict) else None
        details = error.get("details") if isinstance(error, dict) else None
        return any(
            isinstance(each, dict) and each.get("reason") == "ACCOUNT_NOT_LINKED" for each in listed(details)
        )


# Webhooks


def lived_in(intervals: Json) -> tuple[datetime, datetime] | None:
    """The time that a notification's intervals span, a day wider: civil days are no days of UTC.

    None: it tells none that can be read, so the news may be anywhere in the latest.
    """
    times = []
    for each in listed(intervals):
        try:
            physical = part(each if isinstance(each, dict) else {}, "physicalTimeInterval")
            times += [begun(physical, "startTime"), begun(physical, "endTime")]
        except BadRecord:
            return None
    return (min(times) - DAY, max(times) + DAY) if times else None


def check_signature(signature: str, body: bytes, keys: Json) -> None:
    """Raises `Forged` unless one of Google's keys signed the body (ECDSA P-256, SHA-256).

    A signature is in Tink's form: a byte 1, the id of the key in four bytes, and the signature in DER, all
    that in base64. The keys are a Tink keyset in JSON.
    """
    try:
        raw = base64.b64decode(signature, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) < 6 or raw[0] != 1:
        raise Forged("its signature is none")
    key = public_key(keys, int.from_bytes(raw[1:5], "big"))
    if key is None:
        raise Forged("it is signed with a key that is not known")
    try:
        key.verify(raw[5:], body, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise Forged("its signature is not right") from None


def public_key(keyset: Json, key_id: int) -> ec.EllipticCurvePublicKey | None:
    """An enabled key of a keyset; None: it has none of that id that can be read."""
    keys = keyset.get("key") if isinstance(keyset, dict) else None
    for each in listed(keys):
        if isinstance(each, dict) and each.get("keyId") == key_id and each.get("status") == "ENABLED":
            try:
                x, y = coordinates(base64.b64decode(each["keyData"]["value"]))
                return ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
            except (KeyError, TypeError, ValueError):
                return None
    return None


def coordinates(message: bytes) -> tuple[int, int]:
    """The point of Tink's `EcdsaPublicKey`: fields 3 and 4 of a protocol buffer. Raises ValueError."""
    found, place = dict[int, int](), 0
    while place + 1 < len(message):
        tag, length = message[place], message[place + 1]
        place += 2
        if tag & 7 == 2:  # with a length
            found[tag >> 3] = int.from_bytes(message[place : place + length], "big")
            place += length
    if not {3, 4} <= found.keys():
        raise ValueError("no point of a curve")
    return found[3], found[4]


def subscribers(settings: Endpoints) -> str:
    return f"{settings.api_url}/v4/projects/{settings.project}/subscribers"


def types_of(subscriber: dict[str, Json]) -> list[str]:
    """The data types that a subscriber is told of, without being asked for each person."""
    found = set()
    for config in listed(subscriber.get("subscriberConfigs")):
        if isinstance(config, dict) and config.get("subscriptionCreatePolicy") == "AUTOMATIC":
            found |= {each for each in listed(config.get("dataTypes")) if isinstance(each, str)}
    return sorted(found)


def account_of(ask: Ask, settings: Endpoints) -> dict[str, str]:
    """The project's own authorisation: a token for its service account (RFC 7523), or one set as it is."""
    secret = settings.service_account.get_secret_value()
    try:
        account = json.loads(secret)
    except ValueError:
        account = None
    if not isinstance(account, dict):
        return {"Authorization": f"Bearer {secret}"}
    now = int(ask.now.timestamp())
    claims = {
        "iss": account.get("client_email"),
        "scope": "https://www.googleapis.com/auth/cloud-platform",
        "aud": settings.token_url,
        "iat": now,
        "exp": now + 3600,
    }
    said = ".".join(map(urlsafe, ({"alg": "RS256", "typ": "JWT"}, claims)))
    try:
        key = serialization.load_pem_private_key(str(account.get("private_key")).encode(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, rsa.RSAPrivateKey):
        raise Refused("Fitbit: the service account's key cannot be read")
    proof = base64.urlsafe_b64encode(key.sign(said.encode(), padding.PKCS1v15(), hashes.SHA256()))
    form = {
        "grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer",
        "assertion": f"{said}.{proof.rstrip(b'=').decode()}",
    }
    reply = ask("POST", settings.token_url, data=form)
    token = reply.get("access_token") if isinstance(reply, dict) else None
    if not isinstance(token, str):
        raise Refused("Fitbit: the service account gets no token")
    return {"Authorization": f"Bearer {token}"}


def urlsafe(value: Json) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


# Asking


def reconciled(
    http: Http, source: Source, since: datetime, until: datetime | None, newest: datetime
) -> list[Json]:
    """All points of [since, until), and some around: what people see in the app, over all their devices."""
    until = until and until + SECOND  # filters take whole seconds
    name, member, low, high = source.type.replace("-", "_"), "", stamp(since), until and stamp(until)
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
    path = f"/v4/users/me/dataTypes/{source.type}/dataPoints:reconcile"
    return points(source, lambda more: http.get(path, **query, **more), "dataPoints")


def rolled_up(
    http: Http, source: Source, since: datetime, until: datetime | None, newest: datetime
) -> list[Json]:
    """The civil days of [since, until). A day about which nothing is known is no item."""
    span = {"start": {"date": parts(since.date())}, "end": {"date": parts(edge(until, newest))}}
    body: dict[str, Any] = {"range": span, "windowSizeDays": 1, "pageSize": source.size}
    path = f"/v4/users/me/dataTypes/{source.type}/dataPoints:dailyRollUp"
    found = points(source, lambda more: http.post(path, {**body, **more}), "rollupDataPoints")
    return [item for item in found if not isinstance(item, dict) or item.get(source.field)]


def points(source: Source, ask: Callable[[dict[str, str]], Json], name: str) -> list[Json]:
    """All points of a list; an absent one is empty."""
    return whole_list(source.type, ask, name, "nextPageToken", asked_as="pageToken", absent=[])


def stamp(moment: datetime) -> str:
    """An instant as filters take it (RFC 3339); whole seconds, rounded down."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def civil(moment: datetime) -> str:
    """A civil time as filters take it."""
    return moment.strftime("%Y-%m-%dT%H:%M:%S")


def edge(until: datetime | None, newest: datetime) -> date:
    """The civil day before which a roll-up ends: the newest has all days that begun anywhere on Earth."""
    return (until + DAY - RESOLUTION if until else newest + EAST + DAY).date()


def parts(day: date) -> dict[str, int]:
    return {"year": day.year, "month": day.month, "day": day.day}


# Reading points


def key(source: Source, item: Mapping[str, Json]) -> str:
    """What identifies a point in its stream, and stays the same however often it is asked for."""
    value = part(item, source.field)
    if source.shape == "rollup":
        return day(part(item, "civilStartTime")).isoformat()
    if source.shape == "daily":
        return day(value).isoformat()
    named = re.fullmatch(r"users/[^/]+/dataTypes/[^/]+/dataPoints/([\w.~-]{1,150})", name_of(item), re.ASCII)
    if named:
        return named[1]
    if source.shape == "sample":
        interval = [begun(part(value, "sampleTime"), "physicalTime")]
    else:
        interval = [begun(part(value, "interval"), each) for each in ("startTime", "endTime")]
    words = [moment.isoformat() for moment in interval]
    try:
        taken_by = json.dumps(item.get("dataSource"), sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        raise BadRecord("dataSource: cannot be read") from None
    return "/".join([*words, hashlib.sha256(taken_by.encode()).hexdigest()[:16]])


def session(item: Mapping[str, Json], value: Mapping[str, Json]) -> dict[str, Any]:
    """An `Exercise`."""
    interval, summary = part(value, "interval"), maybe(value, "metricsSummary")
    start, end = begun(interval, "startTime"), begun(interval, "endTime")
    sport = text(value, "exerciseType")
    return {
        "ordered_at": start,
        "start_at": start,
        "end_at": end,
        "utc_offset_s": offset(interval, "startUtcOffset"),
        "local_date": civil_date(interval, "civilStartTime", start, "startUtcOffset"),
        "type": word(TYPES, sport),
        "provider_type": sport,
        "title": text(value, "displayName"),
        "duration_s": lasted(start, end, "endTime"),
        "moving_s": seconds(value, "activeDuration"),
        "distance_m": scaled(quantity(summary, "distanceMillimeters"), 0.001),
        "elevation_gain_m": scaled(quantity(summary, "elevationGainMillimeters"), 0.001),
        "energy_j": joules(quantity(summary, "caloriesKcal")),
        "heart_rate_avg_bpm": quantity(summary, "averageHeartRateBeatsPerMinute"),
        "steps": count(quantity(summary, "steps"), "steps"),
    }


def sleep(item: Mapping[str, Json], value: Mapping[str, Json]) -> dict[str, Any]:
    """A `Sleep`: a night or a nap. Its civil date is that of waking up."""
    interval, summary, about = part(value, "interval"), maybe(value, "summary"), maybe(value, "metadata")
    start, end = begun(interval, "startTime"), begun(interval, "endTime")
    main, nap = about.get("mainSleep"), about.get("nap")
    return {
        "ordered_at": start,
        "start_at": start,
        "end_at": end,
        "utc_offset_s": offset(interval, "startUtcOffset"),
        "local_date": civil_date(interval, "civilEndTime", end, "endUtcOffset"),
        "provider_type": text(value, "type"),
        "duration_s": lasted(start, end, "endTime", LONGEST_SLEEP),
        "is_main_sleep": main if isinstance(main, bool) else False if nap is True else None,
        "asleep_s": scaled(quantity(summary, "minutesAsleep"), 60),
        "awake_s": scaled(quantity(summary, "minutesAwake"), 60),
        "light_sleep_s": stage(summary, "LIGHT"),
        "deep_sleep_s": stage(summary, "DEEP"),
        "rem_sleep_s": stage(summary, "REM"),
    }


def rollup(item: Mapping[str, Json], value: Mapping[str, Json]) -> dict[str, Any]:
    """A `DailyRollupDataPoint`: one civil day, summed up. Each type has fields of its own."""
    when = day(part(item, "civilStartTime"))
    return {
        "ordered_at": midnight(when),
        "local_date": when,
        "steps": count(quantity(value, "countSum"), "countSum"),
        "distance_m": scaled(quantity(value, "millimetersSum"), 0.001),
        "energy_j": joules(quantity(value, "kcalSum")),
        "heart_rate_avg_bpm": quantity(value, "beatsPerMinuteAvg"),
        "heart_rate_max_bpm": quantity(value, "beatsPerMinuteMax"),
        "heart_rate_min_bpm": quantity(value, "beatsPerMinuteMin"),
    }


def daily(item: Mapping[str, Json], value: Mapping[str, Json]) -> dict[str, Any]:
    """What Google derives once a day. Each type has fields of its own."""
    when = day(value)
    return {
        "ordered_at": midnight(when),
        "local_date": when,
        "heart_rate_resting_bpm": quantity(value, "beatsPerMinute"),
        "hrv_rmssd_ms": quantity(value, "averageHeartRateVariabilityMilliseconds"),
        "spo2_avg_pct": quantity(value, "averagePercentage"),
    }


def sample(item: Mapping[str, Json], value: Mapping[str, Json]) -> dict[str, Any]:
    """A `Weight` or a `HeartRate`. Each type has fields of its own."""
    when = part(value, "sampleTime")
    moment = begun(when, "physicalTime")
    return {
        "ordered_at": moment,
        "start_at": moment,
        "utc_offset_s": offset(when, "utcOffset"),
        "local_date": civil_date(when, "civilTime", moment, "utcOffset"),
        "weight_kg": scaled(quantity(value, "weightGrams"), 0.001),
        "heart_rate_avg_bpm": quantity(value, "beatsPerMinute"),
    }


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


def quantity(item: Mapping[str, Json], name: str) -> float | None:
    """A number, also one that comes as a string: int64 does (`"9007199254740993"`)."""
    value = item.get(name)
    if isinstance(value, str):
        if not re.fullmatch(r"-?[0-9]{1,15}", value):
            raise BadRecord(f"{name}: not a number: {shown(value)}")
        return float(value)
    return number(item, name)


def seconds(item: Mapping[str, Json], name: str) -> float | None:
    """A duration: `"7200s"`, `"-39600s"`, `"1.5s"`."""
    value = item.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not re.fullmatch(r"-?[0-9]{1,9}(\.[0-9]{1,9})?s", value):
        raise BadRecord(f"{name}: not a duration: {shown(value)}")
    return float(value[:-1])


def offset(item: Mapping[str, Json], name: str) -> int | None:
    return utc_offset(seconds(item, name), name)


def day(item: Mapping[str, Json]) -> date:
    """A full civil date."""
    value = part(item, "date")
    try:
        return lived(date(value["year"], value["month"], value["day"]), "date")
    except (KeyError, TypeError, ValueError, OverflowError):
        raise BadRecord(f"date: not a date: {shown(value)}") from None


def civil_date(item: Mapping[str, Json], name: str, moment: datetime, offset_name: str) -> date | None:
    """The civil date as told, or else from the instant and the person's offset then."""
    if item.get(name) is not None:
        return day(part(item, name))
    return date_there(moment, offset(item, offset_name))


def stage(summary: Mapping[str, Json], kind: str) -> float | None:
    """How long the stages of a kind were, in seconds."""
    value = summary.get("stagesSummary")
    found = [each for each in listed(value) if isinstance(each, dict) and each.get("type") == kind]
    return scaled(quantity(found[0], "minutes"), 60) if found else None
