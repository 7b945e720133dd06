"""The simulated Fitbit, which is the Google Health API v4: sources are Google's discovery document and its
pages on OAuth.

Where they are silent it does what is hardest for a client; such choices are told beside the code.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, datetime, timedelta
from secrets import token_hex
from typing import Any, ClassVar, NamedTuple
from urllib.parse import parse_qs, urlsplit
from zoneinfo import ZoneInfo

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from lifelogger.sandbox import hooks
from lifelogger.sandbox.calls import Call, Mistake, Reply, Route, bearer, json_reply, route
from lifelogger.sandbox.days import Beat, Day, Sleep, beats, days, sleeps
from lifelogger.sandbox.grants import Token
from lifelogger.sandbox.ledger import OTHER, PAGE, READ, TOKEN
from lifelogger.sandbox.people import SPORTS, Activity, Person, Sport
from lifelogger.sandbox.provider import Item, Provider, Refusal, utc

PREFIX = "https://www.googleapis.com/auth/googlehealth."
ACTIVITY, METRICS, SLEEP = (
    f"{PREFIX}{word}.readonly"
    for word in ("activity_and_fitness", "health_metrics_and_measurements", "sleep")
)
SCOPES = (ACTIVITY, METRICS, SLEEP, f"{PREFIX}profile.readonly")
USUAL_SCOPES = (ACTIVITY, METRICS, SLEEP)
DAY = timedelta(days=1)
DAY_SECONDS = 86_400

LIST_PARAMETERS = ("dataSourceFamily", "filter", "pageSize", "pageToken")
ROLLUP_FIELDS = ("dataSourceFamily", "pageSize", "pageToken", "range", "windowSizeDays")
"""What the specification knows; anything else is refused."""

TYPES = {
    "Run": "RUNNING",
    "Ride": "BIKING",
    "Walk": "WALKING",
    "VirtualRide": "STATIONARY_BIKE",
    "WeightTraining": "WEIGHTS",
    "Swim": "SWIMMING_POOL",
    "Hike": "HIKING",
    "TrailRun": "TRAIL_RUN",
    "GravelRide": "BIKING",
    "MountainBikeRide": "MOUNTAIN_BIKE",
    "Yoga": "YOGA",
    "Workout": "WORKOUT",
    "Rowing": "ROWING_MACHINE",
    "NordicSki": "CROSS_COUNTRY_SKI",
}


class Listed(NamedTuple):
    """A data type that can be listed and reconciled."""

    scope: str
    members: tuple[str, ...]
    """What can be filtered by, and is not an instant unless it says so."""
    largest: int = 10_000
    usual: int = 1440


class Summed(NamedTuple):
    """A data type that can be rolled up by day."""

    scope: str
    value: Callable[[Day], dict[str, Any]]
    most: int = 90
    """Days of one request, and of one page."""


SAMPLE_TIME = ("sample_time.physical_time", "sample_time.civil_time")
LISTED = {
    "exercise": Listed(ACTIVITY, ("interval.civil_start_time",), 25, 25),
    "sleep": Listed(SLEEP, ("interval.end_time", "interval.civil_end_time"), 25, 25),
    "daily-resting-heart-rate": Listed(METRICS, ("date",)),
    "daily-heart-rate-variability": Listed(METRICS, ("date",)),
    "daily-oxygen-saturation": Listed(METRICS, ("date",)),
    "weight": Listed(METRICS, SAMPLE_TIME),
    "heart-rate": Listed(METRICS, SAMPLE_TIME),
}
SUMMED = {
    "steps": Summed(ACTIVITY, lambda day: {"countSum": str(day.steps)}),
    "distance": Summed(ACTIVITY, lambda day: {"millimetersSum": str(round(day.metres * 1000))}),
    "total-calories": Summed(ACTIVITY, lambda day: {"kcalSum": day.calories}, 14),
    "heart-rate": Summed(
        METRICS,
        lambda day: {
            "beatsPerMinuteAvg": day.pulse,
            "beatsPerMinuteMax": day.highest_pulse,
            "beatsPerMinuteMin": day.lowest_pulse,
        },
        14,
    ),
}


SUBSCRIBERS = "/v4/projects/{project}/subscribers"
KEYS = "/googlehealthapi/webhooks/webhooks_public_keyset.json"
KEY_ID = 1_790_000_001

CLOUD_PLATFORM = "https://www.googleapis.com/auth/cloud-platform"
"""What a service account has to ask for, to manage subscribers."""

SAMPLES = "heart-rate-samples"
"""The stream of `heart-rate` as a list; by its own name it is the roll-up."""


def unpadded(text: str) -> bytes:
    """What base64 for addresses says, without its padding (RFC 7515, 2)."""
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def subscriber(about: hooks.Subscription) -> dict[str, Any]:
    """A `Subscriber`; its secret is not told again."""
    config = {"dataTypes": about.about, "subscriptionCreatePolicy": "AUTOMATIC"}
    return {
        "name": about.id,
        "endpointUri": about.callback,
        "subscriberConfigs": [config],
        "endpointAuthorization": {"secretSet": True},
        "state": "ACTIVE",
        "createTime": utc(about.created),
    }


class Invalid(Refusal):
    """A request that the specification does not allow; the message says why."""

    def __init__(self, message: str) -> None:
        super().__init__(400, f"not in the specification: {message}", fault(400, "INVALID_ARGUMENT", message))


class Fitbit(Provider):
    """People's exercises and nights, and what is known of each of their days."""

    name = "fitbit"
    title = "Fitbit"
    base = "/v4/users/me"
    scopes = SCOPES
    usual_scopes = USUAL_SCOPES
    streams = (*(name for name in LISTED if name not in SUMMED), *SUMMED, SAMPLES)
    activity_stream = "exercise"
    activity_path = ("exercise",)
    defaults: ClassVar[Mapping[str, Any]] = {
        "access_token_seconds": 3600,
        "order": "descending",
        "not_linked": [],
    }
    choices: ClassVar[Mapping[str, Sequence[str]]] = {"order": ("descending", "ascending")}
    pools: ClassVar[Mapping[str, tuple[int, ...]]] = {"user": (60,), "project": (60, DAY_SECONDS)}
    first_limits: ClassVar[Mapping[str, tuple[int, ...]]] = {"user": (300,), "project": (120_000, 86_400_000)}

    def make_routes(self) -> Sequence[Route]:
        points = "/dataTypes/{type}/dataPoints"
        return (
            route(READ, "GET /identity", self._identity, self.base),
            route(READ, f"GET {points}", self._list, self.base),
            route(READ, f"GET {points}:reconcile", self._list, self.base),
            route(READ, f"POST {points}:dailyRollUp", self._roll_up, self.base),
            route(OTHER, f"GET {SUBSCRIBERS}", self._subscribers),
            route(OTHER, f"POST {SUBSCRIBERS}", self._subscribe),
            route(OTHER, f"DELETE {SUBSCRIBERS}/{{key}}", self._unsubscribe),
            route(PAGE, f"GET {KEYS}", self._keys),
            route(TOKEN, "POST /token", self.token),
            route(TOKEN, "POST /revoke", self.revoke),
            route(PAGE, "GET /o/oauth2/v2/auth", self.authorize),
        )

    # What it costs

    def count(self, call: Call) -> None:
        """OAuth is another service: only the API's own requests are counted."""
        if self.kind(call) not in (READ, OTHER):
            return
        call.pools = ("user", "project")
        over_user = self.spend(f"{call.client}/{call.entry.person}", ("user",), call.now)
        over_project = self.spend(call.client, ("project",), call.now)
        call.refused = over_user or over_project

    def usage_note(self, call: Call) -> str:
        if not call.pools:
            return ""
        used = self.usage(f"{call.client}/{call.entry.person}", "user", self.clock.now())
        return f"user {used[0]} project {self.usage(call.client, 'project', self.clock.now())[0]}"

    # What is answered

    def failure(self, status: int) -> Reply:
        return fault(status, *FAULTS.get(status, ("UNKNOWN", f"Error {status}.")))

    def invalid(self, parameter: str) -> Reply:
        return fault(400, "INVALID_ARGUMENT", f"Invalid parameter: {parameter}")

    def missing(self, scope: str) -> Reply:
        message = "Request had insufficient authentication scopes."
        return fault(403, "PERMISSION_DENIED", message, "ACCESS_TOKEN_SCOPE_INSUFFICIENT")

    def check_token(self, call: Call) -> None:
        super().check_token(call)
        assert call.token is not None
        if call.token.grant.person in self.settings["not_linked"]:
            reply = fault(
                400, "FAILED_PRECONDITION", "The account has no Fitbit profile.", "ACCOUNT_NOT_LINKED"
            )
            raise Refusal(400, "", reply)

    def _identity(self, call: Call) -> Reply:
        check_parameters(call, ())
        return json_reply(200, {"name": "users/me/identity", **self.account(self.asker(call))})

    def _list(self, call: Call) -> Reply:
        """`list` and `reconcile`. The order of the latter is not documented: the setting turns it."""
        check_parameters(call, LIST_PARAMETERS)
        name = call.params["type"]
        if name not in LISTED:
            raise Invalid(f"the data type {name} is not simulated as a list")
        about = LISTED[name]
        person = self.asker(call, about.scope)
        wanted = call.asked("filter")
        if not wanted:
            call.entry.note = "no filter: walks the whole history"
        bounds = parsed(wanted or "", name, about.members)
        size = min(page_size(call.asked("pageSize")) or about.usual, about.largest)
        stream = SAMPLES if name in SUMMED else name
        near = self.listed(person, stream, *reach(bounds), self.clock.now())
        points = [point for point in near if all(bound.takes(point) for bound in bounds)]
        points.sort(key=lambda point: point.order, reverse=self.settings["order"] == "descending")
        return paged(
            [point.value for point in points],
            "dataPoints",
            size,
            call.asked("pageToken"),
            f"{name} {wanted} {person.user_id}",
            call.endless,
        )

    def _roll_up(self, call: Call) -> Reply:
        check_parameters(call, ())
        name = call.params["type"]
        if name not in SUMMED:
            raise Invalid(f"the data type {name} is not simulated as a roll-up")
        about = SUMMED[name]
        person = self.asker(call, about.scope)
        try:
            body = json.loads(call.body)
        except ValueError:
            raise Invalid("the body is not JSON") from None
        only(body, ROLLUP_FIELDS, "the body")
        first, end = civil_range(body.get("range"), about.most)
        if body.get("windowSizeDays", 1) != 1:
            raise Invalid("windowSizeDays: only 1 is simulated")
        size = min(page_size(body.get("pageSize")) or about.most, about.most)
        items = list(self._rolled_up(person, name, first, end))
        return paged(
            items,
            "rollupDataPoints",
            size,
            body.get("pageToken"),
            f"{name} {first} {end} {person.user_id}",
            call.endless,
        )

    # Webhooks

    hook_streams = tuple(dict.fromkeys((*LISTED, *SUMMED)))
    hook_retries = tuple(min(60 * 2**turn, 43_200) for turn in range(20))
    """Again and again for about a week; how far apart is not told."""

    def named(self, call: Call) -> str:
        """Told by the token of a service account.

        An application's secret is taken for one: whose account it is cannot be known here.
        """
        word = bearer(call)
        client, until = self.state.get("fitbit.service_tokens", {}).get(word, ("", 0))
        if until > call.now:
            return str(client)
        return next((client for client, secret in self.secrets.items() if word and secret == word), "")

    def _project(self, call: Call) -> str:
        """The application whose project it is."""
        client = self.named(call)
        if not client:
            raise Refusal(401, "no service account", self.failure(401))
        return client

    def service_account(self, client: str) -> dict[str, str]:
        """The private half of a new key; the public one is kept."""
        key, email = rsa.generate_private_key(65537, 2048), f"{token_hex(4)}@sandbox.iam.gserviceaccount.com"
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        known = self.state.get("fitbit.service_accounts", {})
        self.state.put("fitbit.service_accounts", {**known, email: [client, public.decode()]})
        return {"type": "service_account", "client_email": email, "private_key": private.decode()}

    def token(self, call: Call) -> Reply:
        """As elsewhere; and for an account's signed claims (RFC 7523) a token of the project's own."""
        if call.form.get("grant_type") != "urn:ietf:params:oauth:grant-type:jwt-bearer":
            return super().token(call)
        try:
            client = self._vouched_for(call.form.get("assertion", ""), call.now)
        except (InvalidSignature, LookupError, TypeError, ValueError) as error:
            call.entry.note = f"assertion: {error or type(error).__name__}"
            return self.denied(call, 400, "invalid_grant")
        word, tokens = token_hex(20), self.state.get("fitbit.service_tokens", {})
        self.state.put("fitbit.service_tokens", {**tokens, word: [client, call.now + 3600]})
        return json_reply(200, {"access_token": word, "expires_in": 3600, "token_type": "Bearer"})

    def _vouched_for(self, assertion: str, now: float) -> str:
        """The application for which an account's claims speak. Raises what tells that they are none."""
        said, _, signature = assertion.rpartition(".")
        header, claims = (json.loads(unpadded(part)) for part in said.split("."))
        client, public = self.state.get("fitbit.service_accounts", {})[claims["iss"]]
        key = serialization.load_pem_public_key(public.encode())
        assert isinstance(key, rsa.RSAPublicKey)
        key.verify(unpadded(signature), said.encode(), padding.PKCS1v15(), hashes.SHA256())
        if header != {"alg": "RS256", "typ": "JWT"} or claims["scope"] != CLOUD_PLATFORM:
            raise ValueError("its header or its scope")
        if not urlsplit(claims["aud"]).path.endswith("/token"):
            raise ValueError("its audience")
        if not (claims["iat"] - 60 <= now < claims["exp"] <= claims["iat"] + 3600):
            raise ValueError("its time")
        return str(client)

    def _subscribers(self, call: Call) -> Reply:
        mine = self.hooks.of(self._project(call))
        return json_reply(200, {"subscribers": [subscriber(each) for each in mine]} if mine else {})

    def _subscribe(self, call: Call) -> Reply:
        """Made once its endpoint has shown that it knows the secret from none."""
        client = self._project(call)
        try:
            asked = json.loads(call.body)
            url, secret = hooks.here(asked["endpointUri"]), str(asked["endpointAuthorization"]["secret"])
            wanted = [name for each in asked["subscriberConfigs"] for name in each["dataTypes"]]
            policies = {each["subscriptionCreatePolicy"] for each in asked["subscriberConfigs"]}
        except (ValueError, TypeError, KeyError, Mistake) as error:
            raise Invalid(f"the body: {error}") from None
        if policies != {"AUTOMATIC"} or not set(wanted) <= set(self.hook_streams):
            raise Invalid("a policy or a data type that is not simulated")

        async def later() -> Reply:
            body = b'{"type":"verification"}'
            with_secret, _ = await hooks.call("POST", url, body, {"Authorization": secret}, self.hook_timeout)
            without, _ = await hooks.call("POST", url, body, {}, self.hook_timeout)
            if with_secret != 201 or without not in (401, 403):
                return fault(400, "FAILED_PRECONDITION", "Endpoint verification failed.")
            name = f"projects/{call.params['project']}/subscribers/{token_hex(8)}"
            made = hooks.Subscription(name, client, url, secret, wanted, self.clock.now())
            self.hooks.add(made)
            return json_reply(200, {"name": f"operations/{name}", "done": True, "response": subscriber(made)})

        return Reply(200, later=later)

    def _unsubscribe(self, call: Call) -> Reply:
        name = f"projects/{call.params['project']}/subscribers/{call.params['key']}"
        if name not in {each.id for each in self.hooks.of(self._project(call))}:
            raise Refusal(404, "no such subscriber")
        self.hooks.remove(name)
        return json_reply(200, {"done": True})

    def _key(self) -> ec.EllipticCurvePrivateKey:
        """What Google signs with; made when it is needed first."""
        known = self.state.get("fitbit.signing_key")
        if known is None:
            made = ec.generate_private_key(ec.SECP256R1())
            self.state.put("fitbit.signing_key", f"{made.private_numbers().private_value:x}")
            return made
        return ec.derive_private_key(int(known, 16), ec.SECP256R1())

    def _keys(self, call: Call) -> Reply:
        """A Tink keyset."""
        point = self._key().public_key().public_numbers()
        parts = b"".join(
            bytes((tag, 33, 0)) + number.to_bytes(32, "big") for tag, number in ((26, point.x), (34, point.y))
        )
        data = {
            "typeUrl": "type.googleapis.com/google.crypto.tink.EcdsaPublicKey",
            "value": base64.b64encode(b"\x12\x06\x08\x03\x10\x02\x18\x02" + parts).decode(),
            "keyMaterialType": "ASYMMETRIC_PUBLIC",
        }
        key = {"keyData": data, "status": "ENABLED", "keyId": KEY_ID, "outputPrefixType": "TINK"}
        return json_reply(200, {"primaryKeyId": KEY_ID, "key": [key]})

    def hook_event(self, event: hooks.Event, to: hooks.Subscription) -> Any:
        if event.stream not in to.about:
            return None
        data = {
            "version": "1",
            "healthUserId": health_id(event.person),
            "operation": "DELETE" if event.what == "delete" else "UPSERT",
            "dataType": event.stream,
            "intervals": [{"physicalTimeInterval": self._lived(event)}],
        }
        return [{"data": data}]

    def _lived(self, event: hooks.Event) -> dict[str, str]:
        """When what an event is about was recorded; of a day, that day."""
        try:
            if event.stream == self.activity_stream:
                lived = self.find(event.person, event.stream, event.key).value["exercise"]["interval"]
                return {name: lived[name] for name in ("startTime", "endTime")}
            day = datetime.fromisoformat(event.key[:10])
            start = day.replace(tzinfo=ZoneInfo(event.person.timezone)).timestamp()
        except (Mistake, ValueError):  # of what somebody forged
            start = event.at - DAY_SECONDS
        return {"startTime": utc(start), "endTime": utc(start + DAY_SECONDS)}

    def hook_headers(
        self, body: bytes, to: hooks.Subscription, now: float, *, forged: bool
    ) -> dict[str, str]:
        """Google's key signs the body, in Tink's form. Who forges may have got hold of the Authorization."""
        key = ec.generate_private_key(ec.SECP256R1()) if forged else self._key()
        signed = b"\x01" + KEY_ID.to_bytes(4, "big") + key.sign(body, ec.ECDSA(hashes.SHA256()))
        signature = base64.b64encode(signed).decode()
        return {"Authorization": to.secret, "GOOGLE-HEALTH-API-SIGNATURE": signature}

    # Data points

    def points(self, person: Person, stream: str, first: date, last: date, now: float) -> Iterator[Item]:
        zone, seed = ZoneInfo(person.timezone), self.people.seed
        if stream == "exercise":
            for item in super().points(person, stream, first, last, now):
                start = datetime.fromisoformat(item.value["exercise"]["interval"]["startTime"])
                yield item._replace(found={"interval.civil_start_time": civil(start.astimezone(zone))})
        elif stream == "sleep":
            for slept in sleeps(seed, person, first, last, now):
                end = datetime.fromtimestamp(slept.end, zone)
                found = {"interval.end_time": utc(slept.end), "interval.civil_end_time": civil(end)}
                yield Item(utc(slept.start), self._sleep(person, slept, zone), slept.start, found)
        elif stream == SAMPLES:
            for beat in beats(person, first, last, now):
                time = sample_time(beat.moment, beat.at)
                found = sampled(time["physicalTime"], beat.at)
                yield Item(time["physicalTime"], heart_rate(beat, time), beat.moment, found)
        else:
            for day in days(seed, person, first, last, now):
                key, order = day.date.isoformat(), day.date.toordinal()
                if stream in SUMMED:
                    value = {camel(stream): SUMMED[stream].value(day)}
                    yield Item(key, {**window(day.date), **value}, order)
                elif stream != "weight":
                    yield Item(key, derived(stream, day), order, {"date": key})
                elif day.weight is not None:
                    at = datetime.fromtimestamp(day.weighed, zone)
                    time = sample_time(day.weighed, at)
                    yield Item(key, weight(day, time), day.weighed, sampled(time["physicalTime"], at))

    def _rolled_up(self, person: Person, name: str, first: date, end: date) -> Iterator[Any]:
        """A point for each day that has begun; one about which nothing is known has no value."""
        now = self.clock.now()
        known = {item.key: item.value for item in self.listed(person, name, first, end - DAY, now)}
        today = datetime.fromtimestamp(now, ZoneInfo(person.timezone)).date()
        while first < end and first <= today:
            yield known.get(first.isoformat(), window(first))
            first += DAY

    def item(self, activity: Activity) -> Any:
        person = self.people.all[activity.owner]
        measured, zone = self.people.measures(activity), ZoneInfo(person.timezone)
        sport = SPORTS.get(activity.sport, Sport(0, 40, 0))
        summary: dict[str, Any] = {"caloriesKcal": measured.calories}
        if measured.distance:
            summary["distanceMillimeters"] = round(measured.distance * 1000, 1)
            summary["elevationGainMillimeters"] = round(measured.climb * 1000, 1)
        if measured.pulse is not None:
            summary["averageHeartRateBeatsPerMinute"] = str(round(measured.pulse))
        if sport.speed and not sport.pedals:
            summary["steps"] = str(int(measured.distance / 0.8))
        return {
            "dataPointName": f"users/{health_id(person)}/dataTypes/exercise/dataPoints/{activity.key:x}",
            "exercise": {
                "interval": interval(activity.start, activity.start + activity.elapsed, zone),
                "exerciseType": TYPES.get(activity.sport, "OTHER"),
                "displayName": TYPES.get(activity.sport, "OTHER").replace("_", " ").title(),
                "metricsSummary": summary,
                "activeDuration": f"{measured.moving}s",
                "createTime": utc(activity.uploaded),
                "updateTime": utc(activity.uploaded),
            },
        }

    def _sleep(self, person: Person, slept: Sleep, zone: ZoneInfo) -> Any:
        """A classic sleep has no kinds of sleep. What is false is left out, as in all of Google's JSON."""
        kinds = [(stage.kind.upper(), stage.start, stage.end) for stage in slept.stages]
        if slept.nap:
            kinds = [("ASLEEP", slept.start, slept.end)]
        totals: dict[str, list[int]] = {}
        for kind, start, end in kinds:
            totals.setdefault(kind, []).append(end - start)
        awake = slept.seconds("awake")
        return {
            "dataPointName": f"users/{health_id(person)}/dataTypes/sleep/dataPoints/"
            f"{person.index:x}-{slept.start:x}",
            "sleep": {
                "interval": interval(slept.start, slept.end, zone),
                "type": "CLASSIC" if slept.nap else "STAGES",
                "stages": [{"type": kind, **span(start, end, zone)} for kind, start, end in kinds],
                "metadata": {
                    "processed": True,
                    **({"nap": True} if slept.nap else {"mainSleep": True, "stagesStatus": "SUCCEEDED"}),
                },
                "summary": {
                    "minutesInSleepPeriod": minutes(slept.end - slept.start),
                    "minutesAsleep": minutes(slept.end - slept.start - awake),
                    "minutesAwake": minutes(awake),
                    "stagesSummary": [
                        {"type": kind, "minutes": minutes(sum(found)), "count": str(len(found))}
                        for kind, found in totals.items()
                    ],
                },
                "createTime": utc(slept.end + 600),
                "updateTime": utc(slept.end + 600),
            },
        }

    def start_in(self, fields: Mapping[str, Any]) -> int | None:
        try:
            return int(datetime.fromisoformat(fields["interval"]["startTime"]).timestamp())
        except (KeyError, TypeError, ValueError):
            return None  # a start that is none, on purpose: the order stays

    def account(self, person: Person) -> dict[str, Any]:
        return {"healthUserId": health_id(person), "legacyUserId": f"B{person.index:05X}"}

    # Authorisation

    def authorize(self, call: Call) -> Reply:
        method, challenge = call.asked("code_challenge_method"), call.asked("code_challenge")
        if challenge is not None and method != "S256":
            note = "code_challenge_method: missing or not one that can be"
            raise Refusal(400, note, self.invalid("code_challenge_method"))
        reply = super().authorize(call)
        code = parse_qs(urlsplit(reply.headers.get("Location", "")).query).get("code")
        if code and challenge:
            self.state.db.execute("INSERT INTO meta VALUES (?, ?)", (f"challenge {code[0]}", challenge))
        return reply

    def proved(self, call: Call) -> bool:
        """Whether the proof key of a sign-in that had one is shown (RFC 7636)."""
        sql = "SELECT value FROM meta WHERE key = ?"
        row = self.state.db.execute(sql, (f"challenge {call.form.get('code', '')}",)).fetchone()
        digest = hashlib.sha256(call.form.get("code_verifier", "").encode()).digest()
        return row is None or row[0] == base64.urlsafe_b64encode(digest).rstrip(b"=").decode()

    def renew(self, refresh: Token, now: float) -> dict[str, Any]:
        """Without a refresh token: the old one goes on."""
        tokens = self.issue(refresh.grant, now, refresh.token)
        del tokens["refresh_token"]
        return tokens

    def denied(self, call: Call, status: int, error: str) -> Reply:
        """Errors are OAuth's, not the API's."""
        revoked = error == "invalid_grant" and call.form.get("grant_type") == "refresh_token"
        told = "Token has been expired or revoked." if revoked else DENIALS.get(error, "Bad Request")
        return json_reply(status, {"error": error, "error_description": told})

    def revoke(self, call: Call) -> Reply:
        if call.token is None:
            call.entry.note = "unknown token"
            return self.denied(call, 400, "invalid_token")
        return super().revoke(call)


