"""The referee: every request a simulated provider got, and how much of which window was used.

What it says needs no trust in the client under test. It holds no secret: parameters that can carry
one are masked, bodies are not kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from typing import Any
from urllib.parse import urlencode

from lifelogger.sandbox.state import State

SECRETS = frozenset({"access_token", "client_secret", "code", "refresh_token", "state", "token"})

READ, TOKEN, PAGE, OTHER = "read", "token", "page", "other"
"""Kinds of request: data asked for, tokens handled, what a person's browser sees, anything else."""

USED_TWICE = "refresh token used twice"


@dataclass(slots=True, eq=False)
class Entry:
    """One request. Times are epoch seconds: `at` on the sandbox's clock, the other two real."""

    id: int
    provider: str
    client: str | None
    """The application's client id; None when nothing told it."""
    person: str | None
    """The `user_id` of whose token it was."""
    kind: str
    route: str
    """`GET /activities/{id}`; empty when the provider has no such route."""
    method: str
    path: str
    query: str
    status: int
    """0 when the client had gone before it was answered."""
    at: float
    started: float
    ended: float
    usage: str = ""
    """Used of each window after it, as its reply's headers said."""
    note: str = ""
    """What was wrong with it, in words; empty for a request that is as it should be."""


COLUMNS = [column.name for column in fields(Entry)]
_INSERT = f"INSERT INTO ledger VALUES (NULL, {', '.join('?' * (len(COLUMNS) - 1))})"


def masked(query: Iterable[tuple[str, str]]) -> str:
    """A query string without its secrets."""
    return urlencode([(name, "***" if name in SECRETS else value) for name, value in query], safe="*:,")


@dataclass
class Ledger:
    """Entries and window counts in the state; requests that are still open beside them."""

    state: State
    open: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._usage: dict[tuple[str, int, int], int] = {
            (pool, seconds, start): count
            for pool, seconds, start, count in self.state.db.execute("SELECT * FROM usage")
        }

    def begin(self, entry: Entry) -> None:
        self.open.append(entry)

    def end(self, entry: Entry, ended: float) -> None:
        """Write an answered (or abandoned) request down. Belongs into a transaction."""
        entry.ended = ended
        if entry not in self.open:
            return  # everything was forgotten while it was open
        self.open.remove(entry)
        entry.id = self.state.db.execute(_INSERT, astuple(entry)[1:]).lastrowid or 0

    def spend(self, pool: str, seconds: int, now: float, number: int = 1) -> int:
        """Count into the window of `now`; return what is used of it. Belongs into a transaction."""
        key = (pool, seconds, window(now, seconds))
        count = self._usage[key] = self._usage.get(key, 0) + number
        self.state.db.execute("INSERT OR REPLACE INTO usage VALUES (?, ?, ?, ?)", (*key, count))
        return count

    def used(self, pool: str, seconds: int, now: float) -> int:
        return self._usage.get((pool, seconds, window(now, seconds)), 0)

    def windows(self) -> list[tuple[str, int, int, int]]:
        """Pool, length in seconds, start (epoch seconds) and count of every window that was used, as the
        provider counted: refused requests and those of other processes are in it."""
        return sorted((*key, count) for key, count in self._usage.items())

    def requests(
        self,
        *,
        after: int = 0,
        limit: int = 100_000,
        statuses: Sequence[int] = (),
        **equal: str | None,
    ) -> list[Entry]:
        """Ended requests, oldest first. `equal` names columns; `after` is an entry's id."""
        for column in equal:
            _check(column)
        where = ["id > ?", *(f"{column} IS ?" for column in equal)]
        values: list[str | int | None] = [after, *equal.values()]
        if statuses:
            where.append(f"status IN ({', '.join('?' * len(statuses))})")
            values += statuses
        sql = f"SELECT * FROM ledger WHERE {' AND '.join(where)} ORDER BY id LIMIT ?"
        return [Entry(*row) for row in self.state.db.execute(sql, (*values, limit))]

    def most_at_once(self, kind: str = READ) -> dict[str, int]:
        """For each person the most requests that were ever open at the same time, over all providers."""
        changes = []
        for entry in self._spans(kind):
            changes += [(entry.started, 1, entry.person or ""), (entry.ended, -1, entry.person or "")]
        running: dict[str, int] = {}
        most: dict[str, int] = {}
        for _, change, person in sorted(changes):  # at one instant an end comes before a beginning
            running[person] = running.get(person, 0) + change
            most[person] = max(most.get(person, 0), running[person])
        return most

    def overlaps(self, kind: str = READ) -> list[tuple[Entry, Entry]]:
        """Pairs of requests of one person at one provider that were open at the same time."""
        running: dict[tuple[str, str | None], list[Entry]] = {}
        found: list[tuple[Entry, Entry]] = []
        for entry in sorted(self._spans(kind), key=lambda entry: entry.started):
            owner = (entry.provider, entry.person)
            still = [before for before in running.get(owner, ()) if before.ended > entry.started]
            found += [(before, entry) for before in still]
            running[owner] = [*still, entry]
        return found

    def counts(self, column: str) -> dict[str, int]:
        """How many requests there were by one column, `status` for example."""
        _check(column)
        rows: Iterable[tuple[Any, int]] = self.state.db.execute(
            f"SELECT {column}, count(*) FROM ledger GROUP BY {column}"
        )
        return {str(value): count for value, count in rows}

    def reset(self) -> None:
        """Start anew after the state was cleared."""
        self._usage.clear()
        self.open.clear()

    def _spans(self, kind: str) -> list[Entry]:
        """Requests of this kind whose person is known; one that is still open has no end yet."""
        running = [replace(entry, ended=math.inf) for entry in self.open if entry.kind == kind]
        ended = self.requests(limit=-1, kind=kind)
        return [entry for entry in ended + running if entry.person is not None]


def _check(column: str) -> None:
    if column not in COLUMNS:
        raise ValueError(f"no column {column!r}: one of {', '.join(COLUMNS)}")


def window(now: float, seconds: int) -> int:
    """The start of the clock-aligned window that `now` lies in."""
    return int(now // seconds) * seconds
