"""The simulated Oura, API v2: sources are Oura's own OpenAPI document and its developer pages.

Where they are silent it does what loses no data; such choices are told beside the code.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from random import Random
from secrets import token_hex
from typing import Any, ClassVar
from uuid import NAMESPACE_URL, UUID, uuid4, uuid5
from zoneinfo import ZoneInfo

from lifelogger.sandbox import hooks
from lifelogger.sandbox.calls import Call, Mistake, Reply, Route, json_reply, route
from lifelogger.sandbox.days import Beat, Day, Sleep, beats, days, local, sleeps
from lifelogger.sandbox.grants import Grant
from lifelogger.sandbox.ledger import OTHER, PAGE, READ, TOKEN
from lifelogger.sandbox.people import SPORTS, Activity, People, Person, Sport
from lifelogger.sandbox.provider import FIRST, LAST, ONE, Item, Provider, Refusal

WINDOW = 300
SUBSCRIPTIONS = "/v2/webhook/subscription"
SUBSCRIBED_DAYS = 30
"""How long a subscription lasts is told with each, and in no document."""
SCOPES = ("email", "personal", "daily", "heartrate", "workout", "tag", "session", "spo2Daily")
COLLECTIONS = {
    "daily_activity": "daily",
    "daily_readiness": "daily",
    "daily_sleep": "daily",
    "daily_spo2": "spo2Daily",
    "sleep": "daily",
    "workout": "workout",
    "session": "session",
}
"""Documents of one kind each, and the scope that shows them."""
SERIES = "heartrate"
BY_DAY = ("start_date", "end_date", "next_token", "fields")
REVISED_AFTER = 6 * 3600
"""A night is analysed again, when the person opens the app, so long after it ended."""
SERIES_PAGE = 2500
HOUR = 3600
DAY_SECONDS = 86_400

WORDS = {
    "Run": "running",
    "Ride": "cycling",
    "Walk": "walking",
    "VirtualRide": "indoor_cycling",
    "WeightTraining": "strength_training",
    "Swim": "swimming",
    "Hike": "hiking",
    "TrailRun": "trail_running",
    "GravelRide": "cycling",
    "MountainBikeRide": "mountain_biking",
    "Yoga": "yoga",
    "Workout": "workout",
    "Rowing": "rowing",
    "NordicSki": "cross_country_skiing",
}
PHASES = {"deep": "1", "light": "2", "rem": "3", "awake": "4"}

Document = dict[str, Any]


class Problem(Refusal):
    """A request that is answered with an error, which says what the ledger notes."""

    def __init__(self, status: int, note: str, parameter: str | None = None) -> None:
        super().__init__(status, note, problem(status, note, parameter))


class Oura(Provider):
    """People's days, nights, workouts and sessions, a collection of documents for each kind."""

    name = "oura"
    title = "Oura"
    base = "/v2/usercollection"
    scopes = SCOPES
    usual_scopes = ("daily", "workout", "session", "spo2Daily")
    streams = (*COLLECTIONS, SERIES)
    activity_stream = "workout"
    defaults: ClassVar[Mapping[str, Any]] = {"page_size": 50, "lapsed": [], "access_token_seconds": 86_400}
    pools: ClassVar[Mapping[str, tuple[int, ...]]] = {"requests": (WINDOW,)}
    first_limits: ClassVar[Mapping[str, tuple[int, ...]]] = {"requests": (5000,)}

    def make_routes(self) -> Sequence[Route]:
        return (
            *(route(READ, f"GET /{name}", self._list, self.base) for name in COLLECTIONS),
            *(route(READ, f"GET /{name}/{{document}}", self._one, self.base) for name in COLLECTIONS),
            route(READ, f"GET /{SERIES}", self._heart_rate, self.base),
            route(READ, "GET /personal_info", self._personal_info, self.base),
            route(OTHER, f"GET {SUBSCRIPTIONS}", self._subscriptions),
            route(OTHER, f"POST {SUBSCRIPTIONS}", self._subscribe),
            route(OTHER, f"PUT {SUBSCRIPTIONS}/renew/{{key}}", self._renew),
            route(OTHER, f"DELETE {SUBSCRIPTIONS}/{{key}}", self._unsubscribe),
            route(TOKEN, "POST /oauth/token", self.token),
            route(TOKEN, "POST /oauth/revoke", self.revoke),
            route(PAGE, "GET /oauth/authorize", self.authorize),
        )

    def check_setting(self, name: str, value: object) -> None:
        super().check_setting(name, value)
        if name == "page_size" and not value:
            raise Mistake(f"{name}: a page has at least one document")

    def headers(self, call: Call) -> dict[str, str]:
        """Nothing of limits, until one was reached."""
        return self._limit_headers(call.now) if call.refused else {}

    def _limit_headers(self, now: float) -> dict[str, str]:
        reset = (int(now) // WINDOW + 1) * WINDOW
        return {
            "Retry-After": str(reset - int(now)),
            "X-RateLimit-Limit": str(self.limits["requests"][0]),
            "X-RateLimit-Window": str(WINDOW),
            "X-RateLimit-Reset": str(reset),
            "X-RateLimit-Tier": "application",
        }

    # What is answered

    def failure(self, status: int) -> Reply:
        reply = problem(status, f"Error {status}")
        if status == 429:
            reply.headers.update(self._limit_headers(self.clock.now()))
        return reply

    def missing(self, scope: str) -> Reply:
        return problem(403, f"scope {scope} is missing")

    def invalid(self, parameter: str) -> Reply:
        return problem(400, f"{parameter}: missing or not one that can be")

    def _subscriber(self, call: Call, scope: str) -> Person:
        """Whose documents are asked for, if they may be seen."""
        person = self.asker(call, scope)
        if person.user_id in self.settings["lapsed"]:
            raise Problem(403, "the subscription has ended")
        return person

    def _list(self, call: Call) -> Reply:
        only(call, BY_DAY)
        assert call.route is not None
        name = call.route.label.removeprefix("GET /")
        person = self._subscriber(call, COLLECTIONS[name])
        today = datetime.fromtimestamp(call.now, ZoneInfo(person.timezone)).date()
        last = asked_day(call, "end_date") or today
        first = asked_day(call, "start_date") or last - ONE
        if first > last:
            raise Problem(400, "start_date is after end_date")
        if name == "daily_activity":
            last -= ONE  # an `end_date` of today, say users, does not show today
        days = (first.isoformat(), last.isoformat())
        listed = self.listed(person, name, first, last, call.now)
        found = [item for item in listed if days[0] <= item.order[0] <= days[1]]
        found.sort(key=place)
        after = asked_place(call)
        if call.endless:
            after = None
        begin = 0 if after is None else bisect_right(found, after, key=place)
        page = found[begin : begin + self.settings["page_size"]]
        more = call.endless or begin + len(page) < len(found)
        token = written(page[-1].order) if more and page else None
        return json_reply(200, {"data": [narrowed(call, one.value) for one in page], "next_token": token})

    def _one(self, call: Call) -> Reply:
        only(call, ("fields",))
        assert call.route is not None
        name, wanted = call.route.label.split("/")[1], call.params["document"]
        person = self._subscriber(call, COLLECTIONS[name])
        for item in self.listed(person, name, FIRST, LAST, call.now):
            if item.order[1] == wanted:
                return json_reply(200, narrowed(call, item.value))
        raise Problem(404, "no such document")

    def _heart_rate(self, call: Call) -> Reply:
        only(call, ("start_datetime", "end_datetime", "next_token", "latest", "fields"))
        person = self._subscriber(call, SERIES)
        end = asked_moment(call, "end_datetime", call.now)
        begin = asked_moment(call, "start_datetime", end - DAY_SECONDS)
        if call.asked("next_token") is not None:
            try:
                begin = max(begin, int(call.asked("next_token") or ""))
            except ValueError:
                raise Problem(400, "next_token: not one of ours") from None
        end = min(end, call.now)
        begin = min(max(begin, person.joined), end)
        first, last = (datetime.fromtimestamp(moment, UTC).date() for moment in (begin, end))
        series = self.listed(person, SERIES, first, last, call.now)
        worn = [item for item in series if begin <= item.order < end]
        if call.asked("latest") == "true":
            worn = worn[-1:]
        page, more = worn[:SERIES_PAGE], worn[SERIES_PAGE:]
        token = str(more[0].order) if more else None
        return json_reply(200, {"data": [narrowed(call, one.value) for one in page], "next_token": token})

    def _personal_info(self, call: Call) -> Reply:
        only(call, ())
        assert call.token is not None
        person, scopes = self.asker(call), call.token.grant.scopes
        told: Document = {"id": account_id(person)}
        if "personal" in scopes:
            sex = {"F": "female", "M": "male"}[person.sex]
            told |= {"age": 25 + person.index % 40, "weight": person.weight, "height": None}
            told |= {"biological_sex": sex}
        if "email" in scopes:
            told["email"] = f"{person.user_id}@example.org"
        return json_reply(200, told)

    # Webhooks

    hook_streams = tuple(COLLECTIONS)
    hook_retries = (10, 20, 40, 80, 160, 320, 640, 640, 640, 640)
    """Ten more tries, over about an hour."""
    hook_gone = True

    def named(self, call: Call) -> str:
        return call.headers.get("x-client-id", "")

    def _application(self, call: Call) -> str:
        client = self.named(call)
        if not self.knows_client(client, call.headers.get("x-client-secret", "")):
            raise Problem(401, "wrong client id or secret")
        return client

    def _subscriptions(self, call: Call) -> Reply:
        return json_reply(200, [subscription(each) for each in self.hooks.of(self._application(call))])

    def _subscribe(self, call: Call) -> Reply:
        """Made once its callback has repeated a challenge."""
        client = self._application(call)
        try:
            asked = json.loads(call.body)
            url, secret = hooks.here(asked["callback_url"]), str(asked["verification_token"])
            name, what = asked["data_type"], asked["event_type"]
        except (ValueError, TypeError, KeyError, Mistake) as error:
            raise Problem(422, f"the body: {error}", "body") from None
        if name not in COLLECTIONS or what not in ("create", "update", "delete"):
            raise Problem(422, f"no events {what} of {name}", "data_type")
        word = token_hex(8)
        query = {"verification_token": secret, "challenge": word}

        async def later() -> Reply:
            status, told = await hooks.challenge(url, query, self.hook_timeout)
            if status != 200 or told != {"challenge": word}:
                return problem(400, "the callback could not be verified")
            now = self.clock.now()
            made = hooks.Subscription(
                str(uuid4()), client, url, secret, [name, what], now, now + SUBSCRIBED_DAYS * DAY_SECONDS
            )
            self.hooks.add(made)
            return json_reply(201, subscription(made))

        return Reply(201, later=later)

    def _own(self, call: Call) -> hooks.Subscription:
        mine = {each.id: each for each in self.hooks.of(self._application(call))}
        if call.params["key"] not in mine:
            raise Problem(403, "")
        return mine[call.params["key"]]

    def _renew(self, call: Call) -> Reply:
        found = self._own(call)
        found.expires = self.clock.now() + SUBSCRIBED_DAYS * DAY_SECONDS
        self.hooks.keep()
        return json_reply(200, subscription(found))

    def _unsubscribe(self, call: Call) -> Reply:
        self.hooks.remove(self._own(call).id)
        return Reply(204)

    def hook_event(self, event: hooks.Event, to: hooks.Subscription) -> Any:
        if [event.stream, event.what] != to.about:
            return None
        key = str(UUID(int=int(event.key))) if event.stream == self.activity_stream else event.key
        return {
            "event_type": event.what,
            "data_type": event.stream,
            "object_id": key,
            "event_time": datetime.fromtimestamp(event.at, UTC).isoformat(),
            "user_id": account_id(event.person),
        }

    def hook_headers(
        self, body: bytes, to: hooks.Subscription, now: float, *, forged: bool
    ) -> dict[str, str]:
        """Signed with the client's secret, together with the time."""
        at, key = str(int(now)), "guessed" if forged else self.secrets[to.client]
        signature = hmac.new(key.encode(), at.encode() + body, "sha256").hexdigest().upper()
        return {"x-oura-timestamp": at, "x-oura-signature": signature}

    # Documents

    def points(self, person: Person, stream: str, first: date, last: date, now: float) -> Iterator[Item]:
        if stream == SERIES:
            for beat in beats(person, first, last, now):
                row = heart_rate(beat)
                yield Item(row["timestamp"], row, beat.moment)
        elif stream == self.activity_stream:
            for item in super().points(person, stream, first, last, now):
                yield item._replace(order=(item.value["day"], item.value["id"]))
        else:
            documents = {
                "daily_activity": self._activity_days,
                "daily_readiness": self._readiness,
                "daily_sleep": self._sleep_days,
                "daily_spo2": self._saturation,
                "sleep": self._sleeps,
                "session": self._sessions,
            }
            for document in documents[stream](person, first, last, now):
                yield Item(document["id"], document, (document["day"], document["id"]))

    def tombstone(self, stream: str, value: Any) -> Any:
        """A sleep that was deleted stays, and says so."""
        return {**value, "type": "deleted"} if stream == "sleep" else None

    def is_tombstone(self, stream: str, value: Any) -> bool:
        return stream == "sleep" and isinstance(value, dict) and value.get("type") == "deleted"

    def _activity_days(self, person: Person, first: date, last: date, now: float) -> Iterator[Document]:
        for day in days(self.people.seed, person, first, last, now):
            yield activity_day(person, day)

    def _readiness(self, person: Person, first: date, last: date, now: float) -> Iterator[Document]:
        for night, chance, revised in self._nights(person, first, last, now):
            yield {
                "id": identifier("daily_readiness", person, night.date),
                "contributors": readiness_contributors(chance),
                "day": night.date.isoformat(),
                "score": chance.randint(50, 96) + revised,
                "temperature_deviation": round(chance.gauss(0, 0.3), 2),
                "temperature_trend_deviation": round(chance.gauss(0, 0.2), 2),
                "timestamp": wall(local(person, night.date, 0), person),
            }

    def _sleep_days(self, person: Person, first: date, last: date, now: float) -> Iterator[Document]:
        for night, chance, revised in self._nights(person, first, last, now):
            names = (
                "deep_sleep",
                "efficiency",
                "latency",
                "rem_sleep",
                "restfulness",
                "timing",
                "total_sleep",
            )
            yield {
                "id": identifier("daily_sleep", person, night.date),
                "contributors": {name: chance.randint(20, 100) for name in names},
                "day": night.date.isoformat(),
                "score": chance.randint(48, 95) + revised,
                "timestamp": wall(local(person, night.date, 0), person),
            }

    def _saturation(self, person: Person, first: date, last: date, now: float) -> Iterator[Document]:
        """Nights in which it could not be measured have a document, too."""
        known = {day.date: day.oxygen for day in days(self.people.seed, person, first, last, now)}
        for night, chance, _ in self._nights(person, first, last, now):
            measured = night.date in known and chance.random() < 0.95
            yield {
                "id": identifier("daily_spo2", person, night.date),
                "breathing_disturbance_index": chance.randint(0, 20) if measured else None,
                "day": night.date.isoformat(),
                "spo2_percentage": {"average": known[night.date]} if measured else None,
            }

    def _nights(
        self, person: Person, first: date, last: date, now: float
    ) -> Iterator[tuple[Sleep, Random, int]]:
        """The nights that days are judged by, chance for their numbers, and 1 once analysed again."""
        for night in sleeps(self.people.seed, person, first, last, now):
            if not night.nap:
                chance = Random(f"{self.people.seed}/ring/{person.index}/{night.date}")
                yield night, chance, int(now >= night.end + REVISED_AFTER)

    def _sleeps(self, person: Person, first: date, last: date, now: float) -> Iterator[Document]:
        """Sleep by the day it belongs to: after 18:00 that is the next one."""
        for sleep in sleeps(self.people.seed, person, first - ONE, last, now):
            yield sleep_document(self.people.seed, person, sleep, now)

    def _sessions(self, person: Person, first: date, last: date, now: float) -> Iterator[Document]:
        for day in days(self.people.seed, person, first, last, now):
            chance = Random(f"{self.people.seed}/session/{person.index}/{day.date}")
            start = local(person, day.date, 21) + chance.randint(0, HOUR)
            end = start + chance.randint(3, 25) * 60
            if chance.random() < 0.2 and end <= now:
                yield {
                    "id": identifier("session", person, day.date),
                    "day": day.date.isoformat(),
                    "end_datetime": wall(end, person),
                    "heart_rate": sample(start, 5, [day.pulse + 0.0, None, day.pulse - 1.5], person),
                    "heart_rate_variability": None,
                    "mood": chance.choice((None, "same", "good", "great")),
                    "motion_count": None,
                    "start_datetime": wall(start, person),
                    "type": chance.choice(("breathing", "meditation", "relaxation", "body_status")),
                }

    def item(self, activity: Activity) -> Any:
        return workout(self.people.all[activity.owner], activity, self.people)

    def start_in(self, fields: Mapping[str, Any]) -> int | None:
        try:
            return int(datetime.fromisoformat(fields["start_datetime"]).timestamp())
        except (KeyError, TypeError, ValueError):
            return None

    def account(self, person: Person) -> dict[str, Any]:
        return {"id": account_id(person)}

    # Authorisation

    def issue(self, grant: Grant, now: float, refresh: str | None = None) -> dict[str, Any]:
        return {**super().issue(grant, now, refresh), "token_type": "bearer"}


def subscription(about: hooks.Subscription) -> Document:
    """A `WebhookSubscriptionModel`."""
    name, what = about.about
    return {
        "id": about.id,
        "callback_url": about.callback,
        "event_type": what,
        "data_type": name,
        "expiration_time": datetime.fromtimestamp(about.expires or 0, UTC).isoformat(),
    }


# Errors and parameters


def problem(status: int, detail: str, parameter: str | None = None) -> Reply:
    """An error. The document gives a shape to 422 alone (`HTTPValidationError`); the others are like it."""
    if status == 422:
        return json_reply(
            422, {"detail": [{"loc": ["query", parameter], "msg": detail, "type": "value_error"}]}
        )
    return json_reply(status, {"detail": detail})


def only(call: Call, names: Sequence[str]) -> None:
    """Refuse what the document does not have: a misspelt parameter shall not be ignored."""
    for name, values in call.query.items():
        if name not in names:
            raise Problem(400, f"no parameter {name}")
        if len(values) > 1:
            raise Problem(400, f"{name} is there twice")


def asked_day(call: Call, name: str) -> date | None:
    """A day of the query; of a time, the date that it names."""
    text = call.asked(name)
    if text is None:
        return None
    try:
        return date.fromisoformat(text) if len(text) == 10 else datetime.fromisoformat(text).date()
    except ValueError:
        raise Problem(422, f"{name}: not a date", name) from None


def asked_moment(call: Call, name: str, default: float) -> float:
    """A time of the query, as epoch seconds."""
    text = call.asked(name)
    try:
        return default if text is None else datetime.fromisoformat(text).astimezone(UTC).timestamp()
    except (ValueError, OverflowError):
        raise Problem(422, f"{name}: not a time", name) from None


def asked_place(call: Call) -> tuple[str, str] | None:
    """After which document a `next_token` goes on."""
    text = call.asked("next_token")
    if text is None:
        return None
    try:
        day, key = json.loads(base64.urlsafe_b64decode(text))
        return str(day), str(key)
    except (ValueError, TypeError, binascii.Error):
        raise Problem(400, "next_token: not one of ours") from None


def place(item: Item) -> Any:
    return item.order


def written(place: tuple[str, str]) -> str:
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode()


def narrowed(call: Call, document: Any) -> Any:
    """A document with the `fields` that are wanted; its id always."""
    wanted = call.asked("fields")
    if wanted is None or not isinstance(document, dict):
        return document
    return {name: value for name, value in document.items() if name in ("id", *wanted.split(","))}


# How Oura shows people and what they did


def account_id(person: Person) -> str:
    return str(uuid5(NAMESPACE_URL, f"oura/{person.index}"))


def identifier(kind: str, person: Person, day: date, number: int = 0) -> str:
    return str(uuid5(NAMESPACE_URL, f"{kind}/{person.index}/{day}/{number}"))


def wall(moment: float, person: Person) -> str:
    """A moment as a `LocalizedDateTime`: the time on the wall, and its offset."""
    return datetime.fromtimestamp(moment, ZoneInfo(person.timezone)).isoformat(timespec="milliseconds")


def sample(start: float, interval: float, items: Sequence[float | None], person: Person) -> Document:
    return {"interval": interval, "items": list(items), "timestamp": wall(start, person)}


def readiness_contributors(chance: Random) -> Document:
    names = (
        "activity_balance",
        "body_temperature",
        "hrv_balance",
        "previous_day_activity",
        "previous_night",
        "recovery_index",
        "resting_heart_rate",
        "sleep_balance",
    )
    return {name: chance.randint(20, 100) for name in names}


def activity_day(person: Person, day: Day) -> Document:
    """A `PublicDailyActivity`. It grows while the day lasts."""
    chance = Random(f"ring/{person.index}/{day.date}")
    names = (
        "meet_daily_targets",
        "move_every_hour",
        "recovery_time",
        "stay_active",
        "training_frequency",
        "training_volume",
    )
    start = local(person, day.date, 4)
    high, medium, low = (chance.randint(0, most) * 60 for most in (40, 90, 300))
    return {
        "id": identifier("daily_activity", person, day.date),
        "class_5_min": "0112233445",
        "score": chance.randint(45, 98),
        "active_calories": int(day.active_calories),
        "average_met_minutes": round(chance.uniform(1.2, 1.9), 5),
        "contributors": {name: chance.randint(20, 100) for name in names},
        "equivalent_walking_distance": int(day.metres),
        "high_activity_met_minutes": high // 10,
        "high_activity_time": high,
        "inactivity_alerts": chance.randint(0, 4),
        "low_activity_met_minutes": low // 40,
        "low_activity_time": low,
        "medium_activity_met_minutes": medium // 20,
        "medium_activity_time": medium,
        "met": sample(start, 60, [1.3, 0.9, None, 1.1], person),
        "meters_to_target": 9000 - int(day.metres),
        "non_wear_time": 0,
        "resting_time": 27_000,
        "sedentary_met_minutes": 10,
        "sedentary_time": 30_000,
        "steps": day.steps,
        "target_calories": 500,
        "target_meters": 9000,
        "total_calories": int(day.calories),
        "day": day.date.isoformat(),
        "timestamp": wall(start, person),
    }


def sleep_document(seed: int, person: Person, sleep: Sleep, now: float) -> Document:
    """A `PublicModifiedSleepModel`, as it is at a moment: first estimates, and what was deleted later."""
    chance = Random(f"{seed}/ring/sleep/{person.index}/{sleep.start}")
    ended = datetime.fromtimestamp(sleep.end, ZoneInfo(person.timezone))
    late = sleep.nap and ended.hour >= 18
    revised = now >= sleep.end + REVISED_AFTER
    gone = sleep.nap and chance.random() < 0.3 and now >= sleep.end + chance.randint(8, 30) * HOUR
    kind = "deleted" if gone else "late_nap" if late else "sleep" if sleep.nap else "long_sleep"
    steps = range(sleep.start, sleep.end, 300)
    phases = "".join(
        PHASES[next(stage.kind for stage in sleep.stages if stage.start <= step < stage.end)]
        for step in steps
    )
    lowest = person.resting_pulse - chance.randint(0, 5)
    asleep = sleep.seconds("light", "deep", "rem")
    return {
        "id": identifier("sleep", person, sleep.date, int(sleep.nap)),
        "average_breath": round(chance.uniform(12, 18), 3),
        "average_heart_rate": round(lowest + chance.uniform(3, 10), 2),
        "average_hrv": chance.randint(18, 110) + revised,
        "awake_time": sleep.seconds("awake"),
        "bedtime_end": wall(sleep.end, person),
        "bedtime_start": wall(sleep.start, person),
        "day": (sleep.date + (ONE if late else timedelta())).isoformat(),
        "deep_sleep_duration": sleep.seconds("deep"),
        "efficiency": max(1, asleep * 100 // (sleep.end - sleep.start)),
        "heart_rate": sample(sleep.start, 300, [None, *([lowest + 4.0] * (len(steps) - 1))], person),
        "hrv": None,
        "latency": chance.randint(0, 25) * 60,
        "light_sleep_duration": sleep.seconds("light"),
        "low_battery_alert": False,
        "lowest_heart_rate": lowest,
        "movement_30_sec": None,
        "period": int(sleep.nap),
        "readiness": None,
        "readiness_score_delta": None,
        "rem_sleep_duration": sleep.seconds("rem"),
        "restless_periods": chance.randint(0, 200),
        "sleep_algorithm_version": "v2",
        "sleep_analysis_reason": "bedtime_edit"
        if gone
        else "background_created_foreground_updated"
        if revised
        else "background_sleep_analysis",
        "sleep_phase_30_sec": None,
        "sleep_phase_5_min": phases,
        "sleep_score_delta": None,
        "time_in_bed": sleep.end - sleep.start,
        "total_sleep_duration": asleep,
        "type": kind,
    }


def heart_rate(beat: Beat) -> Document:
    """A `PublicHeartRateRow`."""
    return {
        "timestamp": datetime.fromtimestamp(beat.moment, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"),
        "timestamp_unix": beat.moment * 1000,
        "bpm": beat.rate,
        "source": "sleep" if beat.asleep else "awake",
    }


def workout(person: Person, activity: Activity, people: People) -> Document:
    """A `PublicWorkout`."""
    measured = people.measures(activity)
    sport = SPORTS.get(activity.sport, Sport(0, 40, 0))
    day = datetime.fromtimestamp(activity.start, ZoneInfo(person.timezone)).date()
    return {
        "id": str(UUID(int=activity.key)),
        "activity": WORDS.get(activity.sport, activity.sport.lower()),
        "calories": measured.calories,
        "day": day.isoformat(),
        "distance": measured.distance if sport.speed else None,
        "end_datetime": wall(activity.start + activity.elapsed, person),
        "intensity": ("easy", "moderate", "hard")[activity.key % 3],
        "label": None,
        "source": "manual" if measured.manual else "confirmed",
        "start_datetime": wall(activity.start, person),
    }
