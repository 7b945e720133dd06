"""Everything the sandbox is made of, put together: one clock, one memory, the people, and the providers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from lifelogger.sandbox.activities import Activities
from lifelogger.sandbox.clock import Clock
from lifelogger.sandbox.faults import Faults
from lifelogger.sandbox.fitbit import Fitbit
from lifelogger.sandbox.ledger import Ledger
from lifelogger.sandbox.oura import Oura
from lifelogger.sandbox.people import People
from lifelogger.sandbox.provider import Provider
from lifelogger.sandbox.state import State, StateError
from lifelogger.sandbox.strava import Strava

PROVIDERS: tuple[Callable[..., Provider], ...] = (Strava, Fitbit, Oura)


class World:
    """The simulated world. Used from the event loop's thread alone once the server runs.

    With a state file it goes on where it was; its clock, too, unless one is given.
    """

    def __init__(
        self,
        people: int = 36,
        seed: int = 1,
        history_days: int = 1825,
        state: Path | None = None,
        clock: Clock | None = None,
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
        self.activities = Activities(self.state, self.people)
        self.faults = Faults()
        made = [make(self.state, self.clock, self.people, self.activities, self.ledger) for make in PROVIDERS]
        self.providers: Mapping[str, Provider] = {provider.name: provider for provider in made}

    def keep_clock(self) -> None:
        """Write the clock down, for a restart."""
        self.state.put("clock", self.clock.anchor)

    def reset(self) -> None:
        """Forget all that happened; the people are the same, and the clock is as it was at first."""
        self.faults.clear()
        self.state.clear()
        self.ledger.reset()
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
