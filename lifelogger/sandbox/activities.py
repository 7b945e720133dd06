"""What a provider shows of a person at a moment: seeded activities and added ones, without the deleted.

Added activities are there for every provider; changes are one provider's.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lifelogger.sandbox.changes import UNCHANGED, Change, Changes
from lifelogger.sandbox.people import FIRST_ADDED_KEY, Activity, People, Person
from lifelogger.sandbox.state import State

MOST_START = 60_000_000_000
"""Starts further from 1970 (epoch seconds) have no local time, but an order they still have."""


class Shown(NamedTuple):
    """One activity as it can be seen."""

    start: int
    activity: Activity
    change: Change

    @property
    def moved(self) -> Activity:
        """The activity at the start it has here, unless that one has no local time."""
        return self.activity._replace(start=self.start) if abs(self.start) < MOST_START else self.activity


@dataclass(frozen=True, slots=True)
class View:
    """All that can be seen of a person, oldest start first; true from `begin` until before `end`."""

    shown: Sequence[Shown]
    begin: float
    end: float
    changes: Mapping[str, Change]
    """Of which it was made."""

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
    """The activities of all people, with a memory for those that were added by hand."""

    def __init__(self, state: State, people: People, changes: Changes) -> None:
        self.state = state
        self.people = people
        self.changes = changes
        self.load()

    def load(self) -> None:
        """Take up what the state knows, and forget everything else."""
        self._views: dict[tuple[str, str, int], View] = {}
        self._added: dict[int, dict[int, Activity]] = {}
        for key, text in self.state.db.execute("SELECT key, activity FROM added"):
            self._keep(Activity(key, *json.loads(text)))

    def view(self, provider: str, stream: str, person: Person, now: float) -> View:
        """What a provider's stream of activities shows."""
        changes = self.changes.of(provider, stream, person)
        known = self._views.get((provider, stream, person.index))
        if known is not None and known.begin <= now < known.end and known.changes is changes:
            return known
        seen = self._look(changes, person, now)
        self._views[provider, stream, person.index] = seen
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
        for owner in [owner for owner in self._views if owner[-1] == activity.owner]:
            del self._views[owner]
        return activity

    def _keep(self, activity: Activity) -> None:
        self._added.setdefault(activity.owner, {})[activity.key] = activity

    def _look(self, changes: Mapping[str, Change], person: Person, now: float) -> View:
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
                change = changes.get(str(activity.key), UNCHANGED) if changes else UNCHANGED
                if not change.deleted:
                    start = activity.start if change.start is None else change.start
                    moved = moved or change.start is not None
                    shown.append(Shown(start, activity, change))
        if moved or self._added.get(person.index):
            shown.sort(key=lambda one: (one.start, one.activity.key))
        return View(shown, begin, end, changes)
