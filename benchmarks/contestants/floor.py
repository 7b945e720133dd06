"""The floor: bare threads that do the same requests and write the same rows. No queue, no lock, no budget.

    python floor.py THREADS     prints `ready`; reads a line of users, syncs them all, again and again

Whoever wants more than this (one sync at a time, a budget, a restart that loses nothing) pays for it, and
the benchmark tells how much. psycopg without SQLAlchemy, prepared statements, a connection to the database
and one to the provider for each thread.
"""

from __future__ import annotations

import sys
import threading
from queue import Empty, SimpleQueue

import plain
import psycopg

NAMES = [
    "external_id", "kind", "ordered_at", "start_at", "end_at", "utc_offset_s", "local_date", "type",
    "provider_type", "title", "duration_s", "moving_s", "distance_m", "elevation_gain_m",
    "heart_rate_avg_bpm", "heart_rate_max_bpm", "raw", "digest",
]  # fmt: skip
FIND = """
    SELECT c.id, c.access_token, s.cursor FROM connections c
    LEFT JOIN streams s ON s.connection_id = c.id AND s.name = 'activities' WHERE c.user_id = %s
"""
UPSERT = f"""
    INSERT INTO records (connection_id, stream, created_at, updated_at, {", ".join(NAMES)})
    VALUES (%(connection_id)s, 'activities', %(now)s, %(now)s, {", ".join(f"%({name})s" for name in NAMES)})
    ON CONFLICT (connection_id, stream, external_id) DO UPDATE
    SET {", ".join(f"{name} = excluded.{name}" for name in NAMES if name != "external_id")}
    WHERE records.digest IS DISTINCT FROM excluded.digest
"""
ADVANCE = """
    INSERT INTO streams (connection_id, name, cursor) VALUES (%s, 'activities', %s)
    ON CONFLICT (connection_id, name) DO UPDATE SET cursor = excluded.cursor
"""
JOURNAL = """
    INSERT INTO sync_runs (connection_id, trigger, outcome, started_at, ended_at,
                           requests, inserted, updated, deleted, quarantined)
    VALUES (%s, 'tick', 'ok', %s, %s, %s, %s, 0, 0, 0)
"""
NEXT = """
    UPDATE connections SET last_sync_at = %s, next_sync_at = %s + interval '15 minutes', claimed_at = NULL,
                           updated_at = %s WHERE id = %s
"""


def sync(db: psycopg.Connection, user_id: str) -> None:
    began = plain.now()
    connection_id, sealed, cursor = db.execute(FIND, [user_id]).fetchone()
    requests, inserted = 0, 0
    for page in plain.pages(sealed.decode(), cursor):
        requests += 1
        rows = [{**plain.columns(each), "connection_id": connection_id, "now": began} for each in page]
        with db.transaction(), db.cursor() as at:
            at.executemany(UPSERT, rows)
            inserted += at.rowcount
            db.execute(ADVANCE, [connection_id, began])
    now = plain.now()
    with db.transaction():
        db.execute(JOURNAL, [connection_id, began, now, requests, inserted])
        db.execute(NEXT, [now, now, now, connection_id])


def serve(users: SimpleQueue[str]) -> None:
    with psycopg.connect(plain.DATABASE, autocommit=True) as db:
        while True:
            try:
                user_id = users.get_nowait()
            except Empty:
                return
            sync(db, user_id)


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        users: SimpleQueue[str] = SimpleQueue()
        for user_id in line.split():
            users.put(user_id)
        threads = [threading.Thread(target=serve, args=[users]) for _ in range(int(sys.argv[1]))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
