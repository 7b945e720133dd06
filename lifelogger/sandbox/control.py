"""The control API: turns the clock, breaks replies, tells the truth. JSON in, JSON out.

What cannot be done is answered 400 with a sentence: `{"error": …}`. None of this counts as a request.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lifelogger.sandbox.calls import Mistake, compact, whole
from lifelogger.sandbox.changes import Edit, merged, removed
from lifelogger.sandbox.ledger import COLUMNS, USED_TWICE
from lifelogger.sandbox.people import SPORTS, Activity, Person
from lifelogger.sandbox.provider import Provider
from lifelogger.sandbox.world import DEFAULT, World

EDITS = ("start", "uploaded", "fields", "remove", "raw", "elapsed", "sport", "private", "provider")
"""What a request to add or edit an activity may say."""

END_OF_TIME = 32_503_680_000
"""The year 3000, in epoch seconds."""

FASTEST = 10_000_000
"""A year in three seconds."""
LONGEST = 30 * 86_400
"""Seconds of the longest activity."""

Json = dict[str, Any]


def control_app(world: World) -> Starlette:
    """The application below `/control/`."""
    control = Control(world)
    return Starlette(
        routes=[
            _get("health", control.health),
            _get("people", control.people),
            _post("connect", control.connect),
            _get("clock", control.show_clock),
            _post("clock", control.turn_clock),
            _get("people/{person}/activities", control.truth),
            _post("people/{person}/activities", control.add),
            _get("people/{person}/items", control.items),
            _post("people/{person}/items", control.change_item),
            _patch("activities/{key}", control.edit),
            _delete("activities/{key}", control.delete),
            _get("faults", control.faults),
            _post("faults", control.add_fault),
            _delete("faults", control.delete_faults),
            _delete("faults/{id}", control.delete_fault),
            _get("holds", control.holds),
            _post("holds", control.add_hold),
            _get("holds/{id}", control.hold),
            _delete("holds/{id}", control.release),
            _get("limits", control.show_limits),
            _post("limits", control.set_limits),
            _post("spend", control.spend),
            _get("settings", control.show_settings),
            _post("settings", control.set_settings),
            _get("webhooks", control.webhooks),
            _post("webhooks", control.disturb_webhooks),
            _post("webhooks/forge", control.forge_webhooks),
            _post("service-account", control.service_account),
            _post("people/{person}/revoke", control.revoke),
            _post("people/{person}/expire", control.expire),
            _get("ledger", control.ledger),
            _get("ledger/summary", control.summary),
            _post("reset", control.reset),
        ]
    )


class Control:
    """One method per thing that can be asked: parameters of path and query, and the body, to a reply."""

    def __init__(self, world: World) -> None:
        self.world = world

    def health(self, params: Json, body: Json) -> Json:
        return {"ok": True, "now": self.world.clock.now(), "people": len(self.world.people.all)}

    def people(self, params: Json, body: Json) -> list[Json]:
        return [
            {
                "user_id": person.user_id,
                "name": person.name,
                "timezone": person.timezone,
                **{name: provider.account(person) for name, provider in self.world.providers.items()},
            }
            for person in self.world.people.all
        ]

    def connect(self, params: Json, body: Json) -> list[Json]:
        """Let an application in on behalf of people; returns lines for `connections import`."""
        _only(body, "provider", "people", "client_id", "client_secret", "scopes")
        provider = self._provider(body)
        client, secret = _client(body), _text(body, "client_secret", "sandbox")
        if not provider.knows_client(client, secret):
            raise Mistake(f"client_secret: not the one that {client!r} showed first")
        scopes = _words(body, "scopes")
        asked = _words(body, "people")
        people = self.world.people.all if asked is None else [self._person(word) for word in asked]
        lines = []
        with self.world.state:
            for person in people:
                tokens = provider.connect(person, client, scopes)
                lines.append({"user_id": person.user_id, "provider": provider.name, **tokens})
        return lines

    def show_clock(self, params: Json, body: Json) -> Json:
        clock = self.world.clock
        return {"now": clock.now(), "speed": clock.speed}

    def turn_clock(self, params: Json, body: Json) -> Json:
        """Any of `real`, `speed`, `set` and `step`, in this order."""
        _only(body, "real", "speed", "set", "step")
        clock = self.world.clock
        if body.get("real"):
            clock.follow_real_time()
        if body.get("speed") is not None:
            speed = _number(body, "speed")
            if not 0 <= speed <= FASTEST:
                raise Mistake(
                    f"speed: {speed:g} is less than 0 (a clock is set back) or more than {FASTEST:g}"
                )
            clock.run(speed)
        if body.get("set") is not None:
            clock.set(_moment(body, "set"))
        if body.get("step") is not None:
            step = _number(body, "step")
            clock.set(_in_time(clock.now() + step, "step"))
        self.world.keep_clock()
        return self.show_clock(params, {})

    def items(self, params: Json, body: Json) -> list[Json]:
        """The truth of a stream, newest first: all there is of it now, whoever may see it."""
        _only(params, "person", "provider", "stream")
        provider, person = self._provider(params), self._person(params["person"])
        found = provider.truth(person, _stream(provider, params), self.world.clock.now())
        return [{"key": item.key, "item": item.value} for item in found]

    def change_item(self, params: Json, body: Json) -> Json:
        """Change an item: `fields` are merged into it, `remove` names what it lacks, `raw` takes its place,
        `deleted` takes it away and brings it back."""
        _only(body, "provider", "stream", "key", "fields", "remove", "raw", "deleted")
        provider, person = self._provider(body), self._person(params["person"])
        stream, key, fields = _stream(provider, body), _text(body, "key", ""), _object(body, "fields")
        values = _changed(body)
        if stream == provider.activity_stream:
            own: Any = fields
            for name in provider.activity_path:
                own = own.get(name)
                own = own if isinstance(own, dict) else {}
            values |= _moved(provider.start_in(own))
        edits = [*merged(fields), *removed(_words(body, "remove") or ())]
        with self.world.state:
            item = provider.change(person, stream, key, edits, **values)
        deleted = values.get("deleted")
        what = "update" if deleted is None else "delete" if deleted else "create"
        provider.hooks.happened(person, stream, key, what)
        return {"key": key, "item": item}

    def service_account(self, params: Json, body: Json) -> Json:
        """A new key of an account that acts for an application itself, as a provider's console gives it."""
        _only(body, "provider", "client")
        with self.world.state:
            return self._provider(body).service_account(_text(body, "client", "sandbox"))

    def truth(self, params: Json, body: Json) -> list[Any]:
        """All activities that can be seen of a person now, private or not, newest first."""
        provider, person = self._provider(params), self._person(params["person"])
        return [
            item.value for item in provider.truth(person, provider.activity_stream, self.world.clock.now())
        ]

    def add(self, params: Json, body: Json) -> Any:
        """A new activity: by default one that has just ended and is already uploaded."""
        _only(body, *EDITS)
        provider, person = self._provider(body), self._person(params["person"])
        if not provider.activity_stream:
            raise Mistake(f"{provider.title} shows no activities")
        now = self.world.clock.now()
        fields = _object(body, "fields")
        elapsed = body.get("elapsed", fields.get("elapsed_time", 1800))
        if not whole(elapsed) or elapsed > LONGEST:
            elapsed = 1800  # a bad length belongs to the item, not to the person's day
        sport = _text(body, "sport", "Run")
        if sport not in SPORTS:
            raise Mistake(f"sport: {sport!r} is none of {', '.join(SPORTS)}; any word goes into the fields")
        named = fields.get("sport_type")
        start = _moment(body, "start") if body.get("start") is not None else now - elapsed
        activity = Activity(
            key=0,
            owner=person.index,
            start=int(start),
            elapsed=elapsed,
            sport=named if isinstance(named, str) and named in SPORTS else sport,
            uploaded=_moment(body, "uploaded") if body.get("uploaded") is not None else start + elapsed,
            private=bool(body.get("private", fields.get("private", False))),
        )
        with self.world.state:
            activity = self.world.activities.add(activity)
            edits = {name: value for name, value in body.items() if name in ("fields", "remove", "raw")}
            added = self._edit(provider, activity, edits)
        for each in self.world.providers.values():
            if each.activity_stream and activity.uploaded <= now:
                each.hooks.happened(person, each.activity_stream, str(activity.key), "create")
        return added

    def edit(self, params: Json, body: Json) -> Any:
        """Change what an activity's item says: `fields`, `remove`, `raw`, `start`."""
        _only(body, "fields", "remove", "raw", "start", "provider")
        provider, activity = self._provider(body), self._activity(params)
        with self.world.state:
            edited = self._edit(provider, activity, body)
        self._happened(provider, activity, "update")
        return edited

    def delete(self, params: Json, body: Json) -> Json:
        provider, activity = self._provider(params), self._activity(params)
        with self.world.state:
            self._change(provider, activity, (), deleted=True)
        self._happened(provider, activity, "delete")
        return {}

    def faults(self, params: Json, body: Json) -> list[Json]:
        return [fault.describe() for fault in self.world.faults.faults.values()]

    def add_fault(self, params: Json, body: Json) -> Json:
        self._check_choice(body)
        return {"id": self.world.faults.add_fault(body).id}

    def delete_faults(self, params: Json, body: Json) -> Json:
        self.world.faults.faults.clear()
        return {}

    def delete_fault(self, params: Json, body: Json) -> Json:
        faults = self.world.faults.faults
        del faults[_known(params["id"], faults, "fault")]
        return {}

    def holds(self, params: Json, body: Json) -> list[Json]:
        return [hold.describe() for hold in self.world.faults.holds.values()]

    def add_hold(self, params: Json, body: Json) -> Json:
        self._check_choice(body)
        return {"id": self.world.faults.add_hold(body).id}

    def hold(self, params: Json, body: Json) -> Json:
        holds = self.world.faults.holds
        return holds[_known(params["id"], holds, "hold")].describe()

    def release(self, params: Json, body: Json) -> Json:
        self.world.faults.release([_known(params["id"], self.world.faults.holds, "hold")])
        return {}

    def show_limits(self, params: Json, body: Json) -> Json:
        return dict(self._provider(params).limits)

    def set_limits(self, params: Json, body: Json) -> Json:
        provider = self._provider(body)
        provider.limit({name: value for name, value in body.items() if name != "provider"})
        return dict(provider.limits)

    def spend(self, params: Json, body: Json) -> Json:
        """Another program of the same application makes requests; they count overall as well."""
        _only(body, "provider", "client_id", "pool", "number")
        provider = self._provider(body)
        pools = provider.counted(_text(body, "pool", next(iter(provider.pools))))
        number = body.get("number", 1)
        if not whole(number):
            raise Mistake(f"number: {number!r} is not a whole number")
        client, now = _client(body), self.world.clock.now()
        with self.world.state:
            provider.spend(client, pools, now, number)
        return {name: provider.usage(client, name, now) for name in provider.pools}

    def show_settings(self, params: Json, body: Json) -> Json:
        return dict(self._provider(params).settings)

    def set_settings(self, params: Json, body: Json) -> Json:
        provider = self._provider(body)
        provider.configure({name: value for name, value in body.items() if name != "provider"})
        return dict(provider.settings)

    def revoke(self, params: Json, body: Json) -> Json:
        """The person takes back what they granted, to all applications."""
        provider, person = self._provider(body), self._person(params["person"])
        provider.hooks.happened(person, "", "", "revoke")
        with self.world.state:
            return {"grants": provider.grants.revoke(person.user_id, self.world.clock.now())}

    def webhooks(self, params: Json, body: Json) -> Json:
        """Who subscribed, and what became of each delivery, oldest first."""
        hooks = self._provider(params).hooks
        return {
            "subscriptions": [asdict(each) for each in hooks.subscriptions.values()],
            "deliveries": [each.describe() for each in hooks.deliveries],
        }

    def disturb_webhooks(self, params: Json, body: Json) -> Json:
        """Of the next deliveries so many are `lost`, `doubled` or `reordered`; all are `late` by seconds."""
        _only(body, "provider", "lost", "doubled", "reordered", "late")
        mischief = self._provider(body).hooks.mischief
        for name in ("lost", "doubled", "reordered"):
            if not whole(body.get(name, 0)):
                raise Mistake(f"{name}: {body[name]!r} is not a whole number")
            setattr(mischief, name, body.get(name, getattr(mischief, name)))
        if body.get("late") is not None:
            mischief.late = _number(body, "late")
        return {name: getattr(mischief, name) for name in ("lost", "doubled", "reordered", "late")}

    def forge_webhooks(self, params: Json, body: Json) -> Json:
        """Somebody who knows the address and the person's id sends events of their own."""
        _only(body, "provider", "person", "stream", "number")
        provider, person = self._provider(body), self._person(body.get("person"))
        number = body.get("number", 1)
        if not whole(number):
            raise Mistake(f"number: {number!r} is not a whole number")
        return {"sent": provider.hooks.forge(person, _stream(provider, body), number)}

    def expire(self, params: Json, body: Json) -> Json:
        """The person's access tokens are past their time."""
        provider, person = self._provider(body), self._person(params["person"])
        with self.world.state:
            provider.grants.expire(person.user_id, self.world.clock.now())
        return {}

    def ledger(self, params: Json, body: Json) -> list[Json]:
        """Answered requests, oldest first; `after` is an entry's id, `status` may be several with commas."""
        columns = [name for name in COLUMNS if name not in ("id", "status", "at", "started", "ended")]
        _only(params, "after", "limit", "status", *columns)
        entries = self.world.ledger.requests(
            after=_whole(params.get("after", "0"), "after"),
            limit=_whole(params.get("limit", "100000"), "limit"),
            statuses=[_whole(text, "status") for text in params.get("status", "").split(",") if text],
            **{name: params[name] for name in columns if name in params},
        )
        return [asdict(entry) for entry in entries]

    def summary(self, params: Json, body: Json) -> Json:
        ledger = self.world.ledger
        by_status = ledger.counts("status")
        notes = ledger.counts("note")
        windows, most = [], dict[str, dict[str, int]]()
        for name, seconds, start, used in ledger.windows():
            provider_name, _, rest = name.partition(":")
            client, _, pool = rest.rpartition(":")
            provider = self.world.providers[provider_name]
            limit = provider.limits[pool][provider.pools[pool].index(seconds)]
            windows.append(
                {
                    "provider": provider_name,
                    "client_id": client,
                    "pool": pool,
                    "seconds": seconds,
                    "start": start,
                    "used": used,
                    "limit": limit,
                }
            )
            lengths = most.setdefault(pool, {})
            lengths[str(seconds)] = max(used, lengths.get(str(seconds), 0))
        return {
            "requests": sum(by_status.values()),
            "open": len(ledger.open),
            "by_status": by_status,
            "by_route": ledger.counts("route"),
            "windows": windows,
            "most_in_a_window": most,
            "overlaps": len(ledger.overlaps()),
            "most_at_once": ledger.most_at_once(),
            "refresh_tokens_used_twice": notes.get(USED_TWICE, 0),
            "unexpected": sum(count for note, count in notes.items() if note),
        }

    def reset(self, params: Json, body: Json) -> Json:
        self.world.reset()
        return {}

    def _provider(self, values: Json) -> Provider:
        name = values.get("provider") or DEFAULT
        if not isinstance(name, str) or name not in self.world.providers:
            raise Mistake(f"no provider {name!r}: one of {', '.join(self.world.providers)}")
        return self.world.providers[name]

    def _person(self, word: object) -> Person:
        person = self.world.people.by_id.get(word) if isinstance(word, str) else None
        if person is None:
            raise Mistake(f"no person {word!r}: /control/people has them all")
        return person

    def _activity(self, params: Json) -> Activity:
        key = _whole(params["key"], "activity")
        activity = self.world.activities.find(key, self.world.clock.now())
        if activity is None:
            raise Mistake(f"no activity {key}")
        return activity

    def _happened(self, provider: Provider, activity: Activity, what: str) -> None:
        person = self.world.people.all[activity.owner]
        provider.hooks.happened(person, provider.activity_stream, str(activity.key), what)

    def _edit(self, provider: Provider, activity: Activity, body: Json) -> Json:
        """Apply what a request says beyond the activity itself; its id and what its item is then.

        Here `fields` are the activity's own, wherever they are in its item, and each is replaced as a whole.
        """
        fields, path = _object(body, "fields"), provider.activity_path
        start = _moment(body, "start") if body.get("start") is not None else provider.start_in(fields)
        edits = [Edit((*path, name), value) for name, value in fields.items()]
        edits += removed(_words(body, "remove") or (), path)
        return self._change(provider, activity, edits, **_changed(body), **_moved(start))

    def _change(self, provider: Provider, activity: Activity, edits: Sequence[Edit], **values: Any) -> Json:
        person = self.world.people.all[activity.owner]
        item = provider.change(person, provider.activity_stream, str(activity.key), edits, **values)
        return {"id": activity.key, "item": item}

    def _check_choice(self, body: Json) -> None:
        """Refuse what would never be met: an unknown person or provider, a pattern that fits no route."""
        if body.get("person") is not None:
            self._person(body["person"])
        every = [self._provider(body)] if body.get("provider") else list(self.world.providers.values())
        match = body.get("match")
        if isinstance(match, str) and not any(provider.has_route(match) for provider in every):
            labels = ", ".join(one.label for provider in every for one in provider.routes)
            raise Mistake(f"match: {match!r} fits no route: {labels}")


