"""The simulated Strava, API v3: sources are Strava's own Swagger document and its developer pages.

Where they are silent it does what loses no data; such choices are told beside the code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from random import Random
from secrets import token_hex
from typing import Any, ClassVar
from zoneinfo import ZoneInfo

from lifelogger.sandbox import hooks
from lifelogger.sandbox.activities import Shown
from lifelogger.sandbox.calls import Call, Mistake, Reply, Route, basic, compact, json_reply, route
from lifelogger.sandbox.grants import Grant, Token
from lifelogger.sandbox.hooks import here
from lifelogger.sandbox.ledger import OTHER, PAGE, READ, TOKEN
from lifelogger.sandbox.people import SPORTS, Activity, Measures, Person, Sport
from lifelogger.sandbox.provider import Provider, Refusal, pair, utc

WINDOWS = (900, 86_400)
SCOPES = (
    "read",
    "read_all",
    "profile:read_all",
    "profile:write",
    "activity:read",
    "activity:read_all",
    "activity:write",
)
READING = ("activity:read", "activity:read_all")
"""Either shows activities, the second one private ones, too."""
LARGEST_PAGE = 200
DEFAULT_PAGE = 30
KEPT_SECONDS = 3600
"""A refresh returns the access token there is while it has more than this left."""
ROTATIONS = ("new access token", "always", "never")
MOST_RENDERED = 50_000
"""Items kept as JSON: some 60 MB."""

TYPES = {"TrailRun": "Run", "GravelRide": "Ride", "MountainBikeRide": "Ride"}
"""The older `type` of a `sport_type`, where it is another word."""
STREAMS = (
    "time",
    "distance",
    "latlng",
    "altitude",
    "velocity_smooth",
    "heartrate",
    "cadence",
    "watts",
    "temp",
    "moving",
    "grade_smooth",
)
DEVICES = (
    "Garmin Edge 1030",
    "Garmin Forerunner 255",
    "Wahoo ELEMNT BOLT",
    "Apple Watch Series 9",
    "COROS PACE 3",
)


class Strava(Provider):
    """People's activities, one list each."""

    name = "strava"
    title = "Strava"
    base = "/api/v3"
    scopes = SCOPES
    usual_scopes = ("read", "activity:read_all")
    separator = ","
    defaults: ClassVar[Mapping[str, Any]] = {
        "short_pages": False,
        "rotate": "new access token",
        "access_token_seconds": 6 * 3600,
    }
    choices: ClassVar[Mapping[str, Sequence[str]]] = {"rotate": ROTATIONS}
    pools: ClassVar[Mapping[str, tuple[int, ...]]] = {"reads": WINDOWS, "overall": WINDOWS}
    first_limits: ClassVar[Mapping[str, tuple[int, ...]]] = {"reads": (100, 1000), "overall": (200, 2000)}

    def make_routes(self) -> Sequence[Route]:
        return (
            route(READ, "GET /athlete/activities", self._list, self.base),
            route(READ, "GET /athlete", self._athlete, self.base),
            route(READ, "GET /activities/{id}", self._detail, self.base),
            route(READ, "GET /activities/{id}/streams", self._streams, self.base),
            route(OTHER, "GET /push_subscriptions", self._subscriptions, self.base),
            route(OTHER, "POST /push_subscriptions", self._subscribe, self.base),
            route(OTHER, "DELETE /push_subscriptions/{id}", self._unsubscribe, self.base),
            route(TOKEN, "POST /oauth/token", self.token, self.base),
            route(TOKEN, "POST /oauth/revoke", self.revoke),
            route(PAGE, "GET /oauth/authorize", self.authorize),
        )

    def load(self) -> None:
        super().load()
        self._rendered: dict[tuple[int, int], bytes] = {}

    # Who asks, and what it costs

    def count(self, call: Call) -> None:
        kind = self.kind(call)
        if kind == PAGE or not (call.path.startswith(f"{self.base}/") or kind == TOKEN):
            return
        reads = kind == READ or (kind == OTHER and call.method == "GET")
        call.pools = self.counted("reads" if reads else "overall")
        call.refused = self.spend(call.client, call.pools, call.now)

    def headers(self, call: Call) -> dict[str, str]:
        """The limits of the application and what it used of them, in the windows of the reply."""
        if not call.path.startswith(f"{self.base}/") and self.kind(call) != TOKEN:
            return {}
        now = self.clock.now()
        found = {}
        for pool, prefix in (("overall", "X-RateLimit"), ("reads", "X-ReadRateLimit")):
            found[f"{prefix}-Limit"] = pair(self.limits[pool])
            found[f"{prefix}-Usage"] = pair(self.usage(call.client, pool, now))
        return found

    # What is answered

    def failure(self, status: int) -> Reply:
        return fault(status, *FAULTS.get(status, (f"Error {status}", "Application", "", "error")))

    def invalid(self, parameter: str) -> Reply:
        return fault(400, "Bad Request", "Application", parameter, "invalid")

    def missing(self, scope: str) -> Reply:
        return fault(403, "Forbidden", "AccessToken", f"{scope}_permission", "missing")

    def _athlete(self, call: Call) -> Reply:
        return json_reply(200, athlete(self.asker(call), detailed=has(call, "profile:read_all")))

    def _list(self, call: Call) -> Reply:
        person = self.asker(call, *READING)
        try:
            after, before = number(call, "after"), number(call, "before")
            page = number(call, "page", 1, 2**31) or 1
            size = number(call, "per_page", 1, LARGEST_PAGE) or DEFAULT_PAGE
        except ValueError as error:
            raise Refusal(400, f"{error}: not a number it can be", self.invalid(str(error))) from None
        if call.endless:
            after, before, page = None, None, 1
        shown = self.view(person, self.clock.now()).between(after, before)
        if after is None:
            shown = shown[::-1]
        items = self._page(shown, page, size, everything=has(call, READING[1]))
        return Reply(200, b"[" + b",".join(map(self._render, items)) + b"]")

    def _page(self, shown: Sequence[Shown], page: int, size: int, everything: bool) -> Sequence[Shown]:
        """One page of a list. Strava cuts pages first and then drops what the token may not see.

        A page that lost all it had is left out: an empty one tells the client that the list has ended.
        """
        if self.settings["short_pages"]:
            size = max(1, size * 2 // 3)
        if everything:
            return shown[(page - 1) * size : page * size]
        pages = (
            [one for one in shown[first : first + size] if not self._private(one)]
            for first in range(0, len(shown), size)
        )
        full = [items for items in pages if items]
        return full[page - 1] if page <= len(full) else ()

    def _detail(self, call: Call) -> Reply:
        one = self._own(call, self.asker(call, *READING))
        if one is None:
            return fault(404, "Record Not Found", "Activity", "id", "invalid")
        more = details(one.activity, self.people.measures(one.activity))
        return json_reply(200, one.change.apply({**self.item(one.moved), **more}))

    def _streams(self, call: Call) -> Reply:
        person = self.asker(call, *READING)
        keys = list(filter(None, (call.asked("keys") or "").split(",")))
        if not keys or any(key not in STREAMS for key in keys):
            call.entry.note = "keys: not names of streams"
            return fault(400, "Bad Request", "Stream", "keys", "invalid")
        if call.asked("key_by_type") not in ("true", "1"):
            call.entry.note = "key_by_type: must be true"
            return fault(400, "Bad Request", "Stream", "key_by_type", "invalid")
        one = self._own(call, person)
        measured = self.people.measures(one.activity) if one else None
        if one is None or measured is None or measured.manual:
            return self.failure(404)
        found = streams(one.activity, measured, person)
        return json_reply(200, {key: found[key] for key in keys if key in found})

    def _own(self, call: Call, person: Person) -> Shown | None:
        """The activity that is asked for, if it is the person's and the token may see it."""
        one = self.view(person, self.clock.now()).find(int(call.params["id"]))
        return None if one is None or (self._private(one) and not has(call, READING[1])) else one

    def _private(self, one: Shown) -> bool:
        private = one.activity.private
        return bool(one.change.edited({"private": private}).get("private", private))

    # Webhooks

    hook_streams = ("activities",)
    hook_retries = (60, 300)
    """At most three tries; how far apart is not told."""
    hook_timeout = 2

    def _application(self, call: Call) -> str:
        """Whose subscriptions are asked for. Raises `Refusal`."""
        client = call.form.get("client_id") or call.asked("client_id") or ""
        secret = call.form.get("client_secret") or call.asked("client_secret") or ""
        if not self.knows_client(client, secret):
            raise Refusal(401, "wrong client id or secret", self.failure(401))
        return client

    def _subscriptions(self, call: Call) -> Reply:
        found = self.hooks.of(self._application(call))
        return json_reply(200, [subscription(each) for each in found])

    def _subscribe(self, call: Call) -> Reply:
        """One for each application, once its callback has repeated a challenge."""
        client, form = self._application(call), call.form
        if self.hooks.of(client):
            raise Refusal(400, "", fault(400, "Bad Request", "PushSubscription", "", "already exists"))
        try:
            url = here(form.get("callback_url", ""))
        except Mistake as mistake:
            raise Refusal(400, str(mistake), self._not_verifiable()) from None
        word, secret = token_hex(8), form.get("verify_token", "")
        query = {"hub.mode": "subscribe", "hub.challenge": word, "hub.verify_token": secret}

        async def later() -> Reply:
            status, told = await hooks.challenge(url, query, self.hook_timeout)
            if status != 200 or told != {"hub.challenge": word}:
                return self._not_verifiable()
            number = max([300_000, *(int(each) for each in self.hooks.subscriptions)]) + 1
            now = self.clock.now()
            self.hooks.add(hooks.Subscription(str(number), client, url, secret, [], now))
            return json_reply(201, {"id": number})

        return Reply(201, later=later)

    def _not_verifiable(self) -> Reply:
        return fault(400, "Bad Request", "PushSubscription", "callback url", "not verifiable")

    def _unsubscribe(self, call: Call) -> Reply:
        client, wanted = self._application(call), call.params["id"]
        if wanted not in {each.id for each in self.hooks.of(client)}:
            raise Refusal(404, "no such subscription")
        self.hooks.remove(wanted)
        return Reply(204)

    def hook_event(self, event: hooks.Event, to: hooks.Subscription) -> Any:
        athlete = athlete_id(event.person)
        told = {"owner_id": athlete, "subscription_id": int(to.id), "event_time": int(event.at)}
        if event.what == "revoke":
            happened = {"object_type": "athlete", "object_id": athlete, "aspect_type": "update"}
            return {**happened, "updates": {"authorized": "false"}, **told}
        updates = {"title": "Changed"} if event.what == "update" else {}
        happened = {"object_type": "activity", "object_id": int(event.key), "aspect_type": event.what}
        return {**happened, "updates": updates, **told}

    # Items

    def item(self, activity: Activity) -> Any:
        return summary(self.people.all[activity.owner], activity, self.people.measures(activity))

    def _render(self, shown: Shown) -> bytes:
        key = (shown.activity.key, shown.change.version)
        text = self._rendered.get(key)
        if text is None:
            if len(self._rendered) >= MOST_RENDERED:
                self._rendered.clear()
            text = self._rendered[key] = compact(self.shown(shown))
        return text

    def start_in(self, fields: Mapping[str, Any]) -> int | None:
        text = fields.get("start_date")
        if not isinstance(text, str):
            return None
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            return None  # a date that is none, on purpose: the order stays
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())

    def account(self, person: Person) -> dict[str, Any]:
        return {"athlete_id": athlete_id(person)}

    # Authorisation

    def issue(self, grant: Grant, now: float, refresh: str | None = None) -> dict[str, Any]:
        tokens = super().issue(grant, now, refresh)
        return {**tokens, "expires_at": int(now) + tokens["expires_in"]}

    def renew(self, refresh: Token, now: float) -> dict[str, Any]:
        """A new access token, unless there is one with an hour left. Older ones work until they expire."""
        grant, rotate = refresh.grant, self.settings["rotate"]
        newest = self.grants.newest(grant, "access")
        kept = newest and newest.expires_at is not None and newest.expires_at - now > KEPT_SECONDS
        word = refresh.token
        if rotate == "always" or (rotate == "new access token" and not kept):
            self.grants.replace(grant, "refresh", now)
            word = self.grants.issue(grant, "refresh")
        if newest is None or newest.expires_at is None or not kept:
            return self.issue(grant, now, word)
        return {
            "token_type": "Bearer",
            "access_token": newest.token,
            "expires_at": newest.expires_at,
            "expires_in": newest.expires_at - int(now),
            "refresh_token": word,
            "scope": " ".join(grant.scopes),
        }

    def welcome(self, person: Person) -> dict[str, Any]:
        return {"athlete": athlete(person, detailed=False)}

    def denied(self, call: Call, status: int, error: str) -> Reply:
        if error == "invalid_client":
            return fault(status, "Authorization Error", "Application", "client_secret", "invalid")
        if error == "unsupported_grant_type":
            return self.invalid("grant_type")
        if call.form.get("grant_type") == "authorization_code":
            return fault(status, "Bad Request", "AuthorizationCode", "code", "invalid")
        return fault(status, "Bad Request", "RefreshToken", "refresh_token", "invalid")

    def revoke(self, call: Call) -> Reply:
        client, secret = basic(call)
        if client not in self.secrets or not self.knows_client(client, secret):
            call.entry.note = "wrong client id or secret"
            return self.denied(call, 401, "invalid_client")
        if not call.form.get("token"):
            call.entry.note = "no token to revoke"
            return fault(400, "Bad Request", "Application", "token", "missing")
        if call.token and call.token.grant.client != client:
            call.token = None
        return super().revoke(call)


