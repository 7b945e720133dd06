"""A provider that does nothing but count, by its own windows and its own clock, and workers that ask it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lifelogger.budget import Budget, BudgetSpent, Pool, Usage


class Clock:
    """Ours, turned by the test; the provider's is `ahead` of it."""

    def __init__(self, now: datetime, ahead: timedelta = timedelta(0)) -> None:
        self.now = now.timestamp()
        self.ahead = ahead

    def __call__(self) -> float:
        return self.now

    def datetime(self) -> datetime:
        return datetime.fromtimestamp(self.now, UTC)

    def set(self, now: datetime) -> None:
        self.now = now.timestamp()

    def forward(self, seconds: float) -> None:
        self.now += seconds

    def date(self) -> datetime:
        """The header `Date` of a reply that is written now."""
        return (self.datetime() + self.ahead).replace(microsecond=0)


class WallClock(Clock):
    def __init__(self, ahead: float) -> None:
        self.ahead = timedelta(seconds=ahead)

    def __call__(self) -> float:
        return time.time()

    def datetime(self) -> datetime:
        return datetime.now(UTC)


class Provider:
    """Counts every request in each `(seconds, limit)` window; what it refuses counts as well."""

    def __init__(self, *windows: tuple[int, int], clock: Clock) -> None:
        self.windows, self.clock = windows, clock
        self.counts: dict[int, Counter[int]] = {seconds: Counter() for seconds, _ in windows}
        self.excused: Counter[tuple[int, int]] = Counter()
        self.total = 0
        self._lock = threading.Lock()

    def request(self, probe: bool = False) -> Usage:
        """Count one request; return what the reply's headers would say.

        A probe may be one too many: that is how one learns it.
        """
        with self._lock:
            self.total += 1
            now = int(self.clock() + self.clock.ahead.total_seconds())
            for seconds, limit in self.windows:
                start = now - now % seconds
                self.counts[seconds][start] += 1
                if probe and self.counts[seconds][start] > limit:
                    self.excused[seconds, start] += 1
            return Usage(
                tuple(limit for _, limit in self.windows),
                tuple(self.counts[seconds][now - now % seconds] for seconds, _ in self.windows),
            )

    def excess(self) -> dict[tuple[int, int], int]:
        """Every window with more requests than its limit, and how many it has."""
        return {
            (seconds, start): number
            for seconds, limit in self.windows
            for start, number in self.counts[seconds].items()
            if number - self.excused[seconds, start] > limit
        }


@contextmanager
def served(windows: Sequence[tuple[int, int]], ahead: float, last: int) -> Iterator[tuple[Provider, str]]:
    """A `Provider` over HTTP that says `over` once it has seen `last` of its shortest windows."""
    provider = Provider(*windows, clock=WallClock(ahead))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(random.uniform(0, 0.01))  # so that requests overtake each other ...
            usage = provider.request()
            date = provider.clock.date()
            time.sleep(random.uniform(0, 0.01))  # ... and so do replies
            over = len(provider.counts[min(provider.counts)]) >= last
            reply = {"limits": usage.limits, "used": usage.used, "date": date.timestamp(), "over": over}
            body = json.dumps(reply).encode()
            self.send_response_only(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield provider, f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def hammer(
    redis_url: str, address: str, windows: Sequence[tuple[int, int]], *, processes: int, threads: int
) -> list[dict[str, int]]:
    """Worker processes that ask as fast as the budget lets them; what each of them did."""
    call = json.dumps(
        [redis_url, address, [f"{limit}/{seconds} seconds" for seconds, limit in windows], threads]
    )
    root = Path(__file__).parents[1]
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.budget_provider", call], stdout=subprocess.PIPE, cwd=root
        )
        for _ in range(processes)
    ]
    try:
        outputs = [worker.communicate(timeout=40)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return [json.loads(output) for output in outputs]


def work(redis_url: str, address: str, limits: Sequence[str], threads: int) -> dict[str, int]:
    """One process: threads that send as long as the provider wants to go on."""
    budget = Budget(redis_url)
    pool = Pool("reads", "strava:7:reads", tuple(limits), reports=True)
    over = threading.Event()
    done: Counter[str] = Counter()

    def one(_: int) -> None:
        while not over.is_set():
            try:
                ticket = budget.take([pool])
            except BudgetSpent:
                done["refused"] += 1
                over.wait(0.005)
                continue
            done["sent"] += 1
            with urllib.request.urlopen(address, timeout=30) as response:
                reply: dict[str, Any] = json.load(response)
            usage = Usage(tuple(reply["limits"]), tuple(reply["used"]))
            budget.settle(ticket, usage={"reads": usage}, date=datetime.fromtimestamp(reply["date"], UTC))
            if reply["over"]:
                over.set()

    with ThreadPoolExecutor(threads) as pool_of_threads:
        list(pool_of_threads.map(one, range(threads)))
    return done


if __name__ == "__main__":
    print(json.dumps(work(*json.loads(sys.argv[1]))))