# Errors and parameters

FAULTS: Mapping[int, tuple[str, ...]] = {
    400: ("INVALID_ARGUMENT", "Error 400."),
    401: ("UNAUTHENTICATED", "Request had invalid authentication credentials."),
    403: ("PERMISSION_DENIED", "Error 403."),
    404: ("NOT_FOUND", "Method not found."),
    429: ("RESOURCE_EXHAUSTED", "Quota exceeded.", "RATE_LIMIT_EXCEEDED"),
    500: ("INTERNAL", "Error 500."),
    503: ("UNAVAILABLE", "Error 503."),
}
DENIALS = {"invalid_client": "Unauthorized", "invalid_token": "Token expired or revoked"}


def fault(status: int, word: str, message: str, reason: str | None = None) -> Reply:
    """An error in Google's shape (google.rpc.Status)."""
    error: dict[str, Any] = {"code": status, "message": message, "status": word}
    if reason:
        kind = "type.googleapis.com/google.rpc.ErrorInfo"
        error["details"] = [{"@type": kind, "reason": reason, "domain": "health.googleapis.com"}]
    return json_reply(status, {"error": error})


def check_parameters(call: Call, names: Sequence[str]) -> None:
    for name, values in call.query.items():
        if name not in names or len(values) != 1:
            raise Invalid(f"the parameter {name}")


