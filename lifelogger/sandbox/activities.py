"""What a provider shows of a person at a moment: seeded activities, and what was added, edited, deleted.

Added activities are there for every provider; edits and deletions are one provider's.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from lifelogger.sandbox.people import FIRST_ADDED_KEY, Activity, People, Person
from lifelogger.sandbox.state import State


@dataclass(frozen=True, slots=True)
class Change:
    """An edit of one activity at one provider."""

    version: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What its item says instead, in the provider's words."""
    removed: tuple[str, ...] = ()
    """Fields that its item lacks."""
    raw: str | None = None
    """JSON that is served in place of the item, whatever it is."""
    start: int | None = None
    """When it started after all, in epoch seconds."""
    deleted: bool = False


UNCHANGED = Change()


class Shown(NamedTuple):
    """One activity as it can be seen."""

    start: int
    activity: Activity
    change: Change


@dataclass(frozen=True, slots=True)
class View:
    """All that can be seen of a person, oldest start first; true from `begin` until before `end`."""

    shown: Sequence[Shown]
    begin: float
    end: float

    def between(self, after: float | None, before: float | None) -> Sequence[Shown]:
        """What started strictly after and before these moments (epoch seconds)."""
        low = 0 if after is None else bisect_right(self.shown, after, key=_start)
        high = len(self.shown) if before is None else bisect_left(self.shown, before, key=_start)
        return self.shown[low:high]

    def find(self, key: int) -> Shown | None:
        return next((shown for shown in self.shown if shown.activity.key == key), None)


def _start(shown: Shown) -> int:
    return shown.start


class Activities:
    """The activities of all people, with a memory for what was done to them by hand."""

    def __init__(self, state: State, people: People) -> None:
        self.state = state
        self.people = people
        self.load()

    def load(self) -> None:
        """Take up what the state knows, and forget everything else."""
        self._views: dict[tuple[str, int], View] = {}
        self._added: dict[int, dict[int, Activity]] = {}
        for key, text in self.state.db.execute("SELECT key, activity FROM added"):
            self._keep(Activity(key, *json.loads(text)))
        self._changes: dict[tuple[str, int], Change] = {}
        for provider, key, version, fields, removed, raw, start, deleted in self.state.db.execute(
            "SELECT provider, key, version, fields, removed, raw, start, deleted FROM changes"
        ):
            change = Change(
                version, json.loads(fields), tuple(json.loads(removed)), raw, start, bool(deleted)
            )
            self._changes[provider, key] = change

    def view(self, provider: str, person: Person, now: float) -> View:
        known = self._views.get((provider, person.index))
        if known is not None and known.begin <= now < known.end:
            return known
        seen = self._look(provider, person, now)
        self._views[provider, person.index] = seen
        return seen

    def find(self, key: int, until: float) -> Activity | None:
        """An activity by its key, uploaded or not; deleted ones as well. `until` bounds the search."""
        if key >= FIRST_ADDED_KEY:
            return next((added[key] for added in self._added.values() if key in added), None)
        person = self.people.owner(key)
        done = self.people.activities(person, until) if person else ()
        return next((activity for activity in done if activity.key == key), None)

    def add(self, activity: Activity) -> Activity:
        """Keep an activity under a key of its own. Belongs into a transaction."""
        person = self.people.all[activity.owner]
        sql = "INSERT INTO added VALUES (coalesce((SELECT max(key) FROM added) + 1, ?), ?, ?) RETURNING key"
        (key,) = self.state.db.execute(
            sql, (FIRST_ADDED_KEY, person.user_id, json.dumps(activity[1:]))
        ).fetchone()
        activity = activity._replace(key=key)
        self._keep(activity)
        self._forget_views(activity)
        return activity

    def change(self, provider: str, activity: Activity, **values: Any) -> Change:
        """Edit at one provider: `values` are fields of `Change`. Belongs into a transaction."""
        before = self._changes.get((provider, activity.key), UNCHANGED)
        after = replace(before, version=before.version + 1, **values)
        person = self.people.all[activity.owner]
        self.state.db.execute(
            "INSERT OR REPLACE INTO changes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                provider,
                activity.key,
                person.user_id,
                after.version,
                json.dumps(dict(after.fields)),
                json.dumps(after.removed),
                after.raw,
                after.start,
                after.deleted,
            ),
        )
        self._changes[provider, activity.key] = after
        self._forget_views(activity)
        return after

    def changed(self, provider: str, activity: Activity) -> Change:
        """What was done to an activity at a provider so far."""
        return self._changes.get((provider, activity.key), UNCHANGED)

    def _keep(self, activity: Activity) -> None:
        self._added.setdefault(activity.owner, {})[activity.key] = activity

    def _forget_views(self, activity: Activity) -> None:
        for provider, index in [owner for owner in self._views if owner[1] == activity.owner]:
            del self._views[provider, index]

    def _look(self, provider: str, person: Person, now: float) -> View:
        shown, begin, end = [], -math.inf, now + 86_400
        moved = False
        for activities in (
            self.people.activities(person, now + 86_400),
            self._added.get(person.index, {}).values(),
        ):
            for activity in activities:
                if activity.uploaded > now:
                    end = min(end, activity.uploaded)
                    continue
                begin = max(begin, activity.uploaded)
                change = self._changes.get((provider, activity.key), UNCHANGED)
                if not change.deleted:
                    start = activity.start if change.start is None else change.start
                    moved = moved or change.start is not None
                    shown.append(Shown(start, activity, change))
        if moved or self._added.get(person.index):
            shown.sort(key=lambda one: (one.start, one.activity.key))
        return View(shown, begin, end)