# Errors and parameters


def subscription(about: hooks.Subscription) -> dict[str, Any]:
    made = utc(about.created)
    return {
        "id": int(about.id),
        "resource_state": 2,
        "application_id": about.client,
        "callback_url": about.callback,
        "created_at": made,
        "updated_at": made,
    }


FAULTS = {
    401: ("Authorization Error", "Athlete", "access_token", "invalid"),
    404: ("Record Not Found", "resource", "path", "invalid"),
    429: ("Rate Limit Exceeded", "Application", "rate limit", "exceeded"),
}


def fault(status: int, message: str, resource: str, field: str, code: str) -> Reply:
    """An error in Strava's `Fault` shape."""
    errors = [{"resource": resource, "field": field, "code": code}]
    return json_reply(status, {"message": message, "errors": errors})


def has(call: Call, scope: str) -> bool:
    return call.token is not None and scope in call.token.grant.scopes


def number(call: Call, name: str, least: int = 0, most: int = 2**63) -> int | None:
    """A whole number of the query, None without it. Raises ValueError, with the name, when it cannot be."""
    text = call.asked(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise ValueError(name)
    return int(text)


# How Strava shows people and what they did


def athlete_id(person: Person) -> int:
    return 41_000_000 + person.index * 977


def athlete(person: Person, *, detailed: bool) -> dict[str, Any]:
    """A `SummaryAthlete`, or a `DetailedAthlete`."""
    zone, city, country, _, _ = person.home
    miles = zone.startswith("America/") and country == "United States"
    shown = {
        "id": athlete_id(person),
        "username": person.user_id,
        "resource_state": 2,
        "firstname": person.first_name,
        "lastname": person.last_name,
        "city": city,
        "state": None,
        "country": country,
        "sex": person.sex,
        "premium": person.index % 3 == 0,
        "created_at": utc(person.joined),
        "updated_at": utc(person.joined),
        "badge_type_id": 0,
        "profile_medium": "avatar/athlete/medium.png",
        "profile": "avatar/athlete/large.png",
        "friend": None,
        "follower": None,
    }
    if not detailed:
        return shown
    return {
        **shown,
        "resource_state": 3,
        "follower_count": person.index % 50,
        "friend_count": person.index % 40,
        "mutual_friend_count": 0,
        "athlete_type": 1,
        "date_preference": "%m/%d/%Y",
        "measurement_preference": "feet" if miles else "meters",
        "clubs": [],
        "ftp": None,
        "weight": person.weight,
        "bikes": [
            {"id": gear(person, "b"), "primary": True, "name": "Tarmac", "resource_state": 2, "distance": 0}
        ],
        "shoes": [
            {"id": gear(person, "g"), "primary": True, "name": "adidas", "resource_state": 2, "distance": 0}
        ],
    }


def summary(person: Person, activity: Activity, measured: Measures) -> dict[str, Any]:
    """A `SummaryActivity`, its fields in the order of the Swagger example."""
    zone_name, _, country, latitude, longitude = person.home
    local = datetime.fromtimestamp(activity.start, ZoneInfo(zone_name))
    offset = local.utcoffset()
    summer = local.dst()
    assert offset is not None
    assert summer is not None
    offset_seconds = int(offset.total_seconds())
    sport = SPORTS.get(activity.sport, Sport(0, 40, 0))
    words = measured.words
    outdoors = sport.speed > 0 and not sport.indoor and not measured.manual
    place = [round(latitude + words.gauss(0, 0.03), 6), round(longitude + words.gauss(0, 0.03), 6)]
    device = None if measured.manual else DEVICES[(person.index + words.randint(0, 1)) % len(DEVICES)]
    item = {
        "resource_state": 2,
        "athlete": {"id": athlete_id(person), "resource_state": 1},
        "name": f"{time_of_day(local.hour)} {spoken(activity.sport)}",
        "distance": measured.distance,
        "moving_time": measured.moving,
        "elapsed_time": activity.elapsed,
        "total_elevation_gain": measured.climb,
        "type": TYPES.get(activity.sport, activity.sport),
        "sport_type": activity.sport,
        "workout_type": None,
        "id": activity.key,
        "external_id": None if measured.manual else f"garmin_push_{activity.key * 7}",
        "upload_id": None if measured.manual else activity.key + 10_000_000_000,
        "start_date": utc(activity.start),
        "start_date_local": local.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "timezone": f"(GMT{signed(int((offset - summer).total_seconds()))}) {zone_name}",
        "utc_offset": offset_seconds,
        "start_latlng": place if outdoors else None,
        "end_latlng": place if outdoors else None,
        "location_city": None,
        "location_state": None,
        "location_country": country,
        "achievement_count": words.randint(0, 3),
        "kudos_count": words.randint(0, 25),
        "comment_count": words.randint(0, 2),
        "athlete_count": 1,
        "photo_count": 0,
        "map": {
            "id": f"a{activity.key}",
            "summary_polyline": polyline(place, words) if outdoors else None,
            "resource_state": 2,
        },
        "device_name": device,
        "trainer": sport.indoor,
        "commute": outdoors and words.random() < 0.1,
        "manual": measured.manual,
        "private": activity.private,
        "flagged": False,
        "gear_id": gear(person, "b" if sport.pedals else "g") if sport.speed > 1.2 else None,
        "from_accepted_tag": False,
        "average_speed": round(measured.distance / measured.moving, 3),
        "max_speed": measured.top_speed,
    }
    if measured.cadence is not None:
        item["average_cadence"] = measured.cadence
    if measured.watts is not None:
        item["average_watts"] = measured.watts
        item["weighted_average_watts"] = int(measured.watts * 1.12)
        item["kilojoules"] = round(measured.watts * measured.moving / 1000, 1)
        item["device_watts"] = words.random() < 0.5
        item["max_watts"] = int(measured.watts * 2.4)
    item["has_heartrate"] = measured.pulse is not None
    if measured.pulse is not None:
        item["average_heartrate"] = measured.pulse
        item["max_heartrate"] = measured.top_pulse
    item["pr_count"] = 0
    item["total_photo_count"] = 0
    item["has_kudoed"] = False
    item["suffer_score"] = None if measured.pulse is None else int(measured.pulse * measured.moving / 9000)
    return item


def details(activity: Activity, measured: Measures) -> dict[str, Any]:
    """What a `DetailedActivity` has beyond the summary."""
    return {
        "resource_state": 3,
        "description": "",
        "calories": measured.calories,
        "elev_high": round(20 + measured.climb, 1),
        "elev_low": 20.0,
        "segment_efforts": [],
        "splits_metric": [],
        "laps": [],
        "gear": None,
        "partner_brand_tag": None,
        "photos": {"primary": None, "count": 0},
        "highlighted_kudosers": [],
        "hide_from_home": False,
        "embed_token": f"{activity.key:040x}",
        "segment_leaderboard_opt_out": False,
        "leaderboard_opt_out": False,
    }


def streams(activity: Activity, measured: Measures, person: Person) -> dict[str, Any]:
    """A `StreamSet`: a point every ten seconds, at most a thousand."""
    elapsed = max(1, activity.elapsed)
    step = max(10, -(-elapsed // 1000))
    times = list(range(0, elapsed + 1, step))
    share = [time / elapsed for time in times]
    chance = Random(activity.key)
    speed = measured.distance / elapsed
    data: dict[str, list[Any]] = {"time": list(times), "moving": [True] * len(times)}
    if measured.distance:
        data["distance"] = [round(measured.distance * part, 1) for part in share]
        data["velocity_smooth"] = [round(speed * chance.uniform(0.8, 1.2), 2) for _ in times]
        data["altitude"] = [round(20 + measured.climb * min(part, 1 - part), 1) for part in share]
        data["grade_smooth"] = [round(chance.gauss(0, 1.5), 1) for _ in times]
        if not SPORTS.get(activity.sport, Sport(0, 40, 0)).indoor:
            _, _, _, latitude, longitude = person.home
            data["latlng"] = [
                [round(latitude + part * 0.02, 6), round(longitude + part * 0.02, 6)] for part in share
            ]
    if measured.pulse is not None:
        data["heartrate"] = [int(measured.pulse + chance.gauss(0, 6)) for _ in times]
    if measured.cadence is not None:
        data["cadence"] = [int(measured.cadence + chance.gauss(0, 3)) for _ in times]
    if measured.watts is not None:
        data["watts"] = [max(0, int(measured.watts + chance.gauss(0, 30))) for _ in times]
    return {
        name: {"data": values, "series_type": "time", "original_size": len(times), "resolution": "high"}
        for name, values in data.items()
    }


def gear(person: Person, kind: str) -> str:
    return f"{kind}{10_000_000 + person.index}"


def signed(seconds: int) -> str:
    """An offset as in `(GMT-03:30)`."""
    hours, rest = divmod(abs(seconds), 3600)
    return f"{'-' if seconds < 0 else '+'}{hours:02}:{rest // 60:02}"


def time_of_day(hour: int) -> str:
    return "Morning" if hour < 11 else "Lunch" if hour < 14 else "Afternoon" if hour < 17 else "Evening"


def spoken(sport: str) -> str:
    """`TrailRun` as `Trail Run`."""
    return "".join(f" {letter}" if letter.isupper() else letter for letter in sport).strip()


def polyline(place: Sequence[float], words: Random) -> str:
    """A short loop from a place and back, in Google's encoding."""
    steps = [(words.randint(-900, 900), words.randint(-900, 900)) for _ in range(6)]
    steps.append((-sum(lat for lat, _ in steps), -sum(lng for _, lng in steps)))
    steps.insert(0, (round(place[0] * 1e5), round(place[1] * 1e5)))
    return "".join(encoded(value) for step in steps for value in step)


def encoded(value: int) -> str:
    bits, text = (~(value << 1) if value < 0 else value << 1), ""
    while bits >= 0x20:
        text += chr((0x20 | (bits & 0x1F)) + 63)
        bits >>= 5
    return text + chr(bits + 63)