def only(value: object, names: Sequence[str], what: str) -> None:
    if not isinstance(value, dict) or any(name not in names for name in value):
        raise Invalid(f"{what}: an object with some of {', '.join(names)} is expected")


def page_size(value: object) -> int:
    """A page size: larger ones than allowed are cut down, 0 is the usual one."""
    text = str(value if value is not None else 0)
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise Invalid(f"pageSize: {value!r}")
    return int(text)


CIVIL = re.compile(r"\d{4}-\d\d-\d\d(T\d\d:\d\d:\d\d)?")


class Bound(NamedTuple):
    """One comparison of a filter."""

    member: str
    sign: str
    """`>=` or `<`."""
    value: str

    def takes(self, point: Item) -> bool:
        return (point.found[self.member] < self.value) == (self.sign == "<")


def parsed(text: str, name: str, members: Sequence[str]) -> list[Bound]:
    """A filter: comparisons `>=` and `<`, joined by `AND` (AIP-160, as documented)."""
    bounds = []
    for one in re.split(r"\s+AND\s+", text) if text else []:
        match = re.fullmatch(r'([a-z_]+)\.([a-z_.]+)\s*(>=|<)\s*"([^"]*)"', one.strip())
        if not match or match[1] != name.replace("-", "_") or match[2] not in members:
            raise Invalid(f"filter: {one!r} is none of {', '.join(members)} with >= or <")
        bounds.append(Bound(match[2], match[3], literal(match[2], match[4])))
    return bounds


