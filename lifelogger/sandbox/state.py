"""What the sandbox remembers: one SQLite database, in memory or in a file that survives a restart.

Tokens, changed items, used-up windows and the ledger are here; people's lives are not, they
are computed from the seed. Used from the event loop's thread alone.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

VERSION = 2

CHANGES = """
CREATE TABLE changes (
    provider TEXT NOT NULL, stream TEXT NOT NULL, person TEXT NOT NULL, key TEXT NOT NULL,
    version INTEGER NOT NULL, edits TEXT NOT NULL, raw TEXT, start INTEGER, deleted INTEGER NOT NULL,
    PRIMARY KEY (provider, stream, person, key)
) WITHOUT ROWID;
"""

SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE grants (
    id INTEGER PRIMARY KEY, provider TEXT NOT NULL, client TEXT NOT NULL, person TEXT NOT NULL,
    scopes TEXT NOT NULL, created REAL NOT NULL, revoked REAL
);
CREATE INDEX grants_by_person ON grants (person, provider);
CREATE TABLE tokens (
    token TEXT PRIMARY KEY, grant_id INTEGER NOT NULL REFERENCES grants (id), kind TEXT NOT NULL,
    expires_at INTEGER, replaced REAL
) WITHOUT ROWID;
CREATE INDEX tokens_by_grant ON tokens (grant_id);
CREATE TABLE codes (
    code TEXT PRIMARY KEY, provider TEXT NOT NULL, client TEXT NOT NULL, person TEXT NOT NULL,
    scopes TEXT NOT NULL, redirect_uri TEXT NOT NULL, expires_at REAL NOT NULL, used REAL
) WITHOUT ROWID;
CREATE TABLE added (key INTEGER PRIMARY KEY, person TEXT NOT NULL, activity TEXT NOT NULL);
{CHANGES}CREATE TABLE usage (
    pool TEXT NOT NULL, seconds INTEGER NOT NULL, start INTEGER NOT NULL, count INTEGER NOT NULL,
    PRIMARY KEY (pool, seconds, start)
) WITHOUT ROWID;
CREATE TABLE ledger (
    id INTEGER PRIMARY KEY, provider TEXT NOT NULL, client TEXT, person TEXT, kind TEXT NOT NULL,
    route TEXT NOT NULL, method TEXT NOT NULL, path TEXT NOT NULL, query TEXT NOT NULL,
    status INTEGER NOT NULL, at REAL NOT NULL, started REAL NOT NULL, ended REAL NOT NULL,
    usage TEXT NOT NULL, note TEXT NOT NULL
);
CREATE INDEX ledger_by_person ON ledger (person, id);
"""

TABLES = ("grants", "tokens", "codes", "added", "changes", "usage", "ledger", "meta")
KEPT_LEDGER_ROWS = 1_000_000


class StateError(Exception):
    """The state file cannot be used as asked; the message says why and what to do."""


class State:
    """The database, and a few named values in it. `with state:` is one transaction."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        try:
            self.db = sqlite3.connect(path or ":memory:", check_same_thread=False, timeout=1)
        except sqlite3.OperationalError as error:
            raise StateError(f"{path}: {error}") from error
        try:
            # One process owns the file. Its writes survive the process, and need not survive the machine.
            self.db.executescript(
                "PRAGMA locking_mode=EXCLUSIVE; PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF;"
            )
            self._prepare()
        except sqlite3.OperationalError as error:
            self.db.close()
            raise StateError(f"{path}: {error}; is another sandbox using it?") from error
        except (sqlite3.DatabaseError, StateError) as error:
            self.db.close()
            raise StateError(f"{path}: {error}") from error

    def _prepare(self) -> None:
        (version,) = self.db.execute("PRAGMA user_version").fetchone()
        if version == 1:  # its changes were of activities alone, by another key: those are forgotten
            self.db.executescript(
                f"BEGIN IMMEDIATE; DROP TABLE changes; {CHANGES} PRAGMA user_version={VERSION}; COMMIT;"
            )
            version = VERSION
        if version not in (0, VERSION):
            raise StateError("made by another version of the sandbox; delete it to start anew")
        if not version:
            self.db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version={VERSION}; COMMIT;")
        with self.db:
            self.db.execute(
                "DELETE FROM ledger WHERE id <= (SELECT max(id) FROM ledger) - ?", (KEPT_LEDGER_ROWS,)
            )

    def __enter__(self) -> sqlite3.Connection:
        return self.db.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.db.__exit__(*error)

    def get(self, key: str, default: Any = None) -> Any:
        """A named value (anything JSON), or `default`."""
        row = self.db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else default

    def put(self, key: str, value: Any) -> None:
        with self.db:
            self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    def clear(self) -> None:
        """Forget everything."""
        with self.db:
            for table in TABLES:
                self.db.execute(f"DELETE FROM {table}")

    def close(self) -> None:
        self.db.close()
