"""Everything the sandbox is made of, put together: one clock, one memory, the people, and the providers."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

import lifelogger.sandbox
from lifelogger.sandbox.activities import Activities
from lifelogger.sandbox.changes import Changes
from lifelogger.sandbox.clock import Clock
from lifelogger.sandbox.faults import Faults
from lifelogger.sandbox.ledger import Ledger
from lifelogger.sandbox.people import People
from lifelogger.sandbox.provider import Provider
from lifelogger.sandbox.state import State, StateError

GROUP = "lifelogger.sandbox"
"""The entry points at which other packages register classes of providers."""
DEFAULT = "strava"
"""The provider that the control API means when it is told none."""


@cache
def found() -> Sequence[type[Provider]]:
    """The providers there are, by name: in the modules of this folder, and what other packages register."""
    classes: dict[str, type[Provider]] = {}
    for module in pkgutil.iter_modules(lifelogger.sandbox.__path__, f"{lifelogger.sandbox.__name__}."):
        if not module.name.endswith("__main__"):
            classes.update({each.name: each for each in providers_of(module.name)})
    classes.update({each.name: each for each in (entry.load() for entry in entry_points(group=GROUP))})
    return [classes[name] for name in sorted(classes)]


def providers_of(module: str) -> list[type[Provider]]:
    """The concrete providers that a module defines."""
    members = vars(importlib.import_module(module)).values()
    classes = [each for each in members if inspect.isclass(each) and issubclass(each, Provider)]
    return [each for each in classes if each.__module__ == module and not inspect.isabstract(each)]


class World:
    """The simulated world. Used from the event loop's thread alone once the server runs.

    With a state file it goes on where it was; its clock, too, unless one is given. Without `providers` it
    has those that are found.
    """

    def __init__(
        self,
        people: int = 36,
        seed: int = 1,
        history_days: int = 1825,
        state: Path | None = None,
        clock: Clock | None = None,
        providers: Sequence[type[Provider]] | None = None,
    ) -> None:
        self.state = State(state)
        try:
            self.clock = clock or self._clock()
            self.first_anchor = self.clock.anchor
            self.kind = {"people": people, "seed": seed, "history_days": history_days}
            self.origin = self._origin(state)
            self.people = People(seed, people, history_days, self.origin)
        except Exception:
            self.state.close()
            raise
        self.ledger = Ledger(self.state)
        self.changes = Changes(self.state)
        self.activities = Activities(self.state, self.people, self.changes)
        self.faults = Faults()
        self.providers: Mapping[str, Provider] = {
            make.name: make(self.state, self.clock, self.people, self.activities, self.ledger)
            for make in (found() if providers is None else providers)
        }

    def keep_clock(self) -> None:
        """Write the clock down, for a restart."""
        self.state.put("clock", self.clock.anchor)

    def reset(self) -> None:
        """Forget all that happened; the people are the same, and the clock is as it was at first."""
        self.faults.clear()
        self.state.clear()
        self.ledger.reset()
        self.changes.load()
        self.activities.load()
        for provider in self.providers.values():
            provider.load()
        self.clock.anchor = self.first_anchor
        self._remember()

    def close(self) -> None:
        self.state.close()

    def _clock(self) -> Clock:
        clock = Clock()
        begun, virtual, speed = self.state.get("clock", clock.anchor)
        clock.anchor = (begun, virtual, speed)
        return clock

    def _origin(self, path: Path | None) -> float:
        """The moment the world was made. Raises `StateError` when the file is about another world."""
        known = self.state.get("world")
        if known is None:
            self.origin = self.clock.now()
            self._remember()
        elif any(known[name] != value for name, value in self.kind.items()):
            was = ", ".join(f"{name.replace('_', ' ')} {known[name]}" for name in self.kind)
            raise StateError(f"{path}: made with {was}; start with the same, or delete it to start anew")
        else:
            self.origin = known["origin"]
        return self.origin

    def _remember(self) -> None:
        self.state.put("world", {**self.kind, "origin": self.origin})
