"""Strava API v3. Each fact and its source: docs/providers/strava.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta

from lifelogger.errors import BadRecord, Forged, NotThere, Refused, Unavailable
from lifelogger.providers.base import (
    LONGEST,
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
    Stream,
    Subscription,
    Usage,
    Window,
    begun,
    date_there,
    number,
    parsed,
    same,
    scaled,
    shown,
    text,
    utc_offset,
    webhook_secret,
    word,
)

LARGEST_PAGE = 200
SPARE = 10
"""How many items more than we hold of a window one page asks for: new ones, and the one item
older than the window that proves its end without a second request."""
SECOND = timedelta(seconds=1)
MOST_EMPTY_STEPS = 5
"""Pages in a row that bring nothing older before we conclude that the list has no end: all of them would
have to begin in one second, or be unreadable. Each costs a request that somebody else could use."""

DETAIL_ONLY = frozenset(
    (
        "best_efforts",
        "calories",
        "description",
        "elev_high",
        "elev_low",
        "embed_token",
        "gear",
        "hide_from_home",
        "highlighted_kudosers",
        "laps",
        "leaderboard_opt_out",
        "partner_brand_tag",
        "photos",
        "segment_efforts",
        "segment_leaderboard_opt_out",
        "similar_activities",
        "splits_metric",
        "splits_standard",
        "stats_visibility",
    )
)
"""What an activity that is asked for by its id has beyond those of the list."""

TYPES = {
    "AlpineSki": "alpine_skiing",
    "BackcountrySki": "backcountry_skiing",
    "Badminton": "badminton",
    "Canoeing": "canoeing",
    "Crossfit": "crossfit",
    "EBikeRide": "e_biking",
    "Elliptical": "elliptical",
    "EMountainBikeRide": "e_biking",
    "Golf": "golf",
    "GravelRide": "cycling",
    "Handcycle": "handcycling",
    "HighIntensityIntervalTraining": "interval_training",
    "Hike": "hiking",
    "IceSkate": "ice_skating",
    "InlineSkate": "inline_skating",
    "Kayaking": "kayaking",
    "Kitesurf": "kitesurfing",
    "MountainBikeRide": "mountain_biking",
    "NordicSki": "cross_country_skiing",
    "Pickleball": "pickleball",
    "Pilates": "pilates",
    "Racquetball": "racquetball",
    "Ride": "cycling",
    "RockClimbing": "climbing",
    "RollerSki": "roller_skiing",
    "Rowing": "rowing",
    "Run": "running",
    "Sail": "sailing",
    "Skateboard": "skateboarding",
    "Snowboard": "snowboarding",
    "Snowshoe": "snowshoeing",
    "Soccer": "football",
    "Squash": "squash",
    "StairStepper": "stair_climbing",
    "StandUpPaddling": "stand_up_paddling",
    "Surfing": "surfing",
    "Swim": "swimming",
    "TableTennis": "table_tennis",
    "Tennis": "tennis",
    "TrailRun": "trail_running",
    "Velomobile": "cycling",
    "VirtualRide": "cycling",
    "VirtualRow": "rowing",
    "VirtualRun": "running",
    "Walk": "walking",
    "WeightTraining": "strength_training",
    "Wheelchair": "wheelchair",
    "Windsurf": "windsurfing",
    "Workout": "workout",
    "Yoga": "yoga",
}
"""Strava's `SportType` to our vocabulary. A word that is not here is `other`, and kept beside it."""