def reach(bounds: Sequence[Bound]) -> tuple[date, date]:
    """Days that have all that a filter takes, whatever the zone: no life is looked at from its start."""
    least = [bound.value[:10] for bound in bounds if bound.sign == ">="]
    most = [bound.value[:10] for bound in bounds if bound.sign == "<"]
    first = date.fromisoformat(max(least, default="1980-01-01"))
    last = date.fromisoformat(min(most, default="2999-01-01"))
    return max(first, date(1980, 1, 1)) - DAY, min(last, date(2999, 1, 1)) + DAY


def literal(member: str, text: str) -> str:
    """The other side of a comparison, so written that it compares as text."""
    try:
        if member == "date":
            return date.fromisoformat(text).isoformat()
        if "civil" in member:
            if not CIVIL.fullmatch(text):
                raise ValueError
            return civil(datetime.fromisoformat(text))
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise ValueError
        return utc(moment.timestamp())
    except ValueError:
        raise Invalid(f"filter: {text!r} is no value of {member}") from None


def civil_range(value: object, most: int) -> tuple[date, date]:
    """The first day of a range, and the one after its last."""
    only(value, ("start", "end"), "range")
    assert isinstance(value, dict)
    found = []
    for name in ("start", "end"):
        only(value.get(name), ("date", "time"), f"range.{name}")
        only(value[name].get("date"), ("year", "month", "day"), f"range.{name}.date")
        if any(value[name].get("time", {}).values()):
            raise Invalid(f"range.{name}: not aligned with the window")
        try:
            found.append(date(**value[name]["date"]))
        except (TypeError, ValueError):
            raise Invalid(f"range.{name}: not a date") from None
    first, end = found
    if not 0 < (end - first).days <= most:
        raise Invalid(f"range: {(end - first).days} days are not between 1 and {most}")
    return first, end


