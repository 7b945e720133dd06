"""The sandbox's control API as Python calls, for every test: `Control(sandbox.url)`.

    control = Control(sandbox.url)
    line = control.connect("alice")[0]
    control.fault("GET /athlete/activities", status=500, times=1)
    with control.hold("GET /athlete/activities") as gate: ...; gate.wait_until_reached()
    assert control.summary()["overlaps"] == 0

A request that makes no sense raises `Refused`, with the sandbox's own sentence.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any
from urllib.parse import urlencode

import urllib3

DEADLINE_SECONDS = 20
Moment = float | str | datetime
Json = dict[str, Any]


class Refused(Exception):
    """The control API refused a request; the message says why."""


@dataclass
class Hold:
    """Requests that are kept open. As a context manager it releases them at the end."""

    control: Control
    id: int
    released: bool = False

    def reached(self) -> int:
        """How many requests came to it."""
        return int(self.control.get(f"holds/{self.id}")["reached"])

    def wait_until_reached(self, number: int = 1, seconds: float = DEADLINE_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while self.reached() < number:
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {seconds:g} s in vain for {number} requests to be held")
            time.sleep(0.005)

    def release(self) -> None:
        if not self.released:
            self.control.delete_path(f"holds/{self.id}")
            self.released = True

    def __enter__(self) -> Hold:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Control:
    """One sandbox. Times are epoch seconds, ISO 8601 with an offset, or aware datetimes."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.pool = urllib3.PoolManager(retries=False, timeout=DEADLINE_SECONDS)

    def close(self) -> None:
        self.pool.clear()

    # People and what they did

    def people(self) -> list[Json]:
        found: list[Json] = self.get("people")
        return found

    def connect(
        self,
        *people: str,
        scopes: Sequence[str] | None = None,
        client_id: str = "sandbox",
        client_secret: str = "sandbox",
        provider: str = "strava",
    ) -> list[Json]:
        """Let the application in on behalf of these people (of all, without any): lines to import."""
        lines: list[Json] = self.post(
            "connect",
            provider=provider,
            people=list(people) or None,
            scopes=None if scopes is None else list(scopes),
            client_id=client_id,
            client_secret=client_secret,
        )
        return lines

    def truth(self, person: str, provider: str = "strava") -> list[Json]:
        """All items of a person as the provider would list them now, newest first."""
        items: list[Json] = self.get(f"people/{person}/activities", provider=provider)
        return items

    def add(self, person: str, *, fields: Mapping[str, Any] | None = None, **options: Any) -> int:
        """A new activity, by default just ended and uploaded; returns its id.

        Options: `start`, `uploaded` (later than its end: a late upload), `elapsed`, `sport`, `private`,
        `remove` (fields its item lacks), `raw` (JSON served in place of the item).
        """
        values = {"fields": dict(fields or {}), **{name: _plain(value) for name, value in options.items()}}
        return int(self.post(f"people/{person}/activities", **values)["id"])

    def edit(self, activity: int, *, fields: Mapping[str, Any] | None = None, **options: Any) -> Json:
        """Change an item: `fields`, and as options `remove`, `raw`, `start`. Returns what it is then."""
        values = {"fields": dict(fields or {}), **{name: _plain(value) for name, value in options.items()}}
        item: Json = self._call("PATCH", f"activities/{activity}", body=json.dumps(values))["item"]
        return item

    def delete(self, activity: int, provider: str = "strava") -> None:
        self.delete_path(f"activities/{activity}", provider=provider)

    def items(self, person: str, stream: str, provider: str = "strava") -> list[Json]:
        """The truth of a stream, newest first: a `key` and an `item` each, as the provider lists it now."""
        found: list[Json] = self.get(f"people/{person}/items", provider=provider, stream=stream)
        return found

    def change_item(
        self, person: str, stream: str, key: str, provider: str = "strava", **options: Any
    ) -> Json:
        """Change any item: `fields` (merged into it), `remove` (paths like `summary.minutes`), `raw` (JSON in
        its place), `deleted` (also to bring it back). Returns `key` and `item`; that is None once deleted."""
        changed: Json = self.post(
            f"people/{person}/items", provider=provider, stream=stream, key=key, **options
        )
        return changed

    def revoke(self, person: str, provider: str = "strava") -> None:
        """The person takes back what they granted."""
        self.post(f"people/{person}/revoke", provider=provider)

    def expire(self, person: str, provider: str = "strava") -> None:
        """The person's access tokens are past their time."""
        self.post(f"people/{person}/expire", provider=provider)

    # Webhooks

    def webhooks(self, provider: str = "strava") -> Json:
        """Who `subscriptions` are of, and all `deliveries`, oldest first."""
        found: Json = self.get("webhooks", provider=provider)
        return found

    def disturb_webhooks(self, provider: str = "strava", **mischief: float) -> Json:
        """Of the next deliveries so many are `lost`, `doubled` or `reordered`; all are `late` by seconds."""
        found: Json = self.post("webhooks", provider=provider, **mischief)
        return found

    def forge_webhooks(
        self, person: str, number: int = 1, provider: str = "strava", stream: str | None = None
    ) -> int:
        """Somebody sends events that are not the provider's; returns how many."""
        named = {} if stream is None else {"stream": stream}
        return int(
            self.post("webhooks/forge", provider=provider, person=person, number=number, **named)["sent"]
        )

    # The clock

    def service_account(self, provider: str = "fitbit", client: str = "sandbox") -> Json:
        """A new key of an account that acts for an application, as the provider's console gives it."""
        return self.post("service-account", provider=provider, client=client)

    def now(self) -> float:
        return float(self.get("clock")["now"])

    def set_clock(self, moment: Moment) -> None:
        self.post("clock", set=_plain(moment))

    def step(self, seconds: float) -> None:
        self.post("clock", step=seconds)

    def speed(self, speed: float) -> None:
        self.post("clock", speed=speed)

    def freeze(self, moment: Moment | None = None) -> None:
        """Stop the clock, where it is or at a moment."""
        self.post("clock", speed=0, **({} if moment is None else {"set": _plain(moment)}))

    def follow_real_time(self) -> None:
        self.post("clock", real=True)

    # What goes wrong

    def fault(self, match: str, **options: Any) -> int:
        """Break replies; returns the fault's id. Options: `lifelogger.sandbox.faults.Fault`."""
        return int(self.post("faults", match=match, **options)["id"])

    def faults(self) -> list[Json]:
        """All faults, with how many `hits` they had."""
        found: list[Json] = self.get("faults")
        return found

    def clear_faults(self, *ids: int) -> None:
        """Take these faults away, or all of them."""
        for path in [f"faults/{id_}" for id_ in ids] or ["faults"]:
            self.delete_path(path)

    def hold(self, match: str, person: str | None = None, times: int | None = None) -> Hold:
        """Keep requests open until the hold is released."""
        return Hold(self, int(self.post("holds", match=match, person=person, times=times)["id"]))

    # Limits and settings

    def limits(self, provider: str = "strava", **pools: Sequence[int]) -> Json:
        """Set limits, like `reads=(200, 2000)`; returns all."""
        if not pools:
            found: Json = self.get("limits", provider=provider)
        else:
            found = self.post("limits", provider=provider, **{name: list(of) for name, of in pools.items()})
        return found

    def spend(
        self, number: int, pool: str = "reads", client_id: str = "sandbox", provider: str = "strava"
    ) -> Json:
        """Another program of the application makes requests; returns what is used then."""
        used: Json = self.post("spend", provider=provider, client_id=client_id, pool=pool, number=number)
        return used

    def settings(self, provider: str = "strava", **changes: Any) -> Json:
        found: Json
        found = (
            self.post("settings", provider=provider, **changes)
            if changes
            else self.get("settings", provider=provider)
        )
        return found

    # What happened

    def ledger(self, **filters: Any) -> list[Json]:
        """Answered requests, oldest first. Filters: `person`, `status`, `route`, `kind`, `after` (an id)."""
        entries: list[Json] = self.get("ledger", **filters)
        return entries

    def summary(self) -> Json:
        found: Json = self.get("ledger/summary")
        return found

    def reset(self) -> None:
        """Forget everything that happened; the people stay, the clock is as at first."""
        self.post("reset")

    # The wire

    def get(self, path: str, **params: Any) -> Any:
        return self._call("GET", path, params)

    def post(self, path: str, **body: Any) -> Any:
        return self._call("POST", path, body=json.dumps(body))

    def delete_path(self, path: str, **params: Any) -> None:
        self._call("DELETE", path, params)

    def _call(
        self, method: str, path: str, params: Mapping[str, Any] | None = None, body: str | None = None
    ) -> Any:
        query = urlencode({name: value for name, value in (params or {}).items() if value is not None})
        reply = self.pool.request(method, f"{self.url}/control/{path}?{query}", body=body)
        if reply.status != 200:
            raise Refused(f"{method} /control/{path}: {reply.status} {reply.data.decode()}")
        return json.loads(reply.data)


def _plain(value: Any) -> Any:
    return value.timestamp() if isinstance(value, datetime) else value
