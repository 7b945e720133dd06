"""What was done by hand to items of a provider's lists: edited, replaced, deleted, and brought back.

One memory for all providers and their streams. It knows items as JSON and by their keys, and no more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lifelogger.sandbox.people import Person
from lifelogger.sandbox.state import State

Path = tuple[str, ...]
"""Where in an item something is: names of objects within each other."""
ABSENT: Any = object()


class Edit(NamedTuple):
    """What an item says at a path; or that it says nothing there."""

    path: Path
    value: Any = ABSENT

    def apply(self, item: Any) -> Any:
        """The item as it is then; the one that was given stays as it is."""
        return without(item, self.path) if self.value is ABSENT else filled(item, self.path, self.value)


@dataclass(frozen=True, slots=True)
class Change:
    """All that was done to one item."""

    version: int = 0
    edits: tuple[Edit, ...] = ()
    """One after the other."""
    raw: str | None = None
    """JSON that is served in place of the item, whatever it is."""
    start: int | None = None
    """When an activity started after all, in epoch seconds."""
    deleted: bool = False

    def apply(self, item: Any) -> Any:
        """An item as it is now."""
        return self.edited(item) if self.raw is None else json.loads(self.raw)

    def edited(self, item: Any) -> Any:
        for edit in self.edits:
            item = edit.apply(item)
        return item


UNCHANGED = Change()
NOTHING: Mapping[str, Change] = {}


class Changes:
    """Changes by provider, stream, person and key."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.load()

    def load(self) -> None:
        """Take up what the state knows, and forget everything else."""
        self._known: dict[tuple[str, str, str], Mapping[str, Change]] = {}
        for *owner, key, version, edits, raw, start, deleted in self.state.db.execute(
            "SELECT * FROM changes"
        ):
            made = tuple(Edit(tuple(path), *value) for path, *value in json.loads(edits))
            change = Change(version, made, raw, start, bool(deleted))
            self._keep((owner[0], owner[1], owner[2]), key, change)

    def of(self, provider: str, stream: str, person: Person) -> Mapping[str, Change]:
        """The changes of a stream, by the keys of its items; another object after each change."""
        return self._known.get((provider, stream, person.user_id), NOTHING)

    def change(
        self, provider: str, stream: str, person: Person, key: str, edits: Sequence[Edit] = (), **values: Any
    ) -> Change:
        """Change an item further: `values` are fields of `Change`. Belongs into a transaction."""
        before = self.of(provider, stream, person).get(key, UNCHANGED)
        kept = [old for old in before.edits if not any(covers(new, old) for new in edits)]
        after = replace(before, version=before.version + 1, edits=(*kept, *edits), **values)
        owner = (provider, stream, person.user_id)
        made = [[edit.path] if edit.value is ABSENT else edit for edit in after.edits]
        self.state.db.execute(
            "INSERT OR REPLACE INTO changes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*owner, key, after.version, json.dumps(made), after.raw, after.start, after.deleted),
        )
        self._keep(owner, key, after)
        return after

    def _keep(self, owner: tuple[str, str, str], key: str, change: Change) -> None:
        self._known[owner] = {**self._known.get(owner, NOTHING), key: change}


def merged(fields: Mapping[str, Any], path: Path = ()) -> Iterator[Edit]:
    """The edits that merge fields into an item: object by object, so that the rest of each stays."""
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            yield from merged(value, (*path, name))
        else:
            yield Edit((*path, name), value)


def removed(words: Iterable[str], path: Path = ()) -> Iterator[Edit]:
    """The edits that take away what these words name, like `summary.minutes`."""
    return (Edit((*path, *word.split("."))) for word in words)


def covers(new: Edit, old: Edit) -> bool:
    """Whether nothing is left of an edit after another one."""
    return old.path[: len(new.path)] == new.path


def filled(item: Any, path: Path, value: Any) -> Any:
    """An item with a value at a path; what is no object on the way there becomes one."""
    name, *rest = path
    within = item if isinstance(item, dict) else {}
    return {**within, name: filled(within.get(name), tuple(rest), value) if rest else value}


def without(item: Any, path: Path) -> Any:
    name, *rest = path
    if not isinstance(item, dict) or name not in item:
        return item
    if rest:
        return {**item, name: without(item[name], tuple(rest))}
    return {other: value for other, value in item.items() if other != name}
