"""Bringing a database to the tables of this version, with Alembic."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from lifelogger.store.engine import Store

FOLDER = Path(__file__).parent / "migrations"
LOCK = 0x6C6966656C6F67  # "lifelog": two processes that start together migrate one after the other


def upgrade(store: Store, revision: str = "head") -> None:
    """Bring the tables up to `revision`, unless they are. Safe to call from several processes at once."""
    current, newest = revisions(store)
    if current is not None and current in (revision, newest):
        return
    run(store, lambda config: command.upgrade(config, revision))


def downgrade(store: Store, revision: str) -> None:
    """Take migrations back down to `revision` (`base`: no tables)."""
    run(store, lambda config: command.downgrade(config, revision))


def run(store: Store, action: object) -> None:
    config = Config()
    config.set_main_option("script_location", str(FOLDER))
    with store.write() as connection:
        if not store.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
        config.attributes["connection"] = connection
        action(config)  # type: ignore[operator]


def revisions(store: Store) -> tuple[str | None, str | None]:
    """The revision that the database is at, and the newest one."""
    config = Config()
    config.set_main_option("script_location", str(FOLDER))
    with store.read() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
    return current, ScriptDirectory.from_config(config).get_current_head()
