"""How soon an upload can be read: webhooks with the real commands.

    make bench

Sandbox, web server, worker and periodiq are those of `lifelogger run`, on the embedded Redis and SQLite.
One person after the other uploads an activity; the time is from the upload to the answer of our API that has
it, asked every few milliseconds. It also tells what each upload cost in requests, by the sandbox's ledger.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import requests

UPLOADS = 30
SPARE = 2
"""`lifelogger run` leaves so many people for whoever wants to connect by hand."""
LOOK_SECONDS = 0.01
PATIENCE_SECONDS = 60.0
PLENTY = [100_000, 100_000]
"""Requests in each window: the first imports of so many people shall not wait for each other."""

SETTINGS = """
[sandbox]
port = {sandbox}
people = {people}

[web]
port = {web}

[sync]
history_days = 8

[providers.strava]
budget = ["100000/15 minutes", "100000/day"]
overall_budget = ["100000/15 minutes", "100000/day"]

[providers.fitbit]
enabled = false

[providers.oura]
enabled = false
"""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "settings.toml"
        file.write_text(
            SETTINGS.format(sandbox=free_port(), web=free_port(), people=UPLOADS + SPARE), encoding="utf-8"
        )
        os.environ["LIFELOGGER_SETTINGS"] = str(file)  # for the commands, too
        measure()


def measure() -> None:
    from lifelogger import api_keys, local, webhooks
    from lifelogger.client import request_sync
    from lifelogger.runtime import runtime
    from lifelogger.store.migrate import upgrade
    from lifelogger.supervisor import Tree

    rt = runtime()
    upgrade(rt.store)
    with Tree(lambda line: None).running() as tree:
        rt.redis.ping()
        for part in local.parts(rt.settings):
            tree.start(part)
        tree.wait_until_ready()
        control = requests.Session()
        at = f"{local.sandbox_url(rt.settings)}/control"
        pools = {"reads": PLENTY, "overall": PLENTY}
        control.post(f"{at}/limits", json={"provider": "strava", **pools}).raise_for_status()
        local.connect_people(rt, lambda line: None)
        webhooks.keep(rt, "strava")
        people = imported(rt, request_sync)

        program = requests.Session()
        program.headers["authorization"] = f"Bearer {api_keys.add(rt, 'bench', ['read:records'])}"
        waits, costs = [], []
        for person in people:
            before = ledger(control, at, person)
            begun = time.perf_counter()
            made = control.post(f"{at}/people/{person}/activities", json={}).json()["id"]
            address = f"{local.web_url(rt.settings)}/api/users/{person}/records"
            wait_for(lambda address=address, made=made: has(program, address, str(made)), "the upload")
            waits.append(time.perf_counter() - begun)
            wait_for(lambda person=person: idle(rt, person), "the end of the sync")
            costs.append(ledger(control, at, person) - before)
    waits.sort()
    print(
        f"python {sys.version.split()[0]}, embedded Redis and SQLite, {len(waits)} uploads of as many people"
    )
    print(f"readable through the API after {statistics.median(waits):.2f} s (median),", end=" ")
    print(f"{waits[int(len(waits) * 0.95)]:.2f} s (95 %), {waits[-1]:.2f} s (at most)")
    print(f"at the cost of {statistics.mean(costs):.2f} requests each")


def imported(rt: Any, ask: Any) -> list[str]:
    """Whoever is connected, once their first import is over."""
    from sqlalchemy import select

    from lifelogger.store.models import Connection

    with rt.store.read() as db:
        people = sorted(db.scalars(select(Connection.user_id)))
    for person in people:
        ask(person, runtime=rt)
    for person in people:
        wait_for(lambda person=person: idle(rt, person), f"the first import of {person}")
    return people


def idle(rt: Any, person: str) -> bool:
    """Whether a person was synced, and nothing is under way or known to be new."""
    from sqlalchemy import select

    from lifelogger.store.models import Connection

    with rt.store.read() as db:
        row = db.execute(select(Connection.__table__).where(Connection.user_id == person)).one()
    return row.last_sync_at is not None and row.claimed_at is None and row.news_at is None


def ledger(control: requests.Session, at: str, person: str) -> int:
    """How many requests there were about a person."""
    return len(control.get(f"{at}/ledger", params={"person": person}).json())


def has(program: requests.Session, address: str, key: str) -> bool:
    reply = program.get(address, params={"limit": 5})
    reply.raise_for_status()
    return any(each["external_id"] == key for each in reply.json())


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what} did not come within {PATIENCE_SECONDS:.0f} s")
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    main()