class Strava(Provider):
    """One stream, `activities`, read from the list of the athlete's own activities."""

    name = "strava"
    title = "Strava"
    scopes = ("read", "activity:read_all")
    streams = (Stream("activities", "activity", scopes=("activity:read_all", "activity:read")),)
    scope_separator = ","
    one_subscription = True

    def pages(self, http: Http, stream: Stream, window: Window) -> Iterator[Page]:
        """Walk back from the newest activity until one lies before the window.

        The list is asked without `after`, which gives the newest first: a poll without news then
        ends after one page, at the first activity older than the window. With `after` the end
        would cost a second, empty page each time, because a short page may have successors.

        After a full page the walk goes on `before` the oldest start, so that activities uploaded
        or deleted meanwhile shift nothing; after a short one with the next page of the same list.
        """
        size = LARGEST_PAGE if window.expect is None else min(LARGEST_PAGE, window.expect + SPARE)
        before = window.until
        oldest: datetime | None = None
        number_of_page, steps = 1, 0
        while True:
            query = {"per_page": size, "page": number_of_page}
            if before is not None:
                query["before"] = epoch(before)
            items = http.get("/athlete/activities", **query)
            if not isinstance(items, list):
                raise Unavailable("the list of activities is not a list")
            if not items:
                yield Page([], window.since, end=True)
                return
            starts = [start for item in items if (start := readable_start(item)) is not None]
            lowest = min(starts, default=None)
            older = lowest is not None and (oldest is None or lowest < oldest)
            oldest = lowest if older else oldest
            # Another activity may begin in the same second as the oldest one and stand on the next page.
            reached = None if oldest is None else oldest + SECOND
            if number_of_page == 1 and before is not None and lowest == before - SECOND and len(items) < size:
                reached = lowest  # it had room for more of that second: a walk that is cut here goes on below
            ended = oldest is not None and (
                oldest < window.since or (window.floor is not None and oldest <= window.floor)
            )
            if ended and reached is not None:
                yield Page(items, min(reached, window.since))
                return
            yield Page(items, reached)
            steps = 0 if older else steps + 1
            if steps > MOST_EMPTY_STEPS:
                raise Unavailable("the list of activities does not end")
            if len(items) >= size and older and reached is not None:
                before, number_of_page = reached, 1
            else:
                number_of_page += 1

    def item(self, http: Http, stream: Stream, external_id: str, owner: str | None) -> Json:
        """An activity as the list has it, so that whichever of both is read next writes nothing anew.

        Events are not signed, and name whatever their sender likes: an activity of somebody else, who lets
        everybody see it, is none of this person's.
        """
        try:
            found = http.get(f"/activities/{external_id}")
        except NotThere:
            return None
        if not isinstance(found, dict):
            raise Unavailable("the activity is not an object")
        return summary(found) if whole_number(found.get("athlete")) == owner else None

    def record(self, stream: Stream, item: Json) -> Record:
        """Normalise a `SummaryActivity` (specs: strava.swagger.json)."""
        if not isinstance(item, dict):
            raise BadRecord(f"not an activity: {shown(item)}")
        key = self.external_id(stream, item)
        if key is None:
            raise BadRecord(f"id: not a whole number: {shown(item.get('id'))}")
        start = begun(item, "start_date")
        sport = text(item, "sport_type") or text(item, "type")
        elapsed = number(item, "elapsed_time")
        offset = utc_offset(number(item, "utc_offset"), "utc_offset")
        if elapsed is not None and not 0 <= elapsed < LONGEST.total_seconds():
            raise BadRecord(f"elapsed_time: not the length of an activity: {shown(elapsed)}")
        return Record(
            external_id=key,
            kind=stream.kind,
            ordered_at=start,
            start_at=start,
            end_at=None if elapsed is None else start + timedelta(seconds=elapsed),
            utc_offset_s=offset,
            local_date=date_there(start, offset),
            type=word(TYPES, sport),
            provider_type=sport,
            title=text(item, "name"),
            duration_s=elapsed,
            moving_s=number(item, "moving_time"),
            distance_m=number(item, "distance"),
            elevation_gain_m=number(item, "total_elevation_gain"),
            # Calories stand in the detail only; kilojoules are the mechanical work of a ride.
            work_j=scaled(number(item, "kilojoules"), 1000),
            heart_rate_avg_bpm=number(item, "average_heartrate"),
            heart_rate_max_bpm=number(item, "max_heartrate"),
        )

    def external_id(self, stream: Stream, item: Json) -> str | None:
        return whole_number(item)

    def pools(self, settings: Endpoints, connection_id: int, *, token: bool = False) -> tuple[Pool, ...]:
        """Reads spend from the read limits and the overall ones, token calls from the latter only."""
        overall = self.pool(settings, "overall", settings.overall_budget, reports=True)
        reads = self.pool(settings, "reads", settings.budget, reports=True)
        return (overall,) if token else (reads, overall)

    def usage(self, headers: Mapping[str, str]) -> dict[str, Usage]:
        """`X-ReadRateLimit-*` and `X-RateLimit-*`: the 15 minutes, then the day."""
        found = {}
        for pool, prefix in (("reads", "X-ReadRateLimit"), ("overall", "X-RateLimit")):
            limits, used = counts(headers.get(f"{prefix}-Limit")), counts(headers.get(f"{prefix}-Usage"))
            if limits and used:
                found[pool] = Usage(limits, used)
        return found

    def authorize_extras(self) -> dict[str, str]:
        return {"approval_prompt": "auto"}

    def grantee(self, reply: Json) -> str | None:
        athlete = reply.get("athlete") if isinstance(reply, dict) else None
        return whole_number(athlete)

    def account(self, http: Http) -> str | None:
        """Asked of tokens that came without it: a sign-in tells it."""
        try:
            return whole_number(http.get("/athlete"))
        except Refused:
            return None

    # Webhooks: one subscription for the application, and events that are not signed.

    def webhook_topics(self, settings: Endpoints) -> tuple[str, ...]:
        return ("all",)

    def webhook(self, settings: Endpoints, call: Call, known: Known) -> Heard:
        """The handshake, or an event: of one of our subscriptions, and otherwise a hint at best.

        Anybody can send one, even that a person left: so whether it is true is asked over the API.
        """
        if call.method == "GET":
            if not same(call.query.get("hub.verify_token", ""), webhook_secret(settings)):
                raise Forged("hub.verify_token is not ours")
            return Heard(reply={"hub.challenge": call.query.get("hub.challenge", "")[:200]})
        event = parsed(call.body)
        if not isinstance(event, dict) or str(event.get("subscription_id")) not in known.subscriptions:
            raise Forged("it is of no subscription of ours")
        owner = whole_number({"id": event.get("owner_id")})
        if owner is None:
            raise Forged("it is nobody's")
        updates = event.get("updates")
        left = isinstance(updates, dict) and str(updates.get("authorized")).lower() == "false"
        if event.get("object_type") == "athlete":
            return Heard((Event(owner, deauthorised=True),) if left else ())
        streams = tuple(stream.name for stream in self.streams)
        return Heard((Event(owner, streams, whole_number({"id": event.get("object_id")})),))

    def subscriptions(self, ask: Ask, settings: Endpoints) -> list[Subscription]:
        found = ask("GET", f"{settings.api_url}/push_subscriptions", params=application(settings))
        return [
            Subscription(str(each["id"]), "all", str(each["callback_url"]))
            for each in (found if isinstance(found, list) else [])
            if isinstance(each, dict) and {"id", "callback_url"} <= each.keys()
        ]

    def subscribe(self, ask: Ask, settings: Endpoints, topic: str, callback: str) -> None:
        form = {"callback_url": callback, "verify_token": webhook_secret(settings)}
        ask("POST", f"{settings.api_url}/push_subscriptions", data={**application(settings), **form})

    def unsubscribe(self, ask: Ask, settings: Endpoints, subscription: Subscription) -> None:
        address = f"{settings.api_url}/push_subscriptions/{subscription.id}"
        ask("DELETE", address, params=application(settings))

    def grant_is_dead(self, status: int, reply: Json) -> bool:
        """Strava answers a dead refresh token with a 400 of its own shape, not `invalid_grant`."""
        if super().grant_is_dead(status, reply):
            return True
        errors = reply.get("errors") if isinstance(reply, dict) else None
        return status == 400 and any(
            isinstance(error, dict)
            and error.get("resource") == "RefreshToken"
            and error.get("code") == "invalid"
            for error in (errors if isinstance(errors, list) else [])
        )


