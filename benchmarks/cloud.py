"""A provider that costs next to nothing: pages of activities as Strava shows them, rendered once.

The sandbox writes a ledger and counts budgets, which takes longer than the clients that are measured here.
This one answers with bytes that it has kept, after a delay that is set while it runs, so that what limits a
contestant is the contestant.

    GET /athlete/activities?per_page=&page=[&before=]    one and the same list for every token
    GET /control?delay=SECONDS                           sets the delay, and forgets what was counted
    GET /counted                                         how many lists were asked for, and when the first was
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from email.utils import formatdate
from typing import Any
from urllib.parse import parse_qsl

ACTIVITIES = 100
"""Of each person: one page and the empty one that ends the list."""
APART = 2.5 * 86400
"""Seconds between two of them: three lie in the look-back of seven days."""
LIMITS = "10000000,100000000"
"""What the budget headers tell: nobody is ever refused."""
POLYLINE = (
    "ki{eFvqfiVqAWQIGEEKAYJgBVqDJ{BHa@jAkNJw@Pw@V{APs@^aABQAOEQGKoJ_FuJkFqAo@{A}@sH{DiAs@Q]?"
    "WVy@`@oBt@_CB]KYMMkB{AQEI@WT{BlE{@zAQPI@ICsCqA"
)


def activity(number: int, now: float) -> dict[str, Any]:
    """A `SummaryActivity`, the newest with number 0, in the shape and size that Strava's have."""
    begins = int(now - 3600 - number * APART)
    distance = 5000 + (number * 137) % 9000
    return {
        "resource_state": 2,
        "athlete": {"id": 134815, "resource_state": 1},
        "name": f"Morning Run {number}",
        "distance": distance + 0.5,
        "moving_time": distance // 3,
        "elapsed_time": distance // 3 + 60,
        "total_elevation_gain": number % 300,
        "type": "Run",
        "sport_type": "Run",
        "workout_type": None,
        "id": 154504250376823 + 1000 - number,
        "external_id": f"garmin_push_{number}",
        "upload_id": 987654321234567891234 + number,
        "start_date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(begins)),
        "start_date_local": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(begins - 25200)),
        "timezone": "(GMT-08:00) America/Los_Angeles",
        "utc_offset": -25200,
        "location_city": None,
        "location_state": None,
        "location_country": "United States",
        "achievement_count": 0,
        "kudos_count": number % 7,
        "comment_count": 1,
        "athlete_count": 1,
        "photo_count": 0,
        "map": {"id": f"a{number}", "summary_polyline": POLYLINE, "resource_state": 2},
        "trainer": False,
        "commute": False,
        "manual": False,
        "private": False,
        "visibility": "everyone",
        "flagged": False,
        "gear_id": "b12345678987654321",
        "from_accepted_tag": False,
        "start_latlng": [37.83, -122.26],
        "end_latlng": [37.83, -122.27],
        "average_speed": 3.03,
        "max_speed": 5.4,
        "average_cadence": 86.6,
        "has_heartrate": True,
        "average_heartrate": 140.3,
        "max_heartrate": 178,
        "heartrate_opt_out": False,
        "display_hide_heartrate_option": True,
        "elev_high": 102.4,
        "elev_low": 11.2,
        "upload_id_str": str(987654321234567891234 + number),
        "pr_count": 0,
        "total_photo_count": 1,
        "has_kudoed": False,
    }


class Cloud:
    """What it knows: the list, newest first, and what was counted."""

    def __init__(self) -> None:
        now = time.time()
        found = [activity(number, now) for number in range(ACTIVITIES)]
        self.starts = [int(now - 3600 - number * APART) for number in range(ACTIVITIES)]
        self.items = [json.dumps(each, separators=(",", ":")) for each in found]
        self.bodies: dict[str, bytes] = {}
        self.delay = 0.0
        self.requests, self.first = 0, 0.0

    def answer(self, target: str) -> tuple[bytes, float]:
        """The body for a request's target, and after how many seconds it goes out."""
        path, _, query = target.partition("?")
        if path == "/athlete/activities":
            self.first = self.first or time.time()
            self.requests += 1
            if query not in self.bodies:
                self.bodies[query] = self.page(dict(parse_qsl(query)))
            return self.bodies[query], self.delay
        if path == "/control":
            self.delay = float(dict(parse_qsl(query))["delay"])
            self.requests, self.first = 0, 0.0
        return json.dumps({"requests": self.requests, "first": self.first, "delay": self.delay}).encode(), 0

    def page(self, asked: dict[str, str]) -> bytes:
        before = float(asked.get("before", "inf"))
        below = [item for item, start in zip(self.items, self.starts, strict=True) if start < before]
        size = int(asked.get("per_page", 30))
        start = size * (int(asked.get("page", 1)) - 1)
        return f"[{','.join(below[start : start + size])}]".encode()


class Connection(asyncio.Protocol):
    """HTTP/1.1 with connections that stay open; of a request only its first line matters."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud, self.received = cloud, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        while b"\r\n\r\n" in self.received:
            head, _, self.received = self.received.partition(b"\r\n\r\n")
            body, delay = self.cloud.answer(head.split(b" ", 2)[1].decode())
            if delay:
                asyncio.get_running_loop().call_later(delay, self.reply, body)
            else:
                self.reply(body)

    def reply(self, body: bytes) -> None:
        used = f"{self.cloud.requests},{self.cloud.requests}"
        head = (
            f"HTTP/1.1 200 OK\r\nDate: {formatdate(usegmt=True)}\r\nContent-Type: application/json\r\n"
            f"X-RateLimit-Limit: {LIMITS}\r\nX-RateLimit-Usage: {used}\r\n"
            f"X-ReadRateLimit-Limit: {LIMITS}\r\nX-ReadRateLimit-Usage: {used}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self.transport.write(head.encode() + body)


async def main() -> None:
    cloud = Cloud()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(cloud), "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until our parent is gone


if __name__ == "__main__":
    asyncio.run(main())