def paged(
    items: Sequence[Any], name: str, size: int, token: object, asked: str, endless: bool = False
) -> Reply:
    """One page. Its token works for the same request only; an empty list is left out, as Google does."""
    mark, start = hashlib.sha256(asked.encode()).hexdigest()[:16], 0
    if token:
        match = re.fullmatch(r"([0-9a-f]{16})\.([0-9]{1,9})", str(token))
        if not match or match[1] != mark:
            raise Invalid("pageToken: not of this request")
        start = 0 if endless else int(match[2])
    page = list(items[start : start + size])
    reply: dict[str, Any] = {name: page} if page else {}
    if start + size < len(items) or endless:
        reply["nextPageToken"] = f"{mark}.{start + size}"
    return json_reply(200, reply)


# How Google writes people, times and days


def health_id(person: Person) -> str:
    return str(1_000_000_000_000 + person.index * 7919)


def camel(name: str) -> str:
    first, *rest = name.split("-")
    return first + "".join(word.title() for word in rest)


def interval(start: int, end: int, zone: ZoneInfo) -> dict[str, Any]:
    """A `SessionTimeInterval`."""
    return {
        **span(start, end, zone),
        "civilStartTime": civil_time(datetime.fromtimestamp(start, zone)),
        "civilEndTime": civil_time(datetime.fromtimestamp(end, zone)),
    }


