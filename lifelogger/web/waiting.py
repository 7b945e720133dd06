"""Waiting for the change feed, cheaply: no thread and no transaction is held, and one look serves all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from starlette.concurrency import run_in_threadpool

EVERY_SECONDS = 0.25
"""How often the database is asked for its newest change while somebody waits, however many do."""
MOST_WAITING = 200
"""Requests that may wait at once; one more is answered at once, as if it had not asked to wait."""


class Watch:
    """The number of the newest change, as of a moment ago."""

    def __init__(self, newest: Callable[[], int]) -> None:
        self._newest = newest
        self._found = 0
        self._asked_at = 0.0
        self.waiting = 0

    async def passed(self, number: int, until: float) -> bool:
        """Wait for a change behind `number`, but not longer than to the monotonic time `until`."""
        if self.waiting >= MOST_WAITING:
            return False
        self.waiting += 1
        try:
            while time.monotonic() < until:
                if await self._look() > number:
                    return True
                await asyncio.sleep(EVERY_SECONDS)
            return False
        finally:
            self.waiting -= 1

    async def _look(self) -> int:
        now = time.monotonic()
        if now - self._asked_at >= EVERY_SECONDS:
            self._asked_at = now  # who comes while this one asks is content with what was found before
            self._found = await run_in_threadpool(self._newest)
        return self._found
