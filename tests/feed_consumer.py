"""A consumer of the change feed, as a host would write it: a copy and the cursor, committed together.

    python -m tests.feed_consumer COPY.db

follows the feed until it is killed.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from pathlib import Path

from lifelogger import client
from lifelogger.runtime import Runtime, runtime
from lifelogger.status import as_json

Copied = dict[tuple[str, str, str, str], str]
TABLES = """
CREATE TABLE IF NOT EXISTS cursor (one INTEGER PRIMARY KEY CHECK (one = 1), value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS copy (
    user_id TEXT, provider TEXT, stream TEXT, external_id TEXT, record TEXT,
    PRIMARY KEY (user_id, provider, stream, external_id)
);
"""


class Copy:
    """What a consumer keeps: all of it survives its death, or nothing of a page does."""

    def __init__(self, path: Path) -> None:
        self.db = sqlite3.connect(path, timeout=30)
        self.db.executescript(TABLES)

    @property
    def cursor(self) -> str:
        row = self.db.execute("SELECT value FROM cursor").fetchone()
        return str(row[0]) if row else ""

    def take(self, page: client.Changes) -> None:
        with self.db:
            for change in page.changes:
                self._apply(change)
            self.db.execute("INSERT OR REPLACE INTO cursor VALUES (1, ?)", (page.next,))

    def _apply(self, change: client.Change) -> None:
        key = tuple(change[name] for name in ("user_id", "provider", "stream", "external_id"))  # type: ignore[literal-required]
        if change["action"] == "erase":
            whose = "user_id = ? AND coalesce(?, provider) = provider"
            self.db.execute(f"DELETE FROM copy WHERE {whose}", key[:2])
        elif change["action"] == "delete":
            mine = "user_id = ? AND provider = ? AND stream = ? AND external_id = ?"
            self.db.execute(f"DELETE FROM copy WHERE {mine}", key)
        else:
            told = json.dumps(as_json(change["record"]), sort_keys=True)
            self.db.execute("INSERT OR REPLACE INTO copy VALUES (?, ?, ?, ?, ?)", (*key, told))

    def contents(self) -> Copied:
        return {row[:4]: row[4] for row in self.db.execute("SELECT * FROM copy")}


def follow(copy: Copy, rt: Runtime, limit: int = 20) -> bool:
    """Take one page; whether there was anything in it."""
    page = client.changes(copy.cursor, limit=limit, runtime=rt)
    copy.take(page)
    return bool(page.changes)


if __name__ == "__main__":
    mine, rt = Copy(Path(sys.argv[1])), runtime()
    print("following", flush=True)
    while True:
        if not follow(mine, rt):
            time.sleep(0.01)