Answer = Callable[[Json, Json], Any]


def _endpoint(answer: Answer) -> Callable[[Request], Any]:
    @functools.wraps(answer)
    async def endpoint(request: Request) -> Response:
        try:
            text = await request.body()
            body = json.loads(text) if text.strip() else {}
            if not isinstance(body, dict):
                raise Mistake("the body is not a JSON object")
            result = answer({**request.query_params, **request.path_params}, body)
        except (Mistake, ValueError) as error:
            return JSONResponse({"error": str(error)}, 400)
        # Not JSONResponse: an item that is wrong on purpose may hold NaN.
        return Response(compact(result), media_type="application/json")

    return endpoint


def _route(method: str, path: str, answer: Answer) -> Route:
    return Route(f"/control/{path}", _endpoint(answer), methods=[method])


_get = functools.partial(_route, "GET")
_post = functools.partial(_route, "POST")
_patch = functools.partial(_route, "PATCH")
_delete = functools.partial(_route, "DELETE")


def _only(values: Json, *names: str) -> None:
    """Refuse names that mean nothing here: a misspelt one shall not be ignored."""
    for name in values:
        if name not in names:
            raise Mistake(f"no parameter {name!r}: one of {', '.join(names)}")


def _stream(provider: Provider, values: Json) -> str:
    name = _text(values, "stream", provider.activity_stream)
    if name not in provider.streams:
        raise Mistake(f"no stream {name!r} at {provider.title}: one of {', '.join(provider.streams)}")
    return name