def span(start: int, end: int, zone: ZoneInfo) -> dict[str, str]:
    return {
        "startTime": utc(start),
        "startUtcOffset": offset(datetime.fromtimestamp(start, zone)),
        "endTime": utc(end),
        "endUtcOffset": offset(datetime.fromtimestamp(end, zone)),
    }


def sampled(physical: str, at: datetime) -> dict[str, str]:
    """What filters look at of a sample."""
    return dict(zip(SAMPLE_TIME, (physical, civil(at)), strict=True))


def window(day: date) -> dict[str, Any]:
    """A day of a roll-up, without its value."""
    return {"civilStartTime": {"date": parts(day)}, "civilEndTime": {"date": parts(day + DAY)}}


def sample_time(moment: int, at: datetime) -> dict[str, Any]:
    """An `ObservationSampleTime`."""
    return {"physicalTime": utc(moment), "utcOffset": offset(at), "civilTime": civil_time(at)}


def weight(day: Day, time: dict[str, Any]) -> dict[str, Any]:
    """A `Weight`; most types have no names, and neither has this one."""
    return {"weight": {"sampleTime": time, "weightGrams": round((day.weight or 0) * 1000)}}


def heart_rate(beat: Beat, time: dict[str, Any]) -> dict[str, Any]:
    """A `HeartRate`."""
    metadata = {"motionContext": "SEDENTARY" if beat.asleep else "ACTIVE", "sensorLocation": "WRIST"}
    return {"heartRate": {"sampleTime": time, "beatsPerMinute": str(beat.rate), "metadata": metadata}}