def application(settings: Endpoints) -> dict[str, str]:
    """Who we are, where no person's token says so."""
    return {"client_id": settings.client_id, "client_secret": settings.client_secret.get_secret_value()}


def summary(detail: Mapping[str, Json]) -> dict[str, Json]:
    """A `DetailedActivity` as a `SummaryActivity`."""
    found = {name: value for name, value in detail.items() if name not in DETAIL_ONLY}
    course = found.get("map")
    if isinstance(course, dict):
        found["map"] = {**course, "resource_state": 2}
        found["map"].pop("polyline", None)
    return {**found, "resource_state": 2}


def readable_start(item: Json) -> datetime | None:
    """The start of an item, or None when it is one that `record` will refuse."""
    try:
        return begun(item, "start_date") if isinstance(item, dict) else None
    except BadRecord:
        return None


def whole_number(item: Json) -> str | None:
    """The `id` of an item as text: Strava's are 64-bit whole numbers. None: it has none."""
    value = item.get("id") if isinstance(item, dict) else None
    plausible = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63
    return str(value) if plausible else None


def epoch(moment: datetime) -> int:
    """Whole epoch seconds, as Strava's `before` and `after` take them."""
    return int(moment.timestamp())


def counts(header: str | None) -> tuple[int, int] | None:
    """`"12,345"` as numbers; None when the header is missing or something else."""
    found = re.fullmatch(r"\s*([0-9]{1,9})\s*,\s*([0-9]{1,9})\s*", header or "")
    return (int(found[1]), int(found[2])) if found else None