def _changed(body: Json) -> Json:
    """What a request says of an item as a whole, as fields of a `Change`."""
    found: Json = {"raw": json.dumps(body["raw"])} if "raw" in body else {}
    if body.get("deleted") is not None:
        if not isinstance(body["deleted"], bool):
            raise Mistake(f"deleted: {body['deleted']!r} is not true or false")
        found["deleted"] = body["deleted"]
    return found


def _moved(start: float | None) -> Json:
    return {} if start is None else {"start": int(start)}


def _number(body: Json, name: str) -> float:
    value = body[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Mistake(f"{name}: {value!r} is not a number")
    return float(value)


def _moment(body: Json, name: str) -> float:
    """Epoch seconds, of a number or of ISO 8601 with an offset."""
    value = body[name]
    if not isinstance(value, str):
        return _in_time(_number(body, name), name)
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise Mistake(f"{name}: {value!r} is neither epoch seconds nor a time in ISO 8601") from None
    if moment.tzinfo is None:
        raise Mistake(f"{name}: {value!r} tells no offset; end it in Z for UTC")
    return _in_time(moment.timestamp(), name)


def _in_time(moment: float, name: str) -> float:
    if not 0 <= moment < END_OF_TIME:
        raise Mistake(f"{name}: {moment:g} is not between 1970 and 3000")
    return moment


def _text(body: Json, name: str, default: str) -> str:
    value = body.get(name, default)
    if not isinstance(value, str) or not value:
        raise Mistake(f"{name}: {value!r} is not a word")
    return value


def _client(body: Json) -> str:
    return _text(body, "client_id", "sandbox")


def _words(body: Json, name: str) -> Sequence[str] | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise Mistake(f"{name}: {value!r} is not a list of words")
    return value


def _object(body: Json, name: str) -> Json:
    value = body.get(name, {})
    if not isinstance(value, dict):
        raise Mistake(f"{name}: {value!r} is not an object")
    return value


def _whole(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise Mistake(f"{name}: {text!r} is not a whole number")
    return int(text)


def _known(text: str, among: dict[int, Any], what: str) -> int:
    id_ = _whole(text, what)
    if id_ not in among:
        raise Mistake(f"no {what} {id_}")
    return id_