def derived(name: str, day: Day) -> dict[str, Any]:
    """What Google derives once a day."""
    values: Mapping[str, dict[str, Any]] = {
        "daily-resting-heart-rate": {"beatsPerMinute": str(day.resting_pulse)},
        "daily-heart-rate-variability": {"averageHeartRateVariabilityMilliseconds": day.variability},
        "daily-oxygen-saturation": {
            "averagePercentage": day.oxygen,
            "lowerBoundPercentage": round(day.oxygen - 1.5, 1),
            "upperBoundPercentage": min(100.0, round(day.oxygen + 1.5, 1)),
        },
    }
    return {camel(name): {"date": parts(day.date), **values[name]}}


def parts(day: date) -> dict[str, int]:
    return {"year": day.year, "month": day.month, "day": day.day}


def civil_time(moment: datetime) -> dict[str, Any]:
    """A `CivilDateTime`; what is zero is left out."""
    time = {"hours": moment.hour, "minutes": moment.minute, "seconds": moment.second}
    return {"date": parts(moment.date()), "time": {name: value for name, value in time.items() if value}}


def offset(moment: datetime) -> str:
    shift = moment.utcoffset()
    assert shift is not None
    return f"{int(shift.total_seconds())}s"


def civil(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S")


def minutes(seconds: int) -> str:
    return str(seconds // 60)
