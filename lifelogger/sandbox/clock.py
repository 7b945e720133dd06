"""The time in the sandbox: the real one, or one that is set, stepped, frozen or runs fast.

One clock for everything simulated: what people have done by now, when tokens expire, in which
window a request counts, the `Date` of a reply. It knows nothing of any of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

Anchor = tuple[float, float, float]
"""A real moment, the virtual moment it stands for (both epoch seconds) and the speed from there on."""

REAL: Anchor = (0.0, 0.0, 1.0)


class Clock:
    """A virtual clock, by default the real one.

    It is a straight line through an anchor, so it can be written down and taken up again: what a
    restart takes passes for the people too, unless the clock is frozen.
    """

    def __init__(self, real: Callable[[], float] = time.time) -> None:
        self.real = real
        self.anchor: Anchor = REAL

    def now(self) -> float:
        """Epoch seconds."""
        begun, virtual, speed = self.anchor
        return virtual + (self.real() - begun) * speed

    @property
    def speed(self) -> float:
        """Virtual seconds in a real one; 0 is frozen."""
        return self.anchor[2]

    def set(self, moment: float) -> None:
        """Jump to a moment, forwards or backwards, at the speed it has."""
        self.anchor = (self.real(), moment, self.speed)

    def step(self, seconds: float) -> None:
        self.set(self.now() + seconds)

    def run(self, speed: float) -> None:
        """Go on from now at this speed. Raises ValueError when that is backwards."""
        if speed < 0:
            raise ValueError(f"speed {speed}: a clock does not run backwards; set it instead")
        self.anchor = (self.real(), self.now(), speed)

    def freeze(self, moment: float) -> None:
        """Stand still at exactly this moment."""
        self.anchor = (self.real(), moment, 0.0)

    def follow_real_time(self) -> None:
        self.anchor = REAL
